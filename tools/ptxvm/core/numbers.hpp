// Number formats of PTX and their rounding.
#pragma once
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>

using u8 = uint8_t;
using u16 = uint16_t;
using u32 = uint32_t;
using u64 = uint64_t;
using s8 = int8_t;
using s16 = int16_t;
using s32 = int32_t;
using s64 = int64_t;
using f32 = float;
using f64 = double;

enum class Rounding : u8 { nearest, zero, down, up, away };

inline double round_integral(double x, Rounding mode) {
  constexpr double (*by_mode[])(double) = {std::nearbyint, std::trunc, std::floor, std::ceil, std::round};
  return by_mode[int(mode)](x);
}

// A 16-bit float with `Precision` significant bits (the hidden one included) and least normal exponent `MinExponent`.
template <int Precision, int MinExponent>
struct Small {
  static constexpr int fraction = Precision - 1;
  static constexpr u16 infinity = 0x7fff >> fraction << fraction;
  u16 bits;

  Small() = default;
  explicit Small(double x, Rounding mode = Rounding::nearest) : bits(encode(x, mode)) {}

  operator double() const {
    const u32 magnitude = bits & 0x7fff, wide = magnitude << (24 - Precision);
    const float finite = std::bit_cast<float>(wide) * std::bit_cast<float>(u32(253 + MinExponent) << 23);
    const float value = magnitude >= infinity ? std::bit_cast<float>(wide | 0x7f800000) : finite;
    return bits & 0x8000 ? -value : value;
  }

 private:
  static u16 encode(double x, Rounding mode) {
    const u64 raw = std::bit_cast<u64>(x);
    const u16 sign = raw >> 48 & 0x8000;
    const double magnitude = std::fabs(x);
    if (magnitude != magnitude) return 0x7fff;
    if (sign && (mode == Rounding::down || mode == Rounding::up))
      mode = mode == Rounding::down ? Rounding::up : Rounding::down;
    int exponent = int(raw >> 52 & 0x7ff) - 1023;
    if (exponent > 1 - MinExponent) {  // beyond the largest finite value before rounding
      const bool clips = std::isfinite(x) && (mode == Rounding::zero || mode == Rounding::down);
      return sign | (clips ? infinity - 1 : infinity);
    }
    exponent = exponent < MinExponent ? MinExponent : exponent;
    const double quantum = std::bit_cast<double>(u64(exponent - fraction + 1023) << 52);
    // The hidden bit of a normal number carries into the exponent field; so does a round-up to the next power of 2.
    const u32 code = (u32(exponent - MinExponent) << fraction) + u32(round_integral(magnitude / quantum, mode));
    return sign | u16(code);
  }
};

using f16 = Small<11, -14>;
using bf16 = Small<8, -126>;

// Two floats in one register.
template <class T>
struct Pair {
  T low, high;
};

template <class T> inline constexpr bool is_pair = false;
template <class T> inline constexpr bool is_pair<Pair<T>> = true;
template <class T> inline constexpr bool is_small = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T> inline constexpr bool is_float = std::is_floating_point_v<T> || is_small<T>;

// Arithmetic on 16-bit floats is done in double and rounded once; double holds enough bits that this is exact rounding.
template <class T> using Compute = std::conditional_t<is_small<T>, double, T>;

// The unsigned integer that holds the bits of a T.
template <class T>
using BitsOf = std::conditional_t<sizeof(T) == 8, u64, std::conditional_t<sizeof(T) == 4, u32,
               std::conditional_t<sizeof(T) == 2, u16, u8>>>;

// A register, a slot, is 64 bits wide; those that its type lacks are ignored.
template <class T>
inline T from_slot(u64 slot) {
  return std::bit_cast<T>(BitsOf<T>(slot));
}

template <class T>
inline u64 to_slot(T value) {
  if constexpr (std::is_integral_v<T> && std::is_signed_v<T>) return u64(s64(value));  // sign-extended
  else return std::bit_cast<BitsOf<T>>(value);
}

// Every NaN that arithmetic on 32 bits or fewer makes is the canonical one.
template <class T>
inline T canonical(T x) {
  if constexpr (std::is_same_v<T, f32>) return x != x ? std::bit_cast<f32>(0x7fffffffu) : x;
  else return x;
}

template <class T>
inline T flush(T x) {  // .ftz: subnormals become zeros of the same sign
  constexpr double least = std::is_same_v<T, f16> ? 0x1p-14 : 0x1p-126;
  return std::fabs(double(x)) < least ? T(std::copysign(Compute<T>(0), Compute<T>(x))) : x;
}

template <class T>
inline T saturate(T x) {  // .sat: to [0, 1], NaN to +0
  return Compute<T>(x) > 0 ? (Compute<T>(x) < 1 ? x : T(1)) : T(0);
}

// .relu: negative numbers become +0.
template <class T>
inline T clamp_negative(T x) {
  return Compute<T>(x) <= 0 ? T(0) : x;
}

// min and max: -0 is less than +0; of a number and a NaN the number wins, unless NaNs are kept.
template <class T>
inline T extreme(bool largest, bool keeps_nan, T a, T b) {
  if (a != a || b != b) return keeps_nan ? a + b : a != a ? b : a;
  const bool less = a < b || (a == b && std::signbit(a));
  return less != largest ? a : b;
}

// a*b + c in double, rounded to odd, so that a second rounding to at most 51 bits is correct. a*b must be exact.
inline double fma_to_odd(double a, double b, double c) {
  const double p = a * b, sum = p + c, back = sum - p, error = (p - (sum - back)) + (c - back);
  const u64 bits = std::bit_cast<u64>(sum);
  if (!std::isfinite(sum) || error == 0 || bits & 1) return sum;
  return std::bit_cast<double>((error > 0) == (sum > 0) ? bits + 1 : bits - 1);
}

// Calls f while float and double arithmetic round in this mode.
template <class F>
inline void with_rounding(Rounding mode, F f) {
  constexpr int modes[] = {FE_TONEAREST, FE_TOWARDZERO, FE_DOWNWARD, FE_UPWARD, FE_TONEAREST};
  if (mode == Rounding::nearest) return f();
  std::fesetround(modes[int(mode)]);
  f();
  std::fesetround(FE_TONEAREST);
}
