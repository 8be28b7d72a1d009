// y = gate * (x - mean) * rstd + bias, with the batch's statistics or given ones; with an epilogue, act of that and of a
// residual, for all tasks that share a slab of x.
#pragma once
#include "epilogue.cuh"
#include "running.cuh"

namespace tsbn::cuda {

template <class A> struct ForwardFactors {
  A center, scale, offset;
};

template <class A> struct Parameters {
  A gate = 0, bias = 0;

  __device__ Parameters() {}
  __device__ Parameters(const Params& p, int64_t t, int64_t c)
      : gate(Gate<A>(load_parameter<A>(p.weight_data, p.n.weight, t, c), p.n.sigmoid).value),
        bias(load_bias<A>(p, t, c)) {}
};

// From the statistics of a channel to its factors; the mean is center + `lost`.
template <class A>
__device__ ForwardFactors<A> forward_factors(const Params& p, const Parameters<A>& own, A center, A lost, A var) {
  const A scale = own.gate * (A(1) / sqrt(var + A(p.eps)));
  return {center, scale, own.bias - lost * scale};
}

// The second pass with an epilogue: a piece of x is read once for the outputs of all its tasks.
template <class T, int V, int CH, bool kMixed, int kHeld>
__device__ void apply_epilogue(const Params& p, const Walk<T, V, CH, kMixed>& walk, const T* x,
                               const Kept<Slot<T, V>, kHeld>& kept) {
  using A = Acc<T>;
  const Epilogue<A> epilogue(p);
  const ForwardFactors<A>* factors = walk.template factors<ForwardFactors<A>>() + (walk.channel - walk.first_channel());
  const T* residual = walk.template start<T>(p.residual_data, p.n.residual);
  T* y = walk.start(static_cast<T*>(p.out_data), p.n.out);
  constexpr uint32_t U = 2;
  constexpr bool kMasks = Walk<T, V, CH, kMixed>::kMasks;
  const uint32_t tasks = uint32_t(p.n.tasks), width = walk.width();
  walk.template short_backwards<U>([&](uint32_t k, uint32_t count) {
    Slot<T, V> slots[U], added[U];
#pragma unroll
    for (uint32_t u = 0; u < U; ++u) {
      if (u >= count) continue;
      if (!kept.template get<U>(k, u, slots[u])) slots[u] = walk.read(x, p.n.x, walk.template place<kMasks>(k + u));
    }
#pragma unroll 1
    for (uint32_t t = 0; t < tasks; ++t) {
#pragma unroll
      for (uint32_t u = 0; u < U; ++u) {
        if (p.residual_data == nullptr || u >= count) continue;
        added[u] = walk.read(residual + t * p.n.residual.t, p.n.residual, walk.template place<kMasks>(k + u));
      }
#pragma unroll 1
      for (uint32_t u = 0; u < U; ++u, rotate(slots), rotate(added)) {
        if (u >= count) continue;
        A v[V], r[V];
        slots[0].get(v);
        added[0].get(r);
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const ForwardFactors<A>& f = factors[t * width + (CH == 1 ? 0 : e)];
          v[e] = (v[e] - f.center) * f.scale + f.offset;
          if (p.residual_data != nullptr) v[e] += r[e];
        }
        epilogue.activate(v);
        walk.write(y + t * p.n.out.t, p.n.out, walk.template place<kMasks>(k + u), slot_of<T>(v));
      }
    }
  });
}

