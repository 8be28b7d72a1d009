// What is kept of the values seen so far, how two such states merge, and the merge over a block and a cluster.
// Every merge has its place in a fixed order: the same input gives the same bits.
#pragma once
#include <type_traits>

#include "element.cuh"

namespace tsbn::cuda {

__device__ inline float quotient(float a, float b) { return __fdividef(a, b); }
__device__ inline double quotient(double a, double b) { return a / b; }

// The mean is kept as shift + rest, shift being a value of the data: the rest keeps its digits where |mean| >> std.
template <class A> struct alignas(4 * sizeof(A)) Moments {
  A count = 0, shift = 0, rest = 0, squares = 0;  // squares: of the deviations from the mean
};

// Chan, Golub and LeVeque (1983).
template <class A> __device__ Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  if (b.count == A(0)) return a;
  if (a.count == A(0)) return b;
  const A count = a.count + b.count, share = quotient(b.count, count);
  const A delta = (b.shift - a.shift) + (b.rest - a.rest);
  return {count, a.shift, a.rest + delta * share, a.squares + b.squares + delta * delta * (a.count * share)};
}

template <class A> struct alignas(2 * sizeof(A)) Sums {
  A total = 0, dot = 0;  // of dy, and of dy * (x - mean)
};
template <class A> __device__ Sums<A> merge(const Sums<A>& a, const Sums<A>& b) {
  return {a.total + b.total, a.dot + b.dot};
}

template <class A> __device__ Moments<A> shuffle_down(const Moments<A>& s, int by) {
  return {__shfl_down_sync(0xffffffff, s.count, by), __shfl_down_sync(0xffffffff, s.shift, by),
          __shfl_down_sync(0xffffffff, s.rest, by), __shfl_down_sync(0xffffffff, s.squares, by)};
}
template <class A> __device__ Sums<A> shuffle_down(const Sums<A>& s, int by) {
  return {__shfl_down_sync(0xffffffff, s.total, by), __shfl_down_sync(0xffffffff, s.dot, by)};
}

template <class A, int V> __device__ A fold(A (&v)[V]) {
#pragma unroll
  for (int half = V / 2; half > 0; half /= 2) {
#pragma unroll
    for (int k = 0; k < half; ++k) v[k] += v[k + half];
  }
  return v[0];
}

// What one thread has seen of its CH channels (1, or one for each element of a slot).
template <class A, int V, int CH> struct Running {
  A count = 0, shift[CH], rest[CH] = {}, squares[CH] = {};

  // A tile is summed around the shift, then its squares around its own mean, while it is in registers: exact enough
  // wherever the tile lies. `valid(u, v)` tells elements from padding, `size` how many of a channel are valid.
  template <int U, class Valid> __device__ void add(const A (&x)[U][V], A size, Valid valid) {
    A d[U][V], sum[V] = {}, square[V] = {}, mean[CH];
    if (count == A(0)) {
#pragma unroll
      for (int c = 0; c < CH; ++c) shift[c] = x[0][c];
      if constexpr (CH == 1) {
#pragma unroll
        for (int v = V - 1; v >= 0; --v) shift[0] = valid(0, v) ? x[0][v] : shift[0];
      }
    }
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        d[u][v] = valid(u, v) ? x[u][v] - shift[CH == 1 ? 0 : v] : A(0);
        sum[v] += d[u][v];
      }
    }
    const A inverse = quotient(A(1), size);
    if constexpr (CH == 1) mean[0] = fold(sum) * inverse;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if constexpr (CH > 1) mean[v] = sum[v] * inverse;
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const A e = valid(u, v) ? d[u][v] - mean[CH == 1 ? 0 : v] : A(0);
        square[v] += e * e;
      }
    }
    if constexpr (CH == 1) square[0] = fold(square);
    const A share = quotient(size, count + size), weight = count * share;
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const A delta = mean[c] - rest[c];
      rest[c] += delta * share;
      squares[c] += square[c] + delta * delta * weight;
    }
    count += size;
  }
  __device__ Moments<A> state(int c) const {
    if (count == A(0)) return {};
    return {count, shift[c], rest[c], squares[c]};
  }
};

template <class A, int V, int CH> struct RunningSums {
  A total[CH] = {}, dot[CH] = {};

  template <int U> __device__ void add(const A (&dy)[U][V], const A (&x)[U][V], const A (&center)[CH]) {
    A first[V] = {}, second[V] = {};
#pragma unroll
    for (int u = 0; u < U; ++u) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        first[v] += dy[u][v];
        second[v] += dy[u][v] * (x[u][v] - center[CH == 1 ? 0 : v]);
      }
    }
    if constexpr (CH == 1) fold(first), fold(second);
#pragma unroll
    for (int c = 0; c < CH; ++c) total[c] += first[c], dot[c] += second[c];
  }
  __device__ Sums<A> state(int c) const { return {total[c], dot[c]}; }
};

// ---- clusters: blocks that read each other's shared memory (sm_90 and later) -------------------------------------

#if __CUDA_ARCH__ >= 900
__device__ inline void cluster_arrive() { __cluster_barrier_arrive(); }
__device__ inline void cluster_wait() { __cluster_barrier_wait(); }
template <class S> __device__ S from_rank(const S* mine, unsigned rank) {
  return *static_cast<const S*>(__cluster_map_shared_rank(mine, rank));
}
#else
__device__ inline void cluster_arrive() {}
__device__ inline void cluster_wait() {}
template <class S> __device__ S from_rank(const S* mine, unsigned) { return *mine; }
#endif

// The state of channel `threadIdx.x` of the slab, in the threads below CH << log_lanes. Lanes that share channels lie
// 1 << log_lanes apart. `scratch` has room for one state for each warp and channel, and one more for each channel.
template <class State, int CH, class R>
__device__ State reduce(const R& running, State* scratch, int log_lanes, unsigned cluster) {
  const unsigned width = CH << log_lanes, warps = blockDim.x / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    State s = running.state(c);
    for (int by = 16; by >= 1 << log_lanes; by /= 2) s = merge(s, shuffle_down(s, by));
    if (lane < 1u << log_lanes) scratch[warp * width + lane * CH + c] = s;
  }
  __syncthreads();
  State total;
  if (threadIdx.x < width) {
    for (unsigned w = 0; w < warps; ++w) total = merge(total, scratch[w * width + threadIdx.x]);
  }
  if (cluster > 1) {
    State* exchange = scratch + warps * width;
    if (threadIdx.x < width) exchange[threadIdx.x] = total;
    cluster_arrive();
    cluster_wait();
    if (threadIdx.x < width) {
      total = State();
      for (unsigned rank = 0; rank < cluster; ++rank) total = merge(total, from_rank(exchange + threadIdx.x, rank));
    }
    cluster_arrive();  // the others may still read; kernels wait before they end
  }
  return total;
}

}  // namespace tsbn::cuda
