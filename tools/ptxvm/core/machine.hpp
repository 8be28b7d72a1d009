// The state of a launch: memory with its shadow, warps, blocks, clusters, and the machine that runs them.
#pragma once
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "program.hpp"

// What a thread knows to have happened: for each block, a clock for each of its threads. Missing blocks are all 0.
using Clocks = std::unordered_map<u32, std::vector<u32>>;
using SharedClocks = std::shared_ptr<const Clocks>;

void join(Clocks& into, const Clocks& other);

// What a release makes known to whoever acquires it, and how far it reaches; whose it is, and by which of its clocks.
struct Release {
  SharedClocks clocks;
  Scope scope;
  u32 block, thread, clock;
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
  void allocate(std::string label, u64 length) {
    name = std::move(label), size = length;
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

inline constexpr int warp_size = 32;
inline constexpr u32 all_lanes = 0xffffffff;

struct Dim {
  u32 x = 1, y = 1, z = 1;
  u64 count() const { return u64(x) * y * z; }
  Dim at(u64 linear) const { return {u32(linear % x), u32(linear / x % y), u32(linear / x / y)}; }
  bool operator==(const Dim&) const = default;
  Dim operator/(Dim b) const { return {x / b.x, y / b.y, z / b.z}; }
  Dim operator%(Dim b) const { return {x % b.x, y % b.y, z % b.z}; }
};

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream stream;
  (stream << ... << parts);
  return stream.str();
}

struct Violation {
  std::string kind, message;
  s64 inst, other_inst;
  u64 block;
  u32 thread;
  u64 address;
};

// Lanes of a warp that are at the same instruction.
struct Split {
  enum State : u8 { at_sync, ready, at_barrier, at_cluster } state;  // at_sync: for lanes of its own warp to come here
  u32 pc, lanes;
  u32 barrier = 0;                 // that it waits at
};

struct ThreadClock {
  u32 clock = 1;
  SharedClocks known;              // beyond what the whole block knows
  SharedClocks fenced;             // what it knew at its last fence
  u32 fence_clock = 0;
  Scope fence_scope = Scope::weak;
  std::vector<Release> observed;   // by relaxed reads since the last fence
};

struct Machine;
struct Block;

struct Warp {
  Machine* machine = nullptr;
  Block* block = nullptr;
  u32 index = 0;                   // in the block
  std::vector<u64> registers;      // [slot][lane]
  std::vector<Split> splits;       // splits[0] is the one that runs
  u32 live = 0;                    // lanes that have not exited
  u32 lanes = 0;                   // that execute the current instruction
  bool stays = false;              // the current instruction has moved the program counter itself, or waits
  u32 turns = 0;
  u32 arrived = 0;                 // at the cluster barrier
  std::array<u32, warp_size> phase{};
  std::array<ThreadClock, warp_size> clocks;
  std::vector<OwnedRegion> local;

  u64* slot(s32 number) { return registers.data() + u64(number) * warp_size; }
  const u64* slot(s32 number) const { return registers.data() + u64(number) * warp_size; }
  u32 number() const;              // in the grid
  u32 predicate(s32 slot) const;
  bool ready() const { return !splits.empty() && splits[0].state == Split::ready; }
  void reconverge(bool lowest_first = true);
  // Makes the executing lanes wait at this instruction; the rest of the running split moves on.
  void wait(Split::State state, u32 barrier = 0);
  // Ends the launch: the first of the lanes has broken a rule, by itself or together with another instruction.
  [[noreturn]] void fail(const char* kind, const Inst& i, u32 among, const std::string& message, u64 address = 0,
                         s64 other_inst = -1) const;
  void exit_lanes();

