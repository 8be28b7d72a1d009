// How the threads of a block share rows: which slots a thread holds, sums over a row, the gates of the tasks in shared
// memory, and sums over rows.
#pragma once
#include "element.cuh"

namespace tsbn::cuda {

extern __shared__ __align__(16) unsigned char tsbn_rows[];

// A thread of a block: the slots that it holds of the rows it meets, and the block's tiles of rows.
template <class T, int V> struct Rows {
  using A = Acc<T>;
  static constexpr int K = kRowBytes / int(sizeof(A)) / V;  // slots that a thread holds
  // In shared memory a slot of the accumulate type is W words, which lie so that lanes have no bank conflicts.
  static constexpr int Q = V == 1 ? 1 : 16 / int(sizeof(A)), W = V / Q;
  using Word = Slot<A, Q>;

  const RowParams& p;
  uint32_t lane, group, task, split;
  uint32_t begin;        // the thread's first column
  uint32_t first, last;  // tiles of this block
  int full;              // slots of this thread in a row
  uint32_t turn = 0;

  __device__ explicit Rows(const RowParams& p) : p(p) {
    const RowNumbers& n = p.n;
    lane = threadIdx.x & (lanes() - 1), group = threadIdx.x >> n.log_lanes;
    const uint32_t slab = blockIdx.x / uint32_t(n.splits), piece = slab % uint32_t(n.pieces) * uint32_t(n.slots);
    split = blockIdx.x % uint32_t(n.splits), task = slab / uint32_t(n.pieces);
    begin = (piece + lane) * V;
    first = split * uint32_t(n.share);
    const uint32_t tiles = (uint32_t(n.rows) + groups() - 1) / groups(), end = first + uint32_t(n.share);
    last = end < tiles ? end : tiles;
    const uint32_t left = uint32_t(n.channels) / V - piece, slots = left < n.slots ? left : uint32_t(n.slots);
    full = lane < slots ? int((slots - lane + lanes() - 1) >> n.log_lanes) : 0;
  }
  __device__ uint32_t lanes() const { return 1u << p.n.log_lanes; }
  __device__ uint32_t groups() const { return blockDim.x >> p.n.log_lanes; }

  // Slots of a piece with those that no row fills: what is read of shared memory needs no masks.
  __device__ uint32_t width() const { return uint32_t(p.n.steps) << p.n.log_lanes; }

  // ---- rows ---------------------------------------------------------------------------------------------------------

  // Which of its task's rows a thread has in a tile; the last tile may have fewer rows than groups.
  __device__ uint32_t number(uint32_t tile) const { return tile * groups() + group; }
  __device__ int mine(uint32_t k) const { return k < uint32_t(p.n.rows) ? full : 0; }
  __device__ bool leads(uint32_t k) const { return lane == 0 && k < uint32_t(p.n.rows); }

  // Division of numbers below 2^31 by an invariant (Granlund and Montgomery, 1994).
  __device__ int64_t row(uint32_t k, int64_t t, int64_t tasks) const {
    const uint32_t n = (__umulhi(k, uint32_t(p.n.multiplier)) + k) >> p.n.shift;
    return (n * tasks + t) * p.n.inner + (k - n * uint32_t(p.n.inner));
  }
  __device__ int64_t row_of_x(uint32_t k) const { return p.n.x_tasks == 1 ? k : row(k, task, p.n.x_tasks); }
  __device__ int64_t row_of_task(uint32_t k, uint32_t t) const { return row(k, task + t, p.n.tasks); }

  __device__ uint32_t slot(uint32_t u) const { return lane + (u << p.n.log_lanes); }
  __device__ uint32_t column(uint32_t u) const { return begin + (u << p.n.log_lanes) * V; }
  __device__ T* at(void* data, int64_t row, uint32_t u) const {
    return static_cast<T*>(data) + row * p.n.channels + column(u);
  }
  __device__ const T* at(const void* data, int64_t row, uint32_t u) const {
    return static_cast<const T*>(data) + row * p.n.channels + column(u);
  }

  // A row's values; 0 beyond the slots that are this thread's.
  __device__ void read(A (&v)[K][V], const void* data, int64_t row, int mine) const {
    const T* from = at(data, row, 0);
    const uint32_t step = lanes() * V;
    Slot<T, V> slots[K] = {};
#pragma unroll
    for (int u = 0; u < K; ++u, from += step) {
      if (u < mine) slots[u].load(from);
    }
#pragma unroll
    for (int u = 0; u < K; ++u) slots[u].get(v[u]);
  }

  // Calls f(u, values) for all steps, with 0 beyond this thread's slots; some of them are loaded at a time.
  template <class F> __device__ void read_some(const void* data, int64_t row, int mine, F f) const {
    constexpr int U = K / 2;
    const T* from = at(data, row, 0);
    const uint32_t step = lanes() * V;
#pragma unroll
    for (int first = 0; first < K; first += U) {
      Slot<T, V> slots[U] = {};
#pragma unroll
      for (int u = 0; u < U; ++u, from += step) {
        if (first + u < mine) slots[u].load(from);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        if (first + u >= p.n.steps) continue;
        A v[V];
        slots[u].get(v);
        f(first + u, v);
      }
    }
  }

  // Writes f(u), this thread's slots of a row.
  template <class F> __device__ void write(void* data, int64_t row, int mine, F f) const {
    T* to = at(data, row, 0);
    const uint32_t step = lanes() * V;
    constexpr int U = K < 4 ? K : 4;
#pragma unroll
    for (int first = 0; first < K; first += U) {
      if (first >= p.n.steps) continue;
#pragma unroll
      for (int u = 0; u < U; ++u, to += step) {
        if (first + u < mine) f(first + u).store(to);
      }
    }
  }

  template <class F> __device__ static void each(A (&v)[K][V], F f) {
#pragma unroll
    for (int u = 0; u < K; ++u) {
#pragma unroll
      for (int e = 0; e < V; ++e) f(v[u][e]);
    }
  }

  // A number of a row, which one thread of each warp loads.
  __device__ A statistic(const void* data, uint32_t k, int64_t row) const {
    const uint32_t within = lanes() < 32 ? lanes() - 1 : 31;
    A value = 0;
    if ((threadIdx.x & within) == 0 && k < uint32_t(p.n.rows)) value = static_cast<const A*>(data)[row];
    return __shfl_sync(0xffffffff, value, threadIdx.x & 31 & ~within);
  }

  // Sums over the lanes of a group, the same bits in all of them. In turn there are two places for the warps' sums, so
  // that one barrier is enough.
  template <int N> __device__ void add_up(A (&sums)[N]) {
    const uint32_t warp = threadIdx.x / 32, warps = lanes() / 32;
    butterfly(sums, lanes() < 32 ? lanes() : 32);
    if (lanes() <= 32) return;
    A* area = scratch() + turn * (blockDim.x / 32 * 2);
    turn ^= 1;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (threadIdx.x % 32 == 0) area[warp * 2 + i] = sums[i];
    }
    __syncthreads();
    const uint32_t from = (warp & ~(warps - 1)) + (threadIdx.x & (warps - 1));
#pragma unroll
    for (int i = 0; i < N; ++i) sums[i] = area[from * 2 + i];
    butterfly(sums, warps);
  }
  template <int N> __device__ static void butterfly(A (&sums)[N], uint32_t width) {
#pragma unroll 1
    for (uint32_t by = 1; by < width; by *= 2) {
#pragma unroll
      for (int i = 0; i < N; ++i) sums[i] += __shfl_xor_sync(0xffffffff, sums[i], by);
    }
  }

