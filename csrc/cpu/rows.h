// Rows family: the positions of a (task, channel) slab are contiguous within a sample (NCHW). One channel a group.
// Included inside an instruction set's namespace, after simd.h.

template <class T>
struct Rows {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;
  static constexpr int kUnroll = 4;  // independent sums hide the latency of the add
  static constexpr uintptr_t kLine = 64;

  static T* slab(const Operand& o, const Work& w, int64_t group) {
    return static_cast<T*>(o.data) + (group / w.C) * o.t + (group % w.C) * o.c;
  }

  struct Sums {
    V first[kUnroll] = {}, second[kUnroll] = {};
    static double total(const V (&v)[kUnroll]) { return sum_of_lanes((v[0] + v[1]) + (v[2] + v[3])); }
  };

  // Calls add(offset, lane_count, accumulator) for every vector of a contiguous run; lane_count < L only at its end.
  // What is left over of a run goes to accumulators in turn, from `turn` on, so that short runs fill all of them.
  template <class Add>
  static TSBN_INLINE void each_vector(int64_t length, int64_t turn, Add add) {
    int64_t i = 0;
    for (; i + kUnroll * L <= length; i += kUnroll * L) {
      for (int j = 0; j < kUnroll; ++j) add(i + j * L, L, j);
    }
    for (; i + L <= length; i += L) add(i, L, turn++ % kUnroll);
    if (i < length) add(i, int(length - i), turn % kUnroll);
  }

  struct BlockMoments {
    double mean, m2;
  };

  static BlockMoments block_moments(const T* x, const Operand& o, const Block& b, A origin) {
    const V shift = rounded<T>(V{} + origin);
    Sums sums;
    for (int64_t n = b.n0; n < b.n1; ++n) {
      const T* p = x + n * o.n + b.s0;
      each_vector(b.s1 - b.s0, n, [&](int64_t i, int lanes, int64_t j) TSBN_LAMBDA {
        const V d = load_up_to(p + i, lanes, shift) - shift;
        sums.first[j] += d;
        sums.second[j] += d * d;
      });
    }
    const double sum = Sums::total(sums.first), offset = sum / double(b.positions());
    return {double(shift[0]) + offset, Sums::total(sums.second) - sum * offset};
  }

  // The first block is summed around the mean of its first few values, and again around its own mean where that was
  // too far off; each later block around the mean of those before it. So |mean| >> std cancels nothing.
  static void moments(const Work& w, int64_t group, int64_t chunk, double* partial, void*) {
    const T* x = slab(w.x, w, group);
    const int64_t begin = w.partition.first_block(chunk), end = w.partition.last_block(chunk);
    Block b = w.partition.block(begin);
    const int few = b.s1 - b.s0 < L ? int(b.s1 - b.s0) : L;
    const A origin = A(sum_of_lanes(load_up_to(x + b.n0 * w.x.n + b.s0, few, V{})) / few);
    auto [mean, m2] = block_moments(x, w.x, b, origin);
    double count = double(b.positions());
    if (is_far(mean - double(origin), m2 / count)) {
      const BlockMoments again = block_moments(x, w.x, b, A(mean));
      mean = again.mean;
      m2 = again.m2;
    }
    for (int64_t index = begin + 1; index < end; ++index) {
      b = w.partition.block(index);
      const BlockMoments block = block_moments(x, w.x, b, A(mean));
      merge_moments(mean, m2, count, block.mean, block.m2, double(b.positions()));
      count += double(b.positions());
    }
    partial[0] = mean;
    partial[1] = m2;
  }

