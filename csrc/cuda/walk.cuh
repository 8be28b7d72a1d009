// Which slots a thread of a block owns, where they lie in global memory, and what of them stays in shared memory.
#pragma once
#include <cooperative_groups.h>

#include "statistics.cuh"

namespace tsbn::cuda {

extern __shared__ __align__(16) unsigned char tsbn_memory[];

// Where a slot lies: outer * stride.n + inner * stride.s from the slab's first element.
struct Place {
  int64_t outer;
  uint32_t inner;
};

// Where the samples of each task of a mixed batch are; a last task, which blocks without work have, has none.
struct Mix {
  const int64_t *order, *task;                        // samples, those of a task one after the other; of each block
  const int64_t *samples, *sample, *blocks, *block;  // of each task: its number of them, and the first one

  __device__ explicit Mix(const Params& p) {
    const int64_t tasks = p.n.all_tasks + 1;
    order = p.mix, task = order + p.n.samples, samples = task + p.n.parts;
    sample = samples + tasks, blocks = sample + tasks, block = blocks + tasks;
  }
};

// Calls f(block) for those of the blocks of slabs that a block of the launch does, one after the other.
template <class F> __device__ void each_block(const Params& p, F f) {
  for (uint32_t block = blockIdx.x;;) {
    f(block);
    block += gridDim.x;
    if (block >= uint32_t(p.n.blocks)) return;
    __syncthreads();  // what is in shared memory has been read
  }
}

// The k-th slot of this thread, of those of its block.
__device__ inline uint32_t slot_of_thread(uint32_t k) { return threadIdx.x + k * blockDim.x; }

// Of a slot that a run may not fill: what of it is the run's, and how far its run begins behind its first slot.
struct MaskedPlace : Place {
  int low, high, lead;
};

// kMixed: a block has samples of one task of a mixed batch, which it finds through an order of the batch.
template <class T, int V, int CH, bool kMixed = false> struct Walk {
  using A = Acc<T>;
  static constexpr bool kMasks = V > 1 && CH == 1 && !kMixed;

  const Params& p;
  uint32_t block;               // the second launch of a split begins with the slabs that L2 still holds: the last ones
  int64_t slab, task, channel;  // channel: this thread's first
  uint32_t part, mine;          // mine: slots of this thread
  int64_t outer;                // of the block's first slot
  uint32_t inner, residue;
  Mix mix;

  __device__ explicit Walk(const Params& p) : Walk(p, p.n.phases & kCombine ? gridDim.x - 1 - blockIdx.x : blockIdx.x) {}
  __device__ Walk(const Params& p, uint32_t block) : p(p), block(block), mix(p) {
    const Numbers& n = p.n;
    int64_t begin = 0, length;
    if constexpr (kMixed) {
      const uint32_t samples = block / uint32_t(n.tiles);
      slab = block % uint32_t(n.tiles);
      task = mix.task[samples];
      part = samples - uint32_t(mix.block[task]);
      const int64_t before = part * n.part_samples, left = mix.samples[task] - before;
      mix.order += mix.sample[task] + before;
      length = ((left < n.part_samples ? left : n.part_samples) * n.divisor) << n.log_lanes;
    } else {
      slab = block / uint32_t(n.parts);
      part = block % uint32_t(n.parts);
      task = slab / n.tiles;
      begin = part * n.part_slots;
      const int64_t left = n.slots - begin;
      length = left < n.part_slots ? left : n.part_slots;
    }
    channel = first_channel() + (threadIdx.x & ((1u << n.log_lanes) - 1)) * CH;
    mine = channel < n.channels && length > threadIdx.x ? (uint32_t(length) - threadIdx.x + blockDim.x - 1) / blockDim.x
                                                        : 0;
    const int64_t first = begin >> n.log_lanes;
    outer = first / n.divisor;
    inner = uint32_t(first - outer * n.divisor);
    residue = 0;
    if constexpr (kMasks) residue = uint32_t(reinterpret_cast<uintptr_t>(start<T>(p.x_data, n.x)) / sizeof(T));
  }

  // Whether there are more blocks than the mix has work for.
  __device__ bool idle() const { return kMixed && mix.samples[task] <= part * p.n.part_samples; }
  // Values of a channel of the task.
  __device__ A values() const { return kMixed ? A(mix.samples[task] * p.n.positions) : A(p.n.positions); }

  template <class E> __device__ E* start(E* data, const Operand& o) const { return data + task * o.t + channel * o.c; }
  template <class E> __device__ const E* start(const void* data, const Operand& o) const {
    return start(static_cast<const E*>(data), o);
  }
  __device__ int64_t first_channel() const { return (slab % p.n.tiles) * (CH << p.n.log_lanes); }

  // Calls f(std::true_type()) if slots need masks, else f(std::false_type()).
  template <class F> __device__ void choose_masks(F f) const {
    if constexpr (kMasks) {
      if (p.n.masked) return f(std::true_type());
    }
    f(std::false_type());
  }

  // Division of numbers below 2^31 by an invariant (Granlund and Montgomery, 1994).
  __device__ void find(uint32_t k, Place& at) const {
    const uint32_t i = inner + (slot_of_thread(k) >> p.n.log_lanes);
    const uint32_t quotient = (__umulhi(i, uint32_t(p.n.multiplier)) + i) >> p.n.shift;
    at.outer = kMixed ? mix.order[quotient] : outer + quotient;
    at.inner = i - quotient * uint32_t(p.n.divisor);
  }
  __device__ void find(uint32_t k, MaskedPlace& at) const {
    find(k, static_cast<Place&>(at));
    at.lead = int((residue + uint32_t(at.outer) * uint32_t(p.n.x.n)) % V);
    const int64_t before = int64_t(at.inner) * V - at.lead, after = p.n.run - before;
    at.low = before < 0 ? int(-before) : 0;
    at.high = after < V ? int(after) : V;
  }
  template <bool kMasked> __device__ auto place(uint32_t k) const {
    std::conditional_t<kMasked, MaskedPlace, Place> at;
    find(k, at);
    return at;
  }
  __device__ static int64_t offset(const Place& at, const Operand& o) { return at.outer * o.n + int64_t(at.inner) * o.s; }

  __device__ static Slot<T, V> read(const T* start, const Operand& o, const Place& at) {
    Slot<T, V> result;
    result.load(start + offset(at, o));
    return result;
  }
  __device__ static Slot<T, V> read(const T* start, const Operand& o, const MaskedPlace& at) {
    Slot<T, V> result;
    const T* from = start + offset(at, o) - at.lead;
    if (at.low == 0 && at.high == V) result.load(from);
    else result.load(from, at.low, at.high);
    return result;
  }
  __device__ static void write(T* start, const Operand& o, const Place& at, const Slot<T, V>& value) {
    value.store(start + offset(at, o));
  }
  __device__ static void write(T* start, const Operand& o, const MaskedPlace& at, const Slot<T, V>& value) {
    T* to = start + offset(at, o) - at.lead;
    if (at.low == 0 && at.high == V) value.store(to);
    else value.store(to, at.low, at.high);
  }

  // ---- shared memory: states of the warps, of the block, factors; then the resident slots ------------------------

  template <class S> __device__ S* states() const { return reinterpret_cast<S*>(tsbn_memory); }
  __device__ uint32_t width() const { return CH << p.n.log_lanes; }
  template <class F> __device__ F* factors() const {
    return reinterpret_cast<F*>(tsbn_memory + (blockDim.x / 32 + 1) * width() * 4 * sizeof(A));
  }
  __device__ Slot<T, V>* kept(uint32_t rows_of_factors = 1) const {
    const uint32_t rows = blockDim.x / 32 + 1 + rows_of_factors;
    return reinterpret_cast<Slot<T, V>*>(tsbn_memory + rows * width() * 4 * sizeof(A));
  }

  // The parts' states between the two halves of a split: [slab][part][channel]; of a mixed batch [block][slab][channel].
  template <class State> __device__ void spill(const State& total) const {
    State* to = static_cast<State*>(p.partial) + int64_t(block) * width();
    if (threadIdx.x < width()) to[threadIdx.x] = total;
  }
  template <class State> __device__ State combine() const {
    const State* from = static_cast<const State*>(p.partial);
    const int64_t first = kMixed ? mix.block[task] * p.n.tiles + slab : slab * p.n.parts;
    const uint32_t parts = uint32_t(kMixed ? mix.blocks[task] : p.n.parts), step = kMixed ? uint32_t(p.n.tiles) : 1;
    return merge_states(states<State>(), width(), parts, [&](uint32_t k, uint32_t c) {
      return from[(first + k * step) * width() + c];
    });
  }
  // The same where the blocks of the launch run all at a time. They meet twice: each merges the states of a few channels
  // of its slab, then takes what the others have merged. First the whole grid meets, at the barrier that comes with such a
  // launch; it shows the counters at 0 at which blocks of a slab meet from then on. Behind the states lie those that are
  // merged, [slab][channel], and the counters of slabs.
  template <class State> __device__ State combine_together() const {
    const uint32_t parts = uint32_t(p.n.parts), slabs = uint32_t(p.n.blocks) / parts, wide = width();
    State* from = static_cast<State*>(p.partial) + int64_t(slab) * parts * wide;
    State* merged = static_cast<State*>(p.partial) + p.n.blocks * wide + slab * wide;
    uint32_t* counters = reinterpret_cast<uint32_t*>(static_cast<State*>(p.partial) + (p.n.blocks + slabs) * wide);
    const bool first = block == blockIdx.x;
    if (first) {
      for (uint32_t k = block * blockDim.x + threadIdx.x; k < slabs; k += gridDim.x * blockDim.x) counters[k] = 0;
      cooperative_groups::this_grid().sync();
    } else {
      meet(counters + slab, parts);
    }
    for (uint32_t c = part; c < wide; c += parts) {
      const State total = merge_states(states<State>(), 1, parts, [&](uint32_t k, uint32_t) { return from[k * wide + c]; });
      if (threadIdx.x == 0) merged[c] = total;
    }
    meet(counters + slab, first ? parts : 2 * parts);
    return threadIdx.x < wide ? merged[threadIdx.x] : State();
  }
  // Waits until so many have come to the counter, of which this block is one.
  __device__ static void meet(uint32_t* counter, uint32_t all) {
    __syncthreads();
    if (threadIdx.x == 0) {
      asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
      for (uint32_t met = 0; met < all;) {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(met) : "l"(counter) : "memory");
      }
    }
    __syncthreads();
  }
  // Blocks that share a slab exchange their states through a cluster, or else through the buffer.
  __device__ uint32_t cluster() const {
    return (p.n.phases & kReduce) && !(p.n.phases & kSpill) ? uint32_t(p.n.parts) : 1;
  }