// kTogether: the blocks of the launch run all at a time.
template <class T, int V, int CH, bool kEpilogue, bool kMixed, bool kTogether>
__device__ void forward_of(const Params& p, const Walk<T, V, CH, kMixed>& walk) {
  using A = Acc<T>;
  if (walk.idle()) return;
  const T* x = walk.template start<T>(p.x_data, p.n.x);
  const uint32_t tasks = kEpilogue ? uint32_t(p.n.tasks) : 1;
  Kept<Slot<T, V>, kHeld<T, kTogether, 1>> kept(walk.kept(tasks), p.n.resident, 0);
  const uint32_t width = walk.width();
  Moments<A> total;
  Parameters<A> own_parameters;  // loaded here, so that nobody waits for them behind the last barrier
  if constexpr (!kEpilogue) {
    const int64_t channel = walk.first_channel() + threadIdx.x;
    const bool owns = threadIdx.x < width && channel < p.n.channels && (kTogether || !(p.n.phases & kSpill));
    if (owns) own_parameters = Parameters<A>(p, walk.task, channel);
  }

  if (p.n.phases & kReduce) {
    Running<A, V, CH> running;
    walk.choose_masks([&](auto masks) {
      constexpr bool masked = decltype(masks)::value;
      walk.template forwards<masked ? 2 : 4>([&](uint32_t k, auto count) {
        constexpr int U = decltype(count)::value;
        Slot<T, V> slots[U];
        A values[U][V];
#pragma unroll
        for (int u = 0; u < U; ++u) slots[u] = walk.read(x, p.n.x, walk.template place<masked>(k + u));
#pragma unroll
        for (int u = 0; u < U; ++u) {
          kept.template put<U>(k, u, slots[u]);
          slots[u].get(values[u]);
        }
        if constexpr (!masked) {
          running.add(values, A(U * V / CH), [](int, int) { return true; });
        } else {  // each slot has a number of values of its own
#pragma unroll
          for (int u = 0; u < U; ++u) {
            const MaskedPlace at = walk.template place<true>(k + u);
            const A(&one)[1][V] = reinterpret_cast<const A(&)[1][V]>(values[u]);
            if (at.low < at.high) {
              running.add(one, A(at.high - at.low), [=](int, int v) { return at.low <= v && v < at.high; });
            }
          }
        }
      });
    });
    total = reduce<Moments<A>, CH>(running, walk.template states<Moments<A>>(), p.n.log_lanes, walk.cluster());
  }
  if (p.n.phases & kSpill) {
    walk.spill(total);
    if constexpr (!kTogether) return;
  }
  if constexpr (kTogether) total = walk.template combine_together<Moments<A>>();
  else if (p.n.phases & kCombine) total = walk.template combine<Moments<A>>();

  ForwardFactors<A>* factors = walk.template factors<ForwardFactors<A>>();
  const auto find_factors = [&](uint32_t i, int64_t task, int64_t channel, const Parameters<A>& own) {
    if (p.n.training) {
      const A mean = total.shift + total.rest, var = total.squares / walk.values();
      factors[i] = forward_factors(p, own, mean, (total.shift - mean) + total.rest, var);
      if (walk.part == 0) {
        static_cast<A*>(p.first)[task * p.n.channels + channel] = mean;
        static_cast<A*>(p.second)[task * p.n.channels + channel] = var;
        track(p, task, channel, mean, var, walk.values());
      }
    } else {
      const A mean = load_parameter<A>(p.mean_data, p.n.mean, task, channel);
      const A var = load_parameter<A>(p.var_data, p.n.var, task, channel);
      factors[i] = forward_factors(p, own, mean, A(0), var);
    }
  };
  if constexpr (kEpilogue) {
    Moments<A>* shared = walk.template states<Moments<A>>();  // so that all threads work on the tasks' factors
    if (threadIdx.x < width) shared[threadIdx.x] = total;
    __syncthreads();
    for (uint32_t i = threadIdx.x; i < tasks * width; i += blockDim.x) {
      const int64_t channel = walk.first_channel() + i % width;
      total = shared[i % width];
      const int64_t task = walk.task + i / width;
      if (channel < p.n.channels) find_factors(i, task, channel, Parameters<A>(p, task, channel));
    }
  } else {
    const int64_t channel = walk.first_channel() + threadIdx.x;
    if (threadIdx.x < width && channel < p.n.channels) find_factors(threadIdx.x, walk.task, channel, own_parameters);
  }
  __syncthreads();

  if constexpr (kEpilogue) {
    apply_epilogue(p, walk, x, kept);
  } else if (walk.mine > 0) {
    ForwardFactors<A> own[CH];
#pragma unroll
    for (int c = 0; c < CH; ++c) own[c] = factors[walk.channel - walk.first_channel() + c];
    T* y = walk.start(static_cast<T*>(p.out_data), p.n.out);
    walk.choose_masks([&](auto masks) {
      constexpr bool masked = decltype(masks)::value;
      walk.template backwards<masked ? 2 : 4>([&](uint32_t k, auto count) {
        constexpr int U = decltype(count)::value;
        Slot<T, V> slots[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          if (!kept.template get<U>(k, u, slots[u])) slots[u] = walk.read(x, p.n.x, walk.template place<masked>(k + u));
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          A v[V];
          slots[u].get(v);
#pragma unroll
          for (int e = 0; e < V; ++e) {
            const ForwardFactors<A>& f = own[CH == 1 ? 0 : e];
            v[e] = (v[e] - f.center) * f.scale + f.offset;
          }
          slots[u].set(v);
          walk.write(y, p.n.out, walk.template place<masked>(k + u), slots[u]);
        }
      });
    });
  }
  if (walk.cluster() > 1) cluster_wait();
}

template <class T, int V, int CH, bool kEpilogue, bool kMixed = false, bool kTogether = false>
__device__ void forward(const Params& p) {
  using Walk = tsbn::cuda::Walk<T, V, CH, kMixed>;
  const auto of = [&](const Walk& walk) { forward_of<T, V, CH, kEpilogue, kMixed, kTogether>(p, walk); };
  if constexpr (kTogether) each_block(p, [&](uint32_t block) { of(Walk(p, block)); });
  else of(Walk(p));
}

}  // namespace tsbn::cuda
