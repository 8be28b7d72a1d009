// Branches, barriers, and what lanes of a warp do together.
#include "lanes.hpp"

// Lets those go who wait at a barrier to which all have come.
void Machine::complete(Block& block, u32 number) {
  Barrier& barrier = block.barriers[number];
  const bool everyone = barrier.waiting == threads_per_block();
  if (everyone) {
    block.common.swap(barrier.clocks[u32(block.linear)]);
    barrier.clocks.erase(u32(block.linear));
  }
  const SharedClocks clocks = barrier.clocks.empty() ? nullptr : std::make_shared<Clocks>(std::move(barrier.clocks));
  for (Warp& w : block.warps)
    for (Split& split : w.splits) {
      if (split.state != Split::at_barrier || split.barrier != number) continue;
      if (everyone) for_lanes(split.lanes, [&](int lane) { w.clocks[lane].known = clocks; });
      else learn(w, split.lanes, clocks);
      const Inst& i = code[split.pc];
      const u32 results[] = {barrier.votes, barrier.votes == barrier.expected, barrier.votes > 0};
      if (i.reduces) for_lanes(split.lanes, [&](int lane) { w.slot(i.op[0])[lane] = results[i.function]; });
      split = {Split::ready, split.pc + 1, split.lanes};
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

namespace {

u32 uniform(const Warp& w, const Inst& i, s32 slot) {
  const u32 value = u32(w.slot(slot)[std::countr_zero(w.lanes)]);
  if (const u32 others = lanes_where(w.lanes, [&](int lane) { return u32(w.slot(slot)[lane]) != value; }))
    w.fail("barrier", i, others, "lanes of a warp name different barriers");
  return value;
}

// The executing lanes whose predicate operand holds.
u32 votes_of(const Warp& w, const Inst& i, s32 slot) {
  return w.lanes & (i.negated ? ~w.predicate(slot) : w.predicate(slot));
}

// Calls f for each group of lanes that name the same members in the last operand, with the group as the executing
// lanes, once all members that have not exited are here.
template <class F>
void for_groups(Warp& w, const Inst& i, F f) {
  const u64* mask = w.slot(i.op[i.operands - 1]);
  const u32 all = w.lanes;
  std::vector<u32> groups;
  for (u32 rest = all; rest; rest &= ~groups.back()) {
    const u32 members = u32(mask[std::countr_zero(rest)]);
    const u32 group = lanes_where(rest, [&](int lane) { return u32(mask[lane]) == members; });
    if (const u32 strangers = group & ~members)
      w.fail("member mask", i, strangers, "a lane takes part that is not in the member mask");
    if (members & w.live & ~group) return w.wait(Split::at_sync);
    groups.push_back(group);
  }
  for (u32 group : groups) w.lanes = group, f();
  w.lanes = all;
}

// Declares an instruction by which the lanes of a group get one result, f(warp, instruction).
template <class F>
void on_group(const std::string& pattern, int operands, F) {
  on(pattern, operands, [](Warp& w, const Inst& i) {
    for_groups(w, i, [&] {
      const u64 result = F{}(w, i);
      for_lanes(w.lanes, [&](int lane) { w.slot(i.op[0])[lane] = result; });
    });
  });
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

// Operands: [result,] barrier [, count] [, predicate]
void block_barrier(Warp& w, const Inst& i) {
  Machine& m = *w.machine;
  const s32* operand = i.op.data() + i.reduces;
  const u32 number = uniform(w, i, operand[0]);
  const bool counted = i.operands - 2 * i.reduces > 1;
  const u32 expected = counted ? uniform(w, i, operand[1]) : m.threads_per_block();
  if (number >= w.block->barriers.size()) w.fail("barrier", i, w.lanes, "there are 16 barriers, 0 to 15");
  Barrier& barrier = w.block->barriers[number];
  if (barrier.arrived && barrier.expected != expected)
    w.fail("barrier", i, w.lanes, text("expects ", expected, " threads; others came expecting ", barrier.expected));
  barrier.expected = expected;
  barrier.arrived += std::popcount(w.lanes);
  if (barrier.arrived > expected)
    w.fail("barrier", i, w.lanes, text("more threads come than the ", expected, " expected"));
  m.gather(barrier.clocks, w, w.lanes);
  if (i.reduces) barrier.votes += std::popcount(votes_of(w, i, i.op[i.operands - 1]));
  if (!i.arrives) barrier.waiting += std::popcount(w.lanes), w.wait(Split::at_barrier, number);
  if (barrier.arrived == expected) m.complete(*w.block, number);
}

void cluster_arrive(Warp& w, const Inst& i) {
  Cluster& cluster = *w.block->cluster;
  if (const u32 again = w.arrived & w.lanes) w.fail("barrier", i, again, "arrives a second time without a wait");
  w.arrived |= w.lanes;
  for_lanes(w.lanes, [&](int lane) { w.phase[lane] = cluster.phase; });
  if (!i.relaxed) w.machine->gather(cluster.gathering, w, w.lanes);
  cluster.arrived += std::popcount(w.lanes);
  w.machine->check_cluster(cluster);
}

void cluster_wait(Warp& w, const Inst& i) {
  Cluster& cluster = *w.block->cluster;
  if (const u32 never = w.lanes & ~w.arrived) w.fail("barrier", i, never, "waits without having arrived");
  if (lanes_where(w.lanes, [&](int lane) { return w.phase[lane] == cluster.phase; })) return w.wait(Split::at_cluster);
  w.arrived &= ~w.lanes;
  w.machine->learn(w, w.lanes, cluster.done);
}

void warp_barrier(Warp& w, const Inst& i) {
  for_groups(w, i, [&] {
    auto clocks = std::make_shared<Clocks>();
    w.machine->gather(*clocks, w, w.lanes);
    w.machine->learn(w, w.lanes, clocks);
  });
}

void shuffle(Warp& w, const Inst& i) {
  std::array<u64, warp_size> source;
  std::copy_n(w.slot(i.op[1]), warp_size, source.begin());
  const auto one_lane = [&](int lane) {
    const u32 b = u32(w.slot(i.op[2])[lane]) & 31, c = u32(w.slot(i.op[3])[lane]), segment = c >> 8 & 31;
    const int last = (lane & segment) | (c & 31 & ~segment), first = lane & segment;
    const int sources[] = {lane - int(b), lane + int(b), lane ^ int(b), first | int(b & ~segment)};  // up down bfly idx
    const int wanted = sources[i.function];
    const bool inside = i.function == 0 ? wanted >= last : wanted <= last;
    const int from = inside ? wanted : lane;
    if (!(w.lanes >> from & 1))
      w.fail("shuffle", i, 1u << lane, text("reads lane ", from, ", which does not take part"));
    w.slot(i.op[0])[lane] = u32(source[from]);
    if (i.also >= 0) w.slot(i.also)[lane] = inside;
  };
  for_groups(w, i, [&] { for_lanes(w.lanes, one_lane); });
}

template <class T, class F>
void on_reduction(const std::string& function, F) {
  on_group("redux sync " + function, 3, [](Warp& w, const Inst& i) {
    const auto value = [&](int lane) {
      const T x = from_slot<T>(w.slot(i.op[1])[lane]);
      return i.absolute ? T(std::fabs(x)) : x;
    };
    T total = value(std::countr_zero(w.lanes));
    for_lanes(w.lanes & (w.lanes - 1), [&](int lane) { total = apply(F{}, i, total, value(lane)); });
    return to_slot(canonical(total));
  });
}

}  // namespace

void declare_control() {
  section("control");
  on("bra uni?", 0, branch);
  on("exit", 0, [](Warp& w, const Inst&) { w.exit_lanes(); });
  on("ret uni?", 0, [](Warp& w, const Inst&) { w.exit_lanes(); });
  on("trap", 0, [](Warp& w, const Inst& i) { w.fail("trap", i, w.lanes, "the kernel gave up"); });
  on("nanosleep u32", 1, [](Warp&, const Inst&) {});
  on("griddepcontrol wait|launch_dependents", 0, [](Warp&, const Inst&) {});
  section("sync");
  for (const auto& [name, aligned] : {std::pair<std::string, std::string>{"bar", ""}, {"barrier", " aligned?"}}) {
    on(name + " cta? sync" + aligned, 1, block_barrier, 1);
    on(name + " cta? arrive" + aligned, 2, block_barrier);
    on(name + " cta? red popc" + aligned + " u32", 3, block_barrier, 1);
    on(name + " cta? red and|or" + aligned + " pred", 3, block_barrier, 1);
  }
  on("bar warp sync", 1, warp_barrier);
  on("barrier cluster arrive release|relaxed? aligned?", 0, cluster_arrive);
  on("barrier cluster wait acquire? aligned?", 0, cluster_wait);
  on("shfl sync up|down|bfly|idx b32", 5, shuffle);
  on_group("vote sync all pred", 3, [](Warp& w, const Inst& i) { return votes_of(w, i, i.op[1]) == w.lanes; });
  on_group("vote sync any pred", 3, [](Warp& w, const Inst& i) { return votes_of(w, i, i.op[1]) != 0; });
  on_group("vote sync ballot b32", 3, [](Warp& w, const Inst& i) { return votes_of(w, i, i.op[1]); });
  on_group("vote sync uni pred", 3, [](Warp& w, const Inst& i) {
    const u32 votes = votes_of(w, i, i.op[1]);
    return votes == w.lanes || votes == 0;
  });
  on("activemask b32", 1, [](Warp& w, const Inst& i) { each<u32>(w, i, [&] { return w.lanes; }); });
  on_group("elect sync", 2, [](Warp& w, const Inst& i) {
    const int leader = std::countr_zero(w.lanes);
    if (i.also >= 0) for_lanes(w.lanes, [&](int lane) { w.slot(i.also)[lane] = lane == leader; });
    return leader;
  });
  for_types<u32, s32>([]<class T>(T) {
    for_integer_functions<T>([](const std::string& function, const std::string& type, auto f) {
      on_reduction<T>(function + " " + type, f);
    });
  });
  on_reduction<f32>("min|max abs? NaN? f32", minimum_or_maximum);
}
