// Happens-before, in the manner of vector clocks (FastTrack), for threads of one launch.
//
// A thread's clock ticks whenever it makes what it did so far known to others: at barriers, fences and releases.
// A thread knows another's access if it knows that thread's clock to be at least the access's.
#include <algorithm>

#include "machine.hpp"

void join(Clocks& into, const Clocks& other) {
  for (const auto& [block, theirs] : other) {
    auto& ours = into[block];
    if (ours.size() < theirs.size()) ours.resize(theirs.size());
    for (size_t k = 0; k < theirs.size(); ++k) ours[k] = std::max(ours[k], theirs[k]);
  }
}

bool Machine::knows(const Warp& w, int lane, u32 block, u32 in_block, u32 clock) const {
  const bool same_thread = in_block == w.index * warp_size + lane;
  if (block == w.block->linear && (same_thread || clock <= w.block->common[in_block])) return true;
  const SharedClocks& known = w.clocks[lane].known;
  if (!known) return false;
  const auto found = known->find(block);
  return found != known->end() && clock <= found->second[in_block];
}

// The lanes of an earlier access that nothing orders before what this lane does now.
u32 Machine::unordered(const Warp& w, int lane, const Access& earlier) const {
  if (earlier.clock == 0) return 0;
  const u32 block = earlier.warp / warps_per_block(), first = earlier.warp % warps_per_block() * warp_size;
  return lanes_where(earlier.lanes, [&](int other) { return !knows(w, lane, block, first + other, earlier.clock); });
}

bool Machine::races(const Warp& w, int lane, const Inst& i, const Access& earlier) const {
  return unordered(w, lane, earlier) &&
         !compatible(u32(w.block->linear), i.scope, earlier.warp / warps_per_block(), earlier.scope);
}

// Two strong accesses do not race if each one's scope reaches the other.
bool Machine::compatible(u32 block, Scope scope, u32 other_block, Scope other) const {
  const Scope least = std::min(scope, other);
  return least == Scope::grid || (least == Scope::block && block == other_block) ||
         (least == Scope::cluster && launch.same_cluster(block, other_block));
}

void Machine::race(const char* what, const Warp& w, const Inst& i, int lane, Spot spot, u64 cell, const Access& other) {
  const u64 byte = cell * spot.region->granule;
  const u32 concurrent = unordered(w, lane, other), block = other.warp / warps_per_block();
  const u32 first = other.warp % warps_per_block() * warp_size;
  const u32 thread = first + std::countr_zero(concurrent ? concurrent : other.lanes);
  const std::string message = text("byte ", byte, " of ", spot.region->name, " ", what, " by thread ", thread,
                                   " of block ", block, " with nothing that orders the two");
  w.fail("race", i, 1u << lane, message, spot.region->base + byte, other.inst);
}

void Machine::check_write(Warp& w, const Inst& i, int lane, Spot spot, u64 index, bool agrees) {
  Cell& cell = spot.region->cells[index];
  if (!agrees && races(w, lane, i, cell.write)) {
    const bool copies = launch.stores_may_collide && spot.region->shared && cell.write.inst == i.index;
    if (!copies) race("was written", w, i, lane, spot, index, cell.write);
    ++counters[i.index].collisions;
  }
  const auto check = [&](const Access& read) {
    if (races(w, lane, i, read)) race("was read", w, i, lane, spot, index, read);
  };
  std::for_each(cell.earlier_reads.begin(), cell.earlier_reads.end(), check);
  cell.earlier_reads.clear();
  check(cell.read);
  cell.read = {};
  cell.write = {w.number(), w.clocks[lane].clock, 1u << lane, i.index, i.scope};
}

