// What the activations compute: value is act(z), gradient is dy * act'(z). Of whole vectors in the CPU's kernels, of
// single values in CUDA's: this is included inside a namespace of either, after TSBN_INLINE, vanishing_exp (e^x for
// x <= 0, zero where its digits end) and normal (of the normal distribution, see cpu/elementary.h).

template <class V>
struct Formula {  // what all share, but for the exceptions below
  static constexpr bool kPlain = false;    // y = x * scale + shift, and dy itself is the gradient
  static constexpr bool kInverts = false;  // x holds act(v), and v takes its place
  static constexpr bool kHasSlope = false;
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
