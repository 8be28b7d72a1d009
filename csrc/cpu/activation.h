// The epilogue y = act(z), and its gradient dy * act'(z). Included inside an instruction set's namespace, after
// formulas.h.
// The kernels take an activation as a template argument, so that a layer without one has the machine code of old.

// No activation, but something to add to x * scale + shift.
template <class V>
struct Identity : Formula<V> {
  TSBN_INLINE V value(V z) const { return z; }
};

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
