// Memory with a shadow: what is accessible, what was written, and who touched it last.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "numbers.hpp"
#include "program.hpp"

// What a thread knows to have happened: for each block, a clock for each of its threads. Missing blocks are all 0.
using Clocks = std::unordered_map<u32, std::vector<u32>>;
using SharedClocks = std::shared_ptr<const Clocks>;

void join(Clocks& into, const Clocks& other);

// What a release makes known to whoever acquires it, and how far it reaches.
struct Release {
  SharedClocks clocks;
  Scope scope;
  u32 block;
};

// An access by lanes of one warp. Warps are numbered through the grid; a clock of 0 means never.
struct Access {
  u32 warp = 0, clock = 0, lanes = 0, inst : 24 = 0;
  Scope scope : 8 = Scope::weak;
};

// The last accesses to one granule: the write, and the reads since.
struct Cell {
  Access write, read;
  std::vector<Access> earlier_reads;
};

enum ByteState : u8 { forbidden, unwritten, written };

// One allocation. `base` is its address in the kernel's eyes.
struct Region {
  std::string name;
  u64 base = 0, size = 0;
  u8* data = nullptr;
  u8* state = nullptr;         // a ByteState for each byte
  u8* counts = nullptr;        // of the writes to each byte, up to 255, if somebody wants to know
  bool readonly = false;
  bool shared = false;         // unordered writes of the same value are no race
  bool tracked = false;        // races are looked for
  unsigned granule = 4;        // bytes of a cell; shrinks to the smallest access seen
  std::vector<Cell> cells = {};

  void track() {
    tracked = true;
    granule = 4;
    cells.assign((size + 3) / 4, Cell{});
  }
  void refine(unsigned bytes);  // makes its cells as small as this
};

// A region that owns its bytes.
struct OwnedRegion : Region {
  std::vector<u8> bytes, states;
  void allocate(std::string label, u64 address, u64 length) {
    name = std::move(label), base = address, size = length;
    bytes.assign(length, 0xcd);
    states.assign(length, unwritten);
    data = bytes.data(), state = states.data();
  }
};

struct Spot {
  Region* region;
  u64 offset;
  u8* data() const { return region->data + offset; }
  u64 flag() const { return reinterpret_cast<u64>(data()); }  // its name as a flag of releases
};

inline constexpr u64 shared_window = 1ull << 40, local_window = 1ull << 41, window_size = 1ull << 32;
inline bool in_shared(u64 address) { return address - shared_window < window_size; }
inline bool in_local(u64 address) { return address - local_window < window_size; }
// An address in a cluster's shared memory is (rank + 1) << rank_shift | offset; rank bits of 0 mean the own block.
inline constexpr int rank_shift = 24;
