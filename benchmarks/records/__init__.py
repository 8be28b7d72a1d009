"""What was measured, as data: this room imports no other, and no PyTorch."""
