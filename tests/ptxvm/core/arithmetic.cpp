// Instructions that compute a lane's registers from the same lane's registers.
#include <algorithm>

#include "instructions.hpp"
#include "lanes.hpp"

namespace ptxvm {

namespace {

template <class T, size_t> using Repeat = T;

// Float arithmetic of N operands of type T, by a function on Compute<T>, with .ftz, .sat, .relu and a rounding mode.
template <class T, int N, class F>
struct FloatOp {
  template <size_t... K>
  static T apply(const Inst& i, std::index_sequence<K...>, Repeat<T, K>... v) {
    if (i.ftz) return finish(i, flush(canonical(T(F{}(Compute<T>(flush(v))...)))));
    return finish(i, canonical(T(F{}(Compute<T>(v)...))));
  }
  static T finish(const Inst& i, T x) {
    if (i.sat) x = saturate(x);
    if (i.relu) x = Compute<T>(x) < 0 ? T(0) : x;
    return x;
  }
  template <size_t... K>
  static void run(Warp& w, const Inst& i, std::index_sequence<K...> k) {
    const RoundingScope scope(i.rounding);
    if (i.ftz || i.sat || i.relu) each<T, Repeat<T, K>...>(w, i, [&](Repeat<T, K>... v) { return apply(i, k, v...); });
    else each<T, Repeat<T, K>...>(w, i, [](Repeat<T, K>... v) { return canonical(T(F{}(Compute<T>(v)...))); });
  }
  template <size_t... K>
  static void run_pair(Warp& w, const Inst& i, std::index_sequence<K...> k) {
    constexpr int half = 8 * sizeof(T);
    const RoundingScope scope(i.rounding);
    each<u64, Repeat<u64, K>...>(w, i, [&](Repeat<u64, K>... v) {
      const u64 low = to_slot<T>(apply(i, k, from_slot<T>(v)...)), high = to_slot<T>(apply(i, k, from_slot<T>(v >> half)...));
      return low | high << half;
    });
  }
};

template <class T, int N, class F>
Handler fop(F) {
  return [](Warp& w, const Inst& i) { FloatOp<T, N, F>::run(w, i, std::make_index_sequence<N>{}); };
}
template <class T, int N, class F>
Handler pair_op(F) {
  return [](Warp& w, const Inst& i) { FloatOp<T, N, F>::run_pair(w, i, std::make_index_sequence<N>{}); };
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
  // The arithmetic is on unsigned values, because overflow wraps.
  on("add" + t, 3, op<T, Bits, Bits>([](Bits a, Bits b) { return T(a + b); }));
  on("sub" + t, 3, op<T, Bits, Bits>([](Bits a, Bits b) { return T(a - b); }));
  on("mul lo" + t, 3, op<T, Bits, Bits>([](Bits a, Bits b) { return T(u64(a) * b); }));
  on("mad lo" + t, 4, op<T, Bits, Bits, Bits>([](Bits a, Bits b, Bits c) { return T(u64(a) * b + c); }));
  on("mul hi" + t, 3, op<T, T, T>([](T a, T b) { return T(Wide(a) * b >> width); }));
  on("mad hi" + t, 4, op<T, T, T, Bits>([](T a, T b, Bits c) { return T(Bits(Wide(a) * b >> width) + c); }));
  if constexpr (width < 64) {
    using UWide = std::make_unsigned_t<Wide>;
    on("mul wide" + t, 3, op<Wide, T, T>([](T a, T b) { return Wide(a) * b; }));
    on("mad wide" + t, 4, op<Wide, T, T, Wide>([](T a, T b, Wide c) { return Wide(UWide(Wide(a) * b) + UWide(c)); }));
  }
  on("div" + t, 3, op<T, T, T>([](T a, T b) { return b == 0 ? T(~T(0)) : b == T(-1) && std::is_signed_v<T> ? T(0 - Bits(a)) : T(a / b); }));
  on("rem" + t, 3, op<T, T, T>([](T a, T b) { return b == 0 ? a : b == T(-1) && std::is_signed_v<T> ? T(0) : T(a % b); }));
  on("min" + t, 3, op<T, T, T>([](T a, T b) { return std::min(a, b); }));
  on("max" + t, 3, op<T, T, T>([](T a, T b) { return std::max(a, b); }));
  on("sad" + t, 4, op<T, T, T, Bits>([](T a, T b, Bits c) { return T(c + Bits(Bits(std::max(a, b)) - Bits(std::min(a, b)))); }));
  on("shr" + t, 3, op<T, T, u32>([](T a, u32 n) { return T(n < width ? a >> n : a < 0 ? -1 : 0); }));
  if constexpr (std::is_signed_v<T>) {
    on("neg" + t, 2, op<T, Bits>([](Bits a) { return T(0 - a); }));
    on("abs" + t, 2, op<T, Bits>([](Bits a) { return T(T(a) < 0 ? 0 - a : a); }));
  }
  if constexpr (width >= 32) {
    on("bfe" + t, 4, op<T, Bits, u32, u32>([](Bits a, u32 start, u32 length) {
      start &= 0xff, length &= 0xff;
      if (length == 0) return T(0);
      const u32 top = std::min<u32>(start + length - 1, width - 1);
      const bool sign = std::is_signed_v<T> && a >> top & 1;
      const Bits kept = length < width ? Bits((Bits(1) << length) - 1) : Bits(-1);
      const Bits field = start < width ? Bits(a >> start) & kept : Bits(0);
      const u32 have = start < width ? std::min<u32>(length, width - start) : 0;
      const Bits above = have >= width ? Bits(0) : Bits(Bits(-1) << have);
      return T(sign ? field | above : field);
    }));
  }
}

template <class T>
void declare_bit_arithmetic(T) {
  constexpr int width = 8 * sizeof(T);
  const std::string t = " " + bits_name<T>();
  on("and" + t, 3, op<T, T, T>([](T a, T b) { return T(a & b); }));
  on("or" + t, 3, op<T, T, T>([](T a, T b) { return T(a | b); }));
  on("xor" + t, 3, op<T, T, T>([](T a, T b) { return T(a ^ b); }));
  on("not" + t, 2, op<T, T>([](T a) { return T(~a); }));
  on("cnot" + t, 2, op<T, T>([](T a) { return T(a == 0); }));
  on("shl" + t, 3, op<T, T, u32>([](T a, u32 n) { return T(n < width ? u64(a) << n : 0); }));
  on("shr" + t, 3, op<T, T, u32>([](T a, u32 n) { return T(n < width ? a >> n : 0); }));
  if constexpr (width >= 32) {
    on("popc" + t, 2, op<u32, T>([](T a) { return u32(std::popcount(a)); }));
    on("clz" + t, 2, op<u32, T>([](T a) { return u32(std::countl_zero(a)); }));
    on("brev" + t, 2, op<T, T>([](T a) {
      T r = 0;
      for (int k = 0; k < width; ++k) r |= (a >> k & 1) << (width - 1 - k);
      return r;
    }));
    on("bfi" + t, 5, op<T, T, T, u32, u32>([](T a, T b, u32 start, u32 length) {
      start &= 0xff, length &= 0xff;
      if (start >= width || length == 0) return b;
      const T kept = (length < width ? (T(1) << length) - 1 : T(-1)) << start;
      return T((b & ~kept) | (a << start & kept));
    }));
  }
}

u32 permute_bytes(u32 a, u32 b, u32 selector) {
  const u64 bytes = u64(b) << 32 | a;
  u32 result = 0;
  for (int k = 0; k < 4; ++k) {
    const u32 choice = selector >> 4 * k & 15;
    u8 byte = u8(bytes >> 8 * (choice & 7));
    if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= u32(byte) << 8 * k;
  }
  return result;
}

void declare_bit_tricks() {
  on("lop3 b32", 5, op<u32, u32, u32, u32, u32>([](u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return r;
  }));
  on("prmt b32", 4, op<u32, u32, u32, u32>([](u32 a, u32 b, u32 selector) { return permute_bytes(a, b, selector); }));
  on("shf l wrap|clamp b32", 4, [](Warp& w, const Inst& i) {
    each<u32, u32, u32, u32>(w, i, [&](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) << (i.wrap ? n & 31 : std::min(n, 32u)) >> 32); });
  });
  on("shf r wrap|clamp b32", 4, [](Warp& w, const Inst& i) {
    each<u32, u32, u32, u32>(w, i, [&](u32 a, u32 b, u32 n) { return u32((u64(b) << 32 | a) >> (i.wrap ? n & 31 : std::min(n, 32u))); });
  });
  on("add sat s32", 3, op<s32, s64, s64>([](s64 a, s64 b) { return s32(std::clamp<s64>(s32(a) + s64(s32(b)), INT32_MIN, INT32_MAX)); }));
  on("sub sat s32", 3, op<s32, s64, s64>([](s64 a, s64 b) { return s32(std::clamp<s64>(s32(a) - s64(s32(b)), INT32_MIN, INT32_MAX)); }));
  on("and pred", 3, op<u8, u8, u8>([](u8 a, u8 b) { return u8(a & b); }));
  on("or pred", 3, op<u8, u8, u8>([](u8 a, u8 b) { return u8(a | b); }));
  on("xor pred", 3, op<u8, u8, u8>([](u8 a, u8 b) { return u8(a ^ b); }));
  on("not pred", 2, op<u8, u8>([](u8 a) { return u8(!a); }));
}

