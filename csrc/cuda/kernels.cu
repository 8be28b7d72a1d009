// The kernels by name. Rows: a slot is 16 bytes of one channel. Columns: 16 bytes of as many channels. Scalar: one
// element, for either family, where 16-byte accesses would be misaligned.
#include "backward.cuh"
#include "fan_out.cuh"
#include "forward.cuh"

#define TSBN_KERNEL(pass, blocks, name, T, ...)                                                                  \
  extern "C" __global__ void __launch_bounds__(tsbn::cuda::kThreads, blocks)                                     \
      tsbn_##name(const __grid_constant__ tsbn::cuda::Params p) {                                                \
    tsbn::cuda::pass<T, __VA_ARGS__>(p);                                                                         \
  }
#define TSBN_FORWARD(name, T, V, CH, kEpilogue) \
  TSBN_KERNEL(forward, tsbn::cuda::kForwardBlocks - (sizeof(T) == 8), name, T, V, CH, kEpilogue)
// In double precision an activation needs more registers than two blocks leave.
#define TSBN_PASSES(name, T, V, CH)                                                                              \
  TSBN_FORWARD(forward_##name, T, V, CH, false)                                                                  \
  TSBN_FORWARD(forward_epilogue_##name, T, V, CH, true)                                                          \
  TSBN_KERNEL(backward, tsbn::cuda::kBackwardBlocks, backward_##name, T, V, CH, false)                           \
  TSBN_KERNEL(backward, tsbn::cuda::kBackwardBlocks - (sizeof(T) == 8), backward_epilogue_##name, T, V, CH, true) \
  TSBN_KERNEL(backward_fan_out, tsbn::cuda::kBackwardBlocks - (sizeof(T) == 8), backward_fan_out_##name, T, V, CH)
#define TSBN_KERNELS(dtype, T)                                                  \
  TSBN_PASSES(dtype##_rows, T, 16 / sizeof(T), 1)                               \
  TSBN_PASSES(dtype##_columns, T, 16 / sizeof(T), 16 / sizeof(T))               \
  TSBN_PASSES(dtype##_scalar, T, 1, 1)

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

#define TSBN_NAMES(name) \
  {tsbn_forward_##name, tsbn_backward_##name, tsbn_forward_epilogue_##name, tsbn_backward_epilogue_##name,     \
   tsbn_backward_fan_out_##name}
#define TSBN_ACCESSES(dtype) {TSBN_NAMES(dtype##_rows), TSBN_NAMES(dtype##_columns), TSBN_NAMES(dtype##_scalar)}

using Kernel = void (*)(const Params);
// [DType][rows, columns, scalar][Pass]
constexpr Kernel kernels[4][3][kPasses] = {TSBN_ACCESSES(f32), TSBN_ACCESSES(f64), TSBN_ACCESSES(f16),
                                           TSBN_ACCESSES(bf16)};

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
    static std::atomic<uint64_t> prepared[4][3][kPasses];
    kernel = reinterpret_cast<const void*>(kernels[l.dtype][l.access][l.pass]);
    gridDim = dim3(unsigned(l.blocks));
    blockDim = dim3(unsigned(l.threads));
    dynamicSmemBytes = size_t(l.shared);
    stream = static_cast<cudaStream_t>(stream_handle);
    error = prepare(kernel, prepared[l.dtype][l.access][l.pass]);
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
