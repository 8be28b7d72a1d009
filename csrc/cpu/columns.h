// Columns family: the channels of a position are contiguous (channels_last, [N,C]). All channels of a task in a group.
// Included inside an instruction set's namespace, after simd.h.

template <class T>
struct Columns {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

  static T* slab(const Operand& o, int64_t task) { return static_cast<T*>(o.data) + task * o.t; }

  // Calls f(c, lane_count) for every vector of C channels.
  template <class Function>
  static TSBN_INLINE void each_vector(int64_t C, Function f) {
    int64_t c = 0;
    for (; c + L <= C; c += L) f(c, L);
    if (c < C) f(c, int(C - c));
  }

  template <int k> struct Positions { static constexpr int count = k; };

  // Calls f(n, s, Positions<k>) for k adjacent positions at once: they share the loads of the channels' vectors.
  template <class Function>
  static TSBN_INLINE void each_position(const Block& b, Function f) {
    for (int64_t n = b.n0; n < b.n1; ++n) {
      int64_t s = b.s0;
      for (; s + 4 <= b.s1; s += 4) f(n, s, Positions<4>{});
      for (; s < b.s1; ++s) f(n, s, Positions<1>{});
    }
  }
  // The two sums of each channel and the origin they are taken around, padded to whole registers.
  struct Scratch {
    A *first, *second, *shift;
    int64_t padded;
    Scratch(void* memory, int64_t C) : padded((C + L - 1) / L * L) {
      first = static_cast<A*>(memory);
      second = first + padded;
      shift = second + padded;
      for (int64_t c = 0; c < padded; ++c) shift[c] = 0;
    }
    template <class Values>
    void set_shift(int64_t C, Values values) {
      for (int64_t c = 0; c < C; ++c) shift[c] = A(values(c));
      for (int64_t c = 0; c < padded; c += L) store(shift + c, rounded<T>(load(shift + c)));
    }
    void clear_sums() {
      for (int64_t c = 0; c < padded; ++c) first[c] = second[c] = 0;
    }
  };

