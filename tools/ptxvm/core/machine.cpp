// Runs the blocks of a grid: warps in lock step, blocks one after the other unless they must be there together.
#include "machine.hpp"

#include <algorithm>
#include <numeric>

u32 Warp::number() const { return u32(block->linear) * machine->warps_per_block() + index; }

u32 Warp::predicate(s32 number) const {
  const u64* p = slot(number);
  u32 mask = 0;
  for (int l = 0; l < warp_size; ++l) mask |= u32(p[l] & 1) << l;
  return mask;
}

// Joins lanes that have met at one instruction and picks the split that runs next: the one that is furthest behind,
// so that lanes that went ahead wait at the place where the branches meet.
void Warp::reconverge(bool lowest_first) {
  for (size_t a = 0; a < splits.size(); ++a)
    for (size_t b = splits.size() - 1; b > a; --b)
      if (splits[a].pc == splits[b].pc && splits[a].state <= Split::ready && splits[b].state <= Split::ready) {
        splits[a] = {Split::ready, splits[a].pc, splits[a].lanes | splits[b].lanes};
        splits.erase(splits.begin() + b);
      }
  const auto before = [lowest_first](const Split& a, const Split& b) {
    if ((a.state == Split::ready) != (b.state == Split::ready)) return a.state == Split::ready;
    return lowest_first ? a.pc < b.pc : a.pc > b.pc;
  };
  if (!splits.empty()) std::iter_swap(splits.begin(), std::min_element(splits.begin(), splits.end(), before));
}

void Warp::wait(Split::State state, u32 barrier) {
  splits.push_back({state, splits[0].pc, lanes, barrier});
  leave();
}

void Warp::fail(const char* kind, const Inst& i, u32 among, const std::string& message, u64 address, s64 other) const {
  const u32 thread = index * warp_size + std::countr_zero(among);
  throw Violation{kind, message, i.index, other, block->linear, thread, address};
}

void Warp::exit_lanes() {
  Cluster& cluster = *block->cluster;
  for_lanes(lanes & arrived, [&](int lane) { cluster.arrived -= phase[lane] == cluster.phase; });
  live &= ~lanes;
  block->live -= std::popcount(lanes);
  leave();
  ++machine->progress;
  machine->check_cluster(cluster);
}

void Warp::leave() {
  stays = true;
  splits[0].lanes &= ~lanes;
  ++splits[0].pc;
  if (splits[0].lanes == 0) splits.erase(splits.begin());
}

