"""Every Triton kernel that known networks ask for, compiled for every kind of GPU."""
