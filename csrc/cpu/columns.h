// Columns family: the channels of a position are contiguous (channels_last, [N,C]). All channels of a task in a group.
// Included inside an instruction set's namespace, after prefetch.h.

template <class T>
struct Columns {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kAhead = 8192;

  // nullptr where there is no such operand.
  static T* slab_of(const Operand& o, int64_t task) {
    return o.data == nullptr ? nullptr : static_cast<T*>(o.data) + task * o.t;
  }
  // One task's values of a vector over [T*C].
  struct Factors {
    const A* values;
    Factors(const void* vector, const Work& w, int64_t task) : values(static_cast<const A*>(vector) + task * w.C) {}
    TSBN_INLINE V operator()(int64_t c, int lanes) const { return load_up_to(values + c, lanes, V{}); }
  };
  struct BeforeFactors {
    Factors center, scale, shift;
    BeforeFactors(const Work& w, int64_t task)
        : center(w.vectors.center, w, task), scale(w.vectors.z_scale, w, task), shift(w.vectors.z_shift, w, task) {}
    template <class Act>
    TSBN_INLINE Before<V> at(int64_t c, int lanes) const {
      if constexpr (Act::kPlain || Act::kInverts) return {center(c, lanes), V{}, V{}};
      else return {center(c, lanes), scale(c, lanes), shift(c, lanes)};
    }
  };

  // Calls f(c, lane_count) for every vector of C channels.
  template <class Function>
  static TSBN_INLINE void each_vector(int64_t C, Function f) {
    int64_t c = 0;
    for (; c + L <= C; c += L) f(c, L);
    if (c < C) f(c, int(C - c));
  }

  // Positions that are visited at once, as they share the loads of the channels' vectors. `in` tells where they lie in an
  // operand, the channels of position j at [j], and asks memory for what is visited later; of a missing operand, whose
  // slab is nullptr, it is not used.
  template <int k> struct Adjacent {  // of one sample
    static constexpr int count = k;
    int64_t n, s;
    template <class P> struct Places {
      P* first;
      int64_t step;
      TSBN_INLINE P* operator[](int j) const { return first + j * step; }
      TSBN_INLINE void prefetch(int j, int64_t c) const { prefetch_ahead<kAhead>(first + j * step + c); }
    };
    template <class P> TSBN_INLINE Places<P> in(P* slab, const Operand& o) const {
      return {slab == nullptr ? nullptr : slab + n * o.n + s * o.s, o.s};
    }
  };
  template <int k> struct OfSamples {  // the same one of several samples, which lie anywhere
    static constexpr int count = k;
    int64_t n[k], next[k], s;
    template <class P> struct Places {
      P *of[k], *later[k];
      TSBN_INLINE P* operator[](int j) const { return of[j]; }
      TSBN_INLINE void prefetch(int j, int64_t c) const {
        constexpr int64_t of_line = int64_t(kLine / sizeof(P));
        if (of_line <= L || c % of_line == 0) TSBN_ISA::prefetch(reinterpret_cast<const char*>(later[j] + c));
      }
    };
    template <class P> TSBN_INLINE Places<P> in(P* slab, const Operand& o) const {
      Places<P> places{};
      for (int j = 0; j < k && slab != nullptr; ++j) {
        places.of[j] = slab + n[j] * o.n + s * o.s;
        places.later[j] = slab + next[j] * o.n + s * o.s;
      }
      return places;
    }
  };