const Special& special(const std::string& name) {
  static const std::unordered_map<std::string, Special> table = [] {
    std::unordered_map<std::string, Special> t = {
        {"%cluster_ctarank", [](const Warp& w, u32) { return w.block->rank; }},
        {"%cluster_nctarank", [](const Warp& w, u32) { return w.machine->launch.cluster.count(); }},
        {"%is_explicit_cluster", [](const Warp& w, u32) { return w.machine->launch.explicit_cluster; }},
        {"%laneid", [](const Warp&, u32 k) { return k % warp_size; }},
        {"%warpid", [](const Warp& w, u32) { return w.index; }},
        {"%nwarpid", [](const Warp& w, u32) { return w.block->warps.size(); }},
        {"%gridid", [](const Warp&, u32) { return 0; }},
        {"%smid", [](const Warp&, u32) { return 0; }},
        {"%nsmid", [](const Warp&, u32) { return 1; }},
        {"%lanemask_eq", [](const Warp&, u32 k) { return 1u << k % warp_size; }},
        {"%lanemask_lt", [](const Warp&, u32 k) { return (1u << k % warp_size) - 1; }},
        {"%lanemask_le", [](const Warp&, u32 k) { return (2u << k % warp_size) - 1; }},
        {"%lanemask_gt", [](const Warp&, u32 k) { return ~((2u << k % warp_size) - 1); }},
        {"%lanemask_ge", [](const Warp&, u32 k) { return ~((1u << k % warp_size) - 1); }},
        {"%dynamic_smem_size", [](const Warp& w, u32) { return w.machine->launch.dynamic_shared; }},
        {"%total_smem_size", [](const Warp& w, u32) { return w.machine->launch.shared_size; }},
        // The address of the grid's barrier, as the driver passes it
        {"%envreg1", [](const Warp& w, u32) { return w.machine->launch.grid_workspace >> 32; }},
        {"%envreg2", [](const Warp& w, u32) { return u32(w.machine->launch.grid_workspace); }}};
    const auto triple = [&t](const std::string& stem, auto dim) {
      t[stem + ".x"] = [dim](const Warp& w, u32 k) { return dim(w, k).x; };
      t[stem + ".y"] = [dim](const Warp& w, u32 k) { return dim(w, k).y; };
      t[stem + ".z"] = [dim](const Warp& w, u32 k) { return dim(w, k).z; };
    };
    triple("%tid", [](const Warp& w, u32 k) { return w.machine->launch.block.at(k); });
    triple("%ntid", [](const Warp& w, u32) { return w.machine->launch.block; });
    triple("%ctaid", [](const Warp& w, u32) { return w.block->index; });
    triple("%nctaid", [](const Warp& w, u32) { return w.machine->launch.grid; });
    triple("%clusterid", [](const Warp& w, u32) { return w.block->index / w.machine->launch.cluster; });
    triple("%nclusterid", [](const Warp& w, u32) { return w.machine->launch.grid / w.machine->launch.cluster; });
    triple("%cluster_ctaid", [](const Warp& w, u32) { return w.block->index % w.machine->launch.cluster; });
    triple("%cluster_nctaid", [](const Warp& w, u32) { return w.machine->launch.cluster; });
    return t;
  }();
  const auto found = table.find(name);
  if (found == table.end()) throw std::invalid_argument("unknown special register " + name);
  return found->second;
}

static std::vector<u64> in_order(u64 n, int order, std::mt19937_64& random) {
  std::vector<u64> items(n);
  std::iota(items.begin(), items.end(), 0);
  if (order == 1) std::reverse(items.begin(), items.end());
  if (order == 2) std::shuffle(items.begin(), items.end(), random);
  return items;
}

void Machine::start(Block& block) {
  const u32 threads = threads_per_block();
  block.index = launch.grid.at(block.linear);
  block.live = threads;
  block.common.assign(threads, 0);
  block.barriers = {};
  block.shared.allocate("shared memory", launch.shared_size);
  block.shared.shared = true;
  block.shared.track();
  block.warps.resize(warps_per_block());
  for (u32 index = 0; index < block.warps.size(); ++index) {
    Warp& w = block.warps[index];
    w.machine = this, w.block = &block, w.index = index, w.turns = w.arrived = 0;
    w.live = u32((1ull << std::min<u32>(warp_size, threads - index * warp_size)) - 1);
    w.splits = {{Split::ready, 0, w.live}};
    w.phase = {}, w.clocks = {};
    w.registers.resize(size_t(launch.slots) * warp_size);  // they hold what an earlier block has left
    for (const auto& [slot, value] : launch.constants) std::fill_n(w.slot(slot), warp_size, value);
    for (const auto& [slot, name] : launch.specials) {
      const Special& value = special(name);
      for (u32 lane = 0; lane < warp_size; ++lane) w.slot(slot)[lane] = value(w, index * warp_size + lane);
    }
    w.local.resize(launch.local_size ? warp_size : 0);
    for (OwnedRegion& local : w.local) local.allocate("local memory", launch.local_size);
  }
}

