// Constants, the exponential and the normal distribution, of whole vectors. Included inside an instruction set's
// namespace, after simd.h.

template <class V> V constant(double c);
template <> TSBN_INLINE F constant<F>(double c) { return F{} + float(c); }
template <> TSBN_INLINE D constant<D>(double c) { return D{} + c; }

// e^x for x <= 0, to 2 units in the last place; below -87 it stays at e^-87.
TSBN_INLINE F exp_of(F x) {
  x = x < -87.0f ? F{} - 87.0f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F n = (x * 1.44269504088896f + kRound) - kRound;
  const F r = (x - n * 0.693359375f) + n * 2.12194440054691e-4f;  // ln 2 in two parts
  F p = F{} + 1.0f / 5040;
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) p = p * r + c;
  typedef int32_t I __attribute__((vector_size(TSBN_VECTOR_BYTES)));
  return p * bit_cast<F>((__builtin_convertvector(n, I) + 127) << 23);
}
TSBN_INLINE D exp_of(D x) {
  for (int i = 0; i < kDoubles; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// The same down to zero, so that its product with any finite number of this size is zero, too.
TSBN_INLINE F vanishing_exp(F x) { return x < -87.0f ? F{} : exp_of(x); }
TSBN_INLINE D vanishing_exp(D x) { return exp_of(x); }

// The normal distribution at z: its density and its cumulative probability.
template <class V> struct Normal { V density, probability; };

// The upper tail for a = |z| is e^(-a^2/2) t P(t) with t = 1 / (1 + 0.21 a); P is a least-squares fit with weights that
// make the relative error 2e-8 at most for all a up to 14.
TSBN_INLINE Normal<F> normal(F z) {
  const F a = z < 0 ? -z : z, t = 1 / (1 + 0.21f * a), e = vanishing_exp(a * a * -0.5f);
  F p = F{} - 0.071655477f;
  for (const float c : {0.28358453f, -0.33024506f, 0.34939151f, -0.093918700f, 0.12486999f, 0.069192853f, 0.085068765f,
                        0.083711581f}) {
    p = p * t + c;
  }
  const F tail = e * t * p;
  return {e * 0.39894228f, z < 0 ? tail : 1 - tail};
}
TSBN_INLINE Normal<D> normal(D z) {
  Normal<D> result;
  for (int i = 0; i < kDoubles; ++i) {
    result.density[i] = 0.39894228040143268 * __builtin_exp(-0.5 * z[i] * z[i]);
    result.probability[i] = 0.5 * __builtin_erfc(-0.70710678118654752 * z[i]);
  }
  return result;
}
