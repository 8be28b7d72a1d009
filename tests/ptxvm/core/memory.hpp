// Memory with a shadow: what is accessible, what was written, and who touched it last.
#pragma once
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "numbers.hpp"
#include "program.hpp"

namespace ptxvm {

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

// The last accesses to one granule. Threads and warps are numbered through the grid; a clock of 0 means never.
struct Cell {
  u32 writer, write_clock;
  u32 write_inst : 24, write_scope : 2, : 6;
  u32 read_warp, read_clock, read_lanes;  // lanes of one warp, or the index of a list of reads
  u32 read_inst : 24, read_scope : 2, many_reads : 1, : 5;
  u32 writes;
};

struct Read {
  u32 warp, clock, lanes, inst;
  Scope scope;
};

enum ByteState : u8 { forbidden, unwritten, written };

// One allocation. `base` is its address in the kernel's eyes.
struct Region {
  std::string name;
  u64 base = 0, size = 0;
  u8* data = nullptr;
  u8* state = nullptr;         // a ByteState for each byte
  bool readonly = false;
  bool shared = false;         // unordered writes of the same value are no race
  bool tracked = false;        // races are looked for
  unsigned granule = 4;        // bytes of a cell; shrinks to the smallest access seen
  std::vector<Cell> cells;

  void track() {
    tracked = true;
    granule = 4;
    cells.assign((size + 3) / 4, Cell{});
  }
  void refine(unsigned bytes);
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
};

inline constexpr u64 shared_window = 1ull << 40, local_window = 1ull << 41, window_size = 1ull << 32;
// An address in a cluster's shared memory is (rank + 1) << rank_shift | offset; rank bits of 0 mean the own block.
inline constexpr int rank_shift = 24;

}  // namespace ptxvm