  // Calls f.template operator()<U>(k) for tiles of U of this thread's slots, then for single ones; or from the end.
  template <int U, class F> __device__ void forwards(F f) const {
    uint32_t k = 0;
    for (; k + U <= mine; k += U) f(k, std::integral_constant<int, U>());
    for (; k < mine; ++k) f(k, std::integral_constant<int, 1>());
  }
  template <int U, class F> __device__ void backwards(F f) const {
    uint32_t k = mine;
    for (; k % U != 0; --k) f(k - 1, std::integral_constant<int, 1>());
    for (; k > 0; k -= U) f(k - U, std::integral_constant<int, U>());
  }
  // The same for a body so long that it should be compiled once: f(k, count) with a count of at most U.
  template <uint32_t U, class F> __device__ void short_forwards(F f) const {
    for (uint32_t k = 0; k < mine; k += U) f(k, mine - k < U ? mine - k : U);
  }
  template <uint32_t U, class F> __device__ void short_backwards(F f) const {
    for (uint32_t end = mine; end > 0;) {
      const uint32_t k = (end - 1) / U * U;
      f(k, end - k);
      end = k;
    }
  }
};

// Slots of each of so many activations that a thread keeps in registers.
template <class T, bool kTogether, int kActivations>
constexpr int kHeld = kTogether && sizeof(T) < 8 ? kHeldSlots / kActivations : 0;

