// Layer norm of rows no longer than a vector: L rows at once, transposed, so that a lane is a row.
// Included inside an instruction set's namespace, after layer_norm_rows.h.

template <class T>
struct LayerTiles {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

  // The place of up to L rows of D values in an operand.
  template <class P>
  struct Rows {
    P* first;  // nullptr: there is no such operand
    int64_t stride, D;
    int count;

    // Calls f(offset in a tile of whole rows, pointer, lane_count); rows that follow each other are one.
    template <class Function>
    TSBN_INLINE void each_vector(Function f) const {
      if (stride == D) LayerRows<T>::each_vector(0, count * D, [&](int64_t i, int lanes) TSBN_LAMBDA { f(i, first + i, lanes); });
      else for (int j = 0; j < count; ++j) f(j * D, first + j * stride, int(D));
    }
  };

  struct Tile {
    V columns[L];  // of each value of a row: a lane is a row

    // Lanes without a row are zeros.
    TSBN_INLINE void load(const Rows<const T>& rows) {
      A values[L * L + L];
      rows.each_vector([&](int64_t i, const T* p, int lanes) TSBN_LAMBDA { store(values + i, load_up_to(p, lanes, V{})); });
      A* turned = reinterpret_cast<A*>(columns);
      if (rows.count < L) {
        for (int64_t d = 0; d < rows.D; ++d) columns[d] = V{};
      }
      for (int j = 0; j < rows.count; ++j) {
        for (int64_t d = 0; d < rows.D; ++d) turned[d * L + j] = values[j * rows.D + d];
      }
    }
    TSBN_INLINE void store_to(const Rows<T>& rows) const {
      A values[L * L + L];
      const A* turned = reinterpret_cast<const A*>(columns);
      for (int64_t d = 0; d < rows.D; ++d) {
        for (int j = 0; j < L; ++j) values[j * rows.D + d] = turned[d * L + j];
      }
      rows.each_vector([&](int64_t i, T* p, int count) TSBN_LAMBDA {
        store_up_to(p, count, LayerTiles::load_lanes(values + i));
      });
    }
  };
  static TSBN_INLINE V load_lanes(const A* lanes) { return load_bits<V>(lanes); }

  // Calls f(n, s, row_count) for the tiles of the blocks of a group's chunk, and done() after each block.
  template <class Function, class Done>
  static TSBN_INLINE void each_tile(const Work& w, int64_t group, int64_t chunk, Function f, Done done) {
    const Partition& cut = w.cut_of(group);
    const Samples samples = w.samples();
    for (int64_t index = cut.first_block(chunk); index < cut.last_block(chunk); ++index) {
      const Block b = cut.block(index);
      for (int64_t n = b.n0; n < b.n1; ++n) {
        for (int64_t s = b.s0; s < b.s1; s += L) f(samples[n], s, b.s1 - s < L ? int(b.s1 - s) : L);
      }
      done();
    }
  }

  template <class P>
  static TSBN_INLINE Rows<P> rows_of(const Work& w, const Operand& o, int64_t task, int64_t n, int64_t s, int count) {
    return {LayerRows<T>::template at<P>(o, task, n, s), o.s, w.C, count};
  }
  static TSBN_INLINE V statistic(const Operand& o, int64_t task, int64_t n, int64_t s, int count) {
    A lanes[L] = {};
    for (int j = 0; j < count; ++j) lanes[j] = *LayerRows<T>::template at<A>(o, task, n, s + j);
    return load_lanes(lanes);
  }
  static TSBN_INLINE void store_statistic(const Operand& o, int64_t task, int64_t n, int64_t s, int count, V values) {
    for (int j = 0; j < count; ++j) *LayerRows<T>::template at<A>(o, task, n, s + j) = values[j];
  }

