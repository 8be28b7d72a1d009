// The kernels by name. Rows: a slot is 16 bytes of one channel. Columns: 16 bytes of as many channels. Scalar: one
// element, for either family, where 16-byte accesses would be misaligned.
#include "backward.cuh"
#include "fan_out.cuh"
#include "forward.cuh"
#include "keys.cuh"

#define TSBN_KERNEL(pass, blocks, name, ...)                                                                     \
  extern "C" __global__ void __launch_bounds__(tsbn::cuda::kThreads, blocks)                                     \
      tsbn_##name(const __grid_constant__ tsbn::cuda::Params p) {                                                \
    tsbn::cuda::pass<__VA_ARGS__>(p);                                                                            \
  }
#define TSBN_FORWARD(name, T, V, CH, kEpilogue) \
  TSBN_KERNEL(forward, tsbn::cuda::kForwardBlocks - (sizeof(T) == 8), name, T, V, CH, kEpilogue)
// In double precision an activation needs more registers than two blocks leave.
#define TSBN_PASSES(name, T, V, CH)                                                                              \
  TSBN_FORWARD(forward_##name, T, V, CH, false)                                                                  \
  TSBN_FORWARD(forward_epilogue_##name, T, V, CH, true)                                                          \
  TSBN_KERNEL(backward, tsbn::cuda::kBackwardBlocks, backward_##name, T, V, CH, false)                           \
  TSBN_KERNEL(backward, tsbn::cuda::kBackwardBlocks - (sizeof(T) == 8), backward_epilogue_##name, T, V, CH, true) \
  TSBN_KERNEL(backward_fan_out, tsbn::cuda::kBackwardBlocks - (sizeof(T) == 8), backward_fan_out_##name, T, V, CH) \
  TSBN_KERNEL(forward, tsbn::cuda::kBackwardBlocks, forward_mixed_##name, T, V, CH, true, true)                   \
  TSBN_KERNEL(backward, tsbn::cuda::kBackwardBlocks - (sizeof(T) == 8), backward_mixed_##name, T, V, CH, true, true)
// With blocks that run all at a time: no more of them are on chip than keep the largest part of it.
#define TSBN_TOGETHER(name, T, V)                                                                                       \
  TSBN_KERNEL(forward, tsbn::cuda::kBackwardBlocks, forward_together_##name, T, V, V, false, false, true)               \
  TSBN_KERNEL(forward, tsbn::cuda::kBackwardBlocks, forward_epilogue_together_##name, T, V, V, true, false, true)       \
  TSBN_KERNEL(backward, tsbn::cuda::kBackwardBlocks, backward_together_##name, T, V, V, false, false, true)             \
  TSBN_KERNEL(backward, tsbn::cuda::kBackwardBlocks - (sizeof(T) == 8), backward_epilogue_together_##name, T, V, V, true, \
              false, true)
#define TSBN_KERNELS(dtype, T)                                                  \
  TSBN_TOGETHER(dtype##_columns, T, 16 / sizeof(T))                             \
  TSBN_PASSES(dtype##_rows, T, 16 / sizeof(T), 1)                               \
  TSBN_PASSES(dtype##_columns, T, 16 / sizeof(T), 16 / sizeof(T))               \
  TSBN_PASSES(dtype##_scalar, T, 1, 1)

TSBN_KERNELS(f32, float)
TSBN_KERNELS(f64, double)
TSBN_KERNELS(f16, __half)
TSBN_KERNELS(bf16, __nv_bfloat16)

// By the width of their words.
TSBN_KERNEL(mixed_keys, 1, mixed_keys_f32, uint32_t)
TSBN_KERNEL(mixed_keys, 1, mixed_keys_f64, unsigned long long)
TSBN_KERNEL(mixed_keys, 1, mixed_keys_f16, uint16_t)

// The host's side is left out where only PTX is wanted.
#ifndef TSBN_DEVICE_ONLY
#include "launch.h"

namespace tsbn::cuda {
namespace {

#define TSBN_NAMES(name, words) \
  {tsbn_forward_##name, tsbn_backward_##name, tsbn_forward_epilogue_##name, tsbn_backward_epilogue_##name,     \
   tsbn_backward_fan_out_##name, tsbn_forward_mixed_##name, tsbn_backward_mixed_##name, tsbn_mixed_keys_##words}
#define TSBN_ACCESSES(dtype, words) \
  {TSBN_NAMES(dtype##_rows, words), TSBN_NAMES(dtype##_columns, words), TSBN_NAMES(dtype##_scalar, words)}

using Kernel = void (*)(const Params);
// [DType][rows, columns, scalar][Pass]
constexpr Kernel kernels[kDTypes][kAccesses][kRowForward] = {
    TSBN_ACCESSES(f32, f32), TSBN_ACCESSES(f64, f64), TSBN_ACCESSES(f16, f16), TSBN_ACCESSES(bf16, f16)};

#define TSBN_TOGETHER_NAMES(dtype)                                                              \
  {tsbn_forward_together_##dtype##_columns, tsbn_backward_together_##dtype##_columns,           \
   tsbn_forward_epilogue_together_##dtype##_columns, tsbn_backward_epilogue_together_##dtype##_columns}
// [DType][Pass], of columns
constexpr Kernel together[kDTypes][kBackwardFanOut] = {
    TSBN_TOGETHER_NAMES(f32), TSBN_TOGETHER_NAMES(f64), TSBN_TOGETHER_NAMES(f16), TSBN_TOGETHER_NAMES(bf16)};

}  // namespace

const void* kernel_of(const Launch& l) {
  return reinterpret_cast<const void*>(l.together ? together[l.dtype][l.pass] : kernels[l.dtype][l.access][l.pass]);
}

}  // namespace tsbn::cuda
#endif
