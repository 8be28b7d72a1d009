// Layer norm: each row of D = C contiguous values has statistics of its own. A row is a position of a Work.
// Included inside an instruction set's namespace, after prefetch.h.

// For the rows that are gone through together: unrolled, as their sums must lie in registers.
#define TSBN_EACH_ROW(j) _Pragma("GCC unroll 4") for (int j = 0; j < count; ++j)

template <class T>
struct LayerRows {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;
  static constexpr int kTogether = L == TSBN_VECTOR_BYTES / 4 && TSBN_VECTOR_BYTES == 64 ? kRowsTogether : kRowsTogether / 2;
  static constexpr int64_t kPiece = 64 * L;  // bounds the terms of one fp32 sum

  static constexpr int64_t kAhead = 8192;

  static int64_t padded(int64_t D) { return (D + L - 1) / L * L; }

  // The first value of a row; nullptr where there is no such operand.
  template <class P = T>
  static TSBN_INLINE P* at(const Operand& o, int64_t task, int64_t n, int64_t s) {
    return o.data == nullptr ? nullptr : static_cast<P*>(o.data) + task * o.t + n * o.n + s * o.s;
  }

  // Calls f(i, lane_count) for every vector of the values [begin, end).
  template <class Function>
  static TSBN_INLINE void each_vector(int64_t begin, int64_t end, Function f) {
    int64_t i = begin;
    for (; i + L <= end; i += L) f(i, L);
    if (i < end) f(i, int(end - i));
  }

  // total[k] = sum over the vectors of what f(i, lane_count, sums) adds to sums[k].
  template <int count, class Function>
  static TSBN_INLINE void sum_vectors(int64_t length, double (&total)[count], Function f) {
    for (double& t : total) t = 0;
    for (int64_t begin = 0; begin < length; begin += kPiece) {
      V sums[count] = {};
      each_vector(begin, length < begin + kPiece ? length : begin + kPiece,
                  [&](int64_t i, int lanes) TSBN_LAMBDA { f(i, lanes, sums); });
      for (int k = 0; k < count; ++k) total[k] += sum_of_lanes(sums[k]);
    }
  }

  // A row of the accumulate type, of whole registers, around its mean.
  static void centred_moments(const A* row, int64_t width, A origin, double (&moments)[2]) {
    sum_vectors(width, moments, [&](int64_t i, int, V* sums) TSBN_LAMBDA {
      const V d = load(row + i) - origin;
      sums[0] += d;
      sums[1] += d * d;
    });
  }

  // `count` rows, `step` rows apart: x is read once, into `rows` in the accumulate type, and summed around the mean of its first few
  // values; again around its own mean where that was too far off. So |mean| >> std cancels nothing.
  template <int count>
  static TSBN_INLINE void forward_rows(const Work& w, int64_t group, int64_t n, int64_t s, int64_t step, A* rows) {
    const int64_t D = w.C, width = padded(D), x_stride = w.x.s * step, y_stride = w.out.s * step;
    const bool streams = w.stream;
    const T *x = at(w.x, group, n, s), *residual = at(w.residual, group, n, s);
    T* sum = at(w.sum, group, n, s);
    const auto read = [&](int j, int64_t i, int lanes, V fill) TSBN_LAMBDA {
      const V v = load_up_to(x + j * x_stride + i, lanes, fill);
      return residual == nullptr ? v : rounded<T>(v + load_up_to(residual + j * x_stride + i, lanes, V{}));
    };
    V origin[count] = {};
    if (!w.rms) {
      const int few = D < L ? int(D) : L;
      TSBN_EACH_ROW(j) origin[j] = rounded<T>(V{} + A(sum_of_lanes(read(j, 0, few, V{})) / few));
    }
    double total[2 * count];
    sum_vectors(D, total, [&](int64_t i, int lanes, V* sums) TSBN_LAMBDA {
      TSBN_EACH_ROW(j) {
        prefetch_ahead<kAhead>(x + j * x_stride + i);
        if (residual != nullptr) prefetch_ahead<kAhead>(residual + j * x_stride + i);
        const V v = read(j, i, lanes, origin[j]);
        if (residual != nullptr) write(sum + j * x_stride + i, lanes, v, streams);
        store(rows + j * width + i, v);
        const V d = v - origin[j];
        sums[j] += d;
        sums[count + j] += d * d;
      }
    });
    V scale[count], shift[count];  // xhat = (x - origin) * scale + shift
    TSBN_EACH_ROW(j) {
      double moments[2] = {total[j], total[count + j]};
      double offset = w.rms ? 0 : moments[0] / double(D), var = moments[1] / double(D) - offset * offset;
      if (is_far(offset, var)) {
        origin[j] = V{} + A(double(origin[j][0]) + offset);
        for (int64_t i = D; i < width; ++i) rows[j * width + i] = origin[j][0];
        centred_moments(rows + j * width, width, origin[j][0], moments);
        offset = moments[0] / double(D);
        var = moments[1] / double(D) - offset * offset;
      }
      const A rstd = A(1 / __builtin_sqrt(var + w.eps));
      if (!w.rms) *at<A>(w.mean, group, n, s + j * step) = A(double(origin[j][0]) + offset);
      *at<A>(w.rstd, group, n, s + j * step) = rstd;
      scale[j] = V{} + rstd;
      shift[j] = V{} - A(offset * rstd);
    }
    for (int64_t k = 0; k < w.fan(); ++k) {
      const A* gate = static_cast<const A*>(w.vectors.gate) + (group + k) * D;
      const A* bias = w.vectors.bias == nullptr ? nullptr : static_cast<const A*>(w.vectors.bias) + (group + k) * D;
      T* y = at(w.out, group + k, n, s);
      each_vector(0, D, [&](int64_t i, int lanes) TSBN_LAMBDA {
        const V g = load_up_to(gate + i, lanes, V{});
        const V b = bias == nullptr ? V{} : load_up_to(bias + i, lanes, V{});
        TSBN_EACH_ROW(j) {
          const V xhat = (load(rows + j * width + i) - origin[j]) * scale[j] + shift[j];
          write(y + j * y_stride + i, lanes, xhat * g + b, streams);
        }
      });
    }
  }

