"""What kernels take: profiled, predicted, or as the compilers say."""
