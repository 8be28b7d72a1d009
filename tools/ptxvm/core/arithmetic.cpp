// Instructions that compute a lane's registers from the same lane's registers.
#include <algorithm>
#include <functional>

#include "lanes.hpp"

namespace {

// f on the values of the operands, rounded to a T, with .ftz, .sat and .relu if any of them is there.
template <class T, bool modified, class F, class... A>
T compute(const Inst& i, F f, A... a) {
  if constexpr (is_pair<T>) {
    using Half = decltype(T::low);
    return {compute<Half, modified>(i, f, a.low...), compute<Half, modified>(i, f, a.high...)};
  } else {
    if (modified && i.ftz) ((a = flush(a)), ...);
    T x = canonical(T(apply(f, i, Compute<A>(a)...)));
    if (modified && i.ftz) x = flush(x);
    return modified ? limited(i, x) : x;
  }
}

// Declares float arithmetic on operands of types A with a result of type T, in the rounding mode of the instruction.
template <class T, class... A, class F>
void on_floats(const std::string& pattern, F) {
  on(pattern, 1 + sizeof...(A), [](Warp& w, const Inst& i) {
    with_rounding(i.rounding, [&] {
      if (i.ftz || i.sat || i.relu) each<T, A...>(w, i, [&](A... a) { return compute<T, true>(i, F{}, a...); });
      else each<T, A...>(w, i, [&](A... a) { return compute<T, false>(i, F{}, a...); });
    });
  });
}

// The integer of twice the size.
template <class T, bool is_signed = std::is_signed_v<T>>
using Wider = std::conditional_t<sizeof(T) == 2, std::conditional_t<is_signed, s32, u32>,
              std::conditional_t<sizeof(T) == 4, std::conditional_t<is_signed, s64, u64>,
                                 std::conditional_t<is_signed, __int128, unsigned __int128>>>;

template <class T>
void declare_integer_arithmetic(T) {
  using Wide = Wider<T>;
  using Bits = std::make_unsigned_t<T>;
  constexpr int width = 8 * sizeof(T);
  const std::string t = " " + type_name<T>();
  for_integer_functions<T>([](const std::string& name, const std::string& type, auto f) {
    on(name + " " + type, f);
  });
  // The arithmetic is on unsigned values, because overflow wraps.
  on("sub" + t, [](Bits a, Bits b) { return T(a - b); });
  on("mul lo" + t, [](Bits a, Bits b) { return T(u64(a) * b); });
  on("mad lo" + t, [](Bits a, Bits b, Bits c) { return T(u64(a) * b + c); });
  on("mul hi" + t, [](T a, T b) { return T(Wide(a) * b >> width); });
  on("mad hi" + t, [](T a, T b, Bits c) { return T(Bits(Wide(a) * b >> width) + c); });
  if constexpr (width < 64) {
    using UWide = Wider<T, false>;
    on("mul wide" + t, [](T a, T b) { return Wide(a) * b; });
    on("mad wide" + t, [](T a, T b, Wide c) { return Wide(UWide(Wide(a) * b) + UWide(c)); });
  }
  on("div" + t, [](T a, T b) { return b == 0 ? T(-1) : T(Wide(a) / b); });
  on("rem" + t, [](T a, T b) { return b == 0 ? a : T(Wide(a) % b); });
  on("sad" + t, [](T a, T b, Bits c) { return T(c + Bits(std::max(a, b)) - Bits(std::min(a, b))); });
  on("shr" + t, [](T a, u32 n) { return T(n < width ? a >> n : a < 0 ? -1 : 0); });
  if constexpr (std::is_signed_v<T>) {
    on("neg" + t, [](Bits a) { return T(0 - a); });
    on("abs" + t, [](Bits a) { return T(T(a) < 0 ? 0 - a : a); });
  }
  if constexpr (width >= 32) {
    on("bfe" + t, [](Bits a, u32 start, u32 length) {
      start &= 0xff, length &= 0xff;
      const u32 top = std::min<u32>(start + length - 1, width - 1);
      const Bits sign = std::is_signed_v<T> && length ? a >> top & 1 : 0;
      Bits field = 0;
      for (u32 k = 0; k < width; ++k) field |= (k < length && start + k < width ? a >> (start + k) & 1 : sign) << k;
      return T(field);
    });
  }
}

template <class T>
void declare_bit_arithmetic(T) {
  constexpr int width = 8 * sizeof(T);
  const std::string t = " " + bits_name<T>();
  on("not" + t, [](T a) { return T(~a); });
  on("cnot" + t, [](T a) { return T(a == 0); });
  on("shl" + t, [](T a, u32 n) { return T(n < width ? u64(a) << n : 0); });
  on("shr" + t, [](T a, u32 n) { return T(n < width ? a >> n : 0); });
  if constexpr (width >= 32) {
    on("popc" + t, [](T a) { return u32(std::popcount(a)); });
    on("clz" + t, [](T a) { return u32(std::countl_zero(a)); });
    on("brev" + t, [](T a) {
      T r = 0;
      for (int k = 0; k < width; ++k) r |= (a >> k & 1) << (width - 1 - k);
      return r;
    });
    on("bfi" + t, [](T a, T b, u32 start, u32 length) {
      start &= 0xff, length &= 0xff;
      if (start >= width || length == 0) return b;
      const T kept = (length < width ? (T(1) << length) - 1 : T(-1)) << start;
      return T((b & ~kept) | (a << start & kept));
    });
  }
}

void declare_bit_tricks() {
  on("lop3 b32", [](u32 a, u32 b, u32 c, u32 table) {
    u32 r = 0;
    for (int k = 0; k < 8; ++k)
      if (table >> k & 1) r |= (k & 4 ? a : ~a) & (k & 2 ? b : ~b) & (k & 1 ? c : ~c);
    return r;
  });
  on("prmt b32", [](u32 a, u32 b, u32 selector) {
    const u64 bytes = u64(b) << 32 | a;
    u32 result = 0;
    for (int k = 0; k < 4; ++k) {
      const u32 choice = selector >> 4 * k & 15;
      u8 byte = u8(bytes >> 8 * (choice & 7));
      if (choice & 8) byte = byte & 0x80 ? 0xff : 0;
      result |= u32(byte) << 8 * k;
    }
    return result;
  });
  on("shf l|r wrap|clamp b32", [](const Inst& i, u32 a, u32 b, u32 n) {
    const u64 both = u64(b) << 32 | a;
    const u32 distance = i.wrap ? n & 31 : std::min(n, 32u);
    return u32(i.left ? both << distance >> 32 : both >> distance);
  });
  on("add sat s32", [](s32 a, s32 b) { return clamped<s32>(s64(a) + b); });
  on("sub sat s32", [](s32 a, s32 b) { return clamped<s32>(s64(a) - b); });
  on("and pred", [](u8 a, u8 b) { return u8(a & b); });
  on("or pred", [](u8 a, u8 b) { return u8(a | b); });
  on("xor pred", [](u8 a, u8 b) { return u8(a ^ b); });
  on("not pred", [](u8 a) { return u8(!a); });
}

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
  on_floats<P, P, P>("add" + mode + "?" + ftz + sat + t, std::plus<>{});
  on_floats<P, P, P>("sub" + mode + "?" + ftz + sat + t, std::minus<>{});
  on_floats<P, P, P>("mul" + mode + "?" + ftz + sat + t, std::multiplies<>{});
  on_floats<P, P, P, P>("fma" + mode + ftz + (is_small<T> ? " sat|relu?" : sat) + t, multiply_add<T>);
  if constexpr (std::is_same_v<P, Pair<f32>>) return;
  if constexpr (std::is_floating_point_v<P>) {
    on_floats<P, P, P>("div" + mode + ftz + t, std::divides<>{});
    on_floats<P, P>("rcp" + mode + ftz + t, [](P a) { return 1 / a; });
    on_floats<P, P>("sqrt" + mode + ftz + t, [](P a) { return std::sqrt(a); });
    on_floats<P, P, P>("copysign" + t, [](P sign, P size) { return std::copysign(size, sign); });
  }
  if constexpr (is_small<P>) {  // arithmetic in f32 of which the first operands have 16 bits
    const std::string mixed = " rn|rz|rm|rp? sat? f32" + t;
    on_floats<f32, P, f32>("add" + mixed, [](f32 a, f32 c) { return a + c; });
    on_floats<f32, P, f32>("sub" + mixed, [](f32 a, f32 c) { return a - c; });
    on_floats<f32, P, P, f32>("fma" + mixed, [](f32 a, f32 b, f32 c) { return std::fma(a, b, c); });
  }
  on_floats<P, P>("neg" + ftz + t, [](auto a) { return -a; });
  on_floats<P, P>("abs" + ftz + t, [](auto a) { return std::fabs(a); });
  on_floats<P, P, P>("min|max" + ftz + (wide ? "" : " NaN?") + t, minimum_or_maximum);
  if constexpr (wide) return;
  on_floats<P, P>("ex2 approx ftz?" + t, [](double a) { return std::exp2(a); });
  on_floats<P, P>("tanh approx" + t, [](double a) { return std::tanh(a); });
}

