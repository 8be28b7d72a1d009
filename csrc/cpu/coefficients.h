// From sums over a slab to the statistics, the gradients of the parameters, and the factors that apply() uses.
// Included inside an instruction set's namespace, after elementary.h.

// The vectors never overlap; GCC gives up on a loop over this many pointers unless it is told so.
#define TSBN_NO_OVERLAP _Pragma("GCC ivdep")

template <class T>
struct Coefficients {
  using A = Acc<T>;
  using V = Vec<T>;
  static constexpr int L = kLanes<T>;

  static TSBN_INLINE float root(float v) { return __builtin_sqrtf(v); }
  static TSBN_INLINE double root(double v) { return __builtin_sqrt(v); }

  template <class Pointer> static A* vector(Pointer p) { return static_cast<A*>(const_cast<void*>(p)); }

  static void prepare(const Work& w, int64_t first, int64_t count) {
    if (w.vectors.weight != nullptr) gates(w, first, first + count);
    if (w.vectors.z_scale != nullptr) preactivation(w, first, first + count);
  }

  // gate = sigmoid(weight) and slope = gate * (1 - gate), both from e^-|weight|: neither cancels.
  static void gates(const Work& w, int64_t first, int64_t last) {
    const A* weight = vector(w.vectors.weight);
    A *gate = vector(w.vectors.gate), *slope = vector(w.vectors.slope);
    for (int64_t i = first; i < last; i += L) {
      const int lanes = last - i < L ? int(last - i) : L;
      const V g = load_up_to(weight + i, lanes, V{});
      const V e = exp_of(g < 0 ? g : -g), inverse = 1 / (1 + e);
      store_up_to(gate + i, lanes, g < 0 ? e * inverse : inverse);
      if (slope != nullptr) store_up_to(slope + i, lanes, e * inverse * inverse);
    }
  }

  static void preactivation(const Work& w, int64_t first, int64_t last) {
    const A *gate = vector(w.vectors.gate), *bias = vector(w.vectors.bias), *var = vector(w.vectors.var);
    A *scale = vector(w.vectors.z_scale), *shift = vector(w.vectors.z_shift);
    const A eps = A(w.eps);
    TSBN_NO_OVERLAP for (int64_t i = first; i < last; ++i) {
      scale[i] = gate[i] / root(var[i] + eps);
      shift[i] = bias == nullptr ? A(0) : bias[i];
    }
  }

  // total: mean, sum of squared deviations. The rounding error of the stored mean goes into the shift, unless a backward
  // must be able to compute the same z from what is stored.
  static void forward(const Work& w, int64_t group, const double* total) {
    const double positions = w.positions_of(group), inverse = positions > 0 ? 1 / positions : 0;
    for (int64_t k = 0; k < w.fan(); ++k) forward_of(w, group * w.channels() + k * w.C, total, inverse);
  }

  static void forward_of(const Work& w, int64_t first, const double* total, double inverse) {
    const int64_t channels = w.channels();
    const A *gate = vector(w.vectors.gate) + first, *bias = vector(w.vectors.bias);
    A *mean = vector(w.vectors.center) + first, *var = vector(w.vectors.var) + first,
      *scale = vector(w.vectors.scale) + first, *shift = vector(w.vectors.shift) + first;
    const double kept = w.activation == Activation::none ? 1 : 0;
    TSBN_NO_OVERLAP for (int64_t c = 0; c < channels; ++c) {
      mean[c] = A(total[c]);
      shift[c] = A((total[c] - double(mean[c])) * kept);
      var[c] = A(total[channels + c] * inverse);
    }
    const A eps = A(w.eps);
    TSBN_NO_OVERLAP for (int64_t c = 0; c < channels; ++c) {
      scale[c] = gate[c] / root(var[c] + eps);
      shift[c] = (bias == nullptr ? A(0) : bias[first + c]) - scale[c] * shift[c];
    }
  }

  // total, for each task of the group: sum g, sum g * (x - mean) of g = dy * act'(z).
  // dx = gate * rstd * (g - mean(g) - xhat * mean(g * xhat)); of a shared x, the sum of this over the tasks.
  static void backward(const Work& w, int64_t group, const double* total) {
    const int64_t channels = w.channels(), first = group * channels;
    const A inverse = A(1 / std::max(1.0, w.positions_of(group)));
    for (int64_t k = 0; k < w.fan(); ++k) backward_of(w, first + k * w.C, total + 2 * channels * k, inverse);
    add_tasks(w, first, channels);
  }

  static void add_tasks(const Work& w, int64_t first, int64_t channels) {
    A *scale = vector(w.vectors.scale) + first, *shift = vector(w.vectors.shift) + first;
    for (int64_t k = 1; k < w.fan(); ++k) {
      TSBN_NO_OVERLAP for (int64_t c = 0; c < channels; ++c) {
        scale[c] += scale[c + k * w.C];
        shift[c] += shift[c + k * w.C];
      }
    }
  }

  static void backward_of(const Work& w, int64_t first, const double* total, A inverse) {
    const int64_t channels = w.channels();
    const A *gate = vector(w.vectors.gate) + first, *slope = vector(w.vectors.slope) + first;
    const A* var = vector(w.vectors.var) + first;
    A *dweight = vector(w.vectors.dweight) + first, *dbias = vector(w.vectors.dbias) + first,
      *scale = vector(w.vectors.scale) + first, *shift = vector(w.vectors.shift) + first,
      *dy_scale = vector(w.vectors.dy_scale) + first;
    const A eps = A(w.eps);
    TSBN_NO_OVERLAP for (int64_t c = 0; c < channels; ++c) {
      const A rstd = 1 / root(var[c] + eps), dot = A(total[channels + c]) * rstd, sum = A(total[c]);
      const A factor = gate[c] * rstd;
      dweight[c] = slope[c] * dot;
      dbias[c] = sum;
      dy_scale[c] = factor;
      scale[c] = -factor * rstd * dot * inverse;
      shift[c] = -factor * sum * inverse;
    }
  }

  // The same from means that are given, for all of [T*C].
  static void given(const Work& w) {
    const A *gate = vector(w.vectors.gate), *var = vector(w.vectors.var), *mean = vector(w.vectors.dz_mean),
            *dot = vector(w.vectors.dz_xhat_mean);
    A *scale = vector(w.vectors.scale), *shift = vector(w.vectors.shift), *dy_scale = vector(w.vectors.dy_scale);
    TSBN_NO_OVERLAP for (int64_t i = 0; i < w.T * w.C; ++i) {
      const A rstd = 1 / root(var[i] + A(w.eps)), factor = gate[i] * rstd;
      dy_scale[i] = factor;
      scale[i] = -factor * rstd * dot[i];
      shift[i] = -factor * mean[i];
    }
    if (w.shared) add_tasks(w, 0, w.C);
  }

  // Layer norm. total, for each task of the group: sum dy, sum dy * xhat.
  static void layer_gradients(const Work& w, int64_t group, const double* total) {
    for (int64_t k = 0; k < w.fan(); ++k, total += 2 * w.C) {
      const int64_t first = (group + k) * w.C;
      const A* slope = vector(w.vectors.slope) + first;
      A *dweight = vector(w.vectors.dweight) + first, *dbias = vector(w.vectors.dbias) + first;
      TSBN_NO_OVERLAP for (int64_t i = 0; i < w.C; ++i) {
        dbias[i] = A(total[i]);
        dweight[i] = slope[i] * A(total[w.C + i]);
      }
    }
  }

  static constexpr VectorKernels kernels{prepare, given, forward, backward, layer_gradients};
};