  // Two sums over rows for each task of a group: of dy, and of dy * xhat. Each is padded to whole registers.
  struct Sums {
    A* values;
    int64_t width;
    TSBN_INLINE A* dbias(int64_t k) const { return values + 2 * k * width; }
    TSBN_INLINE A* dweight(int64_t k) const { return values + (2 * k + 1) * width; }
    void clear(int64_t fan) const {
      for (int64_t i = 0; i < 2 * width * fan; ++i) values[i] = 0;
    }
    void add_to(double* partial, int64_t D, int64_t fan) const {
      for (int64_t k = 0; k < fan; ++k) {
        double* total = partial + 2 * D * k;
        for (int64_t i = 0; i < D; ++i) {
          total[i] += dbias(k)[i];
          total[D + i] += dweight(k)[i];
        }
      }
    }
  };

  // `count` rows of dx, `step` rows apart, which share the loads and stores of `sums` (whose values may be nullptr). Where x is
  // shared, `rows` hold dz, the sum over the tasks; else it is made again, as x is, of what the cache holds.
  template <int count, bool kShared>
  static TSBN_INLINE void backward_rows(const Work& w, int64_t group, int64_t n, int64_t s, int64_t step, A* rows,
                                        const Sums& sums) {
    const int64_t D = w.C, width = padded(D), fan = kShared ? w.T : 1;
    const int64_t x_stride = w.x.s * step, dy_stride = w.dy.s * step, dy_task = w.dy.t;
    const bool streams = w.stream;
    const T *x = at(w.x, group, n, s), *dy = at(w.dy, group, n, s), *ds = at(w.residual, group, n, s);
    T* dx = at(w.out, group, n, s);
    const A* gates = static_cast<const A*>(w.vectors.gate) + group * D;
    V mean[count] = {}, rstd[count];
    TSBN_EACH_ROW(j) {
      if (!w.rms) mean[j] += *at<A>(w.mean, group, n, s + j * step);
      rstd[j] = V{} + *at<A>(w.rstd, group, n, s + j * step);
    }
    const auto deviation = [&](int j, int64_t i, int lanes) TSBN_LAMBDA {
      return load_up_to(x + j * x_stride + i, lanes, mean[j]) - mean[j];
    };
    double total[2 * count];  // of dz, and of dz * (x - mean)
    sum_vectors(D, total, [&](int64_t i, int lanes, V* row_sums) TSBN_LAMBDA {
      V d[count], xhat[count], dz[count] = {};
      TSBN_EACH_ROW(j) {
        prefetch_ahead<kAhead>(x + j * x_stride + i);
        d[j] = deviation(j, i, lanes);
        xhat[j] = d[j] * rstd[j];
      }
      for (int64_t k = 0; k < fan; ++k) {
        const V gate = load_up_to(gates + k * D + i, lanes, V{});
        V first{}, second{};
        TSBN_EACH_ROW(j) {
          const T* p = dy + k * dy_task + j * dy_stride + i;
          prefetch_ahead<kAhead>(p);
          const V upstream = load_up_to(p, lanes, V{});
          dz[j] += gate * upstream;
          first += upstream;
          second += upstream * xhat[j];
        }
        if (sums.values != nullptr) {
          store(sums.dbias(k) + i, load(sums.dbias(k) + i) + first);
          store(sums.dweight(k) + i, load(sums.dweight(k) + i) + second);
        }
      }
      TSBN_EACH_ROW(j) {
        if (kShared) store(rows + j * width + i, dz[j]);
        row_sums[j] += dz[j];
        row_sums[count + j] += dz[j] * d[j];
      }
    });
    if (dx == nullptr) return;
    V dz_mean[count] = {}, scale[count];  // dx = rstd * (dz - mean(dz) - (x - mean) * scale)
    TSBN_EACH_ROW(j) {
      if (!w.rms) dz_mean[j] += A(total[j] / double(D));
      scale[j] = rstd[j] * rstd[j] * A(total[count + j] / double(D));
    }
    each_vector(0, D, [&](int64_t i, int lanes) TSBN_LAMBDA {
      const V gate = kShared ? V{} : load_up_to(gates + i, lanes, V{});
      TSBN_EACH_ROW(j) {
        const V dz = kShared ? load(rows + j * width + i) : gate * load_up_to(dy + j * dy_stride + i, lanes, V{});
        V v = ((dz - dz_mean[j]) - deviation(j, i, lanes) * scale[j]) * rstd[j];
        if (ds != nullptr) v += load_up_to(ds + j * x_stride + i, lanes, V{});
        write(dx + j * x_stride + i, lanes, v, streams);
      }
    });
  }

