// Which slots a thread of a block owns, where they lie in global memory, and what of them stays in shared memory.
#pragma once
#include "statistics.cuh"

namespace tsbn::cuda {

extern __shared__ __align__(16) unsigned char tsbn_memory[];

// Where a slot lies: outer * stride.n + inner * stride.s from the slab's first element, and what of it is the slab's.
struct Place {
  int64_t outer;
  uint32_t inner;
  int low, high, lead;  // lead: elements between the start of the first slot of a run and the run
};

template <class T, int V, int CH> struct Walk {
  using A = Acc<T>;
  static constexpr bool kMasks = V > 1 && CH == 1;

  const Params& p;
  int64_t slab, task, channel;  // channel: this thread's first
  uint32_t part, mine;          // mine: slots of this thread
  int64_t outer;                // of the block's first slot
  uint32_t inner, residue;

  __device__ explicit Walk(const Params& p) : p(p) {
    const Numbers& n = p.n;
    slab = blockIdx.x / uint32_t(n.parts);
    part = blockIdx.x % uint32_t(n.parts);
    task = slab / n.tiles;
    channel = (slab % n.tiles) * (CH << n.log_lanes) + (threadIdx.x & ((1u << n.log_lanes) - 1)) * CH;

    const int64_t begin = part * n.part_slots;
    const int64_t left = n.slots - begin, length = left < n.part_slots ? left : n.part_slots;
    mine = channel < n.channels && length > threadIdx.x ? (uint32_t(length) - threadIdx.x + blockDim.x - 1) / blockDim.x
                                                        : 0;
    const int64_t first = begin >> n.log_lanes;
    outer = first / n.divisor;
    inner = uint32_t(first - outer * n.divisor);
    residue = 0;
    if constexpr (kMasks) residue = uint32_t(reinterpret_cast<uintptr_t>(start<T>(p.x_data, n.x)) / sizeof(T));
  }

  template <class E> __device__ E* start(E* data, const Operand& o) const { return data + task * o.t + channel * o.c; }
  template <class E> __device__ const E* start(const void* data, const Operand& o) const {
    return start(static_cast<const E*>(data), o);
  }
  // This thread's number for its channel `c` among those of the slab, and whether the tensor has it.
  __device__ int64_t first_channel() const { return (slab % p.n.tiles) * (CH << p.n.log_lanes); }

  __device__ uint32_t slot(uint32_t k) const { return threadIdx.x + k * blockDim.x; }

  // Division of numbers below 2^31 by an invariant (Granlund and Montgomery, 1994).
  __device__ Place place(uint32_t k) const {
    const Numbers& n = p.n;
    const uint32_t at = inner + (slot(k) >> n.log_lanes);
    const uint32_t quotient = (__umulhi(at, uint32_t(n.multiplier)) + at) >> n.shift;
    Place result{outer + quotient, at - quotient * uint32_t(n.divisor), 0, V, 0};
    if (kMasks && n.masked) {
      result.lead = (residue + uint32_t(result.outer) * uint32_t(n.x.n)) % V;
      const int64_t before = int64_t(result.inner) * V - result.lead, after = n.run - before;
      result.low = before < 0 ? int(-before) : 0;
      result.high = after < V ? int(after) : V;
    }
    return result;
  }
  __device__ int64_t offset(const Place& at, const Operand& o) const {
    return at.outer * o.n + int64_t(at.inner) * o.s - at.lead;
  }
  __device__ static bool whole(const Place& at) { return !kMasks || (at.low == 0 && at.high == V); }

  __device__ Slot<T, V> read(const T* start, const Operand& o, const Place& at) const {
    Slot<T, V> result;
    if (whole(at)) result.load(start + offset(at, o));
    else result.load(start + offset(at, o), at.low, at.high);
    return result;
  }
  __device__ void write(T* start, const Operand& o, const Place& at, const Slot<T, V>& value) const {
    if (whole(at)) value.store(start + offset(at, o));
    else value.store(start + offset(at, o), at.low, at.high);
  }

  // ---- shared memory: states of the warps, of the block, factors; then the resident slots ------------------------

  template <class S> __device__ S* states() const { return reinterpret_cast<S*>(tsbn_memory); }
  __device__ uint32_t width() const { return CH << p.n.log_lanes; }
  template <class F> __device__ F* factors() const {
    return reinterpret_cast<F*>(tsbn_memory + (blockDim.x / 32 + 1) * width() * 4 * sizeof(A));
  }
  __device__ Slot<T, V>* kept() const {
    return reinterpret_cast<Slot<T, V>*>(tsbn_memory + (blockDim.x / 32 + 2) * width() * 4 * sizeof(A));
  }

  // Merges the parts that the first launch of a split left.
  template <class State> __device__ State combine() const {
    State total;
    if (threadIdx.x < width() && first_channel() + threadIdx.x < p.n.channels) {
      const State* from = static_cast<const State*>(p.partial) + (slab * width() + threadIdx.x) * p.n.parts;
      for (uint32_t k = 0; k < p.n.parts; ++k) total = merge(total, from[k]);
    }
    return total;
  }
  template <class State> __device__ void spill(const State& total) const {
    if (threadIdx.x < width() && first_channel() + threadIdx.x < p.n.channels) {
      static_cast<State*>(p.partial)[(slab * width() + threadIdx.x) * p.n.parts + part] = total;
    }
  }
  // Blocks that share a slab exchange their states through a cluster, or else through two launches.
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
};

}  // namespace tsbn::cuda
