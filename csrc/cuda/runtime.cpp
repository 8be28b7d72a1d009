// What is asked of the CUDA runtime.
#include <cuda_runtime_api.h>

#include <atomic>

#include "launch.h"

namespace tsbn::cuda {
namespace {

void ask(cudaError_t answer) {
  if (answer != cudaSuccess) cudaGetLastError();  // not the next caller's to find
}

// Once for each kernel and device: as much shared memory as there is, and clusters of 16. The same for every launch, so
// that threads that launch at once do not undo each other's setting. All of it is asked for, not needed: a launch that
// cannot do without what a device refuses (clusters of 16 exist on few) fails by itself, and says so.
void prepare(const void* kernel, std::atomic<uint64_t>& prepared) {
  int device = 0, shared = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return;
  const uint64_t bit = uint64_t(1) << (device % 64);
  if (device < 64 && (prepared.load() & bit)) return;
  ask(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (shared > 0) ask(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared));
  ask(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
  ask(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
  prepared.fetch_or(bit);
}

struct Configuration : cudaLaunchConfig_t {
  const void* kernel;
  cudaLaunchAttribute attribute{};

  Configuration(const Launch& l, void* stream_handle) : cudaLaunchConfig_t{}, kernel(l.pass < kRowForward ? kernel_of(l) : row_kernel_of(l)) {
    static std::atomic<uint64_t> prepared[2][kDTypes][kAccesses][kPasses];
    gridDim = dim3(unsigned(l.blocks));
    blockDim = dim3(unsigned(l.threads));
    dynamicSmemBytes = size_t(l.shared);
    stream = static_cast<cudaStream_t>(stream_handle);
    prepare(kernel, prepared[l.together][l.dtype][l.access][l.pass]);
    if (l.together) {
      attribute.id = cudaLaunchAttributeCooperative;
      attribute.val.cooperative = 1;
    } else {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {unsigned(l.cluster), 1, 1};
    }
    attrs = &attribute;
    numAttrs = l.together || l.cluster > 1;
  }
};

int told(cudaError_t answer, const int& number) {
  ask(answer);
  return answer == cudaSuccess ? number : 0;
}

int attribute_of_device(cudaDeviceAttr which) {
  int device = 0, value = 0;
  ask(cudaGetDevice(&device));
  return told(cudaDeviceGetAttribute(&value, which, device), value);
}

}  // namespace

const char* launch(const Launch& l, const void* params, void* stream) {
  Configuration configuration(l, stream);
  void* arguments[] = {const_cast<void*>(params)};
  const cudaError_t error = cudaLaunchKernelExC(&configuration, configuration.kernel, arguments);
  ask(error);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

int active_clusters(const Launch& l) {
  Configuration configuration(l, nullptr);
  int found = 0;
  if (!l.together) {
    return told(cudaOccupancyMaxActiveClusters(&found, configuration.kernel, &configuration), found);
  }
  if (!attribute_of_device(cudaDevAttrCooperativeLaunch)) return 0;
  const cudaError_t answer = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &found, configuration.kernel, int(l.threads), size_t(l.shared));
  return told(answer, found) * attribute_of_device(cudaDevAttrMultiProcessorCount);
}

}  // namespace tsbn::cuda