  template <int k> struct Count { static constexpr int value = k; };

  // Calls f(n, s, step, Count<k>) for k rows at once: they share the loads of the task's vectors. Adjacent rows of a sample,
  // or two samples of a row: the second is as many steps behind the first as they are apart.
  template <class Function>
  static TSBN_INLINE void each_rows(const Work& w, const Block& b, Function f) {
    const Samples samples = w.samples();
    int64_t n = b.n0;
    if (w.mixed() && w.S == 1) {
      for (; n + 2 <= b.n1; n += 2) f(samples[n], 0, samples[n + 1] - samples[n], Count<2>{});
    }
    for (; n < b.n1; ++n) {
      int64_t s = b.s0;
      for (; s + kTogether <= b.s1; s += kTogether) f(samples[n], s, 1, Count<kTogether>{});
      for (; s < b.s1; ++s) f(samples[n], s, 1, Count<1>{});
    }
  }

  static void forward(const Work& w, int64_t group, int64_t chunk, void* scratch) {
    A* rows = static_cast<A*>(scratch);
    const Partition& cut = w.cut_of(group);
    for (int64_t index = cut.first_block(chunk); index < cut.last_block(chunk); ++index) {
      each_rows(w, cut.block(index), [&](int64_t n, int64_t s, int64_t step, auto count) TSBN_LAMBDA {
        forward_rows<count.value>(w, group, n, s, step, rows);
      });
    }
  }

  template <bool kShared>
  static void backward(const Work& w, int64_t group, int64_t chunk, double* partial, void* scratch) {
    const int64_t D = w.C, width = padded(D), fan = kShared ? w.T : 1;
    A* rows = static_cast<A*>(scratch);
    const Sums sums{partial == nullptr ? nullptr : rows + kTogether * width, width};
    if (partial != nullptr) {
      for (int64_t i = 0; i < 2 * D * fan; ++i) partial[i] = 0;
    }
    const Partition& cut = w.cut_of(group);
    for (int64_t index = cut.first_block(chunk); index < cut.last_block(chunk); ++index) {
      if (partial != nullptr) sums.clear(fan);
      each_rows(w, cut.block(index), [&](int64_t n, int64_t s, int64_t step, auto count) TSBN_LAMBDA {
        backward_rows<count.value, kShared>(w, group, n, s, step, rows, sums);
      });
      if (partial != nullptr) sums.add_to(partial, D, fan);
    }
  }

