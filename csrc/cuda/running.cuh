// Running statistics: the thread that stores those of a batch for a task and channel moves the running ones towards them.
#pragma once
#include "element.cuh"

namespace tsbn::cuda {

// (1 - share) * running + share * batch, from the nearer end: a share of 0 or 1 rounds nothing.
template <class A> __device__ A moved(A running, A batch, A share) {
  const A change = batch - running;
  return share < A(0.5) ? running + share * change : batch - (A(1) - share) * change;
}

template <class A>
__device__ void move_running(void* running, const Vector& v, int64_t row, int64_t channel, A batch, double share) {
  if (running == nullptr) return;
  const int64_t i = row * v.t + channel * v.c;
  if (v.dtype == f64) {  // which may hold more digits than the arithmetic has
    double* const to = static_cast<double*>(running) + i;
    *to = moved<double>(*to, batch, share);
  } else {
    store_parameter(running, v.dtype, i, moved<A>(load_parameter<A>(running, v, row, channel), batch, A(share)));
  }
}

// The share of a batch in the running statistics of a row, whose batches are counted. For the cumulative average all
// threads of the row must read the count before it changes, and none knows when the others do: so each adds one to its
// upper half as it reads it, and the one that completes their number takes that off again and counts the batch.
template <class A> __device__ double count_batch(const Params& p, int64_t row, int64_t channel) {
  if (!isnan(p.momentum)) {
    if (p.batches != nullptr && channel == 0) ++p.batches[row];
    return p.momentum;
  }
  const uint32_t channels = uint32_t(p.n.channels);
  const unsigned long long one = 1ull << 32, seen = atomicAdd(p.batches + row, one);
  if (uint32_t(seen >> 32) % channels == channels - 1) atomicAdd(p.batches + row, 1 - channels * one);
  return A(1) / (A(uint32_t(seen)) + A(1));
}

// To be called once for each task and channel, with the mean and the biased variance of `values` values of the batch.
template <class A>
__device__ void track(const Params& p, int64_t task, int64_t channel, A mean, A var, A values) {
  if (p.batches == nullptr && p.mean_data == nullptr && p.var_data == nullptr) return;
  const int64_t row = p.rows == nullptr ? task : p.rows[task];
  const double share = count_batch<A>(p, row, channel);
  move_running(p.mean_data, p.n.mean, row, channel, mean, share);
  move_running(p.var_data, p.n.var, row, channel, var * (values / (values - A(1))), share);
}

}  // namespace tsbn::cuda
