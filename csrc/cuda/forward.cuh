// y = gate * (x - mean) * rstd + bias, with the batch's statistics or given ones.
#pragma once
#include "walk.cuh"

namespace tsbn::cuda {

template <class A> struct ForwardFactors {
  A center, scale, offset;
};

// From the statistics of a channel to its factors; the mean is center + `lost`.
template <class A>
__device__ ForwardFactors<A> forward_factors(const Params& p, int64_t t, int64_t c, A center, A lost, A var) {
  const Gate<A> gate(load_parameter<A>(p.weight_data, p.n.weight, t, c), p.n.sigmoid);
  const A bias = p.bias_data != nullptr ? load_parameter<A>(p.bias_data, p.n.bias, t, c) : A(0);
  const A scale = gate.value * (A(1) / sqrt(var + A(p.eps)));
  return {center, scale, bias - lost * scale};
}

template <class T, int V, int CH> __device__ void forward(const Params& p) {
  using A = Acc<T>;
  const Walk<T, V, CH> walk(p);
  const T* x = walk.template start<T>(p.x_data, p.n.x);
  Slot<T, V>* kept = walk.kept();
  const uint32_t resident = uint32_t(p.n.resident);
  Moments<A> total;

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
          if (walk.slot(k + u) < resident) kept[walk.slot(k + u)] = slots[u];
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
    return;
  }
  if (p.n.phases & kCombine) total = walk.template combine<Moments<A>>();

  ForwardFactors<A>* factors = walk.template factors<ForwardFactors<A>>();
  const int64_t channel = walk.first_channel() + threadIdx.x;
  if (threadIdx.x < walk.width() && channel < p.n.channels) {
    if (p.n.training) {
      const A mean = total.shift + total.rest, var = total.squares / A(p.n.positions);
      factors[threadIdx.x] = forward_factors(p, walk.task, channel, mean, (total.shift - mean) + total.rest, var);
      if (walk.part == 0) {
        static_cast<A*>(p.first)[walk.task * p.n.channels + channel] = mean;
        static_cast<A*>(p.second)[walk.task * p.n.channels + channel] = var;
      }
    } else {
      const A mean = load_parameter<A>(p.mean_data, p.n.mean, walk.task, channel);
      const A var = load_parameter<A>(p.var_data, p.n.var, walk.task, channel);
      factors[threadIdx.x] = forward_factors(p, walk.task, channel, mean, A(0), var);
    }
  }
  __syncthreads();

  if (walk.mine > 0) {
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
          if (walk.slot(k + u) < resident) slots[u] = kept[walk.slot(k + u)];
          else slots[u] = walk.read(x, p.n.x, walk.template place<masked>(k + u));
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

}  // namespace tsbn::cuda
