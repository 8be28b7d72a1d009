// The kernels of layer normalisation by name. Vector: a slot is 16 bytes of a row. Scalar: one element, where rows do not
// begin at multiples of 16 bytes.
#include "layer_norm.cuh"

namespace tsbn::cuda {
template <class T> constexpr int forward_threads() { return sizeof(T) == 8 ? kRowThreads : kRowForwardThreads; }
}  // namespace tsbn::cuda

#define TSBN_ROW_KERNEL(pass, threads, dtype, T, access, V)                               \
  extern "C" __global__ void __launch_bounds__(threads, 1)                                \
      tsbn_##pass##_##dtype##_##access(const __grid_constant__ tsbn::cuda::RowParams p) { \
    tsbn::cuda::pass<T, V>(p);                                                            \
  }
#define TSBN_ROW_KERNELS(dtype, T)                                                                            \
  TSBN_ROW_KERNEL(layer_norm_forward, tsbn::cuda::forward_threads<T>(), dtype, T, rows, 16 / sizeof(T))       \
  TSBN_ROW_KERNEL(layer_norm_forward, tsbn::cuda::kRowThreads, dtype, T, scalar, 1)                           \
  TSBN_ROW_KERNEL(layer_norm_backward, tsbn::cuda::kRowThreads, dtype, T, rows, 16 / sizeof(T))               \
  TSBN_ROW_KERNEL(layer_norm_backward, tsbn::cuda::kRowThreads, dtype, T, scalar, 1)
#define TSBN_PARAMETERS(dtype, A)                                                           \
  extern "C" __global__ void __launch_bounds__(tsbn::cuda::kThreads)                        \
      tsbn_layer_norm_parameters_##dtype(const __grid_constant__ tsbn::cuda::RowParams p) { \
    tsbn::cuda::layer_norm_parameters<A>(p);                                                \
  }

TSBN_ROW_KERNELS(f32, float)
TSBN_ROW_KERNELS(f64, double)
TSBN_ROW_KERNELS(f16, __half)
TSBN_ROW_KERNELS(bf16, __nv_bfloat16)
TSBN_PARAMETERS(f32, float)
TSBN_PARAMETERS(f64, double)

// The host's side is left out where only PTX is wanted.
#ifndef TSBN_DEVICE_ONLY
#include "launch.h"

namespace tsbn::cuda {
namespace {

#define TSBN_ROW_ACCESS(dtype, access, wide)                                                  \
  {tsbn_layer_norm_forward_##dtype##_##access, tsbn_layer_norm_backward_##dtype##_##access,   \
   tsbn_layer_norm_parameters_##wide}
#define TSBN_ROW_ACCESSES(dtype, wide) {TSBN_ROW_ACCESS(dtype, rows, wide), {}, TSBN_ROW_ACCESS(dtype, scalar, wide)}

using Kernel = void (*)(const RowParams);
// [DType][rows, columns, scalar][Pass]; rows have no columns.
constexpr Kernel kernels[kDTypes][kAccesses][kPasses - kRowForward] = {
    TSBN_ROW_ACCESSES(f32, f32), TSBN_ROW_ACCESSES(f64, f64), TSBN_ROW_ACCESSES(f16, f32), TSBN_ROW_ACCESSES(bf16, f32)};

}  // namespace

const void* row_kernel_of(const Launch& l) {
  return reinterpret_cast<const void*>(kernels[l.dtype][l.access][l.pass - kRowForward]);
}

}  // namespace tsbn::cuda
#endif