  static void products(const Work& w, int64_t group, int64_t chunk, double* partial, void*) {
    const T *x = slab(w.x, w, group), *dy = slab(w.dy, w, group);
    const V center = V{} + static_cast<const A*>(w.vectors.center)[group];
    double total = 0, dot = 0;
    for (int64_t index = w.partition.first_block(chunk); index < w.partition.last_block(chunk); ++index) {
      const Block b = w.partition.block(index);
      Sums sums;
      for (int64_t n = b.n0; n < b.n1; ++n) {
        const T *p = x + n * w.x.n + b.s0, *q = dy + n * w.dy.n + b.s0;
        each_vector(b.s1 - b.s0, n, [&](int64_t i, int lanes, int64_t j) TSBN_LAMBDA {
          const V g = load_up_to(q + i, lanes, V{});
          sums.first[j] += g;
          sums.second[j] += g * (load_up_to(p + i, lanes, center) - center);
        });
      }
      total += Sums::total(sums.first);
      dot += Sums::total(sums.second);
    }
    partial[0] = total;
    partial[1] = dot;
  }

  // The head of the next channel's row: rows are too short for the processor to have seen the stride, and their first
  // lines would otherwise be waited for, slab after slab.
  static TSBN_INLINE void prefetch_row(const T* row, int64_t length) {
    constexpr int64_t kHead = 512;
    const int64_t bytes = length * int64_t(sizeof(T)) < kHead ? length * int64_t(sizeof(T)) : kHead;
    for (int64_t i = 0; i < bytes; i += int64_t(kLine)) __builtin_prefetch(reinterpret_cast<const char*>(row) + i);
  }

  // Blocks are walked backwards: the reduction has just left the last ones in the cache.
  template <bool kWithDy, bool kStream>
  static void apply(const Work& w, int64_t group, int64_t chunk) {
    const T* x = slab(w.x, w, group);
    const T* dy = kWithDy ? slab(w.dy, w, group) : nullptr;
    T* out = slab(w.out, w, group);
    const auto factor = [&](const void* v) TSBN_LAMBDA { return V{} + static_cast<const A*>(v)[group]; };
    const V center = factor(w.vectors.center), scale = factor(w.vectors.scale), shift = factor(w.vectors.shift);
    const V dy_scale = kWithDy ? factor(w.vectors.dy_scale) : V{};

    for (int64_t index = w.partition.last_block(chunk); index-- > w.partition.first_block(chunk);) {
      const Block b = w.partition.block(index);
      for (int64_t n = b.n1; n-- > b.n0;) {
        const T* p = x + n * w.x.n + b.s0;
        const T* q = kWithDy ? dy + n * w.dy.n + b.s0 : nullptr;
        T* r = out + n * w.out.n + b.s0;
        const int64_t length = b.s1 - b.s0;
        prefetch_row(p + w.x.c, length);
        if constexpr (kWithDy) prefetch_row(q + w.dy.c, length);
        const auto value = [&](int64_t i, int lanes) TSBN_LAMBDA {
          V v = (load_up_to(p + i, lanes, center) - center) * scale + shift;
          if constexpr (kWithDy) v += load_up_to(q + i, lanes, V{}) * dy_scale;
          return v;
        };
        const auto put = [&](int64_t i, int lanes) TSBN_LAMBDA { store_first(r + i, lanes, value(i, lanes)); };

        int64_t i = 0;
        if constexpr (kStream) {  // up to the first whole cache line
          const int64_t head = int64_t((-reinterpret_cast<uintptr_t>(r)) % kLine / sizeof(T));
          while (i < head && i < length) {
            const int64_t lanes = head - i < L - 1 ? head - i : L - 1;
            const int64_t left = length - i;
            put(i, int(lanes < left ? lanes : left));
            i += lanes < left ? lanes : left;
          }
        }
        for (; i + L <= length; i += L) {
          if constexpr (kStream) stream(r + i, value(i, L));
          else store(r + i, value(i, L));
        }
        if (i < length) put(i, int(length - i));
      }
    }
    if constexpr (kStream) stream_fence();
  }

  static void affine(const Work& w, int64_t group, int64_t chunk) {
    w.stream ? apply<false, true>(w, group, chunk) : apply<false, false>(w, group, chunk);
  }
  static void affine_with_dy(const Work& w, int64_t group, int64_t chunk) {
    w.stream ? apply<true, true>(w, group, chunk) : apply<true, false>(w, group, chunk);
  }
  static constexpr SlabKernels kernels{moments, products, affine, affine_with_dy};
};