constexpr auto is_nan = [](auto x) { return x != x; };

// -0 is less than +0; of a number and a NaN the number wins.
constexpr auto minimum = [](auto a, auto b) { return is_nan(a) ? b : is_nan(b) ? a : a == b ? (std::signbit(a) ? a : b) : a < b ? a : b; };
constexpr auto maximum = [](auto a, auto b) { return is_nan(a) ? b : is_nan(b) ? a : a == b ? (std::signbit(a) ? b : a) : a > b ? a : b; };
constexpr auto minimum_nan = [](auto a, auto b) { return is_nan(a) || is_nan(b) ? a + b : minimum(a, b); };
constexpr auto maximum_nan = [](auto a, auto b) { return is_nan(a) || is_nan(b) ? a + b : maximum(a, b); };
constexpr auto plus = [](auto a, auto b) { return a + b; };
constexpr auto minus = [](auto a, auto b) { return a - b; };
constexpr auto times = [](auto a, auto b) { return a * b; };
constexpr auto over = [](auto a, auto b) { return a / b; };
template <class T>
constexpr auto multiply_add = [](auto a, auto b, auto c) {
  if constexpr (is_small<T>) return fma_to_odd(a, b, c);
  else return std::fma(a, b, c);
};

template <class T, class Make>
void declare_floats(const std::string& t, Make make) {
  const std::string mode = is_small<T> ? " rn" : " rn|rz|rm|rp", ftz = std::is_same_v<T, f64> ? "" : " ftz?", sat = std::is_same_v<T, f64> ? "" : " sat?";
  on("add" + mode + "?" + ftz + sat + t, 3, make.template operator()<2>(plus));
  on("sub" + mode + "?" + ftz + sat + t, 3, make.template operator()<2>(minus));
  on("mul" + mode + "?" + ftz + sat + t, 3, make.template operator()<2>(times));
  on("fma" + mode + ftz + (is_small<T> ? " sat|relu?" : sat) + t, 4, make.template operator()<3>(multiply_add<T>));
  if (t == " f32x2") return;
  on("neg" + ftz + t, 2, make.template operator()<1>([](auto a) { return -a; }));
  on("abs" + ftz + t, 2, make.template operator()<1>([](auto a) { return std::fabs(a); }));
  on("min" + ftz + t, 3, make.template operator()<2>(minimum));
  on("max" + ftz + t, 3, make.template operator()<2>(maximum));
  if constexpr (std::is_same_v<T, f64>) return;
  on("min" + ftz + " NaN" + t, 3, make.template operator()<2>(minimum_nan));
  on("max" + ftz + " NaN" + t, 3, make.template operator()<2>(maximum_nan));
  on("ex2 approx ftz?" + t, 2, make.template operator()<1>([](double a) { return std::exp2(a); }));
  on("tanh approx" + t, 2, make.template operator()<1>([](double a) { return std::tanh(a); }));
}

