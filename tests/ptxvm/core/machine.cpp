// Runs the blocks of a grid: warps in lock step, blocks one after the other unless they must be there together.
#include "machine.hpp"

#include <algorithm>
#include <numeric>

namespace ptxvm {

u32 Warp::number() const { return u32(block->linear) * machine->warps_per_block() + index; }
u32 Warp::thread(int lane) const {
  return u32(block->linear) * machine->threads_per_block() + index * warp_size + lane;
}

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
      if (splits[a].pc == splits[b].pc && splits[a].state <= Split::at_sync && splits[b].state <= Split::at_sync) {
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

u32 Cluster::rank(const Block* block) const {
  return u32(std::find(blocks.begin(), blocks.end(), block) - blocks.begin());
}

const Special& special(const std::string& name) {
  static const std::unordered_map<std::string, Special> table = [] {
    std::unordered_map<std::string, Special> t;
    const auto triple = [&t](const std::string& stem, auto dim) {
      t[stem + ".x"] = [dim](const Launch& l, const Warp& w, u32 k) { return dim(l, w, k).x; };
      t[stem + ".y"] = [dim](const Launch& l, const Warp& w, u32 k) { return dim(l, w, k).y; };
      t[stem + ".z"] = [dim](const Launch& l, const Warp& w, u32 k) { return dim(l, w, k).z; };
    };
    const auto over = [](Dim a, Dim b) { return Dim{a.x / b.x, a.y / b.y, a.z / b.z}; };
    const auto modulo = [](Dim a, Dim b) { return Dim{a.x % b.x, a.y % b.y, a.z % b.z}; };
    triple("%tid", [](const Launch& l, const Warp&, u32 k) { return l.block.at(k); });
    triple("%ntid", [](const Launch& l, const Warp&, u32) { return l.block; });
    triple("%ctaid", [](const Launch&, const Warp& w, u32) { return w.block->index; });
    triple("%nctaid", [](const Launch& l, const Warp&, u32) { return l.grid; });
    triple("%clusterid", [over](const Launch& l, const Warp& w, u32) { return over(w.block->index, l.cluster); });
    triple("%nclusterid", [over](const Launch& l, const Warp&, u32) { return over(l.grid, l.cluster); });
    triple("%cluster_ctaid", [modulo](const Launch& l, const Warp& w, u32) {
      return modulo(w.block->index, l.cluster);
    });
    triple("%cluster_nctaid", [](const Launch& l, const Warp&, u32) { return l.cluster; });
    t["%cluster_ctarank"] = [](const Launch&, const Warp& w, u32) { return w.block->cluster->rank(w.block); };
    t["%cluster_nctarank"] = [](const Launch& l, const Warp&, u32) { return l.cluster.count(); };
    t["%is_explicit_cluster"] = [](const Launch& l, const Warp&, u32) { return l.explicit_cluster; };
    t["%laneid"] = [](const Launch&, const Warp&, u32 k) { return k % warp_size; };
    t["%warpid"] = [](const Launch&, const Warp& w, u32) { return w.index; };
    t["%nwarpid"] = [](const Launch&, const Warp& w, u32) { return w.block->warps.size(); };
    t["%gridid"] = t["%smid"] = [](const Launch&, const Warp&, u32) { return 0; };
    t["%nsmid"] = [](const Launch&, const Warp&, u32) { return 1; };
    t["%lanemask_eq"] = [](const Launch&, const Warp&, u32 k) { return 1u << k % warp_size; };
    t["%lanemask_lt"] = [](const Launch&, const Warp&, u32 k) { return (1u << k % warp_size) - 1; };
    t["%lanemask_le"] = [](const Launch&, const Warp&, u32 k) { return (2u << k % warp_size) - 1; };
    t["%lanemask_gt"] = [](const Launch&, const Warp&, u32 k) { return ~((2u << k % warp_size) - 1); };
    t["%lanemask_ge"] = [](const Launch&, const Warp&, u32 k) { return ~((1u << k % warp_size) - 1); };
    t["%dynamic_smem_size"] = [](const Launch& l, const Warp&, u32) { return l.dynamic_shared; };
    t["%total_smem_size"] = [](const Launch& l, const Warp&, u32) { return l.shared_size; };
    // as the driver passes it
    t["%envreg1"] = [](const Launch& l, const Warp&, u32) { return l.grid_workspace >> 32; };
    t["%envreg2"] = [](const Launch& l, const Warp&, u32) { return u32(l.grid_workspace); };
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

void Machine::start(Block& block, u64 linear, Cluster* cluster) {
  const u32 threads = threads_per_block();
  block.linear = linear;
  block.index = launch.grid.at(linear);
  block.cluster = cluster;
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
      for (u32 lane = 0; lane < warp_size; ++lane) w.slot(slot)[lane] = value(launch, w, index * warp_size + lane);
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
    if (i.guard >= 0) w.lanes &= i.negated ? ~w.predicate(i.guard) : w.predicate(i.guard);
    Counter& counter = counters[i.index];
    ++counter.warps;
    counter.threads += std::popcount(w.lanes);
    ++issued;
    if (!w.lanes) {
      ++w.splits[0].pc;
    } else {
      w.stays = false;
      i.run(w, i);
      if (!w.stays) ++w.splits[0].pc;
    }
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
        if (!at || split.state < at->state || (split.state == Split::at_sync && at->state != Split::at_sync))
          blamed = &w, at = &split;
  const char* what = at->state == Split::ready     ? "no progress: it waits for what never happens, or loops for ever"
                     : at->state == Split::at_sync ? "lanes that must take part never come here"
                                                   : "threads that must take part never come here";
  const u32 threads = threads_per_block(), elsewhere = std::popcount(blamed->live & ~at->lanes);
  const Block& block = *blamed->block;
  blamed->fail("deadlock", code[at->pc], at->lanes, what, "; of block ", block.linear, ", ", threads - block.live,
               " of ", threads, " threads have exited", elsewhere ? ", lanes of this warp that are elsewhere: " : "",
               elsewhere ? std::to_string(elsewhere) : "");
}

void Machine::run() {
  random.seed(launch.seed);
  counters.assign(code.size(), {});
  const u64 blocks = launch.grid.count(), group = launch.cooperative ? blocks : launch.cluster.count();
  std::vector<Block> resident(group);
  std::vector<Cluster> clusters(group / launch.cluster.count());
  // The blocks of a cluster are neighbours in the grid; number clusters, then the blocks in each.
  const Dim c = launch.cluster, g = launch.grid, many = launch.clusters();
  for (u64 first : in_order(blocks / group, launch.order, random)) {
    std::vector<Block*> together;
    for (u64 k = 0; k < clusters.size(); ++k) {
      Cluster& cluster = clusters[k] = {};
      const Dim at = many.at(first * clusters.size() + k);
      for (u64 rank = 0; rank < c.count(); ++rank) cluster.blocks.push_back(&resident[together.size() + rank]);
      for (u64 rank = 0; rank < c.count(); ++rank) {
        const Dim in = c.at(rank);
        const u64 x = at.x * c.x + in.x, y = at.y * c.y + in.y, z = at.z * c.z + in.z;
        start(*cluster.blocks[rank], x + g.x * (y + g.y * z), &cluster);
        together.push_back(cluster.blocks[rank]);
      }
    }
    run_together(together);
  }
}

}  // namespace ptxvm