// What of an activation stays on chip between the two passes over it, of the slots of a block: the first H of each
// thread in its registers, the others in shared memory. Tiles of U slots begin at multiples of U, or are single slots, so
// that registers have constant indices.
template <class S, int H> struct Kept {
  S* shared;  // of the block's first slot, if it were there
  uint32_t resident;
  S held[H > 0 ? H : 1];

  // `index`: of the activations that are kept.
  __device__ Kept(S* start, int64_t all, int index) : resident(uint32_t(all)) {
    const uint32_t before = H * blockDim.x;
    shared = start + (resident > before ? index * (resident - before) : 0) - before;
  }
  template <int U> __device__ void put(uint32_t k, int u, const S& value) {
    if (H > 0 && int(k) + u < H) {
      each<U>(k, u, [&](int h) { held[h] = value; });
    } else if (slot_of_thread(k + u) < resident) {
      shared[slot_of_thread(k + u)] = value;
    }
  }
  // Whether it was kept; then it is `value`.
  template <int U> __device__ bool get(uint32_t k, int u, S& value) const {
    if (H > 0 && int(k) + u < H) {
      each<U>(k, u, [&](int h) { value = held[h]; });
      return true;
    }
    if (slot_of_thread(k + u) >= resident) return false;
    value = shared[slot_of_thread(k + u)];
    return true;
  }

 private:
  template <int U, class F> __device__ static void each(uint32_t k, int u, F f) {
#pragma unroll
    for (int h = 0; h < H; ++h) {
      if (h % U == u && k == uint32_t(h - u)) f(h);
    }
  }
};

}  // namespace tsbn::cuda