  void leave();  // the executing lanes leave the running split, which moves on or ends
};

struct Barrier {
  u32 expected = 0, arrived = 0, waiting = 0, votes = 0;
  Clocks clocks;
};

struct Cluster {
  std::vector<Block*> blocks;
  u32 phase = 0, arrived = 0;
  Clocks gathering;
  SharedClocks done;
};

struct Block {
  u64 linear = 0;
  Dim index;
  Cluster* cluster = nullptr;
  u32 rank = 0;                    // in the cluster
  std::vector<Warp> warps;
  OwnedRegion shared;
  std::vector<u32> common;         // clock of each thread up to which every thread of the block knows it
  std::array<Barrier, 16> barriers;
  u32 live = 0;
};

struct Counter {
  u64 warps = 0, threads = 0, requests = 0, bytes = 0, sectors = 0, conflicts = 0, divergent = 0, collisions = 0;
};

struct Launch {
  Dim grid, block, cluster;
  u64 shared_size = 0, dynamic_shared = 0, local_size = 0;
  u64 resident = 1;                // blocks that run at a time
  bool explicit_cluster = false;
  bool stores_may_collide = false;  // of one instruction, to shared memory; one of the values stays
  int order = 0;                   // 0 forward, 1 reversed, 2 shuffled
  u64 seed = 0, patience = 0;      // warp instructions without progress before a launch counts as stuck
  u32 slots = 0, registers = 0;    // slots, of which the first are registers
  std::vector<std::pair<u32, u64>> constants;
  std::vector<std::pair<u32, std::string>> specials;
  u64 grid_workspace = 0;          // address of the cooperative launch's barrier

  bool same_cluster(u32 block, u32 other) const { return grid.at(block) / cluster == grid.at(other) / cluster; }
};

// The value of a special register, %tid.x, in a thread of a block; throws std::invalid_argument for an unknown one.
using Special = std::function<u64(const Warp& w, u32 thread)>;
const Special& special(const std::string& name);

enum class Use : u8 { read, write, update };

struct Machine {
  std::vector<Inst> code;
  Launch launch;
  std::vector<Region> regions;     // sorted by base
  Region params;
  std::vector<Counter> counters;
  std::unordered_map<u64, std::vector<Release>> flags;  // by address: releases that a read of it would see
  std::mt19937_64 random;
  u64 progress = 0, issued = 0;

  void run();

  // memory.cpp: checks one lane's access. `fresh` are the bytes to be written, if any.
  Spot touch(Warp& w, const Inst& i, int lane, u64 address, unsigned bytes, Use use, const void* fresh = nullptr);
  void count_access(Warp& w, const Inst& i, const u64* addresses, unsigned bytes);

  // ordering.cpp: happens-before
  bool knows(const Warp& w, int lane, u32 block, u32 in_block, u32 clock) const;
  u32 unordered(const Warp& w, int lane, const Access& earlier) const;
  bool races(const Warp& w, int lane, const Inst& i, const Access& earlier) const;
  bool compatible(u32 block, Scope scope, u32 other_block, Scope other) const;
  [[noreturn]] void race(const char* what, const Warp& w, const Inst& i, int lane, Spot spot, u64 cell,
                         const Access& other);
  void check_write(Warp& w, const Inst& i, int lane, Spot spot, u64 cell, bool agrees);
  void check_read(Warp& w, const Inst& i, int lane, Spot spot, u64 cell);
  void fence(Warp& w, Scope scope);
  void publish(Warp& w, const Inst& i, int lane, u64 flag, bool extends);
  void observe(Warp& w, const Inst& i, int lane, u64 flag);
  void gather(Clocks& into, Warp& w, u32 lanes);
  void learn(Warp& w, u32 lanes, const SharedClocks& clocks);

  // control.cpp
  void complete(Block& block, u32 number);
  void check_cluster(Cluster& cluster);

  u32 threads_per_block() const { return u32(launch.block.count()); }
  u32 warps_per_block() const { return (threads_per_block() + warp_size - 1) / warp_size; }

  void start(Block& block);
  void run_together(std::vector<Block*>& blocks);
  void step(Warp& w, u64 instructions);
  [[noreturn]] void report_stuck(const std::vector<Block*>& blocks);
  Spot locate(Warp& w, const Inst& i, int lane, u64 address, unsigned bytes);
  size_t last_region_ = 0;
};

// Calls f on each of the lanes.
template <class F>
inline void for_lanes(u32 lanes, F f) {
  for (; lanes; lanes &= lanes - 1) f(std::countr_zero(lanes));
}

// Those of the lanes for which f holds.
template <class F>
inline u32 lanes_where(u32 lanes, F f) {
  u32 found = 0;
  for_lanes(lanes, [&](int lane) { found |= u32(f(lane)) << lane; });
  return found;
}
