// Runs the kernels of a Work over PyTorch's threads.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#include "pool.h"
#include "work.h"

namespace tsbn::cpu {

// Merges `partial` (of `other_count` positions) into `total` (of `count` positions): `width` doubles.
using Merge = void (*)(double* total, double count, const double* partial, double other_count, int64_t width);

inline void merge_all_moments(double* total, double count, const double* partial, double other, int64_t width) {
  const int64_t channels = width / 2;
  for (int64_t c = 0; c < channels; ++c) {
    merge_moments(total[c], total[channels + c], count, partial[c], partial[channels + c], other);
  }
}

inline void merge_sums(double* total, double, const double* partial, double, int64_t width) {
  for (int64_t i = 0; i < width; ++i) total[i] += partial[i];
}

// What a pass reduces each group to, `width` doubles, and what becomes of that. `prepare` may be nullptr.
struct Reduction {
  Prepare prepare;
  Reduce reduce;
  Merge merge;
  Finish finish;
  int64_t width;
  size_t scratch;  // bytes that each thread lends to `reduce`
};

constexpr int64_t kSerialElements = 16384;  // below this, waking threads costs more than they save

inline int64_t threads_for(const Work& w) {
  return w.streams() * w.N * w.C * w.S <= kSerialElements ? 1 : int64_t(torch::stable::get_num_threads());
}

// The barriers of parallel_for, for ThreadSanitizer, which does not see into OpenMP. One object stands for all loops, as it is
// reached without reading what a loop has captured.
#ifdef __SANITIZE_THREAD__
inline char barriers[2];  // before and behind a loop
inline void arrive(int which) { __tsan_release(&barriers[which]); }
inline void pass(int which) { __tsan_acquire(&barriers[which]); }
#else
inline void arrive(int) {}
inline void pass(int) {}
#endif

// Streaming stores are weakly ordered: other threads read an output after this. It waits for them, so it comes but once.
inline void stream_fence() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// Calls body(i) for i in [0, count). A thread takes its own share first, the same at every pass, so that it finds in its
// cache what it left there; then the next few indices of those that are not done yet, so that a thread that the machine
// holds up does not hold up the rest. `make_body()` gives each thread a body with buffers of its own.
template <class MakeBody>
void parallel_each(int64_t count, int64_t threads, MakeBody make_body) {
  struct alignas(64) Share { std::atomic<int64_t> next{0}; };
  std::vector<Share> shares(threads);
  const auto begin_of = [&](int64_t share) { return count * share / threads; };
  const int64_t stride = std::max<int64_t>(1, count / (threads * 64));
  const auto run = [&](int64_t thread, int64_t) {
    pass(0);
    auto body = make_body();
    for (int64_t k = 0; k < threads; ++k) {
      const int64_t share = (thread + k) % threads, begin = begin_of(share), end = begin_of(share + 1);
      std::atomic<int64_t>& next = shares[share].next;
      for (int64_t i = begin + next.fetch_add(stride); i < end; i = begin + next.fetch_add(stride)) {
        for (int64_t j = i; j < std::min(end, i + stride); ++j) body(j);
      }
    }
    stream_fence();
    arrive(1);
  };
  arrive(0);
  torch::stable::parallel_for(0, threads, 1, run);
  pass(1);
}

// The chunks of all groups, one after the other. In a mixed batch tasks have different numbers of them.
class Chunks {
 public:
  explicit Chunks(const Work& w) : w_(w), each_(w.partition.chunks), count_(w.groups() * each_) {
    if (!w.mixed()) return;
    first_.push_back(0);
    for (int64_t task = 0; task < w.T; ++task) {
      each_ = std::max(each_, w.cuts[task].chunks);
      first_.push_back(first_.back() + w.cuts[task].chunks * w.slabs());
    }
    count_ = first_.back();
  }
  int64_t count() const { return count_; }
  int64_t most() const { return each_; }  // of one group
  int64_t first_of(int64_t group) const {
    return w_.mixed() ? first_[group / w_.slabs()] + group % w_.slabs() * w_.cut_of(group).chunks : group * each_;
  }
  // Calls f(group, chunk) for chunk i.
  template <class F>
  void at(int64_t i, F f) const {
    if (!w_.mixed()) return f(i / each_, i % each_);
    const int64_t task = std::upper_bound(first_.begin(), first_.end(), i) - first_.begin() - 1;
    const int64_t own = w_.cuts[task].chunks, place = i - first_[task];
    f(task * w_.slabs() + place / own, place % own);
  }

