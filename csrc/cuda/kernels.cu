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

// The host's side is left out where only PTX is wanted.
#ifndef TSBN_DEVICE_ONLY
#include "launch.h"

namespace tsbn::cuda {
namespace {

#define TSBN_NAMES(dtype)                                                                                      \
  {tsbn_forward_##dtype##_rows, tsbn_backward_##dtype##_rows}, {tsbn_forward_##dtype##_columns,                \
                                                                tsbn_backward_##dtype##_columns},              \
      {tsbn_forward_##dtype##_scalar, tsbn_backward_##dtype##_scalar}

using Kernel = void (*)(const Params);
// [DType][rows, columns, scalar][forward, backward]
constexpr Kernel kernels[4][3][2] = {
    {TSBN_NAMES(f32)}, {TSBN_NAMES(f64)}, {TSBN_NAMES(f16)}, {TSBN_NAMES(bf16)}};

struct Configuration : cudaLaunchConfig_t {
  const void* kernel;
  cudaLaunchAttribute attribute{};
  cudaError_t error = cudaSuccess;

  Configuration(const Launch& l, void* stream_handle) : cudaLaunchConfig_t{} {
    kernel = reinterpret_cast<const void*>(kernels[l.dtype][l.access][l.backward]);
    gridDim = dim3(unsigned(l.blocks));
    blockDim = dim3(unsigned(l.threads));
    dynamicSmemBytes = size_t(l.shared);
    stream = static_cast<cudaStream_t>(stream_handle);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(l.shared));
    if (l.cluster == 1) return;
    if (l.cluster > 8 && error == cudaSuccess) {  // more than every device with clusters takes
      error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(l.cluster), 1, 1};
    attrs = &attribute;
    numAttrs = 1;
  }
};

}  // namespace

const char* launch(const Launch& l, const Params& params, void* stream) {
  Configuration configuration(l, stream);
  void* arguments[] = {const_cast<Params*>(&params)};
  if (configuration.error == cudaSuccess) {
    configuration.error = cudaLaunchKernelExC(&configuration, configuration.kernel, arguments);
  }
  if (configuration.error == cudaSuccess) return nullptr;
  cudaGetLastError();  // ours to report, not the next caller's to find
  return cudaGetErrorString(configuration.error);
}

bool fits(const Launch& l) {
  Configuration configuration(l, nullptr);
  int clusters = 0;
  const bool known = configuration.error == cudaSuccess &&
                     cudaOccupancyMaxActiveClusters(&clusters, configuration.kernel, &configuration) == cudaSuccess;
  cudaGetLastError();
  return known && clusters > 0;
}

}  // namespace tsbn::cuda
#endif
