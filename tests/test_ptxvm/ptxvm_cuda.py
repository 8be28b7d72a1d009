"""CUDA C++ programs that the tests run, and mutate."""

SOURCE = r"""
#include <cooperative_groups.h>
#include <cuda_bf16.h>
namespace cg = cooperative_groups;

extern "C" __global__ void vector_add(const float* a, const float* b, float* c, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) c[i] = a[i] + b[i];
}

extern "C" __global__ void copy4(const float4* x, float4* y, int n) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i];
}

extern "C" __global__ void tree_sum(const float* x, float* sums, int n) {
  extern __shared__ float part[];
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
  part[threadIdx.x] = s;
  __syncthreads();
  for (int half = blockDim.x / 2; half; half /= 2) {
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = part[0];
}

__device__ float warp_sum(float s) {
  for (int k = 16; k; k /= 2) s += __shfl_xor_sync(0xffffffff, s, k);
  return s;
}

// One block a row: mean and variance in two passes over registers, as a normalisation does it.
extern "C" __global__ void normalise_rows(const __nv_bfloat16* x, __nv_bfloat16* y, float* mean, float* variance, int n) {
  __shared__ float parts[32], total;
  const auto block_sum = [&](float s) {
    s = warp_sum(s);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
    __syncthreads();
    if (threadIdx.x < 32) {
      s = warp_sum(threadIdx.x < blockDim.x / 32 ? parts[threadIdx.x] : 0.0f);
      if (threadIdx.x == 0) total = s;
    }
    __syncthreads();
    return total;
  };
  x += blockIdx.x * n, y += blockIdx.x * n;
  float s = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) s += __bfloat162float(x[i]);
  const float m = block_sum(s) / n;
  float q = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) q += (__bfloat162float(x[i]) - m) * (__bfloat162float(x[i]) - m);
  const float v = block_sum(q) / n, r = rsqrtf(v + 1e-5f);
  for (int i = threadIdx.x; i < n; i += blockDim.x) y[i] = __float2bfloat16((__bfloat162float(x[i]) - m) * r);
  if (threadIdx.x == 0) mean[blockIdx.x] = m, variance[blockIdx.x] = v;
}

extern "C" __global__ void softmax_rows(const float* x, float* y, int n) {
  x += blockIdx.x * n, y += blockIdx.x * n;
  float top = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < n; i += 32) top = fmaxf(top, x[i]);
  for (int k = 16; k; k /= 2) top = fmaxf(top, __shfl_xor_sync(0xffffffff, top, k));
  for (int i = threadIdx.x; i < n; i += 32) sum += expf(x[i] - top);
  sum = warp_sum(sum);
  for (int i = threadIdx.x; i < n; i += 32) y[i] = expf(x[i] - top) / sum;
}

// The last block to finish adds what the others left.
extern "C" __global__ void last_block_sum(const float* x, float* part, unsigned* count, float* total, int n) {
  float s = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) s += x[i];
  s = warp_sum(s);
  if (threadIdx.x) return;
  part[blockIdx.x] = s;
  __threadfence();
  if (atomicAdd(count, 1) != gridDim.x - 1) return;
  __threadfence();
  float t = 0;
  for (int b = 0; b < gridDim.x; ++b) t += part[b];
  *total = t;
}

extern "C" __global__ void reverse_through_grid_barrier(float* x, float* y, int n) {
  const int i = cg::this_grid().thread_rank();
  x[i] = i;
  cg::this_grid().sync();
  y[i] = x[n - 1 - i];
}

// Spin-waits on a flag of the previous block.
extern "C" __global__ void chain(volatile int* flags, int* values) {
  const int b = blockIdx.x;
  if (threadIdx.x == 0) {
    if (b) while (flags[b - 1] == 0) {}
    __threadfence();
    values[b] = b ? values[b - 1] + b : 0;
    __threadfence();
    flags[b] = 1;
  }
}

// Divergence: each lane loops as often as its number says, in two kinds of loop.
extern "C" __global__ void collatz(const unsigned* x, unsigned* steps) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  unsigned v = x[i], n = 0;
  while (v != 1) {
    if (v % 2) v = 3 * v + 1;
    else
      while (v % 2 == 0) v /= 2, ++n;
    n += v % 2 == 0;
  }
  steps[i] = n;
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
// Each block of a cluster sums a part; every block reads all parts through distributed shared memory.
extern "C" __global__ void __cluster_dims__(4) cluster_sum(const float* x, float* sums, int n) {
  __shared__ float part;
  auto cluster = cg::this_cluster();
  float s = 0;
  for (int i = cluster.block_rank() * 32 + threadIdx.x; i < n; i += cluster.num_blocks() * 32)
    s += x[blockIdx.x / cluster.num_blocks() * n + i];
  s = warp_sum(s);
  if (threadIdx.x == 0) part = s;
  cluster.sync();
  float total = 0;
  for (unsigned r = 0; r < cluster.num_blocks(); ++r) total += *cluster.map_shared_rank(&part, r);
  cluster.sync();
  if (threadIdx.x == 0) sums[blockIdx.x] = total;
}
#endif
"""
