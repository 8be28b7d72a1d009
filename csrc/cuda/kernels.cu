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
#include <atomic>

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

// Once for each kernel and device: as much shared memory as there is, and clusters of 16. The same for every launch, so
// that threads that launch at once do not undo each other's setting.
cudaError_t prepare(const void* kernel, std::atomic<uint64_t>& prepared) {
  int device = 0, shared = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  const uint64_t bit = uint64_t(1) << (device % 64);
  if (error != cudaSuccess || (device < 64 && (prepared.load() & bit))) return error;
  error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error == cudaSuccess && major >= 9) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  if (error == cudaSuccess) prepared.fetch_or(bit);
  return error;
}

struct Configuration : cudaLaunchConfig_t {
  const void* kernel;
  cudaLaunchAttribute attribute{};
  cudaError_t error;

  Configuration(const Launch& l, void* stream_handle) : cudaLaunchConfig_t{} {
    static std::atomic<uint64_t> prepared[4][3][2];
    kernel = reinterpret_cast<const void*>(kernels[l.dtype][l.access][l.backward]);
    gridDim = dim3(unsigned(l.blocks));
    blockDim = dim3(unsigned(l.threads));
    dynamicSmemBytes = size_t(l.shared);
    stream = static_cast<cudaStream_t>(stream_handle);
    error = prepare(kernel, prepared[l.dtype][l.access][l.backward]);
    if (l.cluster == 1) return;
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
