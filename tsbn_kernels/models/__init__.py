"""What is done to whole networks."""
