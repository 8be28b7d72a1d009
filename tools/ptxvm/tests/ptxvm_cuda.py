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

# What normalisation kernels use: vectors of 16 bytes, clusters, hints, dependent launches, large shared memory.
NEIGHBOURS = r"""
#include <cooperative_groups.h>
#include <cooperative_groups/reduce.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
namespace cg = cooperative_groups;
template <class T> struct alignas(16) Vec { T v[16 / sizeof(T)]; };
template <class T> __device__ float widen(T x) { return float(x); }

// A channel of [N, C, S] per cluster: moments through distributed shared memory.
template <class T, int THREADS>
__global__ void __cluster_dims__(4, 1, 1) __launch_bounds__(THREADS, 2)
channel_moments(const T* __restrict__ x, float* mean, float* variance, T* y, int N, int C, int S) {
  constexpr int K = 16 / sizeof(T);
  extern __shared__ __align__(16) unsigned char raw[];
  float2* parts = reinterpret_cast<float2*>(raw);
  auto cluster = cg::this_cluster();
  const int c = blockIdx.x / cluster.num_blocks(), rank = cluster.block_rank();
  float s = 0, q = 0;
  for (int n = rank; n < N; n += cluster.num_blocks())
    for (int k = threadIdx.x * K; k < S; k += THREADS * K) {
      const Vec<T> v = *reinterpret_cast<const Vec<T>*>(x + (size_t(n) * C + c) * S + k);
      for (int j = 0; j < K; ++j) { const float f = widen(v.v[j]); s += f; q += f * f; }
    }
  for (int m = 16; m; m /= 2) { s += __shfl_xor_sync(~0u, s, m); q += __shfl_xor_sync(~0u, q, m); }
  if (threadIdx.x % 32 == 0) parts[1 + threadIdx.x / 32] = make_float2(s, q);
  __syncthreads();
  if (threadIdx.x == 0) {
    float2 t = make_float2(0, 0);
    for (int w = 0; w < THREADS / 32; ++w) t.x += parts[1 + w].x, t.y += parts[1 + w].y;
    parts[0] = t;
  }
  cluster.sync();
  float2 t = make_float2(0, 0);
  for (unsigned r = 0; r < cluster.num_blocks(); ++r) {
    const float2 p = *cluster.map_shared_rank(parts, r);
    t.x += p.x, t.y += p.y;
  }
  cluster.sync();
  const float m = t.x / (N * S), v = t.y / (N * S) - m * m, r = rsqrtf(v + 1e-5f);
  if (rank == 0 && threadIdx.x == 0) __stcs(mean + c, m), __stcs(variance + c, v);
  for (int n = rank; n < N; n += cluster.num_blocks())
    for (int k = threadIdx.x * K; k < S; k += THREADS * K) {
      Vec<T> w = *reinterpret_cast<const Vec<T>*>(x + (size_t(n) * C + c) * S + k);
      for (int j = 0; j < K; ++j) w.v[j] = T((widen(w.v[j]) - m) * r);
      *reinterpret_cast<Vec<T>*>(y + (size_t(n) * C + c) * S + k) = w;
    }
}
template __global__ void channel_moments<float, 128>(const float*, float*, float*, float*, int, int, int);
template __global__ void channel_moments<__half, 128>(const __half*, float*, float*, __half*, int, int, int);
template __global__ void channel_moments<__nv_bfloat16, 128>(const __nv_bfloat16*, float*, float*, __nv_bfloat16*, int, int, int);

// A dependent launch with every hint on a load and a store.
extern "C" __global__ void hints(const float4* x, float4* y, int n) {
  asm volatile("griddepcontrol.wait;" ::: "memory");
  unsigned long long policy;
  asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) {
    float4 a = __ldcs(x + i), b = __ldg(x + i), c, d = __ldcg(x + i), e = __ldlu(x + i), f = __ldca(x + i);
    asm volatile("ld.global.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;" : "=f"(c.x), "=f"(c.y), "=f"(c.z), "=f"(c.w) : "l"(x + i), "l"(policy));
    asm volatile("ld.global.nc.L1::no_allocate.L2::cache_hint.v4.f32 {%0, %1, %2, %3}, [%4], %5;" : "=f"(c.x), "=f"(c.y), "=f"(c.z), "=f"(c.w) : "l"(x + i), "l"(policy));
    asm volatile("ld.global.nc.L1::evict_last.L2::128B.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(c.x), "=f"(c.y), "=f"(c.z), "=f"(c.w) : "l"(x + i));
    a.x += b.x + d.x + e.x + f.x + c.x;
    asm volatile("st.global.L2::cache_hint.v4.f32 [%0], {%1, %2, %3, %4}, %5;" :: "l"(y + i), "f"(a.x), "f"(a.y), "f"(a.z), "f"(a.w), "l"(policy) : "memory");
    asm volatile("prefetch.global.L2 [%0];" :: "l"(x + i));
    asm volatile("prefetch.global.L2::evict_last [%0];" :: "l"(x + i));
  }
  asm volatile("griddepcontrol.launch_dependents;");
}
// Each thread keeps a part of the row in shared memory, more than the 48 KB that need no opt-in.
extern "C" __global__ void reverse_rows(const float* x, float* y, int n) {
  extern __shared__ __align__(16) float tile[];
  for (int k = threadIdx.x; k < n; k += blockDim.x) tile[k] = x[blockIdx.x * n + k];
  __syncthreads();
  for (int k = threadIdx.x; k < n; k += blockDim.x) y[blockIdx.x * n + k] = tile[n - 1 - k];
}

// Sums of warps and maxima of eights.
extern "C" __global__ void groups(const float* x, float* y) {
  auto block = cg::this_thread_block();
  auto warp = cg::tiled_partition<32>(block);
  auto tile = cg::tiled_partition<8>(block);
  const float v = x[block.thread_rank()];
  y[block.thread_rank()] = cg::reduce(warp, v, cg::plus<float>()) + cg::reduce(tile, v, cg::greater<float>());
}

// Welford in double, merged through shuffles.
extern "C" __global__ void doubles(const double2* x, double* y, int n) {
  double m = 0, q = 0; int c = 0;
  for (int k = threadIdx.x; k < n; k += 32) { double2 v = x[k]; for (double f : {v.x, v.y}) { ++c; double d = f - m; m += d / c; q = fma(d, f - m, q); } }
  for (int k = 16; k; k /= 2) {
    double om = __shfl_down_sync(~0u, m, k), oq = __shfl_down_sync(~0u, q, k); int oc = __shfl_down_sync(~0u, c, k);
    double d = om - m, t = c + oc;
    if (t > 0) { m += d * oc / t; q += oq + d * d * c * oc / t; } c += oc;
  }
  if (threadIdx.x == 0) y[0] = m, y[1] = q / c, y[2] = sqrt(q / c), y[3] = rsqrt(q / c), y[4] = 1.0 / m;
}

extern "C" __global__ void halves(const __half2* x, const __nv_bfloat162* z, __half2* y, __nv_bfloat162* w) {
  const int k = threadIdx.x;
  y[k] = __hfma2_relu(x[k], x[k], __hneg2(__habs2(x[k])));
  w[k] = __floats2bfloat162_rn(__low2float(z[k]) * 2, __high2float(__hmax2(z[k], __hneg2(z[k]))));
}
"""
