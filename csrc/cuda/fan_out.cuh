// The backward of a fan-out: one x, T tasks. h is the sum over tasks of gate * rstd * g; in evaluation dx = h, in training
// dx = h - mean(h) - xhat * mean(h * xhat), where the means come from the tasks' sums. (Forward: forward.cuh.)
#pragma once
#include "epilogue.cuh"

namespace tsbn::cuda {

// Of a task and channel; a bias only where z is computed again.
template <class A> struct alignas(4 * sizeof(A)) TaskFactors {
  A center, scale, bias, rstd;
};

// A number that the compiler must take as new: what is computed from it is not kept in registers over a loop.
__device__ inline uint32_t anew(uint32_t k) {
  asm volatile("" : "+r"(k));
  return k;
}

// What waits for the second pass: in dx where that loses no digits, else in a buffer in which each thread has its own
// places, so that 16-byte accesses of a warp are adjacent and nothing needs masks.
template <class T, int V, int CH> struct Staged {
  using A = Acc<T>;
  static constexpr bool kInPlace = std::is_same_v<T, A>;
  static constexpr int kPiece = V == 1 ? 1 : 16 / sizeof(A);  // elements of one access
  const Walk<T, V, CH>& walk;
  T* dx;
  A* mine;

  __device__ Staged(const Walk<T, V, CH>& walk) : walk(walk) {
    const Params& p = walk.p;
    dx = walk.start(static_cast<T*>(p.out_data), p.n.out);
    const int64_t steps = (p.n.part_slots + blockDim.x - 1) / blockDim.x;
    mine = static_cast<A*>(p.staged) + walk.block * steps * blockDim.x * V + threadIdx.x * kPiece;
  }
  template <class At> __device__ void put(uint32_t k, const At& at, const A (&h)[V]) const {
    if constexpr (kInPlace) {
      walk.write(dx, walk.p.n.out, at, slot_of<T>(h));
    } else {
#pragma unroll
      for (int e = 0; e < V; e += kPiece) {
        slot_of<A>(reinterpret_cast<const A(&)[kPiece]>(h[e])).store(mine + (int64_t(k) * V + e) * blockDim.x);
      }
    }
  }
  template <class At> __device__ void get(uint32_t k, const At& at, A (&h)[V]) const {
    if constexpr (kInPlace) {
      walk.read(dx, walk.p.n.out, at).get(h);
    } else {
#pragma unroll
      for (int e = 0; e < V; e += kPiece) {
        Slot<A, kPiece> slot;
        slot.load(mine + (int64_t(k) * V + e) * blockDim.x);
        slot.get(reinterpret_cast<A(&)[kPiece]>(h[e]));
      }
    }
  }
};

template <class A> __device__ Sums<A> shuffle_xor(const Sums<A>& s, int by) {
  return {__shfl_xor_sync(0xffffffff, s.total, by), __shfl_xor_sync(0xffffffff, s.dot, by)};
}

// The sums of a warp's lanes over each channel, added to `sums` of the warp, which holds one for each task and channel.
// As long as lanes that share channels hold several of them, each passes half of them on and keeps the others.
template <class A, int V, int CH>
__device__ void add_sums(const RunningSums<A, V, CH>& running, Sums<A>* sums, int log_lanes) {
  const uint32_t lane = threadIdx.x % 32;
  Sums<A> s[CH];
#pragma unroll
  for (int c = 0; c < CH; ++c) s[c] = running.state(c);
  int first = 0, held = CH;
  bool holds = true;
#pragma unroll
  for (int step = 0; step < 5; ++step) {
    const int by = 16 >> step, half = (CH >> step) / 2;
    if (by < 1 << log_lanes) break;
    const bool upper = lane & by;
    if constexpr (CH > 1) {
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const Sums<A> mine = upper ? s[half + i] : s[i], other = upper ? s[i] : s[half + i];
        s[i] = merge(mine, shuffle_xor(other, by));
      }
    }
    if (half > 0) {
      first += upper ? half : 0, held = half;
    } else {
      s[0] = merge(s[0], shuffle_xor(s[0], by));
      holds &= !upper;
    }
  }
  sums += (lane & ((1u << log_lanes) - 1)) * CH + first;
#pragma unroll
  for (int i = 0; i < CH; ++i) {
    if (holds && i < held) sums[i] = merge(sums[i], s[i]);
  }
}

