// Rows family: the positions of a (task, channel) slab are contiguous within a sample (NCHW). One channel a group.
// Included inside an instruction set's namespace, after prefetch.h.

template <class T>
struct Rows {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;
  static constexpr int kUnroll = 4;  // independent sums hide the latency of the add
  static constexpr int64_t kAhead = 4096;  // for each row of a slab: all of it must fit the L2 cache

  // Slabs are numbered like the vectors' elements. One division is for all operands: it costs as much as a short row.
  struct Place {
    int64_t task, channel;
    Place(const Work& w, int64_t slab) : task(slab / w.C), channel(slab % w.C) {}
  };
  // nullptr where there is no such operand.
  static TSBN_INLINE T* slab_of(const Operand& o, Place at) {
    return o.data == nullptr ? nullptr : static_cast<T*>(o.data) + at.task * o.t + at.channel * o.c;
  }
  static TSBN_INLINE A* h_of(const Work& w, Place at) {
    return w.h == nullptr ? nullptr : static_cast<A*>(w.h) + at.channel * w.out.c;
  }
  // The values of sample n from position s on.
  template <class P> static TSBN_INLINE P* row(P* slab, const Operand& o, int64_t n, int64_t s) {
    return slab == nullptr ? nullptr : slab + n * o.n + s;
  }

