// What the activations compute: value is act(z), gradient is dy * act'(z). Of whole vectors in the CPU's kernels, of
// single values in CUDA's: this is included inside a namespace of either, after TSBN_INLINE, vanishing_exp (e^x for
// x <= 0, zero where its digits end), normal (of the normal distribution) and constant<V>: see cpu/elementary.h.

template <class V>
struct Formula {  // what all share, but for the exceptions below
  static constexpr bool kPlain = false;    // y = x * scale + shift, and dy itself is the gradient
  static constexpr bool kInverts = false;  // x holds act(v), and v takes its place
  static constexpr bool kHasSlope = false, kHasBounds = false;
  TSBN_INLINE V operand(V x) const { return x; }
};

template <class V>
struct None : Formula<V> {
  static constexpr bool kPlain = true;
  TSBN_INLINE V value(V z) const { return z; }
  TSBN_INLINE V gradient(V, V dy) const { return dy; }
};

// Comparisons are written so that relu(NaN) is NaN, relu(-inf) zero, and a gradient at NaN passes, as in PyTorch.
template <class V>
struct Relu : Formula<V> {
  TSBN_INLINE V value(V z) const { return z < 0 ? V{} : z; }
  TSBN_INLINE V gradient(V z, V dy) const { return z <= 0 ? V{} : dy; }
};

template <class V>
struct LeakyRelu : Formula<V> {
  static constexpr bool kHasSlope = true;
  V slope;
  TSBN_INLINE V value(V z) const { return z > 0 ? z : z * slope; }
  TSBN_INLINE V gradient(V z, V dy) const { return z > 0 ? dy : dy * slope; }
};

// Backward only: the layer's output y = leaky_relu(v) was kept in the place of its input, and v = leaky_relu^-1(y).
template <class V>
struct InverseLeakyRelu : LeakyRelu<V> {
  static constexpr bool kInverts = true;
  TSBN_INLINE V operand(V y) const { return y > 0 ? y : y / this->slope; }
};

// The logistic function, and what it lacks to 1, without cancellation.
template <class V> struct Logistic { V value, rest; };
template <class V>
TSBN_INLINE Logistic<V> logistic(V z) {
  const V e = vanishing_exp(z < 0 ? z : -z), large = 1 / (1 + e), small = e * large;
  return {z < 0 ? small : large, z < 0 ? large : small};
}

template <class V>
struct Silu : Formula<V> {
  TSBN_INLINE V value(V z) const { return z * logistic(z).value; }
  TSBN_INLINE V gradient(V z, V dy) const {
    const Logistic<V> s = logistic(z);
    return dy * (s.value * (1 + z * s.rest));
  }
};

template <class V>
struct Gelu : Formula<V> {
  TSBN_INLINE V value(V z) const { return z * normal(z).probability; }
  TSBN_INLINE V gradient(V z, V dy) const {
    const Normal<V> n = normal(z);
    return dy * (n.probability + z * n.density);
  }
};

template <class V>
TSBN_INLINE V clamped(V z, V low, V high) { return z < low ? low : (z > high ? high : z); }

// One formula for two activations: they differ in numbers alone.
template <class V>
struct Clamp : Formula<V> {
  static constexpr bool kHasBounds = true;
  V low, high;
  TSBN_INLINE V value(V z) const { return clamped(z, low, high); }
  TSBN_INLINE V gradient(V z, V dy) const { return z <= low ? V{} : (z >= high ? V{} : dy); }
};

template <class V>
struct Hardswish : Formula<V> {
  TSBN_INLINE V value(V z) const { return z * (clamped(z + 3, V{}, V{} + 6) * constant<V>(1.0 / 6)); }
  TSBN_INLINE V gradient(V z, V dy) const {
    const V between = dy * ((2 * z + 3) * constant<V>(1.0 / 6));
    return z <= -3 ? V{} : (z < 3 ? between : dy);
  }
};

// (1 + tanh(u)) / 2 is the logistic function of 2 u, here z f with f = a + b z^2. Far beyond |z| = 24, where it has
// reached both ends, the powers of z would overflow.
template <class V>
struct GeluTanh : Formula<V> {
  static TSBN_INLINE V a() { return constant<V>(1.5957691216057308); }  // 2 sqrt(2 / pi)
  static TSBN_INLINE V factor(V z) {
    const V square = z * z;
    return a() + constant<V>(0.07135481627260025) * (square < 576 ? square : V{} + 576);  // 0.044715 a
  }
  TSBN_INLINE V value(V z) const { return z * logistic(z * factor(z)).value; }
  TSBN_INLINE V gradient(V z, V dy) const {
    const V f = factor(z);
    const Logistic<V> s = logistic(z * f);
    return dy * (s.value + z * (s.value * s.rest) * (3 * f - 2 * a()));
  }
};

// The formula of an activation, with its numbers.
template <class Act, class V>
TSBN_INLINE Act formula(Activation activation, double slope) {
  Act act;
  if constexpr (Act::kHasSlope) act.slope = constant<V>(slope);
  if constexpr (Act::kHasBounds) {
    const bool six = activation == Activation::relu6;
    act.low = constant<V>(six ? 0 : -1), act.high = constant<V>(six ? 6 : 1);
  }
  return act;
}
