"""Layers by every implementation, verified and measured."""
