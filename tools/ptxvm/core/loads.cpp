// ld, st, atom, red, matrices of shared memory, and fences.
#include <cstring>

#include "lanes.hpp"

namespace {

// Calls f on each lane with its address, for writes in an order that depends on the schedule.
template <class F>
void access(Warp& w, const Inst& i, s32 base, unsigned bytes, Use use, F f) {
  Machine& m = *w.machine;
  std::array<u64, warp_size> addresses;
  for (int l = 0; l < warp_size; ++l) addresses[l] = w.slot(base)[l] + u64(i.offset);
  m.count_access(w, i, addresses.data(), bytes);
  if (use != Use::read) ++m.progress;
  const bool backwards = use != Use::read && (m.launch.order == 1 || (m.launch.order == 2 && m.random() & 1));
  for (u32 rest = w.lanes, lane; rest; rest &= ~(1u << lane)) {
    lane = backwards ? std::bit_width(rest) - 1 : std::countr_zero(rest);
    f(int(lane), addresses[lane]);
  }
}

template <class T>
void load(Warp& w, const Inst& i) {
  const unsigned bytes = sizeof(T) * i.vec;
  access(w, i, i.op[i.vec], bytes, Use::read, [&](int lane, u64 address) {
    const Spot spot = w.machine->touch(w, i, lane, address, bytes, Use::read);
    T values[8];
    std::memcpy(values, spot.data(), bytes);
    for (int k = 0; k < i.vec; ++k) w.slot(i.op[k])[lane] = to_slot(values[k]);
    if (i.scope != Scope::weak) w.machine->observe(w, i, lane, spot.flag());
  });
}

template <class T>
void store(Warp& w, const Inst& i) {
  const unsigned bytes = sizeof(T) * i.vec;
  access(w, i, i.op[0], bytes, Use::write, [&](int lane, u64 address) {
    T values[8];
    for (int k = 0; k < i.vec; ++k) values[k] = from_slot<T>(w.slot(i.op[k + 1])[lane]);
    const Spot spot = w.machine->touch(w, i, lane, address, bytes, Use::write, values);
    std::memcpy(spot.data(), values, bytes);
    w.machine->publish(w, i, lane, spot.flag(), false);
  });
}

// atom d, [a], b, c and red [a], b: memory becomes f(memory, b, c).
template <class T, bool returns, class F>
void update(Warp& w, const Inst& i) {
  const s32* operand = i.op.data() + returns;
  access(w, i, operand[0], sizeof(T), Use::update, [&](int lane, u64 address) {
    const Spot spot = w.machine->touch(w, i, lane, address, sizeof(T), Use::update);
    T before;
    std::memcpy(&before, spot.data(), sizeof(T));
    const u64 b = w.slot(operand[1])[lane], c = w.slot(operand[i.operands - returns > 2 ? 2 : 1])[lane];
    const T after = F{}(before, from_slot<T>(b), from_slot<T>(c));
    std::memcpy(spot.data(), &after, sizeof(T));
    w.machine->observe(w, i, lane, spot.flag());
    w.machine->publish(w, i, lane, spot.flag(), true);
    if constexpr (returns) w.slot(i.op[0])[lane] = to_slot(before);
  });
}

const std::string order = " relaxed|acquire|release|acq_rel?", scope = " cta|cluster|gpu|sys?",
                  space = " global|shared|shared::cta|shared::cluster?";

template <class T, class F>
void declare_atomic(const std::string& operation, const std::string& type, F, int operands = 3) {
  const std::string op = " " + operation, t = " " + type, stated = " relaxed|acquire|release|acq_rel";
  // The ISA's order of modifiers, Triton's, and that of CUDA's headers.
  const std::string forms[] = {order + scope + space + op, space + scope + stated + op, space + op + stated + scope};
  for (const std::string& form : forms) {
    on("atom" + form + t, operands, update<T, true, F>);
    on("red" + form + t, operands - 1, update<T, false, F>);
  }
}

template <class T>
constexpr auto float_sum = [](T m, T v, T) { return canonical(T(Compute<T>(m) + Compute<T>(v))); };

template <class T>
constexpr auto pair_sum = [](Pair<T> m, Pair<T> v, Pair<T>) { return Pair<T>{T(m.low + v.low), T(m.high + v.high)}; };

// ldmatrix and stmatrix move 8x8 matrices of 16-bit elements. Lane 8*m + r has the address of row r of matrix m;
// lane t holds the elements 2*(t%4) and 2*(t%4) + 1 of row t/4, or of column t/4 with .trans.
template <bool stores>
void move_matrices(Warp& w, const Inst& i) {
  if (w.lanes != all_lanes) w.fail("divergence", i, w.lanes, "needs all 32 lanes");
  const s32* registers = i.op.data() + stores;
  const s32 base = i.op[stores ? 0 : i.vec];
  w.lanes = i.vec == 4 ? all_lanes : (1u << 8 * i.vec) - 1;
  access(w, i, base, 16, stores ? Use::write : Use::read, [&](int lane, u64 address) {
    const auto element = [&](int k) {  // of the lane's row: the bits of a register's low or high half
      const int row = i.transposed ? k : lane % 8, column = i.transposed ? lane % 8 : k;
      return reinterpret_cast<u8*>(w.slot(registers[lane / 8]) + row * 4 + column / 2) + column % 2 * 2;
    };
    u16 values[8];
    if constexpr (stores) {
      for (int k = 0; k < 8; ++k) std::memcpy(values + k, element(k), 2);
      std::memcpy(w.machine->touch(w, i, lane, address, 16, Use::write, values).data(), values, 16);
    } else {
      std::memcpy(values, w.machine->touch(w, i, lane, address, 16, Use::read).data(), 16);
      for (int k = 0; k < 8; ++k) std::memcpy(element(k), values + k, 2);
    }
  });
  w.lanes = all_lanes;
}

template <class T>
void declare_moves_to_memory(T) {
  const std::string evict = "evict_normal|L1::evict_unchanged|L1::evict_first|L1::evict_last|L1::no_allocate?";
  const std::string hints =
      " L1::" + evict + " L2::evict_normal|L2::evict_first|L2::evict_last? L2::cache_hint? L2::64B|L2::128B|L2::256B?";
  const std::string spaces = " global|shared|shared::cta|shared::cluster|local", vector = " v2|v4|v8? ";
  std::string t = type_name<T>();
  if (!is_float<T> && std::is_unsigned_v<T>) t += "|" + bits_name<T>();
  const std::string rest = hints + vector + t;
  on("ld weak|volatile|relaxed|acquire?" + scope + spaces + "|param|const? ca|cg|cs|lu|cv? nc?" + rest, 2, load<T>, 1);
  on("st weak|volatile|relaxed|release?" + scope + spaces + "? wb|cg|cs|wt?" + rest, 2, store<T>, 1);
}

}  // namespace

