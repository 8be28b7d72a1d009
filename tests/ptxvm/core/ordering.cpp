// Happens-before, in the manner of vector clocks (FastTrack), for threads of one launch.
//
// A thread's clock ticks whenever it makes what it did so far known to others: at barriers, fences and releases.
// A thread knows another's access if it knows that thread's clock to be at least the access's.
#include <algorithm>

#include "machine.hpp"

namespace ptxvm {

void join(Clocks& into, const Clocks& other) {
  for (const auto& [block, theirs] : other) {
    auto& ours = into[block];
    if (ours.size() < theirs.size()) ours.resize(theirs.size());
    for (size_t k = 0; k < theirs.size(); ++k) ours[k] = std::max(ours[k], theirs[k]);
  }
}

bool Machine::ordered(const Warp& w, int lane, u32 thread, u32 clock) const {
  if (clock == 0 || thread == w.thread(lane)) return true;
  const u32 size = threads_per_block(), block = thread / size, in_block = thread % size;
  if (block == w.block->linear && clock <= w.block->common[in_block]) return true;
  const SharedClocks& known = w.clocks[lane].known;
  if (!known) return false;
  const auto found = known->find(block);
  return found != known->end() && clock <= found->second[in_block];
}

// Two strong accesses do not race if each one's scope reaches the other.
bool Machine::compatible(u32 block, Scope scope, u32 other_block, Scope other) const {
  switch (std::min(scope, other)) {
    case Scope::weak: return false;
    case Scope::block: return block == other_block;
    case Scope::cluster: return launch.cluster_of(block) == launch.cluster_of(other_block);
    case Scope::grid: return true;
  }
  return false;
}

namespace {

[[noreturn]] void race(const Machine& m, const char* what, const Warp& w, const Inst& i, int lane, Spot spot, u64 cell, u32 thread, u32 inst) {
  const u64 byte = cell * spot.region->granule;
  const u32 size = m.threads_per_block();
  const std::string message = text("byte ", byte, " of ", spot.region->name, " ", what, " by thread ", thread % size, " of block ",
                                   thread / size, " with nothing that orders the two");
  throw Violation{"race", message, i.index, inst, w.block->linear, w.index * warp_size + lane, spot.region->base + byte};
}

}  // namespace

void Machine::check_write(Warp& w, const Inst& i, int lane, Spot spot, u64 index, Scope scope, bool agrees) {
  Cell& cell = spot.region->cells[index];
  const u32 size = threads_per_block(), block = u32(w.block->linear), warps = warps_per_block();
  if (!agrees && !ordered(w, lane, cell.writer, cell.write_clock) &&
      !compatible(block, scope, cell.writer / size, Scope(cell.write_scope))) {
    const u32 other = cell.writer - w.thread(0);  // its lane, if it is of this warp
    const bool collides = storing && spot.region->shared && other < warp_size && w.lanes >> other & 1 && storing[other] == storing[lane];
    if (!collides || !launch.lanes_may_collide) race(*this, "was written", w, i, lane, spot, index, cell.writer, cell.write_inst);
    ++counters[i.index].collisions;
  }
  const auto check = [&](const Read& read) {
    const u32 reader_block = read.warp / warps, first = reader_block * size + read.warp % warps * warp_size;
    if (compatible(block, scope, reader_block, read.scope)) return;
    for_lanes(read.lanes, [&](int other) {
      if (!ordered(w, lane, first + other, read.clock)) race(*this, "was read", w, i, lane, spot, index, first + other, read.inst);
    });
  };
  if (cell.many_reads) {
    std::vector<Read>& reads = read_lists[cell.read_lanes];
    std::for_each(reads.begin(), reads.end(), check);
    reads.clear();
  } else if (cell.read_clock) {
    check({cell.read_warp, cell.read_clock, cell.read_lanes, cell.read_inst, Scope(cell.read_scope)});
  }
  cell.read_clock = cell.many_reads = 0;
  cell.writer = w.thread(lane);
  cell.write_clock = w.clocks[lane].clock;
  cell.write_inst = i.index;
  cell.write_scope = u32(scope);
  ++cell.writes;
}

void Machine::check_read(Warp& w, const Inst& i, int lane, Spot spot, u64 index, Scope scope) {
  Cell& cell = spot.region->cells[index];
  const u32 size = threads_per_block(), block = u32(w.block->linear), warps = warps_per_block();
  const bool changed = i.constant && cell.write_clock;
  if (changed || (!ordered(w, lane, cell.writer, cell.write_clock) &&
                  !compatible(block, scope, cell.writer / size, Scope(cell.write_scope))))
    race(*this, "was written", w, i, lane, spot, index, cell.writer, cell.write_inst);
  const u32 clock = w.clocks[lane].clock, warp = w.number();
  const Read read{warp, clock, 1u << lane, i.index, scope};
  const auto joins = [&](u32 other_warp, u32 other_clock, Scope other_scope) {
    return other_warp == warp && other_clock == clock && other_scope == scope;
  };
  // A read that is known to this thread need not be kept: who is ordered after this one is ordered after it too.
  const auto superseded = [&](const Read& other) {
    const u32 first = other.warp / warps * size + other.warp % warps * warp_size;
    bool all = true;
    for_lanes(other.lanes, [&](int l) { all = all && ordered(w, lane, first + l, other.clock); });
    return all;
  };
  if (cell.many_reads) {
    std::vector<Read>& reads = read_lists[cell.read_lanes];
    if (!reads.empty() && joins(reads.back().warp, reads.back().clock, reads.back().scope)) {
      reads.back().lanes |= read.lanes;
      return;
    }
    if (reads.size() == reads.capacity()) reads.erase(std::remove_if(reads.begin(), reads.end(), superseded), reads.end());
    reads.push_back(read);
    return;
  }
  if (cell.read_clock && joins(cell.read_warp, cell.read_clock, Scope(cell.read_scope))) {
    cell.read_lanes |= read.lanes;
    return;
  }
  const Read last{cell.read_warp, cell.read_clock, cell.read_lanes, cell.read_inst, Scope(cell.read_scope)};
  cell.read_inst = i.index;
  if (cell.read_clock && !superseded(last)) {
    cell.many_reads = 1;
    cell.read_lanes = u32(read_lists.size());
    read_lists.push_back({last, read});
    return;
  }
  cell.read_warp = warp, cell.read_clock = clock, cell.read_lanes = read.lanes, cell.read_scope = u32(scope);
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
    for (const Release& release : t.observed)
      if (compatible(u32(w.block->linear), scope, release.block, release.scope)) learn(w, 1u << lane, release.clocks);
    t.observed.clear();
    auto now = std::make_shared<Clocks>();
    gather(*now, w, 1u << lane);
    t.fenced = std::move(now);
    t.fence_scope = scope;
  });
}

// A strong write: whoever reads it learns what its thread knew at its release, or at the fence before it.
void Machine::publish(Warp& w, const Inst& i, int lane, u64 flag, bool extends) {
  ThreadClock& t = w.clocks[lane];
  std::vector<Release>& releases = flags[flag];
  if (!extends) releases.clear();  // a read-modify-write continues the release sequence, a store ends it
  if (i.releases) {
    auto now = std::make_shared<Clocks>();
    gather(*now, w, 1u << lane);
    releases.push_back({std::move(now), i.scope, u32(w.block->linear)});
  } else if (t.fenced) {
    releases.push_back({t.fenced, std::min(i.scope, t.fence_scope), u32(w.block->linear)});
  }
}

void Machine::observe(Warp& w, const Inst& i, int lane, u64 flag) {
  const auto found = flags.find(flag);
  if (found == flags.end()) return;
  for (const Release& release : found->second) {
    if (!compatible(u32(w.block->linear), i.scope, release.block, release.scope)) continue;
    if (i.acquires) learn(w, 1u << lane, release.clocks);
    else w.clocks[lane].observed.push_back(release);
  }
}

}  // namespace ptxvm
