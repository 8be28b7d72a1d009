"""Studies made with the package."""