// Whether a relation that the instruction names holds.
template <class T>
bool compare(const Inst& i, T a, T b) {
  if (i.ftz) a = flush(a), b = flush(b);
  return i.accepts & (a < b ? less : a > b ? greater : a == b ? equal : unordered);
}

bool combine(const Inst& i, bool compared, u64 c) {
  const bool other = (c & 1) != i.negated;
  const bool results[] = {compared, compared && other, compared || other, compared != other};
  return results[i.function];
}

// setp: the first result is the comparison, combined with c; the second is its negation, combined with c. On pairs the
// results are those of the halves.
template <class T>
void set_predicate(Warp& w, const Inst& i) {
  const u64 *a = w.slot(i.op[1]), *b = w.slot(i.op[2]), *c = w.slot(i.op[i.operands > 3 ? 3 : 1]);
  u64 *p = w.slot(i.op[0]), *q = i.also >= 0 ? w.slot(i.also) : nullptr;
  for_lanes(w.lanes, [&](int l) {
    const T x = from_slot<T>(a[l]), y = from_slot<T>(b[l]);
    const u64 third = c[l];
    bool first, second;
    if constexpr (is_pair<T>) first = compare(i, x.low, y.low), second = compare(i, x.high, y.high);
    else first = compare(i, x, y), second = !first;
    p[l] = combine(i, first, third);
    if (q) q[l] = combine(i, second, third);
  });
}

