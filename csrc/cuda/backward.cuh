// dx = gate * rstd * (g - mean(g) - xhat * mean(g * xhat)), dweight and dbias; in evaluation dx = gate * rstd * g. g is dy,
// or with an epilogue dy * act'(z), which is then also the gradient of the residual.
#pragma once
#include "epilogue.cuh"

namespace tsbn::cuda {

// dx = dy * dy_scale + (x - center) * x_scale + offset
template <class A> struct BackwardFactors {
  A center, dy_scale, x_scale, offset;
};

// kTogether: the blocks of the launch run all at a time.
template <class T, int V, int CH, bool kEpilogue, bool kMixed, bool kTogether>
__device__ void backward_of(const Params& p, const Walk<T, V, CH, kMixed>& walk) {
  using A = Acc<T>;
  if (walk.idle()) return;
  const T *x = walk.template start<T>(p.x_data, p.n.x), *dy = walk.template start<T>(p.dy_data, p.n.dy);
  T* dx = walk.start(static_cast<T*>(p.out_data), p.n.out);
  Slot<T, V>* shared = walk.kept(kEpilogue ? 2 : 1);
  Kept<Slot<T, V>, kHeld<T, kTogether, 2>> kept(shared, p.n.resident, 0), kept_dy(shared, p.n.resident, 1);
  Sums<A> total;

  // In evaluation dx does not wait for the sums.
  const bool at_once = !kTogether && !p.n.training && p.out_data != nullptr;
  BackwardFactors<A>* factors = walk.template factors<BackwardFactors<A>>();
  A* biases = reinterpret_cast<A*>(factors + walk.width());  // with an epilogue
  const int64_t channel = walk.first_channel() + threadIdx.x;
  Gate<A> gate(A(0), false);
  A rstd = 0;
  if (threadIdx.x < walk.width() && channel < p.n.channels) {
    gate = Gate<A>(load_parameter<A>(p.weight_data, p.n.weight, walk.task, channel), p.n.sigmoid);
    rstd = A(1) / sqrt(load_parameter<A>(p.var_data, p.n.var, walk.task, channel) + A(p.eps));
    factors[threadIdx.x].center = load_parameter<A>(p.mean_data, p.n.mean, walk.task, channel);
    factors[threadIdx.x].dy_scale = gate.value * rstd;
    if constexpr (kEpilogue) biases[threadIdx.x] = load_bias<A>(p, walk.task, channel);
  }
  __syncthreads();
  A center[CH] = {}, dy_scale[CH] = {};
  if (walk.mine > 0) {
#pragma unroll
    for (int c = 0; c < CH; ++c) {
      const BackwardFactors<A>& f = factors[walk.channel - walk.first_channel() + c];
      center[c] = f.center, dy_scale[c] = f.dy_scale;
    }
  }
  const auto scale_and_write = [&](const auto& at, Slot<T, V> value) {
    A v[V];
    value.get(v);
#pragma unroll
    for (int e = 0; e < V; ++e) v[e] *= dy_scale[CH == 1 ? 0 : e];
    value.set(v);
    walk.write(dx, p.n.out, at, value);
  };

  Upstream<T, V, CH, kMixed> upstream(p, walk, center, dy_scale, biases, shared);
  T* dresidual = walk.start(static_cast<T*>(p.dresidual_data), p.n.dresidual);
  // In the first pass, which may be the only one.
  const auto write_at_once = [&](const auto& at, const A(&g)[V]) {
    if (p.dresidual_data != nullptr) walk.write(dresidual, p.n.dresidual, at, slot_of<T>(g));
    if constexpr (!kTogether) {
      if (!at_once) return;
      A v[V];
#pragma unroll
      for (int e = 0; e < V; ++e) v[e] = g[e] * dy_scale[CH == 1 ? 0 : e];
      walk.write(dx, p.n.out, at, slot_of<T>(v));
    }
  };

  if (p.n.phases & kReduce) {
    RunningSums<A, V, CH> running;
    if constexpr (kEpilogue) {
      upstream.forwards([&](const auto& at, const A(&v)[1][V], const A(&g)[1][V]) {
        write_at_once(at, g[0]);
        running.add(g, v, center);
      });
    } else walk.choose_masks([&](auto masks) {
      constexpr bool masked = decltype(masks)::value;
      walk.template forwards<2>([&](uint32_t k, auto count) {
        constexpr int U = decltype(count)::value;
        Slot<T, V> slots[U], gradients[U];
        A values[U][V], grads[U][V];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const auto at = walk.template place<masked>(k + u);
          slots[u] = walk.read(x, p.n.x, at);
          gradients[u] = walk.read(dy, p.n.dy, at);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          kept.template put<U>(k, u, slots[u]), kept_dy.template put<U>(k, u, gradients[u]);
          slots[u].get(values[u]);
          gradients[u].get(grads[u]);
          if (at_once) scale_and_write(walk.template place<masked>(k + u), gradients[u]);
        }
        running.add(grads, values, center);  // padding has dy = 0
      });
    });
    total = reduce<Sums<A>, CH>(running, walk.template states<Sums<A>>(), p.n.log_lanes, walk.cluster());
  }
  if (p.n.phases & kSpill) {
    walk.spill(total);
    if constexpr (!kTogether) return;
  }
  if constexpr (kTogether) total = walk.template combine_together<Sums<A>>();
  else if (p.n.phases & kCombine) total = walk.template combine<Sums<A>>();

