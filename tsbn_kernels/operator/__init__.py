"""The operators: their schemas, checks, gradients and transforms."""
