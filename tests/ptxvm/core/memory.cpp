// Checks of bounds, alignment and unwritten bytes, and the counts of sectors and bank conflicts.
#include "memory.hpp"

#include <algorithm>
#include <cstring>

#include "machine.hpp"

namespace ptxvm {

void Machine::refine(Region& region, unsigned bytes) {
  while (region.granule > bytes) {
    std::vector<Cell> finer(region.cells.size() * 2);
    for (size_t k = 0; k < finer.size(); ++k) {
      finer[k] = region.cells[k / 2];
      if (k % 2 == 0 || !finer[k].earlier_reads) continue;
      read_lists.push_back(read_lists[finer[k].earlier_reads]);  // each half has a list of its own
      finer[k].earlier_reads = u32(read_lists.size() - 1);
    }
    region.cells.swap(finer);
    region.granule /= 2;
  }
}

namespace {

std::string describe_miss(const std::vector<Region>& regions, u64 address) {
  const Region* nearest = nullptr;
  u64 best = ~0ull;
  for (const Region& r : regions) {
    const u64 distance = address < r.base ? r.base - address : address - (r.base + r.size) + 1;
    if (distance < best) best = distance, nearest = &r;
  }
  if (!nearest || best > 1 << 20) return text("no allocation is near 0x", std::hex, address);
  if (address < nearest->base) return text(best, " bytes before the start of ", nearest->name);
  return text(best - 1, " bytes past the end of ", nearest->name);
}

}  // namespace

Spot Machine::locate(Warp& w, const Inst& i, int lane, u64 address, unsigned bytes) {
  Space space = i.space;
  u64 offset = address;
  if (space == Space::generic) {
    space = in_shared(address) ? Space::shared : in_local(address) ? Space::local : Space::global;
    if (space == Space::shared) offset = address - shared_window;
    if (space == Space::local) offset = address - local_window;
  }
  Region* region = nullptr;
  switch (space) {
    case Space::param: region = &params; break;
    case Space::local: region = &w.local[lane]; break;
    case Space::shared: {
      Block* owner = w.block;
      if (const u64 rank = offset >> rank_shift) {
        if (rank > owner->cluster->blocks.size())
          fail("out of bounds", w, i, lane, address, "address in the shared memory of a block outside the cluster");
        owner = owner->cluster->blocks[rank - 1];
        offset &= (1u << rank_shift) - 1;
        if (owner->live == 0)
          fail("out of bounds", w, i, lane, address, "shared memory of block ", owner->linear, ", which has exited");
      }
      region = &owner->shared;
      break;
    }
    default: {
      if (last_region_ >= regions.size() || address - regions[last_region_].base >= regions[last_region_].size) {
        const auto below = [](u64 a, const Region& r) { return a < r.base; };
        const auto after = std::upper_bound(regions.begin(), regions.end(), address, below);
        if (after == regions.begin() || address - (after - 1)->base >= (after - 1)->size)
          fail("out of bounds", w, i, lane, address, bytes, "-byte access, ", describe_miss(regions, address));
        last_region_ = after - 1 - regions.begin();
      }
      region = &regions[last_region_];
      offset = address - region->base;
    }
  }
  if (offset + bytes > region->size || offset + bytes < offset)
    fail("out of bounds", w, i, lane, address,
         bytes, "-byte access at byte ", s64(offset), " of ", region->name, ", which has ", region->size);
  return {region, offset};
}

Spot Machine::touch(Warp& w, const Inst& i, int lane, u64 address, unsigned bytes, Use use, Scope scope,
                    const u8* fresh) {
  const Spot spot = locate(w, i, lane, address, bytes);
  Region& r = *spot.region;
  if (address % bytes)
    fail("misaligned", w, i, lane, address, bytes, "-byte access at byte ", spot.offset, " of ", r.name);
  if (use != Use::read && r.readonly) fail("read-only", w, i, lane, address, "write to ", r.name);
  const u8 least = use == Use::write ? unwritten : written;
  u8 state = written;
  for (unsigned k = 0; k < bytes; ++k) state = std::min(state, r.state[spot.offset + k]);
  if (state < least) {
    const bool outside = state == forbidden;
    fail(outside ? "out of bounds" : "unwritten read", w, i, lane, address, bytes, " bytes at byte ", spot.offset,
         " of ", r.name, outside ? ", outside of its elements" : ", which nobody has written");
  }
  if (r.tracked) {
    refine(r, bytes);
    const bool agrees = fresh && r.shared && state == written && !std::memcmp(fresh, spot.data(), bytes);
    for (u64 cell = spot.offset / r.granule; cell < (spot.offset + bytes) / r.granule; ++cell) {
      if (use == Use::read) check_read(w, i, lane, spot, cell, scope);
      else check_write(w, i, lane, spot, cell, scope, agrees);
    }
  }
  if (use != Use::read) std::memset(r.state + spot.offset, written, bytes);
  return spot;
}

void Machine::count_access(Warp& w, const Inst& i, const u64* addresses, unsigned bytes) {
  Counter& counter = counters[i.index];
  ++counter.requests;
  counter.bytes += u64(bytes) * std::popcount(w.lanes);
  const u64 first = addresses[std::countr_zero(w.lanes)];
  const bool generic_shared = i.space == Space::generic && in_shared(first);
  if (i.space == Space::shared || generic_shared) {
    // 32 banks of 4 bytes serve 128 bytes at a time: a quarter of the warp with 16-byte accesses.
    const int group = bytes <= 4 ? 32 : int(128 / bytes);
    for (int start = 0; start < warp_size; start += group) {
      std::array<std::array<u64, 32>, 32> words;
      std::array<u32, 32> distinct{};
      u32 most = 0;
      const u32 lanes = w.lanes & (group == 32 ? all_lanes : ((1u << group) - 1) << start);
      for_lanes(lanes, [&](int lane) {
        for (u64 word = addresses[lane] / 4; word <= (addresses[lane] + bytes - 1) / 4; ++word) {
          auto& bank = words[word % 32];
          u32& n = distinct[word % 32];
          if (std::find(bank.begin(), bank.begin() + n, word) == bank.begin() + n) bank[n++] = word;
          most = std::max(most, n);
        }
      });
      if (most) counter.conflicts += most - 1;
    }
  } else if (i.space == Space::global || (i.space == Space::generic && !in_local(first))) {
    std::array<u64, 64> sectors;
    int n = 0;
    for_lanes(w.lanes, [&](int lane) {
      const u64 sector = addresses[lane] / 32;
      if (n == 0 || sectors[n - 1] != sector) sectors[n++] = sector;
    });
    std::sort(sectors.begin(), sectors.begin() + n);
    counter.sectors += std::unique(sectors.begin(), sectors.begin() + n) - sectors.begin();
  }
}

}  // namespace ptxvm
