// cvt, mov, and arithmetic on addresses.
#include <limits>

#include "lanes.hpp"

namespace {

template <class D>
D to_integer(double x, bool wide, Rounding mode) {
  constexpr D least = std::numeric_limits<D>::min(), most = std::numeric_limits<D>::max();
  if (x != x) return wide ? D(u64(1) << (8 * sizeof(D) - 1)) : D(0);  // the ISA's results for NaN
  x = round_integral(x, mode);
  return x <= double(least) ? least : x >= double(most) ? most : D(x);
}

template <class D, class S>
D convert(const Inst& i, S s) {
  if (std::is_same_v<S, f32> && i.ftz) s = flush(s);
  if constexpr (!is_float<D> && !is_float<S>) {
    return i.sat ? clamped<D>(s) : D(s);
  } else if constexpr (!is_float<D>) {
    return to_integer<D>(s, std::is_same_v<S, f64> || sizeof(D) == 8, i.rounding);
  } else {
    D d;
    if constexpr (is_small<D>) d = D(i.integral ? round_integral(double(s), i.rounding) : double(s), i.rounding);
    else d = canonical(i.integral ? D(round_integral(double(s), i.rounding)) : D(s));
    if (std::is_same_v<D, f32> && i.ftz) d = flush(d);
    return limited(i, d);
  }
}

template <class D, class S>
void convert_lanes(Warp& w, const Inst& i) {
  // A conversion to 16 bits rounds by itself; to f32 and f64 the processor does.
  with_rounding(is_small<D> || i.integral || !is_float<D> ? Rounding::nearest : i.rounding, [&] {
    each<D, S>(w, i, [&](S s) { return convert<D>(i, s); });
  });
}

template <class D, class S>
void declare_conversion(D, S) {
  const bool narrows = is_small<D> || sizeof(D) < sizeof(S), to_float = is_float<D>, from_float = is_float<S>;
  std::string form = "cvt";
  if (std::is_same_v<D, S> && to_float) form += " rni|rzi|rmi|rpi?";
  else if (to_float && from_float) form += !narrows ? "" : is_small<D> ? " rn|rz|rm|rp|rna" : " rn|rz|rm|rp";
  else if (to_float || from_float) form += to_float ? " rn|rz|rm|rp" : " rni|rzi|rmi|rpi";
  if (std::is_same_v<D, f32> || std::is_same_v<S, f32>) form += " ftz?";
  form += is_small<D> && is_float<S> ? " sat|relu? " : " sat? ";
  on(form + type_name<D>() + " " + type_name<S>(), 2, convert_lanes<D, S>);
}

// The vector is operands 1, 2, ... of pack and 0, 1, ... of unpack.
template <int width, bool packs>
void repack(Warp& w, const Inst& i) {
  const int size = width / i.vec;
  const u64 part = ~0ull >> (64 - size);
  for_lanes(w.lanes, [&](int l) {
    u64 whole = packs ? 0 : w.slot(i.op[i.vec])[l];
    for (int k = 0; k < i.vec; ++k) {
      if (packs) whole |= (w.slot(i.op[k + 1])[l] & part) << k * size;
      else w.slot(i.op[k])[l] = whole >> k * size & part;
    }
    if (packs) w.slot(i.op[0])[l] = whole;
  });
}

}  // namespace

void declare_conversions() {
  section("convert");
  for_types<u8, s8, u16, s16, u32, s32, u64, s64, f16, bf16, f32, f64>([](auto d) {
    for_types<u8, s8, u16, s16, u32, s32, u64, s64, f16, bf16, f32, f64>([d](auto s) { declare_conversion(d, s); });
  });
  for_types<f16, bf16>([]<class T>(T) {  // the first operand goes to the high half
    on("cvt rn|rz relu? " + type_name<Pair<T>>() + " f32", [](const Inst& i, f32 high, f32 low) {
      return Pair<T>{convert<T>(i, low), convert<T>(i, high)};
    });
  });
  section("move");
  const auto copy = [](u64 a) { return a; };
  on("mov pred|b16|b32|b64|u16|u32|u64|s16|s32|s64|f32|f64", copy);
  // `mov` with a vector on either side arrives under these names.
  on("pack v2 b32", 2, repack<32, true>);
  on("pack v2|v4 b64", 2, repack<64, true>);
  on("unpack v2 b32", 2, repack<32, false>);
  on("unpack v2|v4 b64", 2, repack<64, false>);
  on("cvta to? global|const|param u64", copy);
  on("cvta shared|shared::cta|shared::cluster u64", [](u64 a) { return a + shared_window; });
  on("cvta to shared|shared::cta|shared::cluster u64", [](u64 a) { return a - shared_window; });
  on("cvta local u64", [](u64 a) { return a + local_window; });
  on("cvta to local u64", [](u64 a) { return a - local_window; });
  on("isspacep shared|shared::cta|shared::cluster", [](u64 a) { return u8(in_shared(a)); });
  on("isspacep local", [](u64 a) { return u8(in_local(a)); });
  on("isspacep global", [](u64 a) { return u8(!in_shared(a) && !in_local(a)); });
  on("mapa shared::cluster? u32|u64", [](u64 a, u32 rank) {
    return (a & ~(0xffull << rank_shift)) | u64(rank + 1) << rank_shift;
  });
  on("getctarank shared::cluster? u32|u64", 2, [](Warp& w, const Inst& i) {
    each<u32, u64>(w, i, [&](u64 a) {
      const u32 given = a >> rank_shift & 0xff;
      return given ? given - 1 : w.block->rank;
    });
  });
  on("createpolicy fractional L2::evict_first|L2::evict_last|L2::evict_normal|L2::evict_unchanged b64",
     [](u64) { return u64(0); });
}