  static void add_block(const Work& w, const T* x, const Block& b, Scratch& scratch) {
    scratch.clear_sums();
    each_position(b, [&](int64_t n, int64_t s, auto positions) TSBN_LAMBDA {
      const T* p = x + n * w.x.n + s * w.x.s;
      each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
        const V origin = load(scratch.shift + c);
        V sum{}, squares{};
        for (int j = 0; j < positions.count; ++j) {
          const V d = load_up_to(p + j * w.x.s + c, lanes, origin) - origin;
          sum += d;
          squares += d * d;
        }
        store(scratch.first + c, load(scratch.first + c) + sum);
        store(scratch.second + c, load(scratch.second + c) + squares);
      });
    });
  }

  // mean, m2 of the block just added; true where a shift was too far off (see Rows::moments).
  static bool block_moments(const Scratch& k, int64_t C, double size, double* mean, double* m2) {
    const double inverse = 1 / size;
    int64_t far = 0;  // a count, not a flag: the loop stays a vector loop
    for (int64_t c = 0; c < C; ++c) {
      const double sum = k.first[c], offset = sum * inverse;
      mean[c] = k.shift[c] + offset;
      m2[c] = k.second[c] - sum * offset;
      far += is_far(offset, m2[c] * inverse);
    }
    return far > 0;
  }

  static void moments(const Work& w, int64_t task, int64_t chunk, double* partial, void* memory) {
    constexpr int64_t kFew = 8;
    const T* x = slab(w.x, task);
    Scratch k(memory, w.C);
    double *mean = partial, *m2 = partial + w.C;
    double *block_mean = reinterpret_cast<double*>(k.shift + k.padded), *block_m2 = block_mean + w.C;
    const int64_t begin = w.partition.first_block(chunk), end = w.partition.last_block(chunk);

    Block b = w.partition.block(begin);
    const Block few{b.n0, b.n0 + 1, b.s0, b.s1 - b.s0 < kFew ? b.s1 : b.s0 + kFew};
    add_block(w, x, few, k);
    k.set_shift(w.C, [&](int64_t c) TSBN_LAMBDA { return k.first[c] / A(few.positions()); });
    add_block(w, x, b, k);
    double count = double(b.positions());
    if (block_moments(k, w.C, count, mean, m2)) {
      k.set_shift(w.C, [&](int64_t c) TSBN_LAMBDA { return mean[c]; });
      add_block(w, x, b, k);
      block_moments(k, w.C, count, mean, m2);
    }
    for (int64_t index = begin + 1; index < end; ++index) {
      b = w.partition.block(index);
      const double size = double(b.positions());
      k.set_shift(w.C, [&](int64_t c) TSBN_LAMBDA { return mean[c]; });
      add_block(w, x, b, k);
      block_moments(k, w.C, size, block_mean, block_m2);
      for (int64_t c = 0; c < w.C; ++c) merge_moments(mean[c], m2[c], count, block_mean[c], block_m2[c], size);
      count += size;
    }
  }

  static void products(const Work& w, int64_t task, int64_t chunk, double* partial, void* memory) {
    const T *x = slab(w.x, task), *dy = slab(w.dy, task);
    const A* center = static_cast<const A*>(w.vectors.center) + task * w.C;
    Scratch k(memory, w.C);
    for (int64_t c = 0; c < 2 * w.C; ++c) partial[c] = 0;
    for (int64_t index = w.partition.first_block(chunk); index < w.partition.last_block(chunk); ++index) {
      k.clear_sums();
      each_position(w.partition.block(index), [&](int64_t n, int64_t s, auto positions) TSBN_LAMBDA {
        const T *p = x + n * w.x.n + s * w.x.s, *q = dy + n * w.dy.n + s * w.dy.s;
        each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
          const V origin = load_up_to(center + c, lanes, V{});
          V first{}, second{};
          for (int j = 0; j < positions.count; ++j) {
            const V g = load_up_to(q + j * w.dy.s + c, lanes, V{});
            first += g;
            second += g * (load_up_to(p + j * w.x.s + c, lanes, origin) - origin);
          }
          store(k.first + c, load(k.first + c) + first);
          store(k.second + c, load(k.second + c) + second);
        });
      });
      for (int64_t c = 0; c < w.C; ++c) {
        partial[c] += k.first[c];
        partial[w.C + c] += k.second[c];
      }
    }
  }

  // Blocks are walked backwards: the reduction has just left the last ones in the cache.
  template <bool kWithDy, bool kStream>
  static void apply(const Work& w, int64_t task, int64_t chunk) {
    const T* x = slab(w.x, task);
    const T* dy = kWithDy ? slab(w.dy, task) : nullptr;
    T* out = slab(w.out, task);
    const auto vector = [&](const void* v) TSBN_LAMBDA { return static_cast<const A*>(v) + task * w.C; };
    const A *center = vector(w.vectors.center), *scale = vector(w.vectors.scale), *shift = vector(w.vectors.shift);
    const A* dy_scale = kWithDy ? vector(w.vectors.dy_scale) : nullptr;
    for (int64_t index = w.partition.last_block(chunk); index-- > w.partition.first_block(chunk);) {
      each_position(w.partition.block(index), [&](int64_t n, int64_t s, auto positions) TSBN_LAMBDA {
        const T* p = x + n * w.x.n + s * w.x.s;
        const T* q = kWithDy ? dy + n * w.dy.n + s * w.dy.s : nullptr;
        T* r = out + n * w.out.n + s * w.out.s;
        each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
          const V origin = load_up_to(center + c, lanes, V{}), factor = load_up_to(scale + c, lanes, V{}),
                  offset = load_up_to(shift + c, lanes, V{});
          const V dy_factor = kWithDy ? load_up_to(dy_scale + c, lanes, V{}) : V{};
          for (int j = 0; j < positions.count; ++j) {
            V v = (load_up_to(p + j * w.x.s + c, lanes, origin) - origin) * factor + offset;
            if constexpr (kWithDy) v += load_up_to(q + j * w.dy.s + c, lanes, V{}) * dy_factor;
            T* target = r + j * w.out.s + c;
            if (lanes < L) store_first(target, lanes, v);
            else if constexpr (kStream) stream(target, v);
            else store(target, v);
          }
        });
      });
    }
    if constexpr (kStream) stream_fence();
  }

  static void affine(const Work& w, int64_t task, int64_t chunk) {
    w.stream ? apply<false, true>(w, task, chunk) : apply<false, false>(w, task, chunk);
  }
  static void affine_with_dy(const Work& w, int64_t task, int64_t chunk) {
    w.stream ? apply<true, true>(w, task, chunk) : apply<true, false>(w, task, chunk);
  }
  static constexpr SlabKernels kernels{moments, products, affine, affine_with_dy};
};
