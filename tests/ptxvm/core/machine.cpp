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

void Warp::wait(Split::State state) {
  splits.push_back({state, splits[0].pc, lanes});
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
        {"%cluster_ctarank", [](Place p) { return p.warp.block->rank; }},
        {"%cluster_nctarank", [](Place p) { return p.launch.cluster.count(); }},
        {"%is_explicit_cluster", [](Place p) { return p.launch.explicit_cluster; }},
        {"%laneid", [](Place p) { return p.lane(); }},
        {"%warpid", [](Place p) { return p.warp.index; }},
        {"%nwarpid", [](Place p) { return p.warp.block->warps.size(); }},
        {"%gridid", [](Place) { return 0; }},
        {"%smid", [](Place) { return 0; }},
        {"%nsmid", [](Place) { return 1; }},
        {"%lanemask_eq", [](Place p) { return 1u << p.lane(); }},
        {"%lanemask_lt", [](Place p) { return (1u << p.lane()) - 1; }},
        {"%lanemask_le", [](Place p) { return (2u << p.lane()) - 1; }},
        {"%lanemask_gt", [](Place p) { return ~((2u << p.lane()) - 1); }},
        {"%lanemask_ge", [](Place p) { return ~((1u << p.lane()) - 1); }},
        {"%dynamic_smem_size", [](Place p) { return p.launch.dynamic_shared; }},
        {"%total_smem_size", [](Place p) { return p.launch.shared_size; }},
        {"%envreg1", [](Place p) { return p.launch.grid_workspace >> 32; }},  // as the driver passes it
        {"%envreg2", [](Place p) { return u32(p.launch.grid_workspace); }}};
    const auto triple = [&t](const std::string& stem, auto dim) {
      t[stem + ".x"] = [dim](Place p) { return dim(p).x; };
      t[stem + ".y"] = [dim](Place p) { return dim(p).y; };
      t[stem + ".z"] = [dim](Place p) { return dim(p).z; };
    };
    triple("%tid", [](Place p) { return p.launch.block.at(p.thread); });
    triple("%ntid", [](Place p) { return p.launch.block; });
    triple("%ctaid", [](Place p) { return p.warp.block->index; });
    triple("%nctaid", [](Place p) { return p.launch.grid; });
    triple("%clusterid", [](Place p) { return p.warp.block->index / p.launch.cluster; });
    triple("%nclusterid", [](Place p) { return p.launch.grid / p.launch.cluster; });
    triple("%cluster_ctaid", [](Place p) { return p.warp.block->index % p.launch.cluster; });
    triple("%cluster_nctaid", [](Place p) { return p.launch.cluster; });
    return t;
  }();
  const auto found = table.find(name);
  if (found == table.end()) throw std::invalid_argument("unknown special register " + name);
  return found->second;
}

namespace {

std::vector<u64> in_order(u64 n, int order, std::mt19937_64& random) {
  std::vector<u64> items(n);
  std::iota(items.begin(), items.end(), 0);
  if (order == 1) std::reverse(items.begin(), items.end());
  if (order == 2) std::shuffle(items.begin(), items.end(), random);
  return items;
}

}  // namespace

void Machine::start(Block& block) {
  const u32 threads = threads_per_block();
  block.index = launch.grid.at(block.linear);
  block.live = threads;
  block.common.assign(threads, 0);
  block.barriers = {};
  block.shared.allocate("shared memory", 0, launch.shared_size);
  block.shared.shared = true;
  block.shared.track();
  block.warps.resize(warps_per_block());
  for (u32 index = 0; index < block.warps.size(); ++index) {
    Warp& w = block.warps[index];
    const u32 lanes = std::min<u32>(warp_size, threads - index * warp_size);
    w.machine = this, w.block = &block, w.index = index, w.turns = w.arrived = 0;
    w.live = lanes == warp_size ? all_lanes : (1u << lanes) - 1;
    w.splits = {{Split::ready, 0, w.live}};
    w.phase = {}, w.clocks = {};
    w.registers.resize(size_t(launch.slots) * warp_size);
    std::fill_n(w.registers.begin(), size_t(launch.registers) * warp_size, 0);
    for (const auto& [slot, value] : launch.constants) std::fill_n(w.slot(slot), warp_size, value);
    for (const auto& [slot, name] : launch.specials) {
      const Special& value = special(name);
      for (u32 lane = 0; lane < warp_size; ++lane) w.slot(slot)[lane] = value({launch, w, index * warp_size + lane});
    }
    if (launch.local_size) {
      w.local.resize(warp_size);
      for (OwnedRegion& local : w.local) local.allocate("local memory", 0, launch.local_size);
    }
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
    if (w.lanes) i.run(w, i);
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
  const std::string what = at->state == Split::at_sync ? "lanes that must take part never come here"
                           : at->state == Split::ready ? "no progress: it waits for what never happens, or loops for ever"
                                                       : "threads that must take part never come here";
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
  const u64 blocks = g.count(), group = launch.cooperative ? blocks : c.count();
  std::vector<Block> resident(group);
  std::vector<Cluster> clusters(group / c.count());
  std::vector<Block*> together;
  for (Block& block : resident) together.push_back(&block);
  for (u64 first : in_order(blocks / group, launch.order, random)) {
    // The blocks of a cluster are neighbours in the grid; number clusters, then the blocks in each.
    for (u64 k = 0; k < group; ++k) {
      const u64 number = k / c.count(), rank = k % c.count();
      if (rank == 0) clusters[number] = {}, clusters[number].blocks.assign(&together[k], &together[k] + c.count());
      const Dim at = many.at(first * clusters.size() + number), in = c.at(rank);
      const u64 x = at.x * c.x + in.x, y = at.y * c.y + in.y, z = at.z * c.z + in.z;
      resident[k].linear = x + g.x * (y + g.y * z), resident[k].rank = u32(rank), resident[k].cluster = &clusters[number];
      start(resident[k]);
    }
    run_together(together);
  }
}