  if ((p.n.phases & (kReduce | kCombine)) && threadIdx.x < walk.width() && channel < p.n.channels) {
    const A scale = gate.value * rstd, dot = total.dot * rstd, inverse = A(1) / walk.values();
    factors[threadIdx.x].x_scale = -scale * rstd * (dot * inverse);
    factors[threadIdx.x].offset = -scale * (total.total * inverse);
    if (walk.part == 0) {
      const int64_t i = walk.task * p.n.channels + channel;
      if (p.first != nullptr) store_parameter(p.first, p.n.weight.dtype, i, gate.slope * dot);
      if (p.second != nullptr) store_parameter(p.second, p.n.weight.dtype, i, total.total);
    }
  }
  __syncthreads();

  if ((p.n.phases & kApply) && walk.mine > 0) {
    A x_scale[CH] = {}, offset[CH] = {};
    if (kEpilogue ? p.n.training : !at_once) {
#pragma unroll
      for (int c = 0; c < CH; ++c) {
        const BackwardFactors<A>& f = factors[walk.channel - walk.first_channel() + c];
        x_scale[c] = f.x_scale, offset[c] = f.offset, dy_scale[c] = f.dy_scale;
      }
    }
    if constexpr (kEpilogue) {
      const bool late = !(p.n.phases & kReduce);  // the one pass that there is: the sums came from elsewhere
      upstream.backwards([&](const auto& at, const A(&v)[1][V], const A(&g)[1][V]) {
        if (!p.n.training) return write_at_once(at, g[0]);
        if (late && p.dresidual_data != nullptr) walk.write(dresidual, p.n.dresidual, at, slot_of<T>(g[0]));
        A result[V];
#pragma unroll
        for (int e = 0; e < V; ++e) {
          const int c = CH == 1 ? 0 : e;
          result[e] = g[0][e] * dy_scale[c] + ((v[0][e] - center[c]) * x_scale[c] + offset[c]);
        }
        walk.write(dx, p.n.out, at, slot_of<T>(result));
      });
    } else walk.choose_masks([&](auto masks) {
      constexpr bool masked = decltype(masks)::value;
      walk.template backwards<2>([&](uint32_t k, auto count) {
        constexpr int U = decltype(count)::value;
        Slot<T, V> slots[U], gradients[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const bool found = kept.template get<U>(k, u, slots[u]);
          if (!kept_dy.template get<U>(k, u, gradients[u])) gradients[u] = walk.read(dy, p.n.dy, walk.template place<masked>(k + u));
          if (!found && !at_once) slots[u] = walk.read(x, p.n.x, walk.template place<masked>(k + u));
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const auto at = walk.template place<masked>(k + u);
          if (at_once) {
            scale_and_write(at, gradients[u]);
            continue;
          }
          A v[V], g[V];
          slots[u].get(v);
          gradients[u].get(g);
#pragma unroll
          for (int e = 0; e < V; ++e) {
            const int c = CH == 1 ? 0 : e;
            v[e] = g[e] * dy_scale[c] + ((v[e] - center[c]) * x_scale[c] + offset[c]);
          }
          slots[u].set(v);
          walk.write(dx, p.n.out, at, slots[u]);
        }
      });
    });
  }
  if (walk.cluster() > 1) cluster_wait();
}

template <class T, int V, int CH, bool kEpilogue, bool kMixed = false, bool kTogether = false>
__device__ void backward(const Params& p) {
  using Walk = tsbn::cuda::Walk<T, V, CH, kMixed>;
  const auto of = [&](const Walk& walk) { backward_of<T, V, CH, kEpilogue, kMixed, kTogether>(p, walk); };
  if constexpr (kTogether) each_block(p, [&](uint32_t block) { of(Walk(p, block)); });
  else of(Walk(p));
}

}  // namespace tsbn::cuda