  static void forward(const Work& w, int64_t group, int64_t chunk, void*) {
    const int64_t D = w.C;
    const A inverse = A(1) / A(D), eps = A(w.eps);
    const A *gates = static_cast<const A*>(w.vectors.gate), *biases = static_cast<const A*>(w.vectors.bias);
    each_tile(w, group, chunk, [&](int64_t n, int64_t s, int count) TSBN_LAMBDA {
      Tile x, y;
      x.load(rows_of<const T>(w, w.x, group, n, s, count));
      if (w.residual.data != nullptr) {
        y.load(rows_of<const T>(w, w.residual, group, n, s, count));
        for (int64_t d = 0; d < D; ++d) x.columns[d] = rounded<T>(x.columns[d] + y.columns[d]);
        x.store_to(rows_of<T>(w, w.sum, group, n, s, count));
      }
      V origin{}, offset{}, squares{}, rstd{};
      if (!w.rms) {
        for (int64_t d = 0; d < D; ++d) origin += x.columns[d];
        origin *= inverse;
      }
      for (int64_t d = 0; d < D; ++d) {
        x.columns[d] -= origin;
        offset += x.columns[d];
        squares += x.columns[d] * x.columns[d];
      }
      offset = w.rms ? V{} : offset * inverse;
      const V var = squares * inverse - offset * offset + eps;
      for (int j = 0; j < L; ++j) rstd[j] = 1 / Coefficients<T>::root(var[j]);
      if (!w.rms) store_statistic(w.mean, group, n, s, count, origin + offset);
      store_statistic(w.rstd, group, n, s, count, rstd);
      for (int64_t k = group; k < group + w.fan(); ++k) {
        for (int64_t d = 0; d < D; ++d) {
          y.columns[d] = (x.columns[d] - offset) * rstd * gates[k * D + d] + (biases == nullptr ? A(0) : biases[k * D + d]);
        }
        y.store_to(rows_of<T>(w, w.out, k, n, s, count));
      }
    }, [] {});
  }

  // `partial` and the sums in `scratch` are those of LayerRows, but each sum has a lane for each row of a tile.
  template <bool kShared>
  static void backward(const Work& w, int64_t group, int64_t chunk, double* partial, void* scratch) {
    const int64_t D = w.C, fan = kShared ? w.T : 1, sums = partial == nullptr ? 0 : 2 * D * fan;
    const A inverse = A(1) / A(D);
    const A* gates = static_cast<const A*>(w.vectors.gate) + group * D;
    A* lanes = static_cast<A*>(scratch);
    for (int64_t i = 0; i < sums; ++i) partial[i] = 0;
    for (int64_t i = 0; i < sums * L; ++i) lanes[i] = 0;
    each_tile(w, group, chunk, [&](int64_t n, int64_t s, int count) TSBN_LAMBDA {
      Tile x, dy, dz;
      x.load(rows_of<const T>(w, w.x, group, n, s, count));
      const V mean = w.rms ? V{} : statistic(w.mean, group, n, s, count), rstd = statistic(w.rstd, group, n, s, count);
      for (int64_t d = 0; d < D; ++d) x.columns[d] = (x.columns[d] - mean) * rstd, dz.columns[d] = V{};
      for (int64_t k = 0; k < fan; ++k) {
        dy.load(rows_of<const T>(w, w.dy, group + k, n, s, count));
        A *dbias = lanes + 2 * k * D * L, *dweight = dbias + D * L;
        for (int64_t d = 0; d < D; ++d) {
          dz.columns[d] += dy.columns[d] * gates[k * D + d];
          if (partial == nullptr) continue;
          store(dbias + d * L, load_lanes(dbias + d * L) + dy.columns[d]);
          store(dweight + d * L, load_lanes(dweight + d * L) + dy.columns[d] * x.columns[d]);
        }
      }
      if (w.out.data == nullptr) return;
      V dz_mean{}, dz_xhat_mean{};
      for (int64_t d = 0; d < D; ++d) {
        dz_mean += dz.columns[d];
        dz_xhat_mean += dz.columns[d] * x.columns[d];
      }
      dz_mean = w.rms ? V{} : dz_mean * inverse;
      dz_xhat_mean *= inverse;
      if (w.residual.data != nullptr) dy.load(rows_of<const T>(w, w.residual, group, n, s, count));
      for (int64_t d = 0; d < D; ++d) {
        dz.columns[d] = ((dz.columns[d] - dz_mean) - x.columns[d] * dz_xhat_mean) * rstd;
        if (w.residual.data != nullptr) dz.columns[d] += dy.columns[d];
      }
      dz.store_to(rows_of<T>(w, w.out, group, n, s, count));
    }, [&]() TSBN_LAMBDA {
      for (int64_t i = 0; i < sums; ++i) {
        partial[i] += sum_of_lanes(load_lanes(lanes + i * L));
        store(lanes + i * L, V{});
      }
    });
  }
};
