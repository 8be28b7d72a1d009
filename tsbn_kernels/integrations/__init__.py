"""Adapters for other libraries; each module needs its library, the package itself needs none of them."""
