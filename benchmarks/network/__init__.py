"""A training step of a whole network, verified and measured."""
