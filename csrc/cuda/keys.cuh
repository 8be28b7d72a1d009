// A key of each sample of a mixed batch, which its bits alone give: by keys the samples of a task are ordered, so that no
// order of the batch changes the order of a sum.
#pragma once
#include "params.h"

namespace tsbn::cuda {

// Sums, modulo 2^64, of what each word becomes by its place. Words are [samples, channels, run], the last of them side by
// side; 1 << log_lanes threads have a sample, a warp at least. first: the keys; mean_data: those of other tensors, or none.
template <class Word> __device__ void mixed_keys(const Params& p) {
  using Key = unsigned long long;
  constexpr Key kFirst = 0x3C6EF372FE94F82B, kSecond = 0x369DEA0F31A53F85, kStep = 0x27BB2EE687B0B0FD;
  __shared__ Key sums[kThreads / 32];
  const uint32_t lanes = 1u << p.n.log_lanes, lane = threadIdx.x & (lanes - 1);
  const int64_t sample = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) >> p.n.log_lanes;
  const bool exists = sample < p.n.samples;
  Key sum = 0;
  for (int64_t outer = 0; exists && outer < p.n.channels; ++outer) {
    const Word* words = static_cast<const Word*>(p.x_data) + sample * p.n.x.n + outer * p.n.x.c;
#pragma unroll 4
    for (int64_t i = lane; i < p.n.run; i += lanes) {
      Key v = (words[i] ^ (Key(outer * p.n.run + i) * kStep + kSecond)) * kFirst;
      v = (v ^ (v >> 32)) * kSecond;
      sum += v ^ (v >> 29);
    }
  }
#pragma unroll
  for (int by = 16; by > 0; by /= 2) sum += __shfl_down_sync(0xffffffff, sum, by);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (!exists || lane != 0) return;
  for (uint32_t warp = 1; warp < lanes / 32; ++warp) sum += sums[threadIdx.x / 32 + warp];
  if (p.mean_data != nullptr) sum += static_cast<const Key*>(p.mean_data)[sample] * kStep;
  static_cast<Key*>(p.first)[sample] = sum;
}

}  // namespace tsbn::cuda
