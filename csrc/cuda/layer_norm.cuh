// The passes of layer normalisation. A row lies in the registers of a group of threads from its statistics to its
// result; a block goes through tiles of rows, one for each of its groups. Sums over rows wait in shared memory, in
// places that are each thread's own, and are added up in a fixed order.
#pragma once
#include "rows.cuh"

namespace tsbn::cuda {

template <class T, int V> __device__ void layer_norm_forward(const RowParams& p) {
  using Walk = Rows<T, V>;
  using A = Acc<T>;
  const A inverse = A(p.slope);
  Walk walk(p);
  if (!walk.restages()) walk.stage(0);
  for (uint32_t tile = walk.first; tile < walk.last; ++tile) {
    const uint32_t k = walk.number(tile), mine = walk.mine(k);
    const int64_t row = walk.row_of_x(k);
    A v[Walk::K][V];
    walk.read(v, p.x_data, row, mine);
    if (p.residual_data != nullptr) {
      walk.read_some(p.residual_data, row, mine, [&](int u, const A(&more)[V]) {
#pragma unroll
        for (int e = 0; e < V; ++e) v[u][e] += more[e];
      });
      walk.write(p.dresidual_data, row, mine, [&](int u) {
        const Slot<T, V> sum = slot_of<T>(v[u]);
        sum.get(v[u]);
        return sum;
      });
    }
    A scale;
    if (p.n.rms) {
      A sums[1] = {};
      walk.each(v, [&](A& value) { sums[0] += value * value; });
      walk.add_up(sums);
      scale = sums[0] * inverse;
    } else {
      A sums[1] = {}, more[2] = {};
      walk.each(v, [&](A& value) { sums[0] += value; });
      walk.add_up(sums);
      const A mean = sums[0] * inverse;
#pragma unroll
      for (int u = 0; u < Walk::K; ++u) {
#pragma unroll
        for (int e = 0; e < V; ++e) v[u][e] = u < mine ? v[u][e] - mean : A(0);
      }
      walk.each(v, [&](A& value) { more[0] += value, more[1] += value * value; });
      walk.add_up(more);
      const A rest = more[0] * inverse;  // what rounding took from the mean
      scale = more[1] * inverse - rest * rest;
      scale = scale < A(0) ? A(0) : scale;
      walk.each(v, [&](A& value) { value -= rest; });
      if (walk.leads(k)) static_cast<A*>(p.first)[row] = mean + rest;
    }
    scale = rsqrt(scale + A(p.eps));
    if (walk.leads(k)) static_cast<A*>(p.second)[row] = scale;
    walk.each(v, [&](A& value) { value *= scale; });
    walk.for_tasks([&](uint32_t t, uint32_t staged) {
      const int64_t to = walk.row_of_task(k, t);
      walk.write(p.out_data, to, mine, [&](int u) {
        A gate[V], shift[V], y[V];
        walk.gates(gate, staged, u);
        walk.shifts(shift, staged, u);
#pragma unroll
        for (int e = 0; e < V; ++e) y[e] = v[u][e] * gate[e] + shift[e];
        return slot_of<T>(y);
      });
    });
  }
}

template <class T, int V> __device__ void layer_norm_backward(const RowParams& p) {
  using Walk = Rows<T, V>;
  using A = Acc<T>;
  const A inverse = A(p.slope);
  Walk walk(p);
  const bool has_dx = p.out_data != nullptr;
  if (has_dx && !walk.restages()) walk.stage(0);
  RowSums<T, V> sums(walk);
  for (uint32_t tile = walk.first; tile < walk.last; ++tile) {
    const uint32_t k = walk.number(tile), mine = walk.mine(k);
    const int64_t row = walk.row_of_x(k);
    A xhat[Walk::K][V] = {}, h[Walk::K][V] = {}, scale = 0;
    if (has_dx || p.n.needs_dweight) {
      walk.read(xhat, p.x_data, row, mine);
      const A mean = p.n.rms ? A(0) : walk.statistic(p.mean_data, k, row);
      scale = walk.statistic(p.var_data, k, row);
#pragma unroll
      for (int u = 0; u < Walk::K; ++u) {
#pragma unroll
        for (int e = 0; e < V; ++e) xhat[u][e] = u < mine ? (xhat[u][e] - mean) * scale : A(0);
      }
    }
    const auto add = [&](uint32_t t, uint32_t staged) {
      const int64_t from = walk.row_of_task(k, t);
      walk.read_some(p.dy_data, from, mine, [&](int u, const A(&dy)[V]) {
        sums.add(t, u, dy, xhat[u]);
        if (!has_dx) return;
        A gate[V];
        walk.gates(gate, staged, u);
#pragma unroll
        for (int e = 0; e < V; ++e) h[u][e] += dy[e] * gate[e];
      });
    };
    if (!has_dx) {
      add(0, 0);
      continue;
    }
    walk.for_tasks(add);
    A means[2] = {};
#pragma unroll
    for (int u = 0; u < Walk::K; ++u) {
#pragma unroll
      for (int e = 0; e < V; ++e) means[0] += h[u][e], means[1] += h[u][e] * xhat[u][e];
    }
    walk.add_up(means);
    const A average = p.n.rms ? A(0) : means[0] * inverse, slope = means[1] * inverse;
#pragma unroll
    for (int u = 0; u < Walk::K; ++u) {
#pragma unroll
      for (int e = 0; e < V; ++e) h[u][e] = (h[u][e] - average - xhat[u][e] * slope) * scale;
    }
    if (p.residual_data != nullptr) {
      walk.read_some(p.residual_data, row, mine, [&](int u, const A(&ds)[V]) {
#pragma unroll
        for (int e = 0; e < V; ++e) h[u][e] += ds[e];
      });
    }
    walk.write(p.out_data, row, mine, [&](int u) { return slot_of<T>(h[u]); });
  }
  sums.store();
}

// The parameters' gradients from what the splits left: 8 threads for each of 32 columns of [T, channels].
template <class A> __device__ void layer_norm_parameters(const RowParams& p) {
  constexpr uint32_t kColumns = 32, kParts = kThreads / kColumns;
  __shared__ A area[2][kParts][kColumns];
  const int64_t size = p.n.tasks * p.n.channels, i = int64_t(blockIdx.x) * kColumns + threadIdx.x % kColumns;
  const uint32_t part = threadIdx.x / kColumns, kinds = uint32_t(p.n.needs_dweight + p.n.needs_dbias);
  for (uint32_t kind = 0; kind < kinds; ++kind) {
    const A* from = static_cast<const A*>(p.partial) + kind * p.n.splits * size + i;
    A sum = 0;
    if (i < size) {
#pragma unroll 4
      for (int64_t split = part; split < p.n.splits; split += kParts) sum += from[split * size];
    }
    area[kind][part][threadIdx.x % kColumns] = sum;
  }
  __syncthreads();
  if (part >= kinds || i >= size) return;  // the first warp writes one of them, the second the other
  A sum = 0;
#pragma unroll
  for (uint32_t k = 0; k < kParts; ++k) sum += area[part][k][threadIdx.x % kColumns];
  store_gradient(p, part == 0 && p.n.needs_dweight, i / p.n.channels, i % p.n.channels, sum);
}

}  // namespace tsbn::cuda
