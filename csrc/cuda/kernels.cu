// The kernels by name. Rows: a slot is 16 bytes of one channel. Columns: 16 bytes of as many channels. Scalar: one
// element, for either family, where 16-byte accesses would be misaligned.
#include "backward.cuh"
#include "forward.cuh"

#define TSBN_KERNEL(pass, blocks, name, T, V, CH)                               \
  extern "C" __global__ void __launch_bounds__(tsbn::cuda::kThreads, blocks)    \
      tsbn_##pass##_##name(const __grid_constant__ tsbn::cuda::Params p) {      \
    tsbn::cuda::pass<T, V, CH>(p);                                              \
  }
#define TSBN_PAIR(name, T, V, CH)                                               \
  TSBN_KERNEL(forward, tsbn::cuda::kForwardBlocks - (sizeof(T) == 8), name, T, V, CH)              \
  TSBN_KERNEL(backward, tsbn::cuda::kBackwardBlocks, name, T, V, CH)
#define TSBN_KERNELS(dtype, T)                                                  \
  TSBN_PAIR(dtype##_rows, T, 16 / sizeof(T), 1)                                 \
  TSBN_PAIR(dtype##_columns, T, 16 / sizeof(T), 16 / sizeof(T))                 \
  TSBN_PAIR(dtype##_scalar, T, 1, 1)

TSBN_KERNELS(f32, float)
TSBN_KERNELS(f64, double)
TSBN_KERNELS(f16, __half)
TSBN_KERNELS(bf16, __nv_bfloat16)
