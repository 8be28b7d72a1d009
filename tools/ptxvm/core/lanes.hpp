// Declaring instructions by functions on one lane's values.
#pragma once
#include <algorithm>
#include <string>
#include <utility>

#include "machine.hpp"

// Calls f on every lane's operands 1, 2, ... as the types S and stores the result, a D, in operand 0.
template <class D, class... S, class F>
inline void each(Warp& w, const Inst& i, F f) {
  u64* d = w.slot(i.op[0]);
  [&]<size_t... K>(std::index_sequence<K...>) {
    const u64* s[] = {w.slot(i.op[K + 1])...};
    if (w.lanes == all_lanes) {
      for (int l = 0; l < warp_size; ++l) d[l] = to_slot<D>(f(from_slot<S>(s[K][l])...));
    } else {
      for_lanes(w.lanes, [&](int l) { d[l] = to_slot<D>(f(from_slot<S>(s[K][l])...)); });
    }
  }(std::index_sequence_for<S...>{});
}

// f(i, a...) for a function that wants to know the instruction, else f(a...).
template <class F, class... A>
inline auto apply(F f, const Inst& i, A... a) {
  if constexpr (std::is_invocable_v<F, const Inst&, A...>) return f(i, a...);
  else return f(a...);
}

template <class F, class D, class... S>
void on_lanes(const std::string& pattern, D (F::*)(S...) const) {
  on(pattern, 1 + sizeof...(S), [](Warp& w, const Inst& i) { each<D, S...>(w, i, F{}); });
}

template <class F, class D, class... S>
void on_lanes(const std::string& pattern, D (F::*)(const Inst&, S...) const) {
  on(pattern, 1 + sizeof...(S), [](Warp& w, const Inst& i) {
    each<D, S...>(w, i, [&](S... s) { return F{}(i, s...); });
  });
}

// Declares an instruction that is a function of one lane's operands; its types are those of the operands.
template <class F>
void on(const std::string& pattern, F) {
  on_lanes<F>(pattern, &F::operator());
}

// x with .sat and .relu.
template <class T>
inline T limited(const Inst& i, T x) {
  if (i.sat) x = saturate(x);
  return i.relu ? clamp_negative(x) : x;
}

constexpr auto minimum_or_maximum = [](const Inst& i, auto a, auto... others) {
  ((a = extreme(i.largest, i.keeps_nan, a, others)), ...);
  return a;
};

// The D that is nearest to an integer.
template <class D>
inline D clamped(__int128 x) {
  return D(std::clamp<__int128>(x, std::numeric_limits<D>::min(), std::numeric_limits<D>::max()));
}

template <class... T, class F>
void for_types(F f) {
  (f(T{}), ...);
}

// The ISA's names of a type: s32, f16, f16x2, ... and of its bits alone: b32.
template <class T>
std::string type_name() {
  if constexpr (is_pair<T>) return type_name<decltype(T::low)>() + "x2";
  else if constexpr (std::is_same_v<T, bf16>) return "bf16";
  else return (is_float<T> ? "f" : std::is_signed_v<T> ? "s" : "u") + std::to_string(8 * sizeof(T));
}

template <class T>
std::string bits_name() {
  return "b" + std::to_string(8 * sizeof(T));
}

// Calls declare(name, type, f) for the functions of two integers that arithmetic, atomics and redux share.
template <class T, class Declare>
void for_integer_functions(Declare declare) {
  const std::string t = type_name<T>(), bits = bits_name<T>();
  using Bits = std::make_unsigned_t<T>;
  declare("add", t, [](T a, T b) { return T(Bits(a) + Bits(b)); });
  declare("min", t, [](T a, T b) { return std::min(a, b); });
  declare("max", t, [](T a, T b) { return std::max(a, b); });
  if constexpr (std::is_unsigned_v<T>) {
    declare("and", bits, [](T a, T b) { return T(a & b); });
    declare("or", bits, [](T a, T b) { return T(a | b); });
    declare("xor", bits, [](T a, T b) { return T(a ^ b); });
  }
}