  // ---- gates and biases ---------------------------------------------------------------------------------------------

  __device__ static A* scratch() { return reinterpret_cast<A*>(tsbn_rows); }
  __device__ static A* gate_area() { return scratch() + blockDim.x / 32 * 4; }
  __device__ A* shift_area() const { return gate_area() + p.n.staged * width() * V; }
  __device__ A* sum_area() const {
    const int64_t vectors = p.out_data == nullptr ? 0 : p.bias_data == nullptr ? 1 : 2;
    return gate_area() + vectors * p.n.staged * width() * V;
  }
  // Whether there is no room for the gates of all tasks that a block meets.
  __device__ bool restages() const { return p.n.staged < p.n.met; }

  __device__ void stage(uint32_t begin) const {
    const uint32_t left = uint32_t(p.n.met) - begin, count = left < p.n.staged ? left : uint32_t(p.n.staged);
    for (uint32_t t = 0; t < count; ++t) {
      for (uint32_t c = threadIdx.x; c < width() * V; c += blockDim.x) {
        const uint32_t e = c % V, i = ((t * W + e / Q) * width() + c / V) * Q + e % Q;
        const int64_t own = task + begin + t;
        const bool real = c < p.n.channels;
        const A w = real ? load_parameter<A>(p.weight_data, p.n.weight, own, c) : A(0);
        gate_area()[i] = Gate<A>(w, p.n.sigmoid).value;
        if (p.bias_data != nullptr) shift_area()[i] = real ? load_parameter<A>(p.bias_data, p.n.bias, own, c) : A(0);
      }
    }
    __syncthreads();
  }
  __device__ void get(A (&v)[V], const A* area, uint32_t staged, int u) const {
    const Word* from = reinterpret_cast<const Word*>(area) + staged * W * width() + lane + u * lanes();
#pragma unroll
    for (int w = 0; w < W; ++w, from += width()) {
      const Word word = *from;
      word.get(reinterpret_cast<A(&)[Q]>(v[w * Q]));
    }
  }
  __device__ void gates(A (&v)[V], uint32_t staged, int u) const { get(v, gate_area(), staged, u); }
  __device__ void shifts(A (&v)[V], uint32_t staged, int u) const {
    if (p.bias_data != nullptr) return get(v, shift_area(), staged, u);
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] = A(0);
  }

  // Calls f(t, staged) for the tasks that a block meets, `staged` is where the gates of the task lie.
  template <class F> __device__ void for_tasks(F f) const {
    const uint32_t met = uint32_t(p.n.met), most = uint32_t(p.n.staged);
#pragma unroll 1
    for (uint32_t t = 0, staged = 0; t < met; ++t, ++staged) {
      if (restages() && (t == 0 || staged == most)) {
        __syncthreads();
        stage(t);
        staged = 0;
      }
      f(t, staged);
    }
  }
};