  static TSBN_INLINE V factor(const void* vector, int64_t slab) { return V{} + static_cast<const A*>(vector)[slab]; }
  template <class Act>
  static TSBN_INLINE Before<V> before(const Work& w, int64_t slab) {
    const V center = factor(w.vectors.center, slab);
    if constexpr (Act::kPlain || Act::kInverts) return {center, V{}, V{}};
    else return {center, factor(w.vectors.z_scale, slab), factor(w.vectors.z_shift, slab)};
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

  static BlockMoments block_moments(const Work& w, const T* x, const Block& b, A origin) {
    const V shift = rounded<T>(V{} + origin);
    const Samples samples = w.samples();
    Sums sums;
    for (int64_t n = b.n0; n < b.n1; ++n) {
      const T* p = x + samples[n] * w.x.n + b.s0;
      each_vector(b.s1 - b.s0, n, [&](int64_t i, int lanes, int64_t j) TSBN_LAMBDA {
        prefetch_ahead<kAhead>(p + i);
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
    const T* x = slab_of(w.x, Place(w, group));
    const Partition& cut = w.cut_of(group);
    const int64_t begin = cut.first_block(chunk), end = cut.last_block(chunk);
    Block b = cut.block(begin);
    const int few = b.s1 - b.s0 < L ? int(b.s1 - b.s0) : L;
    const A origin = A(sum_of_lanes(load_up_to(x + w.samples()[b.n0] * w.x.n + b.s0, few, V{})) / few);
    auto [mean, m2] = block_moments(w, x, b, origin);
    double count = double(b.positions());
    if (is_far(mean - double(origin), m2 / count)) {
      const BlockMoments again = block_moments(w, x, b, A(mean));
      mean = again.mean;
      m2 = again.m2;
    }
    for (int64_t index = begin + 1; index < end; ++index) {
      b = cut.block(index);
      const BlockMoments block = block_moments(w, x, b, A(mean));
      merge_moments(mean, m2, count, block.mean, block.m2, double(b.positions()));
      count += double(b.positions());
    }
    partial[0] = mean;
    partial[1] = m2;
  }

  // Tasks of a shared x that are gone through at once: they share the loads of x and h. As many as registers allow.
  static constexpr int kTogether = TSBN_VECTOR_BYTES == 64 ? 2 : 1;

  // Sums of the `count` slabs from task k on over one block; of a shared x also their part of h, and dresidual.
  template <class Act, bool kShared, int count>
  static TSBN_INLINE void add_products(const Work& w, const Act& act, const Block& b, int64_t group, int64_t k,
                                       double* partial) {
    Before<V> z[count];
    V share[count] = {};
    const T *dy[count], *residual[count] = {};
    T* dresidual[count] = {};
    Sums sums[count];
    for (int t = 0; t < count; ++t) {
      const int64_t slab = group + (k + t) * w.C;
      const Place place(w, slab);
      z[t] = before<Act>(w, slab);
      dy[t] = slab_of(w.dy, place);
      if (!Act::kPlain) residual[t] = slab_of(w.residual, place);
      if (kShared) share[t] = factor(w.vectors.z_scale, slab), dresidual[t] = slab_of(w.dresidual, place);
    }
    const Place place(w, group + k * w.C);
    const T* x = slab_of(w.x, place);
    A* all_h = kShared ? h_of(w, place) : nullptr;
    const Samples samples = w.samples();
    for (int64_t index = b.n0; index < b.n1; ++index) {
      const int64_t n = samples[index];
      const T *p = x + n * w.x.n + b.s0, *q[count], *u[count];
      T* du[count];
      bool streams[count];
      for (int t = 0; t < count; ++t) {
        q[t] = dy[t] + n * w.dy.n + b.s0;
        u[t] = row(residual[t], w.residual, n, b.s0);
        du[t] = row(dresidual[t], w.dresidual, n, b.s0);
        streams[t] = w.stream && reinterpret_cast<uintptr_t>(du[t]) % kLine == 0;
      }
      A* h = row(all_h, w.out, n, b.s0);
      each_vector(b.s1 - b.s0, index, [&](int64_t i, int lanes, int64_t j) TSBN_LAMBDA {
        if constexpr (!kShared) prefetch_ahead<kAhead>(p + i);
        V total = kShared && h != nullptr && k > 0 ? load_up_to(h + i, lanes, V{}) : V{};
        for (int t = 0; t < count; ++t) {
          prefetch_ahead<kAhead>(q[t] + i);
          if (u[t] != nullptr) prefetch_ahead<kAhead>(u[t] + i);
          const auto [d, g] = gradient(act, z[t], p, q[t], u[t], i, lanes);
          sums[t].first[j] += g;
          sums[t].second[j] += g * d;
          total += g * share[t];
          if (kShared && du[t] != nullptr) write(du[t] + i, lanes, g, streams[t]);
        }
        if (kShared && h != nullptr) store_up_to(h + i, lanes, total);
      });
    }
    for (int t = 0; t < count; ++t) {
      partial[2 * (k + t)] += Sums::total(sums[t].first);
      partial[2 * (k + t) + 1] += Sums::total(sums[t].second);
    }
  }

  // Blocks of a shared x stay in the L1 cache while the tasks' dy go by, and so does their part of h.
  template <template <class> class Activation, bool kShared>
  static void products(const Work& w, int64_t group, int64_t chunk, double* partial, void*) {
    using Act = Activation<V>;
    const Act act = formula<Act, V>(w.activation, w.slope);
    const int64_t fan = kShared ? w.T : 1;
    for (int64_t i = 0; i < 2 * fan; ++i) partial[i] = 0;
    const Partition& cut = w.cut_of(group);
    for (int64_t index = cut.first_block(chunk); index < cut.last_block(chunk); ++index) {
      const Block b = cut.block(index);
      int64_t k = 0;
      if constexpr (kShared) {
        for (; k + kTogether <= fan; k += kTogether) add_products<Act, kShared, kTogether>(w, act, b, group, k, partial);
      }
      for (; k < fan; ++k) add_products<Act, kShared, 1>(w, act, b, group, k, partial);
    }
  }

  // For the pass that writes, which finds its slab in the cache: the heads of rows to come. Where rows are short, those of
  // adjacent channels are one piece.
  static TSBN_INLINE void prefetch_row(const T* row, const Operand& o, int64_t channel, int64_t length) {
    constexpr int64_t kHead = 512;
    const int64_t bytes = length * int64_t(sizeof(T)), channels = bytes < kHead ? kHead / bytes : 1;
    if (channel % channels != 0) return;
    const char* head = reinterpret_cast<const char*>(row + 2 * channels * o.c);
    for (int64_t i = 0; i < kHead; i += int64_t(kLine)) prefetch(head + i);
  }

  // Calls put(offset, lane_count) for the vectors of a row of an output; where they are streamed, all with L lanes lie
  // in whole cache lines from `r` on.
  template <class Bool, class Put>
  static TSBN_INLINE void each_output(const T* r, int64_t length, Bool streams, Put put) {
    int64_t i = 0;
    if (streams) {  // up to the first whole cache line
      const int64_t head = int64_t((-reinterpret_cast<uintptr_t>(r)) % kLine / sizeof(T));
      while (i < head && i < length) {
        const int64_t lanes = head - i < L - 1 ? head - i : L - 1;
        const int64_t left = length - i;
        put(i, int(lanes < left ? lanes : left));
        i += lanes < left ? lanes : left;
      }
    }
    for (; i + L <= length; i += L) put(i, L);
    if (i < length) put(i, int(length - i));
  }

  // Calls f(block, slab) for the blocks of a chunk, and for each task that shares them. Blocks are walked backwards: the
  // reduction has just left the last ones in the cache.
  template <class Function>
  static TSBN_INLINE void each_slab_block(const Work& w, int64_t group, int64_t chunk, Function f) {
    const Partition& cut = w.cut_of(group);
    for (int64_t index = cut.last_block(chunk); index-- > cut.first_block(chunk);) {
      const Block b = cut.block(index);
      for (int64_t k = 0; k < w.fan(); ++k) f(b, group + k * w.C);
    }
  }

  template <template <class> class Activation, class Bool>
  static void forward_rows(const Work& w, int64_t group, int64_t chunk, Bool streams) {
    using Act = Activation<V>;
    const Act act = formula<Act, V>(w.activation, w.slope);
    each_slab_block(w, group, chunk, [&](const Block& b, int64_t slab) TSBN_LAMBDA {
      const V center = factor(w.vectors.center, slab), scale = factor(w.vectors.scale, slab),
              shift = factor(w.vectors.shift, slab);
      const Place place(w, slab);
      const T *x = slab_of(w.x, place), *residual = Act::kPlain ? nullptr : slab_of(w.residual, place);
      T* out = slab_of(w.out, place);
      const int64_t length = b.s1 - b.s0;
      const Samples samples = w.samples();
      for (int64_t index = b.n1; index-- > b.n0;) {
        const int64_t n = samples[index];
        const T *p = x + n * w.x.n + b.s0, *u = row(residual, w.residual, n, b.s0);
        T* r = out + n * w.out.n + b.s0;
        prefetch_row(p, w.x, place.channel, length);
        if (u != nullptr) prefetch_row(u, w.residual, place.channel, length);
        each_output(r, length, streams, [&](int64_t i, int lanes) TSBN_LAMBDA {
          const V d = load_up_to(p + i, lanes, center) - center;
          const V z = preactivation<Act, T>(d, scale, shift, u, i, lanes);
          write(r + i, lanes, act.value(z), streams);
        });
      }
    });
  }

  template <template <class> class Activation, class Bool>
  static void backward_rows(const Work& w, int64_t group, int64_t chunk, Bool streams) {
    using Act = Activation<V>;
    const Act act = formula<Act, V>(w.activation, w.slope);
    each_slab_block(w, group, chunk, [&](const Block& b, int64_t slab) TSBN_LAMBDA {
      const Before<V> z = before<Act>(w, slab);
      const V scale = factor(w.vectors.scale, slab), shift = factor(w.vectors.shift, slab),
              dy_scale = factor(w.vectors.dy_scale, slab);
      const Place place(w, slab);
      const T *x = slab_of(w.x, place), *dy = slab_of(w.dy, place);
      const T* residual = Act::kPlain ? nullptr : slab_of(w.residual, place);
      T *out = slab_of(w.out, place), *dresidual = Act::kPlain ? nullptr : slab_of(w.dresidual, place);
      const int64_t length = b.s1 - b.s0;
      const Samples samples = w.samples();
      for (int64_t index = b.n1; index-- > b.n0;) {
        const int64_t n = samples[index];
        const T *p = x + n * w.x.n + b.s0, *q = dy + n * w.dy.n + b.s0, *u = row(residual, w.residual, n, b.s0);
        T *r = row(out, w.out, n, b.s0), *du = row(dresidual, w.dresidual, n, b.s0);
        prefetch_row(p, w.x, place.channel, length);
        prefetch_row(q, w.dy, place.channel, length);
        if (u != nullptr) prefetch_row(u, w.residual, place.channel, length);
        each_output(Act::kPlain || r != nullptr ? r : du, length, streams, [&](int64_t i, int lanes) TSBN_LAMBDA {
          const auto [d, g] = gradient(act, z, p, q, u, i, lanes);
          if (Act::kPlain || r != nullptr) {
            V v = Act::kPlain || w.training ? d * scale + shift : V{};
            v += g * dy_scale;
            write(r + i, lanes, v, streams);
          }
          if (du != nullptr) write(du + i, lanes, g, streams);
        });
      }
    });
  }

  static void finish_shared(const Work& w, int64_t group, int64_t chunk) {
    const V center = factor(w.vectors.center, group), scale = factor(w.vectors.scale, group),
            shift = factor(w.vectors.shift, group);
    const Place place(w, group);
    const T* x = slab_of(w.x, place);
    const A* all_h = h_of(w, place);
    T* out = slab_of(w.out, place);
    for (int64_t index = w.partition.last_block(chunk); index-- > w.partition.first_block(chunk);) {
      const Block b = w.partition.block(index);
      for (int64_t n = b.n1; n-- > b.n0;) {
        const T* p = x + n * w.x.n + b.s0;
        const A* h = all_h + n * w.out.n + b.s0;
        T* r = out + n * w.out.n + b.s0;
        each_output(r, b.s1 - b.s0, w.stream, [&](int64_t i, int lanes) TSBN_LAMBDA {
          V v = load_up_to(h + i, lanes, V{});
          if (w.training) v += (load_up_to(p + i, lanes, center) - center) * scale + shift;
          write(r + i, lanes, v, w.stream);
        });
      }
    }
  }

  static void double_sums(const Work& w, int64_t group, int64_t chunk, double* partial, void*) {
    const V center = factor(w.vectors.center, group);
    const Place place(w, group);
    const T *x = slab_of(w.x, place), *dy = slab_of(w.dy, place), *ddx = slab_of(w.residual, place);
    for (int k = 0; k < kDoubleSums; ++k) partial[k] = 0;
    for (int64_t index = w.partition.first_block(chunk); index < w.partition.last_block(chunk); ++index) {
      const Block b = w.partition.block(index);
      V sums[kDoubleSums][kUnroll] = {};
      for (int64_t n = b.n0; n < b.n1; ++n) {
        const T *p = row(x, w.x, n, b.s0), *q = row(dy, w.dy, n, b.s0), *u = row(ddx, w.residual, n, b.s0);
        each_vector(b.s1 - b.s0, n, [&](int64_t i, int lanes, int64_t j) TSBN_LAMBDA {
          for (const T* read : {p, q, u}) prefetch_ahead<kAhead>(read + i);
          const V d = load_up_to(p + i, lanes, center) - center, g = load_up_to(q + i, lanes, V{}),
                  v = load_up_to(u + i, lanes, V{});
          sums[0][j] += v;
          sums[1][j] += g;
          sums[2][j] += v * d;
          sums[3][j] += g * d;
          sums[4][j] += v * g;
        });
      }
      for (int k = 0; k < kDoubleSums; ++k) partial[k] += Sums::total(sums[k]);
    }
  }

  static void double_backward(const Work& w, int64_t group, int64_t chunk) {
    each_slab_block(w, group, chunk, [&](const Block& b, int64_t slab) TSBN_LAMBDA {
      const V center = factor(w.vectors.center, slab);
      V f[kDoubleFactors];
      for (int k = 0; k < kDoubleFactors; ++k) f[k] = factor(w.vectors.factors, k * w.T * w.C + slab);
      const Place place(w, slab);
      const T *x = slab_of(w.x, place), *dy = slab_of(w.dy, place), *ddx = slab_of(w.residual, place);
      T *out = slab_of(w.out, place), *ddy = slab_of(w.dresidual, place);
      for (int64_t n = b.n1; n-- > b.n0;) {
        const T *p = row(x, w.x, n, b.s0), *q = row(dy, w.dy, n, b.s0), *u = row(ddx, w.residual, n, b.s0);
        T *r = row(out, w.out, n, b.s0), *du = row(ddy, w.dresidual, n, b.s0);
        each_output(r, b.s1 - b.s0, w.stream, [&](int64_t i, int lanes) TSBN_LAMBDA {
          const V d = load_up_to(p + i, lanes, center) - center, g = load_up_to(q + i, lanes, V{}),
                  v = load_up_to(u + i, lanes, V{});
          write(du + i, lanes, v * f[0] + (d * f[1] + f[2]), w.stream);
          write(r + i, lanes, v * f[3] + g * f[4] + (d * f[5] + f[6]), w.stream);
        });
      }
    });
  }

  template <template <class> class Activation>
  static void forward(const Work& w, int64_t group, int64_t chunk) {
    with_streaming<Activation<V>>(w.stream, [&](auto streams) { forward_rows<Activation>(w, group, chunk, streams); });
  }
  template <template <class> class Activation>
  static void backward(const Work& w, int64_t group, int64_t chunk) {
    with_streaming<Activation<V>>(w.stream, [&](auto streams) { backward_rows<Activation>(w, group, chunk, streams); });
  }
};
