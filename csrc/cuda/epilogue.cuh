// What follows the normalisation in the same kernel: y = act(z), z = gate * (x - mean) * rstd + bias + residual.
#pragma once
#include "walk.cuh"

namespace tsbn::cuda {

#define TSBN_INLINE __device__ __forceinline__

template <class A> TSBN_INLINE A constant(double c) { return A(c); }
TSBN_INLINE float vanishing_exp(float x) { return expf(x); }
TSBN_INLINE double vanishing_exp(double x) { return exp(x); }

template <class A> struct Normal { A density, probability; };
TSBN_INLINE Normal<float> normal(float z) {
  return {0.39894228f * expf(-0.5f * z * z), 0.5f + 0.5f * erff(z * 0.70710678f)};
}
TSBN_INLINE Normal<double> normal(double z) {
  return {0.39894228040143267794 * exp(-0.5 * z * z), 0.5 + 0.5 * erf(z * 0.70710678118654752440)};
}

#include "../formulas.h"

// The activation is the same for all of a launch: it is chosen for a slot at a time, outside the loop over its elements.
template <class A> struct Epilogue {
  Activation activation;
  A slope;

  __device__ explicit Epilogue(const Params& p) : activation(p.n.activation), slope(A(p.slope)) {}

  template <int V> __device__ void activate(A (&z)[V]) const {
    choose([&](auto act) {
      if constexpr (!decltype(act)::kInverts) each<V>([&](int e) { z[e] = act.value(z[e]); });
    });
  }

  // g = dy * act'(z), in the place of dy.
  template <int V> __device__ void differentiate(A (&dy)[V], const A (&z)[V]) const {
    choose([&](auto act) { each<V>([&](int e) { dy[e] = act.gradient(z[e], dy[e]); }); });
  }

  // An operand that holds act(v) becomes v.
  template <int V> __device__ void restore(A (&v)[V]) const {
    choose([&](auto act) {
      if constexpr (decltype(act)::kInverts) each<V>([&](int e) { v[e] = act.operand(v[e]); });
    });
  }

 private:
  template <class F> __device__ void choose(F f) const {
    switch (activation) {
#define TSBN_CASE(name, Act) \
  case Activation::name: return f(formula<Act<A>, A>(Activation::name, slope));
      TSBN_ACTIVATIONS(TSBN_CASE)
#undef TSBN_CASE
    }
  }
  template <int V, class F> __device__ static void each(F f) {
#pragma unroll
    for (int e = 0; e < V; ++e) f(e);
  }
};

// The body of a loop over loaded slots is compiled once: it works on the first, and moves the others up.
template <class S, int U> __device__ void rotate(S (&slots)[U]) {
  const S first = slots[0];
#pragma unroll
  for (int u = 1; u < U; ++u) slots[u - 1] = slots[u];
  slots[U - 1] = first;
}

// What comes from behind the epilogue: g = dy * act'(z), where z is computed again from x.
template <class T, int V, int CH, bool kMixed> class Upstream {
  using A = Acc<T>;
  using Walk = tsbn::cuda::Walk<T, V, CH, kMixed>;
  static constexpr int kUnrolled = CH == 1 ? 2 : 1;
  const Params& p;
  const Walk& walk;
  const A (&center)[CH], (&scale)[CH];
  const A* bias;
  const T *x, *dy, *residual;
  Kept<Slot<T, V>, 0> kept, kept_dy, kept_residual;
  const Epilogue<A> epilogue;

 public:
  __device__ Upstream(const Params& p, const Walk& walk, const A (&center)[CH], const A (&scale)[CH],
                      const A* biases, Slot<T, V>* shared)
      : p(p), walk(walk), center(center), scale(scale), bias(biases + (walk.channel - walk.first_channel())),
        x(walk.template start<T>(p.x_data, p.n.x)), dy(walk.template start<T>(p.dy_data, p.n.dy)),
        residual(walk.template start<T>(p.residual_data, p.n.residual)), kept(shared, p.n.resident, 0),
        kept_dy(shared, p.n.resident, 1), kept_residual(shared, p.n.resident, 2), epilogue(p) {}

  // Calls f(at, x, g) for this thread's slots, and keeps those that stay; or from the end, with what was kept.
  template <class F> __device__ void forwards(F f) {
    walk.template short_forwards<kUnrolled>([&](uint32_t k, uint32_t count) { each<true>(k, count, f); });
  }
  template <class F> __device__ void backwards(F f) {
    walk.template short_backwards<kUnrolled>([&](uint32_t k, uint32_t count) { each<false>(k, count, f); });
  }

 private:
  template <bool keep, class F> __device__ void each(uint32_t k, uint32_t count, F f) {
    constexpr int U = kUnrolled;
    Slot<T, V> slots[U], gradients[U], added[U];
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) {
      if (u >= count) continue;
      if (!keep && kept.template get<U>(k, u, slots[u])) {
        kept_dy.template get<U>(k, u, gradients[u]);
        if (p.residual_data != nullptr) kept_residual.template get<U>(k, u, added[u]);
      } else {
        const auto at = walk.template place<Walk::kMasks>(k + u);
        slots[u] = walk.read(x, p.n.x, at);
        gradients[u] = walk.read(dy, p.n.dy, at);
        if (p.residual_data != nullptr) added[u] = walk.read(residual, p.n.residual, at);
      }
    }
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) {
      if (!keep || u >= count) continue;
      kept.template put<U>(k, u, slots[u]), kept_dy.template put<U>(k, u, gradients[u]);
      if (p.residual_data != nullptr) kept_residual.template put<U>(k, u, added[u]);
    }
#pragma unroll 1
    for (uint32_t u = 0; u < count; ++u, rotate(slots), rotate(gradients), rotate(added)) {
      A v[1][V], g[1][V];
      slots[0].get(v[0]);
      gradients[0].get(g[0]);
      differentiate(v[0], g[0], added[0]);
      f(walk.template place<Walk::kMasks>(k + u), v, g);
    }
  }

  __device__ void differentiate(A (&v)[V], A (&g)[V], const Slot<T, V>& added) const {
    A z[V], r[V];
    epilogue.restore(v);
    added.get(r);
#pragma unroll
    for (int e = 0; e < V; ++e) {
      const int c = CH == 1 ? 0 : e;
      z[e] = (v[e] - center[c]) * scale[c] + bias[c];
      if (p.residual_data != nullptr) z[e] += r[e];
      if (epilogue.activation == Activation::inverse_leaky_relu) z[e] = v[e];
    }
    epilogue.differentiate(g, z);
  }
};

}  // namespace tsbn::cuda