// Gradients of weight and bias from sums of dy * xhat, or of dy.
template <class A> __device__ void store_gradient(const RowParams& p, bool of_weight, int64_t t, int64_t c, A sum) {
  if (of_weight) sum *= Gate<A>(load_parameter<A>(p.weight_data, p.n.weight, t, c), p.n.sigmoid).slope;
  store_parameter(of_weight ? p.first : p.second, p.n.weight.dtype, t * p.n.channels + c, sum);
}

// Sums of dy * xhat and dy over the rows of a block, for each column: [warp][task][kind][step][word][lane].
template <class T, int V> struct RowSums {
  using Walk = Rows<T, V>;
  using A = Acc<T>;
  using Word = typename Walk::Word;
  static constexpr int Q = Walk::Q, W = Walk::W;

  const Walk& walk;
  const RowNumbers& n;
  Word* area;
  uint32_t kinds;
  Word* mine;

  __device__ explicit RowSums(const Walk& walk)
      : walk(walk), n(walk.p.n), area(reinterpret_cast<Word*>(walk.sum_area())),
        kinds(uint32_t(n.needs_dweight + n.needs_dbias)), mine(of(threadIdx.x)) {
    A zero[Q] = {};
    for (uint32_t i = 0; i < words(); ++i) own(i) = slot_of<A>(zero);
  }
  __device__ uint32_t words() const { return uint32_t(n.met) * kinds * uint32_t(n.steps) * W; }
  __device__ Word* of(uint32_t thread) const { return area + thread / 32 * 32 * words() + thread % 32; }
  __device__ Word& own(uint32_t i) const { return mine[i * 32]; }
  __device__ uint32_t index(uint32_t t, uint32_t kind, uint32_t u) const {
    return ((t * kinds + kind) * uint32_t(n.steps) + u) * W;
  }

  __device__ void add(uint32_t t, int u, const A (&dy)[V], const A (&xhat)[V]) const {
    if (n.needs_dweight) {
      add_to(index(t, 0, u), [&](int e) { return dy[e] * xhat[e]; });
    }
    if (n.needs_dbias) {
      add_to(index(t, kinds - 1, u), [&](int e) { return dy[e]; });
    }
  }
  template <class F> __device__ void add_to(uint32_t i, F f) const {
#pragma unroll
    for (int w = 0; w < W; ++w) {
      A v[Q];
      own(i + w).get(v);
#pragma unroll
      for (int q = 0; q < Q; ++q) v[q] += f(w * Q + q);
      own(i + w).set(v);
    }
  }

  // Adds up what the groups have, pair by pair, and leaves it where it belongs.
  __device__ void store() const {
    if (kinds == 0) return;
    for (uint32_t half = walk.groups() / 2; half > 0; half /= 2) {
      __syncthreads();
      if (walk.group >= half) continue;
      for (uint32_t i = 0; i < words(); ++i) {
        A a[Q], b[Q];
        own(i).get(a);
        of(threadIdx.x + (half << n.log_lanes))[i * 32].get(b);
#pragma unroll
        for (int q = 0; q < Q; ++q) a[q] += b[q];
        own(i).set(a);
      }
    }
    if (walk.group > 0) return;
    for (uint32_t t = 0; t < n.met; ++t) {
      for (uint32_t kind = 0; kind < kinds; ++kind) {
        for (uint32_t u = 0; u < uint32_t(walk.full); ++u) {
#pragma unroll
          for (int w = 0; w < W; ++w) leave(own(index(t, kind, u) + w), walk.task + t, kind, walk.column(u) + w * Q);
        }
      }
    }
  }
  __device__ void leave(const Word& word, int64_t task, uint32_t kind, int64_t column) const {
    if (n.splits > 1) {
      const int64_t row = (kind * n.splits + walk.split) * n.tasks + task;
      return word.store(static_cast<A*>(walk.p.partial) + row * n.channels + column);
    }
    A v[Q];
    word.get(v);
#pragma unroll
    for (int q = 0; q < Q; ++q) store_gradient(walk.p, kind == 0 && n.needs_dweight, task, column + q, v[q]);
  }
};

}  // namespace tsbn::cuda