const std::string integer_comparisons = " eq|ne|lt|le|gt|ge|lo|ls|hi|hs";
const std::string float_comparisons = " eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan";

template <class T>
void declare_set_predicate(const std::string& form, const std::string& types) {
  on("setp" + form + types, 3, set_predicate<T>);
  on("setp" + form + " and|or|xor" + types, 4, set_predicate<T>);
}

template <class T>
void declare_comparisons(T) {
  const std::string t = type_name<T>(), types = std::is_unsigned_v<T> ? t + "|" + bits_name<T>() : t;
  const std::string ftz = std::is_same_v<T, f32> || std::is_same_v<T, f16> ? " ftz? " : " ";
  const std::string relations = is_float<T> ? float_comparisons : integer_comparisons;
  declare_set_predicate<T>(relations, ftz + types);
  on("set" + relations + ftz + "u32|s32 " + t, [](const Inst& i, T a, T b) { return compare(i, a, b) ? ~0u : 0u; });
  on("set" + relations + ftz + "f32 " + t, [](const Inst& i, T a, T b) { return f32(compare(i, a, b)); });
  on("selp " + t + "|" + bits_name<T>(), [](u64 a, u64 b, u8 p) { return p & 1 ? a : b; });
}

}  // namespace

void declare_arithmetic() {
  section("integer");
  for_types<u16, s16, u32, s32, u64, s64>([](auto t) {
    declare_integer_arithmetic(t);
    declare_comparisons(t);
    if constexpr (std::is_unsigned_v<decltype(t)>) declare_bit_arithmetic(t);
  });
  declare_bit_tricks();
  section("float");
  for_types<f16, bf16, f32, f64>([]<class T>(T t) {
    declare_comparisons(t);
    declare_floats<T, T>();
    if constexpr (sizeof(T) < 8) declare_floats<T, Pair<T>>();
    if constexpr (is_small<T>) declare_set_predicate<Pair<T>>(float_comparisons, " " + type_name<Pair<T>>());
  });
  // Functions are computed in double: after rounding, correctly rounded but for cases near a tie that double precision
  // cannot tell, about one in 2^28.
  on_floats<f32, f32, f32, f32>("min|max ftz? NaN? f32", minimum_or_maximum);
  on_floats<f32, f32, f32>("div approx|full ftz? f32", std::divides<>{});
  on_floats<f32, f32>("rcp approx ftz? f32", [](f32 a) { return 1 / a; });
  on_floats<f64, f64>("rcp approx ftz f64", [](f64 a) { return 1 / a; });
  on_floats<f32, f32>("sqrt approx ftz? f32", [](f32 a) { return std::sqrt(a); });
  on_floats<f32, f32>("rsqrt approx ftz? f32", [](f64 a) { return 1 / std::sqrt(a); });
  on_floats<f64, f64>("rsqrt approx ftz? f64", [](f64 a) { return f64(1 / std::sqrt((long double)a)); });
  on_floats<f32, f32>("lg2 approx ftz? f32", [](f64 a) { return std::log2(a); });
  on_floats<f32, f32>("sin approx ftz? f32", [](f64 a) { return std::sin(a); });
  on_floats<f32, f32>("cos approx ftz? f32", [](f64 a) { return std::cos(a); });
}
