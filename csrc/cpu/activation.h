// The epilogue y = act(z), and its gradient dy * act'(z). Included inside an instruction set's namespace, after simd.h.
// The kernels take an activation as a template argument, so that a layer without one has the machine code of old.

template <class V>
struct Epilogue {  // what all share, but for the exceptions below
  static constexpr bool kPlain = false;    // y = x * scale + shift, and dy itself is the gradient
  static constexpr bool kInverts = false;  // x holds act(v), and v takes its place
  static constexpr bool kHasSlope = false;
  TSBN_INLINE V operand(V x) const { return x; }
};

template <class V>
struct None : Epilogue<V> {
  static constexpr bool kPlain = true;
  TSBN_INLINE V value(V z) const { return z; }
  TSBN_INLINE V gradient(V, V dy) const { return dy; }
};

// No activation, but something to add to x * scale + shift.
template <class V>
struct Identity : Epilogue<V> {
  TSBN_INLINE V value(V z) const { return z; }
};

// Comparisons are written so that relu(NaN) is NaN, relu(-inf) zero, and a gradient at NaN passes, as in PyTorch.
template <class V>
struct Relu : Epilogue<V> {
  TSBN_INLINE V value(V z) const { return z < 0 ? V{} : z; }
  TSBN_INLINE V gradient(V z, V dy) const { return z <= 0 ? V{} : dy; }
};

template <class V>
struct LeakyRelu : Epilogue<V> {
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

template <class V>
struct Silu : Epilogue<V> {
  struct Gate { V sigmoid, rest; };  // rest = 1 - sigmoid, without cancellation
  static TSBN_INLINE Gate gate(V z) {
    const V e = vanishing_exp(z < 0 ? z : -z), large = 1 / (1 + e), small = e * large;
    return {z < 0 ? small : large, z < 0 ? large : small};
  }
  TSBN_INLINE V value(V z) const { return z * gate(z).sigmoid; }
  TSBN_INLINE V gradient(V z, V dy) const {
    const Gate g = gate(z);
    return dy * (g.sigmoid * (1 + z * g.rest));
  }
};

template <class V>
struct Gelu : Epilogue<V> {
  TSBN_INLINE V value(V z) const { return z * normal(z).probability; }
  TSBN_INLINE V gradient(V z, V dy) const {
    const Normal<V> n = normal(z);
    return dy * (n.probability + z * n.density);
  }
};

template <class Act, class T>
TSBN_INLINE Act activation(const Work& w) {
  Act act;
  if constexpr (Act::kHasSlope) act.slope = Vec<T>{} + Acc<T>(w.slope);
  return act;
}

// z of some lanes, from the deviation d = x - center. Forward and backward compute it by this one expression, so that
// they agree to the bit on which side of a kink it lies.
template <class Act, class T>
TSBN_INLINE Vec<T> preactivation(Vec<T> d, Vec<T> scale, Vec<T> shift, const T* residual, int64_t i, int lanes) {
  Vec<T> z = d * scale + shift;
  if constexpr (!Act::kPlain) {
    if (residual != nullptr) z += load_up_to(residual + i, lanes, Vec<T>{});
  }
  return z;
}

// What the backward makes of the lanes from i on: the deviation of the operand from its center, and dy * act'(z).
template <class V> struct Gradient { V deviation, g; };

// The vectors over channels from which the backward computes z.
template <class V> struct Before { V center, scale, shift; };

template <class Act, class T>
TSBN_INLINE Gradient<Vec<T>> gradient(const Act& act, const Before<Vec<T>>& before, const T* x, const T* dy,
                                      const T* residual, int64_t i, int lanes) {
  using V = Vec<T>;
  const V read = load_up_to(x + i, lanes, Act::kInverts ? V{} : before.center);
  const V upstream = load_up_to(dy + i, lanes, V{});
  const V d = act.operand(read) - before.center;
  if constexpr (Act::kPlain) return {d, upstream};
  else if constexpr (Act::kInverts) return {d, act.gradient(read, upstream)};
  else return {d, act.gradient(preactivation<Act, T>(d, before.scale, before.shift, residual, i, lanes), upstream)};
}

// Calls kernel(streams): a layer without an activation has code of its own for both, the others ask at each store.
template <class Act, class Kernel>
TSBN_INLINE void with_streaming(bool streams, Kernel kernel) {
  if constexpr (Act::kPlain) streams ? kernel(Constant<true>{}) : kernel(Constant<false>{});
  else kernel(streams);
}