void declare_memory() {
  section("memory");
  for_types<u8, s8, u16, s16, u32, s32, u64, s64, f32, f64>([](auto t) { declare_moves_to_memory(t); });
  for_types<u32, s32, u64, s64>([]<class T>(T) {
    const std::string t = type_name<T>(), b = bits_name<T>();
    for_integer_functions<T>([](const std::string& function, const std::string& type, auto f) {
      declare_atomic<T>(function, type, [](T m, T v, T) { return decltype(f){}(m, v); });
    });
    if constexpr (std::is_unsigned_v<T>) {
      declare_atomic<T>("exch", b, [](T, T v, T) { return v; });
      declare_atomic<T>("cas", b, [](T m, T expected, T v) { return m == expected ? v : m; }, 4);
      declare_atomic<T>("inc", t, [](T m, T v, T) { return m >= v ? T(0) : T(m + 1); });
      declare_atomic<T>("dec", t, [](T m, T v, T) { return m == 0 || m > v ? v : T(m - 1); });
    }
  });
  for_types<f32, f64>([]<class T>(T) { declare_atomic<T>("add", type_name<T>(), float_sum<T>); });
  for_types<f16, bf16>([]<class T>(T) {
    declare_atomic<T>("add noftz", type_name<T>(), float_sum<T>);
    declare_atomic<Pair<T>>("add noftz", type_name<Pair<T>>(), pair_sum<T>);
  });
  declare_atomic<u16>("cas", "b16", [](u16 m, u16 expected, u16 v) { return m == expected ? v : m; }, 4);
  on("ldmatrix sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta? b16", 2, move_matrices<false>);
  on("stmatrix sync aligned m8n8 x1|x2|x4 trans? shared|shared::cta? b16", 2, move_matrices<true>);
  on("fence acq_rel|sc cta|cluster|gpu|sys", 0, [](Warp& w, const Inst& i) { w.machine->fence(w, i.scope); });
  on("membar cta|gl|sys", 0, [](Warp& w, const Inst& i) { w.machine->fence(w, i.scope); });
  on("prefetch global|local? L1|L2|L2::evict_last|L2::evict_normal", 1, [](Warp&, const Inst&) {});
}
