// Checks of bounds, alignment and unwritten bytes, and the counts of sectors and bank conflicts.
#include <algorithm>
#include <cstring>

#include "machine.hpp"

void Region::refine(unsigned bytes) {
  while (granule > bytes) {
    std::vector<Cell> finer;
    for (const Cell& cell : cells) finer.insert(finer.end(), 2, cell);
    cells.swap(finer);
    granule /= 2;
  }
}

static std::string describe_miss(const std::vector<Region>& regions, u64 address) {
  const auto distance = [address](const Region& r) {
    return address < r.base ? r.base - address : address - (r.base + r.size);
  };
  const auto nearer = [&](const Region& a, const Region& b) { return distance(a) < distance(b); };
  const auto nearest = std::min_element(regions.begin(), regions.end(), nearer);
  if (nearest == regions.end() || distance(*nearest) > 1 << 20)
    return text("no allocation is near 0x", std::hex, address);
  const char* where = address < nearest->base ? " bytes before the start of " : " bytes past the end of ";
  return text(distance(*nearest), where, nearest->name);
}

Spot Machine::locate(Warp& w, const Inst& i, int lane, u64 address, unsigned bytes) {
  const auto stray = [&](const auto&... parts) { w.fail("out of bounds", i, 1u << lane, text(parts...), address); };
  Space space = i.space;
  u64 offset = address;
  if (space == Space::generic) {
    space = in_shared(address) ? Space::shared : in_local(address) ? Space::local : Space::global;
    if (space != Space::global) offset -= space == Space::shared ? shared_window : local_window;
  }
  Region* region = space == Space::param ? &params : space == Space::local ? &w.local[lane] : nullptr;
  if (space == Space::shared) {
    Block* owner = w.block;
    if (const u64 rank = offset >> rank_shift) {
      if (rank > owner->cluster->blocks.size()) stray("address in the shared memory of a block outside the cluster");
      owner = owner->cluster->blocks[rank - 1];
      offset &= (1u << rank_shift) - 1;
      if (owner->live == 0) stray("shared memory of block ", owner->linear, ", which has exited");
    }
    region = &owner->shared;
  } else if (space == Space::global) {
    const auto inside = [address](const Region& r) { return address - r.base < r.size; };
    if (last_region_ >= regions.size() || !inside(regions[last_region_]))
      last_region_ = std::find_if(regions.begin(), regions.end(), inside) - regions.begin();
    if (last_region_ == regions.size()) stray(bytes, "-byte access, ", describe_miss(regions, address));
    region = &regions[last_region_];
    offset -= region->base;
  }
  if (offset + bytes > region->size || offset + bytes < offset)
    stray(bytes, "-byte access at byte ", s64(offset), " of ", region->name, ", which has ", region->size);
  return {region, offset};
}

Spot Machine::touch(Warp& w, const Inst& i, int lane, u64 address, unsigned bytes, Use use, const void* fresh) {
  const auto fail = [&](const char* kind, const auto&... parts) {
    w.fail(kind, i, 1u << lane, text(parts...), address);
  };
  const Spot spot = locate(w, i, lane, address, bytes);
  Region& r = *spot.region;
  if (address % bytes) fail("misaligned", bytes, "-byte access at byte ", spot.offset, " of ", r.name);
  if (use != Use::read && r.readonly) fail("read-only", "write to ", r.name);
  const u8 state = *std::min_element(r.state + spot.offset, r.state + spot.offset + bytes);
  if (state == forbidden)
    fail("out of bounds", bytes, " bytes at byte ", spot.offset, " of ", r.name, ", outside of its elements");
  if (state == unwritten && use != Use::write)
    fail("unwritten read", bytes, " bytes at byte ", spot.offset, " of ", r.name, ", which nobody has written");
  if (r.tracked) {
    r.refine(bytes);
    const bool agrees = fresh && r.shared && !std::memcmp(fresh, spot.data(), bytes);
    for (u64 cell = spot.offset / r.granule; cell < (spot.offset + bytes) / r.granule; ++cell) {
      if (use == Use::read) check_read(w, i, lane, spot, cell);
      else check_write(w, i, lane, spot, cell, agrees);
    }
  }
  if (use == Use::read) return spot;
  std::memset(r.state + spot.offset, written, bytes);
  if (r.counts)
    for (u64 byte = spot.offset; byte < spot.offset + bytes; ++byte) r.counts[byte] += r.counts[byte] < 255;
  return spot;
}

void Machine::count_access(Warp& w, const Inst& i, const u64* addresses, unsigned bytes) {
  Counter& counter = counters[i.index];
  ++counter.requests;
  counter.bytes += u64(bytes) * std::popcount(w.lanes);
  const u64 first = addresses[std::countr_zero(w.lanes)];
  const bool generic = i.space == Space::generic;
  std::array<u64, warp_size> units;  // first words or sectors, each once
  u64* end = units.data();
  const auto drop_repeated = [&] { std::sort(units.data(), end), end = std::unique(units.data(), end); };
  if (i.space == Space::shared || (generic && in_shared(first))) {
    // 32 banks of 4 bytes serve 128 bytes at a time: a quarter of the warp with 16-byte accesses. Each block has its own.
    const int group = bytes <= 4 ? 32 : int(128 / bytes);
    for (int start = 0; start < warp_size; start += group, end = units.data()) {
      for_lanes(w.lanes & u32((1ull << group) - 1) << start, [&](int lane) { *end++ = addresses[lane] / 4; });
      drop_repeated();
      std::array<u32, 17 * 32> words_of_bank{};
      u32 most = 1;
      std::for_each(units.data(), end, [&](u64 word) {
        const u64 rank = word >> (rank_shift - 2) & 31;
        most = std::max(most, ++words_of_bank[(rank ? rank : w.block->rank + 1) * 32 + word % 32]);
      });
      counter.conflicts += most - 1;
    }
  } else if (i.space == Space::global || (generic && !in_local(first))) {
    for_lanes(w.lanes, [&](int lane) { *end++ = addresses[lane] / 32; });
    drop_repeated();
    counter.sectors += end - units.data();
  }
}
