// How many clusters of each size a GPU holds at a time, with one block a multiprocessor: a line "size clusters" for each.
#include <cstdio>

__global__ void nothing() {}

int main() {
  const int shared = 200 << 10;  // so that no multiprocessor takes a second block
  cudaFuncSetAttribute(nothing, cudaFuncAttributeMaxDynamicSharedMemorySize, shared);
  cudaFuncSetAttribute(nothing, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  for (int size = 1; size <= 16; size *= 2) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster[1];
    cluster[0].id = cudaLaunchAttributeClusterDimension;
    cluster[0].val.clusterDim.x = size;
    cluster[0].val.clusterDim.y = cluster[0].val.clusterDim.z = 1;
    config.gridDim = dim3(size);
    config.blockDim = dim3(512);
    config.dynamicSmemBytes = shared;
    config.attrs = cluster;
    config.numAttrs = 1;
    int count = 0;
    const cudaError_t error = cudaOccupancyMaxActiveClusters(&count, nothing, &config);
    std::printf("%d %d %s\n", size, count, error == cudaSuccess ? "" : cudaGetErrorString(error));
  }
  return 0;
}