template <class T, int V, int CH> __device__ void backward_fan_out(const Params& p) {
  using A = Acc<T>;
  constexpr uint32_t U = V == 8 ? 1 : 2;  // as registers allow
  const Walk<T, V, CH> walk(p);
  const uint32_t tasks = uint32_t(p.n.tasks), width = walk.width(), warps = blockDim.x / 32, all = tasks * width;
  TaskFactors<A>* factors = reinterpret_cast<TaskFactors<A>*>(tsbn_memory);
  TaskFactors<A>* of_dx = factors + all;
  Sums<A>* sums = reinterpret_cast<Sums<A>*>(of_dx + width);
  Sums<A>* own_sums = sums + threadIdx.x / 32 * all;

  for (uint32_t i = threadIdx.x; i < all; i += blockDim.x) {
    const int64_t task = i / width, channel = walk.first_channel() + i % width;
    if (channel >= p.n.channels) continue;
    const Gate<A> gate(load_parameter<A>(p.weight_data, p.n.weight, task, channel), p.n.sigmoid);
    const A rstd = A(1) / sqrt(load_parameter<A>(p.var_data, p.n.var, task, channel) + A(p.eps));
    factors[i] = {load_parameter<A>(p.mean_data, p.n.mean, task, channel), gate.value * rstd,
                  load_bias<A>(p, task, channel), rstd};
  }
  for (uint32_t i = threadIdx.x; i < warps * all; i += blockDim.x) sums[i] = {};
  __syncthreads();

  const T* x = walk.template start<T>(p.x_data, p.n.x);
  const Staged<T, V, CH> staged(walk);
  const uint32_t first = uint32_t(walk.channel - walk.first_channel());

  if ((p.n.phases & kReduce) || !(p.n.phases & kCombine)) {
    const Epilogue<A> epilogue(p);
    const T* dy = walk.template start<T>(p.dy_data, p.n.dy);
    const T* residual = walk.template start<T>(p.residual_data, p.n.residual);
    T* dresidual = walk.start(static_cast<T*>(p.dresidual_data), p.n.dresidual);
    const bool summed = p.n.phases & kReduce, reads_x = summed || epilogue.activation != Activation::none;
    // All lanes of a warp take part in its sums: the number of steps is the block's, a thread may have fewer slots.
    const int64_t left = p.n.slots - walk.part * p.n.part_slots;
    const uint32_t steps = uint32_t(((left < p.n.part_slots ? left : p.n.part_slots) + blockDim.x - 1) / blockDim.x);
    for (uint32_t k = 0; k < steps; k += U) {
      Slot<T, V> slots[U];
      A h[U][V] = {};
#pragma unroll
      for (uint32_t u = 0; u < U; ++u) {
        if (reads_x && k + u < walk.mine) slots[u] = walk.read(x, p.n.x, walk.template place<Walk<T, V, CH>::kMasks>(k + u));
      }
#pragma unroll 1
      for (uint32_t t = 0; t < tasks; ++t) {
        Slot<T, V> gradients[U];
#pragma unroll
        for (uint32_t u = 0; u < U; ++u) {
          if (k + u >= walk.mine) continue;
          gradients[u] = walk.read(dy + t * p.n.dy.t, p.n.dy, walk.template place<Walk<T, V, CH>::kMasks>(anew(k + u)));
        }
        RunningSums<A, V, CH> running;
#pragma unroll
        for (uint32_t u = 0; u < U; ++u) {
          if (k + u >= walk.mine) continue;
          const TaskFactors<A>* of_task = factors + anew(t * width + first);
          A v[1][V] = {}, g[1][V], center[CH];
          gradients[u].get(g[0]);
          if (reads_x) slots[u].get(v[0]);
#pragma unroll
          for (int c = 0; c < CH; ++c) center[c] = of_task[c].center;
          if (epilogue.activation != Activation::none) {
            const auto at = walk.template place<Walk<T, V, CH>::kMasks>(anew(k + u));
            A z[V], r[V] = {};
            if (p.residual_data != nullptr) walk.read(residual + t * p.n.residual.t, p.n.residual, at).get(r);
#pragma unroll
            for (int e = 0; e < V; ++e) {
              const TaskFactors<A>& f = of_task[CH == 1 ? 0 : e];
              z[e] = (v[0][e] - f.center) * f.scale + f.bias + r[e];
            }
            epilogue.differentiate(g[0], z);
            if (p.dresidual_data != nullptr) {
              walk.write(dresidual + t * p.n.dresidual.t, p.n.dresidual, at, slot_of<T>(g[0]));
            }
          }
#pragma unroll
          for (int e = 0; e < V; ++e) h[u][e] += of_task[CH == 1 ? 0 : e].scale * g[0][e];
          running.add(g, v, center);
        }
        if (summed) add_sums(running, own_sums + t * width, int(p.n.log_lanes));
      }
      if (p.out_data == nullptr) continue;
#pragma unroll
      for (uint32_t u = 0; u < U; ++u) {
        if (k + u >= walk.mine) continue;
        const auto at = walk.template place<Walk<T, V, CH>::kMasks>(k + u);
        if (p.n.training) staged.put(k + u, at, h[u]);
        else walk.write(staged.dx, p.n.out, at, slot_of<T>(h[u]));
      }
    }
    if (!summed) return;
  }

  // Of the warps in order, then of the parts in order: the sums of each task and channel of the slab.
  __syncthreads();
  Sums<A>* partial = static_cast<Sums<A>*>(p.partial);
  for (uint32_t i = threadIdx.x; i < all; i += blockDim.x) {
    Sums<A> total;
    if (p.n.phases & kReduce) {
      for (uint32_t w = 0; w < warps; ++w) total = merge(total, sums[w * all + i]);
    }
    if (p.n.phases & kSpill) partial[int64_t(walk.block) * all + i] = total;
    if (p.n.phases & kCombine) {
      for (uint32_t k = 0; k < uint32_t(p.n.parts); ++k) total = merge(total, partial[(walk.slab * p.n.parts + k) * all + i]);
    }
    const int64_t task = i / width, channel = walk.first_channel() + i % width;
    if ((p.n.phases & kSpill) || channel >= p.n.channels) continue;
    total.dot *= factors[i].rstd;
    sums[i] = total;
    if (walk.part != 0) continue;
    if (p.first != nullptr) {
      const Gate<A> gate(load_parameter<A>(p.weight_data, p.n.weight, task, channel), p.n.sigmoid);
      store_parameter(p.first, p.n.weight.dtype, task * p.n.channels + channel, gate.slope * total.dot);
    }
    if (p.second != nullptr) {
      store_parameter(p.second, p.n.weight.dtype, task * p.n.channels + channel, total.total);
    }
  }
  if (!p.n.training || !(p.n.phases & kApply)) return;

  // dx = h + (x - center) * scale + bias
  __syncthreads();
  if (threadIdx.x < width && walk.first_channel() + threadIdx.x < p.n.channels) {
    Sums<A> total;
    for (uint32_t t = 0; t < tasks; ++t) {
      const Sums<A> of_task = sums[t * width + threadIdx.x];
      const A scale = factors[t * width + threadIdx.x].scale;
      total = merge(total, Sums<A>{scale * of_task.total, scale * of_task.dot});
    }
    const TaskFactors<A>& f = factors[threadIdx.x];  // in training the statistics are the same for all tasks
    const A inverse = A(1) / A(p.n.positions);
    of_dx[threadIdx.x] = {f.center, -f.rstd * (total.dot * inverse), -(total.total * inverse), f.rstd};
  }
  __syncthreads();
  if (walk.mine == 0) return;
  TaskFactors<A> own[CH];
#pragma unroll
  for (int c = 0; c < CH; ++c) own[c] = of_dx[first + c];
  walk.template short_backwards<2>([&](uint32_t k, uint32_t count) {
    Slot<T, V> slots[2];
    A h[2][V];
#pragma unroll
    for (uint32_t u = 0; u < 2; ++u) {
      if (u >= count) continue;
      const auto at = walk.template place<Walk<T, V, CH>::kMasks>(k + u);
      slots[u] = walk.read(x, p.n.x, at);
      staged.get(k + u, at, h[u]);
    }
#pragma unroll
    for (uint32_t u = 0; u < 2; ++u) {
      if (u >= count) continue;
      A v[V];
      slots[u].get(v);
#pragma unroll
      for (int e = 0; e < V; ++e) {
        const TaskFactors<A>& f = own[CH == 1 ? 0 : e];
        v[e] = h[u][e] + ((v[e] - f.center) * f.scale + f.bias);
      }
      walk.write(staged.dx, p.n.out, walk.template place<Walk<T, V, CH>::kMasks>(k + u), slot_of<T>(v));
    }
  });
}

}  // namespace tsbn::cuda