template <class T>
void declare_roots(T) {
  const std::string t = (std::is_same_v<T, f32> ? " rn|rz|rm|rp ftz? " : " rn|rz|rm|rp ") + type_name<T>();
  on("div" + t, 3, fop<T, 2>(over));
  on("rcp" + t, 2, fop<T, 1>([](T a) { return 1 / a; }));
  on("sqrt" + t, 2, fop<T, 1>([](T a) { return std::sqrt(a); }));
  on("copysign " + type_name<T>(), 3, fop<T, 2>([](T sign, T size) { return std::copysign(size, sign); }));
}

// Arithmetic in f32 of which the first operands are 16-bit floats.
template <class T, class F>
void mixed(Warp& w, const Inst& i, F f) {
  const RoundingScope scope(i.rounding);
  each<f32, T, f32>(w, i, [&](T a, f32 c) {
    const f32 r = canonical(f(f32(a), c));
    return i.sat ? saturate(r) : r;
  });
}

template <class T>
void declare_mixed_floats(T) {
  const std::string t = " rn|rz|rm|rp? sat? f32 " + type_name<T>();
  on("add" + t, 3, [](Warp& w, const Inst& i) { mixed<T>(w, i, [](f32 a, f32 c) { return a + c; }); });
  on("sub" + t, 3, [](Warp& w, const Inst& i) { mixed<T>(w, i, [](f32 a, f32 c) { return a - c; }); });
  on("fma" + t, 4, [](Warp& w, const Inst& i) {
    const RoundingScope scope(i.rounding);
    each<f32, T, T, f32>(w, i, [&](T a, T b, f32 c) {
      const f32 r = canonical(std::fma(f32(a), f32(b), c));
      return i.sat ? saturate(r) : r;
    });
  });
}

