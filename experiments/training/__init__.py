"""What every training study shares: methods, runs that go on where they were killed, and what they say together."""
