// Branches, barriers, and what lanes of a warp do together.
#include <algorithm>

#include "instructions.hpp"
#include "lanes.hpp"

namespace ptxvm {

void Machine::complete(Block& block, Barrier& barrier) {
  u32 waiters = 0;
  for (const Barrier::Waiter& waiter : barrier.waiting) waiters += std::popcount(waiter.lanes);
  const bool everyone = waiters == threads_per_block();
  if (everyone) {
    block.common.swap(barrier.clocks[u32(block.linear)]);
    barrier.clocks.erase(u32(block.linear));
  }
  const SharedClocks clocks = barrier.clocks.empty() ? nullptr : std::make_shared<Clocks>(std::move(barrier.clocks));
  for (const auto& [w, lanes, inst] : barrier.waiting) {
    if (everyone) for_lanes(lanes, [w = w, &clocks](int lane) { w->clocks[lane].known = clocks; });
    else learn(*w, lanes, clocks);
    const u32 here = lanes;
    const auto split = std::find_if(w->splits.begin(), w->splits.end(), [here](const Split& s) { return s.lanes == here; });
    split->state = Split::ready;
    ++split->pc;
    if (inst) for_lanes(lanes, [&, w = w, inst = inst](int lane) {
      const u32 results[] = {barrier.votes, barrier.votes == barrier.expected, barrier.votes > 0};
      w->slot(inst->op[0])[lane] = results[inst->function];
    });
  }
  barrier = {};
  ++progress;
}

void Machine::check_cluster(Cluster& cluster) {
  u32 live = 0;
  for (const Block* block : cluster.blocks) live += block->live;
  if (cluster.arrived == 0 || cluster.arrived < live) return;
  cluster.done = std::make_shared<Clocks>(std::move(cluster.gathering));
  cluster.gathering.clear();
  cluster.arrived = 0;
  ++cluster.phase;
  ++progress;
  for (Block* block : cluster.blocks)
    for (Warp& w : block->warps)
      for (Split& split : w.splits)
        if (split.state == Split::at_cluster) split.state = Split::ready;
}

bool Warp::meet() {
  if (lanes == live) return true;
  wait(Split::at_sync);
  return false;
}

namespace {

u32 uniform(const Warp& w, const Inst& i, s32 slot) {
  const u32 value = u32(w.slot(slot)[std::countr_zero(w.lanes)]);
  for_lanes(w.lanes, [&](int lane) {
    if (u32(w.slot(slot)[lane]) != value) w.machine->fail("barrier", w, i, lane, 0, "lanes of a warp name different barriers");
  });
  return value;
}

// Calls f for each group of lanes that name the same members, with the group as the executing lanes, once all members
// that have not exited are here.
template <class F>
void for_groups(Warp& w, const Inst& i, s32 mask, F f) {
  const u32 all = w.lanes;
  std::vector<u32> groups;
  for (u32 rest = all; rest; rest &= ~groups.back()) {
    const u32 members = u32(w.slot(mask)[std::countr_zero(rest)]);
    u32 group = 0;
    for_lanes(rest, [&](int lane) { group |= u32(u32(w.slot(mask)[lane]) == members) << lane; });
    if (const u32 strangers = group & ~members)
      w.machine->fail("member mask", w, i, std::countr_zero(strangers), 0, "a lane takes part that is not in the member mask");
    if (members & w.live & ~group) return w.wait(Split::at_sync);
    groups.push_back(group);
  }
  for (u32 group : groups) {
    w.lanes = group;
    f();
  }
  w.lanes = all;
}

void branch(Warp& w, const Inst& i) {
  w.stays = true;
  const Split here = w.splits[0];
  const u32 others = here.lanes & ~w.lanes;
  w.splits[0] = {Split::ready, i.target, w.lanes};
  if (!others) return;
  w.splits.push_back({Split::ready, here.pc + 1, others});
  ++w.machine->counters[i.index].divergent;
}

struct BarrierForm {
  bool waits = true, reduces = false;
};

// Operands: [result,] barrier [, count] [, predicate]
template <BarrierForm form, bool aligned>
void block_barrier(Warp& w, const Inst& i) {
  if ((aligned || i.aligned) && !w.meet()) return;
  Machine& m = *w.machine;
  Block& block = *w.block;
  const s32* operand = i.op.data() + form.reduces;
  const u32 number = uniform(w, i, operand[0]);
  const bool counted = i.operands - 2 * form.reduces > 1;
  const u32 expected = counted ? uniform(w, i, operand[1]) : m.threads_per_block();
  const int lane = std::countr_zero(w.lanes);
  if (number >= block.barriers.size()) m.fail("barrier", w, i, lane, 0, "there are 16 barriers, 0 to 15");
  Barrier& barrier = block.barriers[number];
  if (barrier.arrived && barrier.expected != expected)
    m.fail("barrier", w, i, lane, 0, "expects " + std::to_string(expected) + " threads; others came expecting " + std::to_string(barrier.expected));
  barrier.expected = expected;
  barrier.arrived += std::popcount(w.lanes);
  if (barrier.arrived > expected) m.fail("barrier", w, i, lane, 0, "more threads come than the " + std::to_string(expected) + " expected");
  m.gather(barrier.clocks, w, w.lanes);
  if constexpr (form.reduces) {
    const u32 votes = w.predicate(i.op[i.operands - 1]);
    barrier.votes += std::popcount((i.negated_c ? ~votes : votes) & w.lanes);
  }
  if constexpr (form.waits) {
    barrier.waiting.push_back({&w, w.lanes, form.reduces ? &i : nullptr});
    w.wait(Split::at_barrier);
  }
  if (barrier.arrived == expected) m.complete(block, barrier);
}

template <bool releases>
void cluster_arrive(Warp& w, const Inst& i) {
  if (i.aligned && !w.meet()) return;
  Cluster& cluster = *w.block->cluster;
  if (const u32 again = w.arrived & w.lanes)
    w.machine->fail("barrier", w, i, std::countr_zero(again), 0, "arrives a second time without a wait");
  w.arrived |= w.lanes;
  for_lanes(w.lanes, [&](int lane) { w.phase[lane] = cluster.phase; });
  if constexpr (releases) w.machine->gather(cluster.gathering, w, w.lanes);
  cluster.arrived += std::popcount(w.lanes);
  w.machine->check_cluster(cluster);
}

void cluster_wait(Warp& w, const Inst& i) {
  if (i.aligned && !w.meet()) return;
  Cluster& cluster = *w.block->cluster;
  if (const u32 never = w.lanes & ~w.arrived) w.machine->fail("barrier", w, i, std::countr_zero(never), 0, "waits without having arrived");
  bool complete = true;
  for_lanes(w.lanes, [&](int lane) { complete = complete && w.phase[lane] != cluster.phase; });
  if (!complete) return w.wait(Split::at_cluster);
  w.arrived &= ~w.lanes;
  w.machine->learn(w, w.lanes, cluster.done);
}

void warp_barrier(Warp& w, const Inst& i) {
  for_groups(w, i, i.op[0], [&] {
    auto clocks = std::make_shared<Clocks>();
    w.machine->gather(*clocks, w, w.lanes);
    w.machine->learn(w, w.lanes, clocks);
  });
}

enum Shuffle { up, down, butterfly, indexed };

template <Shuffle mode>
void shuffle(Warp& w, const Inst& i) {
  std::array<u64, warp_size> source;
  std::copy_n(w.slot(i.op[1]), warp_size, source.begin());
  const auto one_lane = [&](int lane) {
    const u32 b = u32(w.slot(i.op[2])[lane]) & 31, c = u32(w.slot(i.op[3])[lane]), segment = c >> 8 & 31;
    const int last = (lane & segment) | (c & 31 & ~segment), first = lane & segment;
    int from = mode == up          ? lane - int(b)
               : mode == down      ? lane + int(b)
               : mode == butterfly ? lane ^ int(b)
                                   : first | int(b & ~segment);
    const bool inside = mode == up ? from >= last : from <= last;
    if (!inside) from = lane;
    if (!(w.lanes >> from & 1))
      w.machine->fail("shuffle", w, i, lane, 0, "reads lane " + std::to_string(from) + ", which does not take part");
    w.slot(i.op[0])[lane] = u32(source[from]);
    if (i.also >= 0) w.slot(i.also)[lane] = inside;
  };
  for_groups(w, i, i.op[4], [&] { for_lanes(w.lanes, one_lane); });
}

// vote: a function of the lanes whose predicate holds and of all that vote.
template <class F>
Handler vote(F) {
  return [](Warp& w, const Inst& i) {
    const u32 votes = i.negated_c ? ~w.predicate(i.op[1]) : w.predicate(i.op[1]);
    for_groups(w, i, i.op[2], [&] {
      const u32 result = F{}(votes & w.lanes, w.lanes);
      for_lanes(w.lanes, [&](int lane) { w.slot(i.op[0])[lane] = result; });
    });
  };
}

template <class T, class F>
Handler reduction(F) {
  return [](Warp& w, const Inst& i) {
    for_groups(w, i, i.op[2], [&] {
      const u64* source = w.slot(i.op[1]);
      T total = from_slot<T>(source[std::countr_zero(w.lanes)]);
      for_lanes(w.lanes & (w.lanes - 1), [&](int lane) { total = F{}(total, from_slot<T>(source[lane])); });
      for_lanes(w.lanes, [&](int lane) { w.slot(i.op[0])[lane] = to_slot<T>(canonical(total)); });
    });
  };
}

template <class T>
void declare_reductions(T) {
  const std::string t = " " + type_name<T>();
  on("redux sync add" + t, 3, reduction<T>([](T a, T b) { return T(u32(a) + u32(b)); }));
  on("redux sync min" + t, 3, reduction<T>([](T a, T b) { return std::min(a, b); }));
  on("redux sync max" + t, 3, reduction<T>([](T a, T b) { return std::max(a, b); }));
}

template <bool largest, bool absolute, bool keeps_nan>
void declare_float_reduction(const std::string& modifiers) {
  on(std::string("redux sync ") + (largest ? "max" : "min") + modifiers + " f32", 3, reduction<f32>([](f32 a, f32 b) {
    if (absolute) a = std::fabs(a), b = std::fabs(b);
    if (a != a || b != b) return keeps_nan ? a + b : a != a ? b : a;
    return (a < b || (a == b && std::signbit(a))) != largest ? a : b;
  }));
}

template <bool largest>
void declare_float_reductions() {
  declare_float_reduction<largest, false, false>("");
  declare_float_reduction<largest, false, true>(" NaN");
  declare_float_reduction<largest, true, false>(" abs");
  declare_float_reduction<largest, true, true>(" abs NaN");
}

}  // namespace

void declare_control() {
  section(Class::control);
  on("bra uni?", 0, branch);
  on("exit", 0, [](Warp& w, const Inst&) { w.exit_lanes(); });
  on("ret uni?", 0, [](Warp& w, const Inst&) { w.exit_lanes(); });
  on("trap", 0, [](Warp& w, const Inst& i) { w.machine->fail("trap", w, i, std::countr_zero(w.lanes), 0, "the kernel gave up"); });
  on("nanosleep u32", 1, [](Warp&, const Inst&) {});
  on("griddepcontrol wait|launch_dependents", 0, [](Warp&, const Inst&) {});
  section(Class::sync);
  on("bar cta? sync", 1, block_barrier<BarrierForm{}, true>, 1);
  on("bar cta? arrive", 2, block_barrier<BarrierForm{.waits = false}, true>);
  on("barrier cta? sync aligned?", 1, block_barrier<BarrierForm{}, false>, 1);
  on("barrier cta? arrive aligned?", 2, block_barrier<BarrierForm{.waits = false}, false>);
  on("bar cta? red popc u32", 3, block_barrier<BarrierForm{.reduces = true}, true>, 1);
  on("bar cta? red and|or pred", 3, block_barrier<BarrierForm{.reduces = true}, true>, 1);
  on("barrier cta? red popc aligned? u32", 3, block_barrier<BarrierForm{.reduces = true}, false>, 1);
  on("barrier cta? red and|or aligned? pred", 3, block_barrier<BarrierForm{.reduces = true}, false>, 1);
  on("bar warp sync", 1, warp_barrier);
  on("barrier cluster arrive release? aligned?", 0, cluster_arrive<true>);
  on("barrier cluster arrive relaxed aligned?", 0, cluster_arrive<false>);
  on("barrier cluster wait acquire? aligned?", 0, cluster_wait);
  on("shfl sync up b32", 5, shuffle<up>);
  on("shfl sync down b32", 5, shuffle<down>);
  on("shfl sync bfly b32", 5, shuffle<butterfly>);
  on("shfl sync idx b32", 5, shuffle<indexed>);
  on("vote sync all pred", 3, vote([](u32 votes, u32 all) { return u32(votes == all); }));
  on("vote sync any pred", 3, vote([](u32 votes, u32) { return u32(votes != 0); }));
  on("vote sync uni pred", 3, vote([](u32 votes, u32 all) { return u32(votes == all || votes == 0); }));
  on("vote sync ballot b32", 3, vote([](u32 votes, u32) { return votes; }));
  on("activemask b32", 1, [](Warp& w, const Inst& i) { for_lanes(w.lanes, [&](int lane) { w.slot(i.op[0])[lane] = w.lanes; }); });
  on("elect sync", 2, [](Warp& w, const Inst& i) {
    for_groups(w, i, i.op[1], [&] {
      const int leader = std::countr_zero(w.lanes);
      for_lanes(w.lanes, [&](int lane) {
        w.slot(i.op[0])[lane] = leader;
        if (i.also >= 0) w.slot(i.also)[lane] = lane == leader;
      });
    });
  });
  for_types<u32, s32>([](auto t) { declare_reductions(t); });
  on("redux sync and b32", 3, reduction<u32>([](u32 a, u32 b) { return a & b; }));
  on("redux sync or b32", 3, reduction<u32>([](u32 a, u32 b) { return a | b; }));
  on("redux sync xor b32", 3, reduction<u32>([](u32 a, u32 b) { return a ^ b; }));
  declare_float_reductions<false>();
  declare_float_reductions<true>();
}

}  // namespace ptxvm