  // A row of ddy and of the gradient of x. The cache holds what is read twice. With u = ddx, dz = dy * gate and
  // v = dy * (slope - gate * rstd * mean(u * xhat)), the formulas of tsbn_kernels/definition/layer_norm.py.
  static TSBN_INLINE void double_backward_row(const Work& w, int64_t task, int64_t n, int64_t s, const Sums& sums) {
    const int64_t D = w.C;
    const bool streams = w.stream;
    const T *x = at(w.x, task, n, s), *dy = at(w.dy, task, n, s), *ddx = at(w.residual, task, n, s);
    T *dx = at(w.out, task, n, s), *ddy = at(w.dresidual, task, n, s);
    const A *gates = static_cast<const A*>(w.vectors.factors) + task * D, *slopes = gates + w.T * D,
            *offsets = slopes + w.T * D;
    const A rstd = *at<A>(w.rstd, task, n, s);
    const V mean = w.rms ? V{} : V{} + *at<A>(w.mean, task, n, s);
    double total[7];  // of u, u * d, dz, dz * d, dy * slope, dy * slope * d and u * dz, with d = x - mean
    sum_vectors(D, total, [&](int64_t i, int lanes, V* sum) TSBN_LAMBDA {
      for (const T* read : {x, dy, ddx}) prefetch_ahead<kAhead>(read + i);
      const V d = load_up_to(x + i, lanes, mean) - mean, g = load_up_to(dy + i, lanes, V{}),
              u = load_up_to(ddx + i, lanes, V{}), dz = g * load_up_to(gates + i, lanes, V{}),
              of_slope = g * load_up_to(slopes + i, lanes, V{});
      sum[0] += u;
      sum[1] += u * d;
      sum[2] += dz;
      sum[3] += dz * d;
      sum[4] += of_slope;
      sum[5] += of_slope * d;
      sum[6] += u * dz;
    });
    for (double& t : total) t /= double(D);
    const double r = double(rstd), u_mean = w.rms ? 0 : total[0], u_xhat = total[1] * r, dz_mean = w.rms ? 0 : total[2],
                 dz_xhat = total[3] * r, dz_rest = r * (total[6] - u_mean * dz_mean - u_xhat * dz_xhat);
    const A along = A(r * u_xhat), first = A(u_mean), of_rest = A(r * dz_xhat),
            v_mean = w.rms ? A(0) : A(total[4] - r * u_xhat * total[2]),
            of_xhat = A(r * ((total[5] - r * u_xhat * total[3]) * r + dz_rest));
    each_vector(0, D, [&](int64_t i, int lanes) TSBN_LAMBDA {
      const V xhat = (load_up_to(x + i, lanes, mean) - mean) * rstd, g = load_up_to(dy + i, lanes, V{}),
              u = load_up_to(ddx + i, lanes, V{}), gate = load_up_to(gates + i, lanes, V{}),
              slope = load_up_to(slopes + i, lanes, V{});
      const V rest = (u - first) * rstd - xhat * along, v = g * (slope - gate * along);
      write(ddy + i, lanes, rest * gate + xhat * slope + load_up_to(offsets + i, lanes, V{}), streams);
      write(dx + i, lanes, (v - v_mean) * rstd - xhat * of_xhat - rest * of_rest, streams);
      store(sums.dbias(0) + i, load(sums.dbias(0) + i) + g * rest);
      store(sums.dweight(0) + i, load(sums.dweight(0) + i) + g * xhat);
    });
  }

  static void double_backward(const Work& w, int64_t task, int64_t chunk, double* partial, void* scratch) {
    const int64_t D = w.C;
    const Sums sums{static_cast<A*>(scratch), padded(D)};
    for (int64_t i = 0; i < kLayerSums * D; ++i) partial[i] = 0;
    for (int64_t index = w.partition.first_block(chunk); index < w.partition.last_block(chunk); ++index) {
      const Block b = w.partition.block(index);
      sums.clear(1);
      for (int64_t n = b.n0; n < b.n1; ++n) {
        for (int64_t s = b.s0; s < b.s1; ++s) double_backward_row(w, task, n, s, sums);
      }
      sums.add_to(partial, D, 1);
    }
  }
};