void Machine::check_read(Warp& w, const Inst& i, int lane, Spot spot, u64 index) {
  Cell& cell = spot.region->cells[index];
  if ((i.constant && cell.write.clock) || races(w, lane, i, cell.write))
    race("was written", w, i, lane, spot, index, cell.write);
  const Access read{w.number(), w.clocks[lane].clock, 1u << lane, i.index, i.scope};
  if (cell.read.warp == read.warp && cell.read.clock == read.clock && cell.read.scope == i.scope) {
    cell.read.lanes |= read.lanes;
    return;
  }
  // A read that is known to this thread need not be kept: who is ordered after this one is ordered after it too.
  if (unordered(w, lane, cell.read)) {
    std::vector<Access>& earlier = cell.earlier_reads;
    if (earlier.size() == earlier.capacity())
      std::erase_if(earlier, [&](const Access& other) { return !unordered(w, lane, other); });
    earlier.push_back(cell.read);
  }
  cell.read = read;
}

// Adds to `into` all that the lanes know and did, and starts a new clock for them.
void Machine::gather(Clocks& into, Warp& w, u32 lanes) {
  const u32 block = u32(w.block->linear);
  auto& own = into[block];
  if (own.empty()) own = w.block->common;
  const std::vector<u32>& common = w.block->common;
  for (size_t k = 0; k < own.size(); ++k) own[k] = std::max(own[k], common[k]);
  const Clocks* last = nullptr;
  for_lanes(lanes, [&](int lane) {
    ThreadClock& t = w.clocks[lane];
    into[block][w.index * warp_size + lane] = t.clock++;
    if (t.known && t.known.get() != last) join(into, *(last = t.known.get()));
  });
}

void Machine::learn(Warp& w, u32 lanes, const SharedClocks& clocks) {
  SharedClocks before, after;
  for_lanes(lanes, [&](int lane) {
    SharedClocks& known = w.clocks[lane].known;
    if (!known) {
      known = clocks;
    } else if (known != clocks) {
      if (!after || known != before) {
        auto merged = std::make_shared<Clocks>(*known);
        join(*merged, *clocks);
        before = known, after = std::move(merged);
      }
      known = after;
    }
  });
}

void Machine::fence(Warp& w, Scope scope) {
  for_lanes(w.lanes, [&](int lane) {
    ThreadClock& t = w.clocks[lane];
    std::erase_if(t.observed, [&](const Release& release) {
      if (!compatible(u32(w.block->linear), scope, release.block, release.scope)) return false;
      learn(w, 1u << lane, release.clocks);
      return true;
    });
    auto now = std::make_shared<Clocks>();
    t.fence_clock = t.clock;
    gather(*now, w, 1u << lane);
    t.fenced = std::move(now);
    t.fence_scope = scope;
  });
}

// A strong write: whoever reads it learns what its thread knew at its release, or at the fence before it.
void Machine::publish(Warp& w, const Inst& i, int lane, u64 flag, bool extends) {
  ThreadClock& t = w.clocks[lane];
  if (!extends && !flags.empty()) flags.erase(flag);  // a read-modify-write continues the release sequence
  if (i.scope == Scope::weak) return;
  std::vector<Release>& releases = flags[flag];
  const u32 block = u32(w.block->linear), thread = w.index * warp_size + lane;
  if (i.releases) {
    const u32 clock = t.clock;
    auto now = std::make_shared<Clocks>();
    gather(*now, w, 1u << lane);
    releases.push_back({std::move(now), i.scope, block, thread, clock});
  } else if (t.fenced) {
    releases.push_back({t.fenced, std::min(i.scope, t.fence_scope), block, thread, t.fence_clock});
  }
}

void Machine::observe(Warp& w, const Inst& i, int lane, u64 flag) {
  const auto found = flags.find(flag);
  if (found == flags.end()) return;
  for (const Release& release : found->second) {
    if (!compatible(u32(w.block->linear), i.scope, release.block, release.scope)) continue;
    if (knows(w, lane, release.block, release.thread, release.clock)) continue;  // and so all that it knew then
    if (i.acquires) learn(w, 1u << lane, release.clocks);
    else w.clocks[lane].observed.push_back(release);
  }
}
