// Instructions that compute a lane's registers from the same lane's registers.
#include <algorithm>

#include "instructions.hpp"
#include "lanes.hpp"

namespace ptxvm {

namespace {

// f on the values of the operands, rounded to a T, with .ftz, .sat and .relu.
template <class T, class F, class... A>
T compute(const Inst& i, F f, A... a) {
  if constexpr (is_pair<T>) {
    using Half = decltype(T::low);
    return {compute<Half>(i, f, a.low...), compute<Half>(i, f, a.high...)};
  } else {
    if (i.ftz) ((a = flush(a)), ...);
    T x = canonical(T(f(Compute<A>(a)...)));
    if (i.ftz) x = flush(x);
    if (i.sat) x = saturate(x);
    return i.relu ? clamp_negative(x) : x;
  }
}

// Float arithmetic on operands of types A with a result of type T, in the rounding mode of the instruction.
template <class T, class... A, class F>
Handler fop(F) {
  return [](Warp& w, const Inst& i) {
    const RoundingScope scope(i.rounding);
    if (i.ftz || i.sat || i.relu) each<T, A...>(w, i, [&](A... a) { return compute<T>(i, F{}, a...); });
    else each<T, A...>(w, i, [](A... a) { return compute<T>(Inst{}, F{}, a...); });
  };
}

template <class T> struct Wider;
template <> struct Wider<u16> { using type = u32; };
template <> struct Wider<s16> { using type = s32; };
template <> struct Wider<u32> { using type = u64; };
template <> struct Wider<s32> { using type = s64; };
template <> struct Wider<u64> { using type = unsigned __int128; };
template <> struct Wider<s64> { using type = __int128; };

template <class T>
void declare_integer_arithmetic(T) {
  using Wide = typename Wider<T>::type;
  using Bits = std::make_unsigned_t<T>;
  constexpr int width = 8 * sizeof(T);
  const std::string t = " " + type_name<T>();
  for_integer_functions<T>([](const std::string& name, const std::string& type, auto f) {
    on(name + " " + type, 3, op(f));
  });
  // The arithmetic is on unsigned values, because overflow wraps.
  on("sub" + t, 3, op([](Bits a, Bits b) { return T(a - b); }));
  on("mul lo" + t, 3, op([](Bits a, Bits b) { return T(u64(a) * b); }));
  on("mad lo" + t, 4, op([](Bits a, Bits b, Bits c) { return T(u64(a) * b + c); }));
  on("mul hi" + t, 3, op([](T a, T b) { return T(Wide(a) * b >> width); }));
  on("mad hi" + t, 4, op([](T a, T b, Bits c) { return T(Bits(Wide(a) * b >> width) + c); }));
  if constexpr (width < 64) {
    using UWide = std::make_unsigned_t<Wide>;
    on("mul wide" + t, 3, op([](T a, T b) { return Wide(a) * b; }));
    on("mad wide" + t, 4, op([](T a, T b, Wide c) { return Wide(UWide(Wide(a) * b) + UWide(c)); }));
  }
  on("div" + t, 3, op([](T a, T b) { return b == 0 ? T(-1) : T(Wide(a) / b); }));
  on("rem" + t, 3, op([](T a, T b) { return b == 0 ? a : T(Wide(a) % b); }));
  on("sad" + t, 4, op([](T a, T b, Bits c) { return T(c + Bits(std::max(a, b)) - Bits(std::min(a, b))); }));
  on("shr" + t, 3, op([](T a, u32 n) { return T(n < width ? a >> n : a < 0 ? -1 : 0); }));
  if constexpr (std::is_signed_v<T>) {
    on("neg" + t, 2, op([](Bits a) { return T(0 - a); }));
    on("abs" + t, 2, op([](Bits a) { return T(T(a) < 0 ? 0 - a : a); }));
  }
  if constexpr (width >= 32) {
    on("bfe" + t, 4, op([](Bits a, u32 start, u32 length) {
      start &= 0xff, length &= 0xff;
      const u32 top = std::min<u32>(start + length - 1, width - 1);
      const Bits sign = std::is_signed_v<T> && length ? a >> top & 1 : 0;
      Bits field = 0;
      for (u32 k = 0; k < width; ++k) field |= (k < length && start + k < width ? a >> (start + k) & 1 : sign) << k;
      return T(field);
    }));
  }
}

template <class T>
void declare_bit_arithmetic(T) {
  constexpr int width = 8 * sizeof(T);
  const std::string t = " " + bits_name<T>();
  on("not" + t, 2, op([](T a) { return T(~a); }));
  on("cnot" + t, 2, op([](T a) { return T(a == 0); }));
  on("shl" + t, 3, op([](T a, u32 n) { return T(n < width ? u64(a) << n : 0); }));
  on("shr" + t, 3, op([](T a, u32 n) { return T(n < width ? a >> n : 0); }));
  if constexpr (width >= 32) {
    on("popc" + t, 2, op([](T a) { return u32(std::popcount(a)); }));
    on("clz" + t, 2, op([](T a) { return u32(std::countl_zero(a)); }));
    on("brev" + t, 2, op([](T a) {
      T r = 0;
      for (int k = 0; k < width; ++k) r |= (a >> k & 1) << (width - 1 - k);
      return r;
    }));
    on("bfi" + t, 5, op([](T a, T b, u32 start, u32 length) {
      start &= 0xff, length &= 0xff;
      if (start >= width || length == 0) return b;
      const T kept = (length < width ? (T(1) << length) - 1 : T(-1)) << start;
      return T((b & ~kept) | (a << start & kept));
    }));
  }
}

constexpr auto permute_bytes = [](u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 choice = selector >> 4 * k & 15;
    u8 byte = u8(bytes >> 8 * (choice & 7));
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= u32(byte) << 8 * k;
  }
  return result;
};

u32 shift_distance(const Inst& i, u32 n) { return i.wrap ? n & 31 : std::min(n, 32u); }

void declare_bit_tricks() {
  on("lop3 b32", 5, op([](u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return r;
  }));
  on("prmt b32", 4, op(permute_bytes));
  on("shf l wrap|clamp b32", 4, op([](const Inst& i, u32 a, u32 b, u32 n) {
    return u32((u64(b) << 32 | a) << shift_distance(i, n) >> 32);
  }));
  on("shf r wrap|clamp b32", 4, op([](const Inst& i, u32 a, u32 b, u32 n) {
    return u32((u64(b) << 32 | a) >> shift_distance(i, n));
  }));
  on("add sat s32", 3, op([](s32 a, s32 b) { return s32(std::clamp<s64>(s64(a) + b, INT32_MIN, INT32_MAX)); }));
  on("sub sat s32", 3, op([](s32 a, s32 b) { return s32(std::clamp<s64>(s64(a) - b, INT32_MIN, INT32_MAX)); }));
  on("and pred", 3, op([](u8 a, u8 b) { return u8(a & b); }));
  on("or pred", 3, op([](u8 a, u8 b) { return u8(a | b); }));
  on("xor pred", 3, op([](u8 a, u8 b) { return u8(a ^ b); }));
  on("not pred", 2, op([](u8 a) { return u8(!a); }));
}

constexpr auto plus = [](auto a, auto b) { return a + b; };
constexpr auto minus = [](auto a, auto b) { return a - b; };
constexpr auto times = [](auto a, auto b) { return a * b; };
constexpr auto over = [](auto a, auto b) { return a / b; };
template <class T>
constexpr auto multiply_add = [](auto a, auto b, auto c) {
  if constexpr (is_small<T>) return fma_to_odd(a, b, c);
  else return std::fma(a, b, c);
};

// What floats of type T and pairs of them have in common; P is T or Pair<T>.
template <class T, class P>
void declare_floats() {
  const bool wide = std::is_same_v<T, f64>;
  const std::string t = " " + type_name<P>(), mode = is_small<T> ? " rn" : " rn|rz|rm|rp";
  const std::string ftz = wide ? "" : " ftz?", sat = wide ? "" : " sat?";
  on("add" + mode + "?" + ftz + sat + t, 3, fop<P, P, P>(plus));
  on("sub" + mode + "?" + ftz + sat + t, 3, fop<P, P, P>(minus));
  on("mul" + mode + "?" + ftz + sat + t, 3, fop<P, P, P>(times));
  on("fma" + mode + ftz + (is_small<T> ? " sat|relu?" : sat) + t, 4, fop<P, P, P, P>(multiply_add<T>));
  if constexpr (std::is_same_v<P, Pair<f32>>) return;
  on("neg" + ftz + t, 2, fop<P, P>([](auto a) { return -a; }));
  on("abs" + ftz + t, 2, fop<P, P>([](auto a) { return std::fabs(a); }));
  on("min" + ftz + t, 3, fop<P, P, P>(minimum));
  on("max" + ftz + t, 3, fop<P, P, P>(maximum));
  if constexpr (wide) return;
  on("min" + ftz + " NaN" + t, 3, fop<P, P, P>(minimum_nan));
  on("max" + ftz + " NaN" + t, 3, fop<P, P, P>(maximum_nan));
  on("ex2 approx ftz?" + t, 2, fop<P, P>([](double a) { return std::exp2(a); }));
  on("tanh approx" + t, 2, fop<P, P>([](double a) { return std::tanh(a); }));
}

template <class T>
void declare_roots(T) {
  const std::string t = (std::is_same_v<T, f32> ? " rn|rz|rm|rp ftz? " : " rn|rz|rm|rp ") + type_name<T>();
  on("div" + t, 3, fop<T, T, T>(over));
  on("rcp" + t, 2, fop<T, T>([](T a) { return 1 / a; }));
  on("sqrt" + t, 2, fop<T, T>([](T a) { return std::sqrt(a); }));
  on("copysign " + type_name<T>(), 3, fop<T, T, T>([](T sign, T size) { return std::copysign(size, sign); }));
}

// Arithmetic in f32 of which the first operands are 16-bit floats.
template <class T>
void declare_mixed_floats(T) {
  const std::string t = " rn|rz|rm|rp? sat? f32 " + type_name<T>();
  on("add" + t, 3, fop<f32, T, f32>([](f32 a, f32 c) { return a + c; }));
  on("sub" + t, 3, fop<f32, T, f32>([](f32 a, f32 c) { return a - c; }));
  on("fma" + t, 4, fop<f32, T, T, f32>([](f32 a, f32 b, f32 c) { return std::fma(a, b, c); }));
}

// Functions are computed in double: after rounding, correctly rounded but for cases near a tie that double precision
// cannot tell, about one in 2^28.
void declare_f32_functions() {
  on("min ftz? f32", 4, fop<f32, f32, f32, f32>(minimum));
  on("max ftz? f32", 4, fop<f32, f32, f32, f32>(maximum));
  on("min ftz? NaN f32", 4, fop<f32, f32, f32, f32>(minimum_nan));
  on("max ftz? NaN f32", 4, fop<f32, f32, f32, f32>(maximum_nan));
  on("div approx|full ftz? f32", 3, fop<f32, f32, f32>(over));
  on("rcp approx ftz? f32", 2, fop<f32, f32>([](f32 a) { return 1 / a; }));
  on("rcp approx ftz f64", 2, fop<f64, f64>([](f64 a) { return 1 / a; }));
  on("sqrt approx ftz? f32", 2, fop<f32, f32>([](f32 a) { return std::sqrt(a); }));
  on("rsqrt approx ftz? f32", 2, fop<f32, f32>([](f64 a) { return 1 / std::sqrt(a); }));
  on("rsqrt approx ftz? f64", 2, fop<f64, f64>([](f64 a) { return f64(1 / std::sqrt((long double)a)); }));
  on("lg2 approx ftz? f32", 2, fop<f32, f32>([](f64 a) { return std::log2(a); }));
  on("sin approx ftz? f32", 2, fop<f32, f32>([](f64 a) { return std::sin(a); }));
  on("cos approx ftz? f32", 2, fop<f32, f32>([](f64 a) { return std::cos(a); }));
}

template <class T>
u8 relation(T a, T b) {
  if constexpr (is_float<T>) {
    const Compute<T> x = a, y = b;
    return x < y ? less : x > y ? greater : x == y ? equal : unordered;
  } else {
    return a < b ? less : a > b ? greater : equal;
  }
}

bool combine(const Inst& i, bool compared, u64 c) {
  const bool other = (c & 1) != i.negated_c;
  const bool results[] = {compared, compared && other, compared || other, compared != other};
  return results[i.function];
}

// setp: the first result is the comparison, combined with c; the second is its negation, combined with c. On pairs the
// results are those of the halves.
template <class T, bool pairs = false>
void set_predicate(Warp& w, const Inst& i) {
  const u64 *a = w.slot(i.op[1]), *b = w.slot(i.op[2]), *c = w.slot(i.op[i.operands > 3 ? 3 : 1]);
  u64 *p = w.slot(i.op[0]), *q = i.also >= 0 ? w.slot(i.also) : nullptr;
  for_lanes(w.lanes, [&](int l) {
    const auto compare = [&i](u64 left, u64 right) -> bool {
      T x = from_slot<T>(left), y = from_slot<T>(right);
      if (i.ftz) x = flush(x), y = flush(y);
      return relation(x, y) & i.accepts;
    };
    const bool first = compare(a[l], b[l]), second = pairs ? compare(a[l] >> 16, b[l] >> 16) : !first;
    const u64 third = c[l];
    p[l] = combine(i, first, third);
    if (q) q[l] = combine(i, second, third);
  });
}

template <class D, class T>
constexpr auto set_value = [](const Inst& i, T a, T b) {
  if (i.ftz) a = flush(a), b = flush(b);
  return relation(a, b) & i.accepts ? (is_float<D> ? D(1) : D(-1)) : D(0);
};

const std::string integer_comparisons = " eq|ne|lt|le|gt|ge|lo|ls|hi|hs";
const std::string float_comparisons = " eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan";

template <class T>
void declare_comparisons(T) {
  const std::string ftz = std::is_same_v<T, f32> || std::is_same_v<T, f16> ? " ftz? " : " ";
  const std::string cmp = is_float<T> ? float_comparisons : integer_comparisons;
  const std::string t = ftz + (std::is_unsigned_v<T> ? type_name<T>() + "|" + bits_name<T>() : type_name<T>());
  on("setp" + cmp + t, 3, set_predicate<T>);
  on("setp" + cmp + " and|or|xor" + t, 4, set_predicate<T>);
  on("set" + cmp + ftz + "u32|s32" + " " + type_name<T>(), 3, op(set_value<s32, T>));
  on("set" + cmp + ftz + "f32" + " " + type_name<T>(), 3, op(set_value<f32, T>));
  on("selp " + type_name<T>() + "|" + bits_name<T>(), 4, op([](u64 a, u64 b, u8 p) { return p & 1 ? a : b; }));
}

}  // namespace

void declare_arithmetic() {
  section(Class::integer);
  for_types<u16, s16, u32, s32, u64, s64>([](auto t) { declare_integer_arithmetic(t); });
  for_types<u16, u32, u64>([](auto t) { declare_bit_arithmetic(t); });
  declare_bit_tricks();
  for_types<u16, s16, u32, s32, u64, s64>([](auto t) { declare_comparisons(t); });
  section(Class::floating);
  for_types<f32, f64>([](auto t) { declare_roots(t); });
  declare_f32_functions();
  for_types<f16, bf16, f32, f64>([]<class T>(T) {
    declare_floats<T, T>();
    if constexpr (sizeof(T) < 8) declare_floats<T, Pair<T>>();
  });
  for_types<f16, bf16>([]<class T>(T t) {
    declare_mixed_floats(t);
    on("setp" + float_comparisons + " " + type_name<T>() + "x2", 3, set_predicate<T, true>);
    on("setp" + float_comparisons + " and|or|xor " + type_name<T>() + "x2", 4, set_predicate<T, true>);
  });
  for_types<f16, bf16, f32, f64>([](auto t) { declare_comparisons(t); });
}

}  // namespace ptxvm
