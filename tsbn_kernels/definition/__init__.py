"""What is computed: the normalisation in plain PyTorch, its activations, and how a stack of tasks is laid out."""
