// Building handlers from functions on one lane's values.
#pragma once
#include <algorithm>
#include <string>
#include <utility>

#include "machine.hpp"

namespace ptxvm {

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

template <class F, class D, class... S>
Handler by_lane(D (F::*)(S...) const) {
  return [](Warp& w, const Inst& i) { each<D, S...>(w, i, F{}); };
}

template <class F, class D, class... S>
Handler by_lane(D (F::*)(const Inst&, S...) const) {
  return [](Warp& w, const Inst& i) { each<D, S...>(w, i, [&](S... s) { return F{}(i, s...); }); };
}

// The handler of an instruction that is a function of one lane's operands; its types are those of the operands.
template <class F>
Handler op(F) {
  return by_lane<F>(&F::operator());
}

template <class... T, class F>
void for_types(F f) {
  (f(T{}), ...);
}

// The ISA's names of a type: s32, f16, f16x2, ... and of its bits alone: b32.
template <class T>
std::string type_name() {
  if constexpr (is_pair<T>) return type_name<decltype(T::low)>() + "x2";
  else if constexpr (std::is_same_v<T, f16>) return "f16";
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

}  // namespace ptxvm