  // Calls f(positions) for four positions at once, and for single ones where there are fewer.
  template <class Function>
  static TSBN_INLINE void each_position(const Work& w, const Block& b, Function f) {
    const Samples samples = w.samples();
    int64_t index = b.n0;
    if (b.s1 - b.s0 < 4) {
      OfSamples<4> four{};
      for (; index + 4 <= b.n1; index += 4) {
        for (int j = 0; j < 4; ++j) {
          four.n[j] = samples[index + j];
          four.next[j] = samples[std::min(index + 4 + j, w.N - 1)];
        }
        for (four.s = b.s0; four.s < b.s1; ++four.s) f(four);
      }
    }
    for (; index < b.n1; ++index) {
      const int64_t n = samples[index];
      int64_t s = b.s0;
      for (; s + 4 <= b.s1; s += 4) f(Adjacent<4>{n, s});
      for (; s < b.s1; ++s) f(Adjacent<1>{n, s});
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
    each_position(w, b, [&](const auto& positions) TSBN_LAMBDA {
      const auto p = positions.in(x, w.x);
      each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
        const V origin = load(scratch.shift + c);
        V sum{}, squares{};
        for (int j = 0; j < positions.count; ++j) {
          const T* from = p[j] + c;
          p.prefetch(j, c);
          const V d = load_up_to(from, lanes, origin) - origin;
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
    constexpr int64_t kFew = 8;  // of one or two samples a mean may lie far from that of all
    const T* x = slab_of(w.x, task);
    Scratch k(memory, w.C);
    double *mean = partial, *m2 = partial + w.C;
    double *block_mean = reinterpret_cast<double*>(k.shift + k.padded), *block_m2 = block_mean + w.C;
    const Partition& cut = w.cut_of(task);
    const int64_t begin = cut.first_block(chunk), end = cut.last_block(chunk);

    Block b = cut.block(begin);
    const int64_t length = b.s1 - b.s0, samples = std::max<int64_t>(1, kFew / length);
    const Block few{b.n0, std::min(b.n1, b.n0 + samples), b.s0, b.s0 + std::min(length, kFew)};
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
      b = cut.block(index);
      const double size = double(b.positions());
      k.set_shift(w.C, [&](int64_t c) TSBN_LAMBDA { return mean[c]; });
      add_block(w, x, b, k);
      block_moments(k, w.C, size, block_mean, block_m2);
      for (int64_t c = 0; c < w.C; ++c) merge_moments(mean[c], m2[c], count, block_mean[c], block_m2[c], size);
      count += size;
    }
  }

  // Blocks of a shared x stay in the cache while each task's dy goes by, and so does their part of h.
  template <template <class> class Activation, bool kShared>
  static void products(const Work& w, int64_t group, int64_t chunk, double* partial, void* memory) {
    using Act = Activation<V>;
    const Act act = formula<Act, V>(w.activation, w.slope);
    const int64_t fan = kShared ? w.T : 1;
    Scratch sums(memory, w.C);
    for (int64_t c = 0; c < 2 * w.C * fan; ++c) partial[c] = 0;
    const Partition& cut = w.cut_of(group);
    for (int64_t index = cut.first_block(chunk); index < cut.last_block(chunk); ++index) {
      const Block b = cut.block(index);
      for (int64_t k = 0; k < fan; ++k) {
        const int64_t task = group + k;
        const BeforeFactors before(w, task);
        const T *x = slab_of(w.x, task), *dy = slab_of(w.dy, task);
        const T* residual = Act::kPlain ? nullptr : slab_of(w.residual, task);
        T* dresidual = kShared ? slab_of(w.dresidual, task) : nullptr;
        A* all_h = kShared ? static_cast<A*>(w.h) : nullptr;
        sums.clear_sums();
        each_position(w, b, [&](const auto& positions) TSBN_LAMBDA {
          const auto p = positions.in(x, w.x), q = positions.in(dy, w.dy), u = positions.in(residual, w.residual);
          const auto du = positions.in(dresidual, w.dresidual);
          const auto h = positions.in(all_h, w.out);
          each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
            const Before<V> z = before.template at<Act>(c, lanes);
            const V share = kShared ? before.scale(c, lanes) : V{};
            V first{}, second{};
            for (int j = 0; j < positions.count; ++j) {
              const T* added = residual == nullptr ? nullptr : u[j];
              if constexpr (!kShared) p.prefetch(j, c);
              q.prefetch(j, c);
              if (added != nullptr) u.prefetch(j, c);
              const auto [d, g] = gradient(act, z, p[j], q[j], added, c, lanes);
              first += g;
              second += g * d;
              if constexpr (kShared) {
                if (all_h != nullptr) {
                  A* target = h[j] + c;
                  store_up_to(target, lanes, (k == 0 ? V{} : load_up_to(target, lanes, V{})) + g * share);
                }
                if (dresidual != nullptr) write(du[j] + c, lanes, g, w.stream);
              }
            }
            store(sums.first + c, load(sums.first + c) + first);
            store(sums.second + c, load(sums.second + c) + second);
          });
        });
        double* total = partial + 2 * w.C * k;
        for (int64_t c = 0; c < w.C; ++c) {
          total[c] += sums.first[c];
          total[w.C + c] += sums.second[c];
        }
      }
    }
  }

  // Calls f(block, task) for the blocks of a chunk, and for each task that shares them. Blocks are walked backwards: the
  // reduction has just left the last ones in the cache.
  template <class Function>
  static TSBN_INLINE void each_task_block(const Work& w, int64_t group, int64_t chunk, Function f) {
    const Partition& cut = w.cut_of(group);
    for (int64_t index = cut.last_block(chunk); index-- > cut.first_block(chunk);) {
      const Block b = cut.block(index);
      for (int64_t k = 0; k < w.fan(); ++k) f(b, group + k);
    }
  }

  template <template <class> class Activation, class Bool>
  static void forward_blocks(const Work& w, int64_t group, int64_t chunk, Bool streams) {
    using Act = Activation<V>;
    const Act act = formula<Act, V>(w.activation, w.slope);
    each_task_block(w, group, chunk, [&](const Block& b, int64_t task) TSBN_LAMBDA {
      const Factors center(w.vectors.center, w, task), scale(w.vectors.scale, w, task), shift(w.vectors.shift, w, task);
      const T *x = slab_of(w.x, task), *residual = Act::kPlain ? nullptr : slab_of(w.residual, task);
      T* out = slab_of(w.out, task);
      each_position(w, b, [&](const auto& positions) TSBN_LAMBDA {
        const auto p = positions.in(x, w.x), u = positions.in(residual, w.residual);
        const auto r = positions.in(out, w.out);
        each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
          const V origin = center(c, lanes), factor = scale(c, lanes), offset = shift(c, lanes);
          for (int j = 0; j < positions.count; ++j) {
            const T *from = p[j] + c, *added = residual == nullptr ? nullptr : u[j];
            p.prefetch(j, c);
            if (added != nullptr) u.prefetch(j, c);
            const V d = load_up_to(from, lanes, origin) - origin;
            const V z = preactivation<Act, T>(d, factor, offset, added, c, lanes);
            write(r[j] + c, lanes, act.value(z), streams);
          }
        });
      });
    });
  }

  template <template <class> class Activation, class Bool>
  static void backward_blocks(const Work& w, int64_t group, int64_t chunk, Bool streams) {
    using Act = Activation<V>;
    const Act act = formula<Act, V>(w.activation, w.slope);
    each_task_block(w, group, chunk, [&](const Block& b, int64_t task) TSBN_LAMBDA {
      const BeforeFactors before(w, task);
      const Factors scale(w.vectors.scale, w, task), shift(w.vectors.shift, w, task),
          dy_scale(w.vectors.dy_scale, w, task);
      const T *x = slab_of(w.x, task), *dy = slab_of(w.dy, task);
      const T* residual = Act::kPlain ? nullptr : slab_of(w.residual, task);
      T *out = slab_of(w.out, task), *dresidual = Act::kPlain ? nullptr : slab_of(w.dresidual, task);
      each_position(w, b, [&](const auto& positions) TSBN_LAMBDA {
        const auto p = positions.in(x, w.x), q = positions.in(dy, w.dy), u = positions.in(residual, w.residual);
        const auto r = positions.in(out, w.out), du = positions.in(dresidual, w.dresidual);
        each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
          const Before<V> z = before.template at<Act>(c, lanes);
          const V factor = scale(c, lanes), offset = shift(c, lanes), dy_factor = dy_scale(c, lanes);
          for (int j = 0; j < positions.count; ++j) {
            const T* added = residual == nullptr ? nullptr : u[j];
            p.prefetch(j, c);
            q.prefetch(j, c);
            if (added != nullptr) u.prefetch(j, c);
            const auto [d, g] = gradient(act, z, p[j], q[j], added, c, lanes);
            if (Act::kPlain || out != nullptr) {
              V v = Act::kPlain || w.training ? d * factor + offset : V{};
              v += g * dy_factor;
              write(r[j] + c, lanes, v, streams);
            }
            if (dresidual != nullptr) write(du[j] + c, lanes, g, streams);
          }
        });
      });
    });
  }

  static void finish_shared(const Work& w, int64_t, int64_t chunk) {
    const Factors center(w.vectors.center, w, 0), scale(w.vectors.scale, w, 0), shift(w.vectors.shift, w, 0);
    for (int64_t index = w.partition.last_block(chunk); index-- > w.partition.first_block(chunk);) {
      each_position(w, w.partition.block(index), [&](const auto& positions) TSBN_LAMBDA {
        const auto p = positions.in(slab_of(w.x, 0), w.x), r = positions.in(slab_of(w.out, 0), w.out);
        const auto h = positions.in(static_cast<const A*>(w.h), w.out);
        each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
          const V origin = center(c, lanes), factor = scale(c, lanes), offset = shift(c, lanes);
          for (int j = 0; j < positions.count; ++j) {
            V v = load_up_to(h[j] + c, lanes, V{});
            if (w.training) v += (load_up_to(p[j] + c, lanes, origin) - origin) * factor + offset;
            write(r[j] + c, lanes, v, w.stream);
          }
        });
      });
    }
  }

  static void double_sums(const Work& w, int64_t group, int64_t chunk, double* partial, void* memory) {
    const Factors center(w.vectors.center, w, group);
    const T *x = slab_of(w.x, group), *dy = slab_of(w.dy, group), *ddx = slab_of(w.residual, group);
    const int64_t padded = (w.C + L - 1) / L * L;
    A* sums = static_cast<A*>(memory);
    for (int64_t i = 0; i < kDoubleSums * w.C; ++i) partial[i] = 0;
    for (int64_t index = w.partition.first_block(chunk); index < w.partition.last_block(chunk); ++index) {
      for (int64_t i = 0; i < kDoubleSums * padded; ++i) sums[i] = 0;
      each_position(w, w.partition.block(index), [&](const auto& positions) TSBN_LAMBDA {
        const auto p = positions.in(x, w.x), q = positions.in(dy, w.dy), u = positions.in(ddx, w.residual);
        each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
          const V origin = center(c, lanes);
          V total[kDoubleSums] = {};
          for (int j = 0; j < positions.count; ++j) {
            const T *from = p[j] + c, *upstream = q[j] + c, *second = u[j] + c;
            p.prefetch(j, c), q.prefetch(j, c), u.prefetch(j, c);
            const V d = load_up_to(from, lanes, origin) - origin, g = load_up_to(upstream, lanes, V{}),
                    v = load_up_to(second, lanes, V{});
            total[0] += v;
            total[1] += g;
            total[2] += v * d;
            total[3] += g * d;
            total[4] += v * g;
          }
          for (int k = 0; k < kDoubleSums; ++k) {
            A* sum = sums + k * padded + c;
            store(sum, load(sum) + total[k]);
          }
        });
      });
      for (int k = 0; k < kDoubleSums; ++k) {
        for (int64_t c = 0; c < w.C; ++c) partial[k * w.C + c] += sums[k * padded + c];
      }
    }
  }

  static void double_backward(const Work& w, int64_t group, int64_t chunk) {
    each_task_block(w, group, chunk, [&](const Block& b, int64_t task) TSBN_LAMBDA {
      const Factors center(w.vectors.center, w, task), factors(w.vectors.factors, w, task);
      const T *x = slab_of(w.x, task), *dy = slab_of(w.dy, task), *ddx = slab_of(w.residual, task);
      T *out = slab_of(w.out, task), *ddy = slab_of(w.dresidual, task);
      each_position(w, b, [&](const auto& positions) TSBN_LAMBDA {
        const auto p = positions.in(x, w.x), q = positions.in(dy, w.dy), u = positions.in(ddx, w.residual);
        const auto r = positions.in(out, w.out), du = positions.in(ddy, w.dresidual);
        each_vector(w.C, [&](int64_t c, int lanes) TSBN_LAMBDA {
          const V origin = center(c, lanes);
          V f[kDoubleFactors];
          for (int k = 0; k < kDoubleFactors; ++k) f[k] = factors(k * w.T * w.C + c, lanes);
          for (int j = 0; j < positions.count; ++j) {
            const T *from = p[j] + c, *upstream = q[j] + c, *second = u[j] + c;
            p.prefetch(j, c), q.prefetch(j, c), u.prefetch(j, c);
            const V d = load_up_to(from, lanes, origin) - origin, g = load_up_to(upstream, lanes, V{}),
                    v = load_up_to(second, lanes, V{});
            write(du[j] + c, lanes, v * f[0] + (d * f[1] + f[2]), w.stream);
            write(r[j] + c, lanes, v * f[3] + g * f[4] + (d * f[5] + f[6]), w.stream);
          }
        });
      });
    });
  }

  template <template <class> class Activation>
  static void forward(const Work& w, int64_t group, int64_t chunk) {
    with_streaming<Activation<V>>(w.stream,
                                  [&](auto streams) { forward_blocks<Activation>(w, group, chunk, streams); });
  }
  template <template <class> class Activation>
  static void backward(const Work& w, int64_t group, int64_t chunk) {
    with_streaming<Activation<V>>(w.stream,
                                  [&](auto streams) { backward_blocks<Activation>(w, group, chunk, streams); });
  }
};