void Machine::step(Warp& w, u64 instructions) {
  const bool lowest_first = ++w.turns % 8 != 0;  // now and then let lanes go ahead, in case the others wait for them
  w.reconverge(lowest_first);
  while (instructions-- && w.ready()) {
    const Inst& i = code[w.splits[0].pc];
    w.lanes = w.splits[0].lanes;
    if (i.guard >= 0) w.lanes &= i.guard_negated ? ~w.predicate(i.guard) : w.predicate(i.guard);
    Counter& counter = counters[i.index];
    ++counter.warps;
    counter.threads += std::popcount(w.lanes);
    ++issued;
    w.stays = false;
    if (i.aligned && w.lanes && w.lanes != w.live) w.wait(Split::at_sync);
    else if (w.lanes) i.run(w, i);
    if (!w.stays) ++w.splits[0].pc;
    if (w.splits.size() > 1) w.reconverge(lowest_first);
  }
}

void Machine::run_together(std::vector<Block*>& blocks) {
  std::vector<Warp*> warps;
  for (Block* block : blocks)
    for (Warp& w : block->warps) warps.push_back(&w);
  std::vector<Warp*> arranged;
  for (u64 k : in_order(warps.size(), launch.order, random)) arranged.push_back(warps[k]);
  u64 last_progress = progress, patience = issued + launch.patience;
  while (!arranged.empty()) {
    if (launch.order == 2) std::shuffle(arranged.begin(), arranged.end(), random);
    bool any = false;
    for (Warp* w : arranged) {
      w->reconverge();
      if (!w->ready()) continue;
      any = true;
      step(*w, launch.order == 2 ? 1 + random() % 64 : 4096);
    }
    std::erase_if(arranged, [](const Warp* w) { return w->live == 0; });
    if (progress != last_progress) last_progress = progress, patience = issued + launch.patience;
    if (!arranged.empty() && (!any || issued > patience)) report_stuck(blocks);
  }
}

void Machine::report_stuck(const std::vector<Block*>& blocks) {
  const Warp* blamed = nullptr;
  const Split* at = nullptr;
  for (const Block* block : blocks)
    for (const Warp& w : block->warps)
      for (const Split& split : w.splits)
        if (!at || split.state < at->state) blamed = &w, at = &split;
  std::string what = at->state == Split::at_sync ? "lanes" : "threads";
  what += " that must take part never come here";
  if (at->state == Split::ready) what = "no progress: it waits for what never happens, or loops for ever";
  const u32 threads = threads_per_block(), exited = threads - blamed->block->live;
  const std::string state = text("; of block ", blamed->block->linear, ", ", exited, " of ", threads,
                                 " threads have exited; lanes of this warp that are elsewhere: ",
                                 std::popcount(blamed->live & ~at->lanes));
  blamed->fail("deadlock", code[at->pc], at->lanes, what + state);
}

void Machine::run() {
  random.seed(launch.seed);
  counters.assign(code.size(), {});
  const Dim c = launch.cluster, g = launch.grid, many = g / c;
  std::vector<Cluster> clusters(std::clamp<u64>(launch.resident / c.count(), 1, many.count()));
  std::vector<Block> resident(clusters.size() * c.count());
  const u64 turns = (many.count() + clusters.size() - 1) / clusters.size();
  for (u64 turn : in_order(turns, launch.order, random)) {
    // The blocks of a cluster are neighbours in the grid; number clusters, then the blocks in each.
    const u64 first = turn * clusters.size(), left = std::min<u64>(clusters.size(), many.count() - first);
    std::vector<Block*> together;
    for (u64 k = 0; k < left * c.count(); ++k) together.push_back(&resident[k]);
    for (u64 k = 0; k < together.size(); ++k) {
      const u64 number = k / c.count(), rank = k % c.count();
      if (rank == 0) clusters[number] = {}, clusters[number].blocks.assign(&together[k], &together[k] + c.count());
      const Dim at = many.at(first + number), in = c.at(rank);
      const u64 x = at.x * c.x + in.x, y = at.y * c.y + in.y, z = at.z * c.z + in.z;
      Block& block = resident[k];
      block.linear = x + g.x * (y + g.y * z), block.rank = u32(rank), block.cluster = &clusters[number];
      start(block);
    }
    run_together(together);
  }
}
