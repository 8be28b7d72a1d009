"""Forty tasks, trained with every method."""