// Functions are computed in double: after rounding, correctly rounded but for cases near a tie that double precision
// cannot tell, about one in 2^28.
void declare_f32_functions() {
  on("min ftz? f32", 4, fop<f32, 3>([](f32 a, f32 b, f32 c) { return minimum(minimum(a, b), c); }));
  on("max ftz? f32", 4, fop<f32, 3>([](f32 a, f32 b, f32 c) { return maximum(maximum(a, b), c); }));
  on("min ftz? NaN f32", 4, fop<f32, 3>([](f32 a, f32 b, f32 c) { return minimum_nan(minimum_nan(a, b), c); }));
  on("max ftz? NaN f32", 4, fop<f32, 3>([](f32 a, f32 b, f32 c) { return maximum_nan(maximum_nan(a, b), c); }));
  on("div approx|full ftz? f32", 3, fop<f32, 2>(over));
  on("rcp approx ftz? f32", 2, fop<f32, 1>([](f32 a) { return 1 / a; }));
  on("rcp approx ftz f64", 2, fop<f64, 1>([](f64 a) { return 1 / a; }));
  on("sqrt approx ftz? f32", 2, fop<f32, 1>([](f32 a) { return std::sqrt(a); }));
  on("rsqrt approx ftz? f32", 2, fop<f32, 1>([](f32 a) { return 1 / std::sqrt(double(a)); }));
  on("rsqrt approx ftz? f64", 2, fop<f64, 1>([](f64 a) { return f64(1 / std::sqrt((long double)a)); }));
  on("lg2 approx ftz? f32", 2, fop<f32, 1>([](f32 a) { return std::log2(double(a)); }));
  on("sin approx ftz? f32", 2, fop<f32, 1>([](f32 a) { return std::sin(double(a)); }));
  on("cos approx ftz? f32", 2, fop<f32, 1>([](f32 a) { return std::cos(double(a)); }));
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
  return i.function == 1 ? compared && other : i.function == 2 ? compared || other : i.function == 3 ? compared != other : compared;
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
void set_value(Warp& w, const Inst& i) {
  each<D, T, T>(w, i, [&](T a, T b) {
    if (i.ftz) a = flush(a), b = flush(b);
    return relation(a, b) & i.accepts ? (is_float<D> ? D(1) : D(-1)) : D(0);
  });
}

const std::string integer_comparisons = " eq|ne|lt|le|gt|ge|lo|ls|hi|hs";
const std::string float_comparisons = " eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan";

template <class T>
void declare_comparisons(T) {
  const std::string ftz = std::is_same_v<T, f32> || std::is_same_v<T, f16> ? " ftz? " : " ";
  const std::string cmp = is_float<T> ? float_comparisons : integer_comparisons;
  const std::string t = ftz + (std::is_unsigned_v<T> ? type_name<T>() + "|" + bits_name<T>() : type_name<T>());
  on("setp" + cmp + t, 3, set_predicate<T>);
  on("setp" + cmp + " and|or|xor" + t, 4, set_predicate<T>);
  on("set" + cmp + ftz + "u32|s32" + " " + type_name<T>(), 3, set_value<s32, T>);
  on("set" + cmp + ftz + "f32" + " " + type_name<T>(), 3, set_value<f32, T>);
  on("selp " + type_name<T>() + "|" + bits_name<T>(), 4, op<u64, u64, u64, u64>([](u64 a, u64 b, u64 p) { return p & 1 ? a : b; }));
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
    declare_floats<T>(" " + type_name<T>(), []<int N>(auto f) { return fop<T, N>(f); });
    if constexpr (sizeof(T) < 8) declare_floats<T>(" " + type_name<T>() + "x2", []<int N>(auto f) { return pair_op<T, N>(f); });
  });
  for_types<f16, bf16>([]<class T>(T t) {
    declare_mixed_floats(t);
    on("setp" + float_comparisons + " " + type_name<T>() + "x2", 3, set_predicate<T, true>);
    on("setp" + float_comparisons + " and|or|xor " + type_name<T>() + "x2", 4, set_predicate<T, true>);
  });
  for_types<f16, bf16, f32, f64>([](auto t) { declare_comparisons(t); });
}

}  // namespace ptxvm
