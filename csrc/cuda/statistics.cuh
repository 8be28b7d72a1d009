// What is kept of the values seen so far, how two such states merge, and the merge over a block and a cluster.
// Every merge has its place in a fixed order: the same input gives the same bits.
#pragma once
#include <type_traits>

#include "element.cuh"

namespace tsbn::cuda {

__device__ inline float quotient(float a, float b) { return __fdividef(a, b); }
__device__ inline double quotient(double a, double b) { return a / b; }

// A mean is kept as shift + rest: the nearest number, and what that leaves. So it keeps its digits where |mean| >> std,
// and in merges of means that lie far apart.
template <class A> __device__ void move(A& shift, A& rest, A by) {
  const A step = rest + by, moved = shift + step;
  rest = step - (moved - shift);
  shift = moved;
}

template <class A> struct alignas(4 * sizeof(A)) Moments {
  A count = 0, shift = 0, rest = 0, squares = 0;  // squares: of the deviations from the mean
};

// Chan, Golub and LeVeque (1983).
template <class A> __device__ Moments<A> merge(const Moments<A>& a, const Moments<A>& b) {
  if (b.count == A(0)) return a;
  if (a.count == A(0)) return b;
  const A count = a.count + b.count, share = quotient(b.count, count);
  const A delta = (b.shift - a.shift) + (b.rest - a.rest);
  Moments<A> both{count, a.shift, a.rest, a.squares + b.squares + delta * delta * (a.count * share)};
  move(both.shift, both.rest, delta * share);
  return both;
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

  // A tile is summed around the mean so far, then its squares around its own mean, while it is in registers: exact
  // enough wherever the tile lies. `valid(u, v)` tells elements from padding, `size` how many of a channel are valid.
  template <int U, class Valid> __device__ void add(const A (&x)[U][V], A size, Valid valid) {
    constexpr int L = CH == 1 && V > 4 ? 4 : V;  // sums side by side
    A d[U][V], sum[L] = {}, square[L] = {}, mean[CH];
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
        sum[v % L] += d[u][v];
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
        square[v % L] += e * e;
      }
    }
    if constexpr (CH == 1) square[0] = fold(square);
    const A share = quotient(size, count + size), weight = count * share;
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const A delta = mean[c] - rest[c];
      move(shift[c], rest[c], delta * share);
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

// Merges `count` states of each of `width` channels into the threads below `width`. Each thread fetches its share, a few
// at a time, so that the latency of far memory is paid once; lanes merge by halves, at last the warps that have something
// do. `area` has room for one state for each warp and channel; `fetch` may read it.
template <class State, class Fetch>
__device__ State merge_states(State* area, uint32_t width, uint32_t count, Fetch fetch) {
  constexpr uint32_t U = 4;
  const uint32_t groups = blockDim.x / width, group = threadIdx.x / width, channel = threadIdx.x % width;
  State total;
#pragma unroll 1
  for (uint32_t first = group; first < count; first += U * groups) {
    State some[U];
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) {
      if (first + u * groups < count) some[u] = fetch(first + u * groups, channel);
    }
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) total = merge(total, some[u]);
  }
  const uint32_t held = (count < groups ? count : groups) * width;  // threads that have merged something
  const uint32_t lanes = held > threadIdx.x / 32 * 32 ? held - threadIdx.x / 32 * 32 : 0;
#pragma unroll 1
  for (uint32_t by = 16; by >= width; by /= 2) {
    if (by < lanes) total = merge(total, shuffle_down(total, by));
  }
  const uint32_t span = width < 32 ? 32 : width, piece = threadIdx.x / span, place = threadIdx.x % span;
  const uint32_t pieces = (held + span - 1) / span;
  if (pieces == 1) return total;
  __syncthreads();  // of `area` all has been fetched
  if (piece < pieces && place < width) area[piece * width + place] = total;
  __syncthreads();
  if (threadIdx.x < width) {
#pragma unroll 1
    for (uint32_t k = 1; k < pieces; ++k) total = merge(total, area[k * width + threadIdx.x]);
  }
  return total;
}

// The state of channel `threadIdx.x` of the slab, in the threads below CH << log_lanes. Lanes that share channels lie
// 1 << log_lanes apart. `area` has room for one state for each warp and channel, and one more for each channel.
template <class State, int CH, class R>
__device__ State reduce(const R& running, State* area, int log_lanes, uint32_t cluster) {
  const uint32_t width = CH << log_lanes, warps = blockDim.x / 32, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int c = 0; c < CH; ++c) {
    State s = running.state(c);
#pragma unroll 1
    for (int by = 16; by >= 1 << log_lanes; by /= 2) s = merge(s, shuffle_down(s, by));
    if (lane < 1u << log_lanes) area[warp * width + lane * CH + c] = s;
  }
  __syncthreads();
  State total = merge_states(area, width, warps, [&](uint32_t w, uint32_t c) { return area[w * width + c]; });
  if (cluster > 1) {
    State* mine = area + warps * width;
    if (threadIdx.x < width) mine[threadIdx.x] = total;
    cluster_arrive();
    cluster_wait();
    total = merge_states(area, width, cluster, [&](uint32_t rank, uint32_t c) { return from_rank(mine + c, rank); });
    cluster_arrive();  // others may still read `mine`: kernels wait before they end
  }
  return total;
}

}  // namespace tsbn::cuda