 private:
  const Work& w_;
  int64_t each_, count_;
  std::vector<int64_t> first_;  // of each task, and of one more
};

// Whether one thread can take a group at a time, and all are busy until the end.
inline bool many_groups(const Work& w, int64_t threads) {
  if (!w.mixed()) return w.groups() >= 4 * threads;
  int64_t most = 0;
  for (int64_t task = 0; task < w.T; ++task) most = std::max(most, w.cuts[task].N);
  return w.N * w.slabs() >= 4 * threads * most;
}

// Calls apply(group, chunk) for every chunk.
template <class Apply>
void apply_all(const Work& w, Apply apply) {
  const Chunks chunks(w);
  parallel_each(chunks.count(), threads_for(w), [&] { return [&](int64_t i) { chunks.at(i, apply); }; });
}

// Reduces each group over its chunks in order, calls finish, then apply(group, chunk) if that `writes` anything.
// Many groups: one thread takes a group from reduction to output, while its slab is cached. Few, or no output: chunks are
// spread over the threads. The sums are the same to the bit.
template <class Apply>
void reduce_then_apply(const Work& w, const Reduction& reduction, bool writes, Apply apply) {
  const int64_t threads = threads_for(w), groups = w.groups(), width = reduction.width;
  const Chunks chunks(w);
  const size_t scratch_size = reduction.scratch / sizeof(double) + 1;
  const bool many = (writes && many_groups(w, threads)) || chunks.most() == 1 || threads == 1;
  // With a task's sums, in its thread; single channels at once, in whole registers.
  const bool prepares_each = reduction.prepare != nullptr && many && w.family == Family::columns && !w.shared;
  if (reduction.prepare != nullptr && !prepares_each) reduction.prepare(w, 0, w.T * w.C);
  // The first chunk's sums are where the total is made.
  const auto add_chunk = [&](double* total, double& count, const double* partial, const Partition& cut, int64_t chunk) {
    const double positions = double(cut.positions(chunk));
    if (chunk > 0) reduction.merge(total, count, partial, positions, width);
    count += positions;
  };

  if (many) {
    parallel_each(groups, threads, [&] {
      return [&, total = std::vector<double>(width), partial = std::vector<double>(width),
              scratch = std::vector<double>(scratch_size)](int64_t group) mutable {
        double count = 0;
        if (prepares_each) reduction.prepare(w, group * w.C, w.C);
        const Partition& cut = w.cut_of(group);
        if (cut.chunks == 0) std::fill(total.begin(), total.end(), 0);
        for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) {
          reduction.reduce(w, group, chunk, chunk == 0 ? total.data() : partial.data(), scratch.data());
          add_chunk(total.data(), count, partial.data(), cut, chunk);
        }
        reduction.finish(w, group, total.data());
        if (!writes) return;
        for (int64_t chunk = cut.chunks; chunk-- > 0;) apply(group, chunk);
      };
    });
    return;
  }

  const PooledMemory memory(size_t((chunks.count() + 1) * width) * sizeof(double));
  double* partials = static_cast<double*>(memory.data());
  parallel_each(chunks.count(), threads, [&] {
    return [&, scratch = std::vector<double>(scratch_size)](int64_t i) mutable {
      chunks.at(i, [&](int64_t group, int64_t chunk) {
        reduction.reduce(w, group, chunk, partials + i * width, scratch.data());
      });
    };
  });
  double* none = partials + chunks.count() * width;
  std::fill_n(none, width, 0);
  for (int64_t group = 0; group < groups; ++group) {
    const Partition& cut = w.cut_of(group);
    double* total = cut.chunks == 0 ? none : partials + chunks.first_of(group) * width;
    double count = 0;
    for (int64_t chunk = 0; chunk < cut.chunks; ++chunk) add_chunk(total, count, total + chunk * width, cut, chunk);
    reduction.finish(w, group, total);
  }
  if (writes) apply_all(w, apply);
}

}  // namespace tsbn::cpu
