"""What only a GPU can show, as far as it can be shown on the CPU; each file also shows that it finds what is wrong."""
