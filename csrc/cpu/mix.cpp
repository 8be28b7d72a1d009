#include "mix.h"

#include <algorithm>
#include <cstring>

#include "parameter.h"
#include "plan.h"

namespace tsbn::cpu {
namespace {

// The values of a sample, as runs of bytes that are contiguous.
struct Contents {
  const char* data;
  int64_t sample, runs, step, length;

  Contents(const Work& w, const Operand& o) : data(static_cast<const char*>(o.data)) {
    const int64_t size = int64_t(element_size(w.dtype));
    const bool rows = w.family == Family::rows;
    sample = o.n * size;
    runs = rows ? w.C : w.S;
    step = (rows ? o.c : o.s) * size;
    length = (rows ? w.S : w.C) * size;
  }
  int compare(int64_t a, int64_t b) const {
    const char *left = data + a * sample, *right = data + b * sample;
    for (int64_t run = 0; run < runs; ++run) {
      if (const int found = std::memcmp(left + run * step, right + run * step, size_t(length))) return found;
    }
    return 0;
  }
};

// A hash of 32 bits of a sample's first bytes, which mostly tell two apart.
uint64_t hash_of(const char* data, int64_t length) {
  constexpr int64_t kMost = 16, kWord = sizeof(uint64_t);
  uint64_t hash = 0, word = 0;
  const auto add = [&] {
    hash = (hash ^ word) * 0x9E3779B97F4A7C15;
    hash ^= hash >> 32;
  };
  length = std::min(length, kMost);
  for (; length >= kWord; length -= kWord, data += kWord) std::memcpy(&word, data, kWord), add();
  if (length > 0) word = 0, std::memcpy(&word, data, size_t(length)), add();
  return hash >> 32;
}

// Orders the samples of each task by their contents: by a hash into as many places as there are samples, then those of one
// place by all that they hold. `place_of(n, hash)` is monotonic in the hash, and tasks lie one after the other.
template <class PlaceOf>
void order_by(const std::vector<Contents>& contents, std::vector<int64_t>& order, PlaceOf place_of) {
  const int64_t samples = int64_t(order.size());
  const Contents& first = contents[0];
  std::vector<int64_t> places(samples), ends(samples + 1);
  for (int64_t n = 0; n < samples; ++n) {
    constexpr int64_t kAhead = 16;  // samples: each begins in a place of its own, which the processor does not foresee
    __builtin_prefetch(first.data + (n + kAhead) * first.sample);
    places[n] = place_of(n, hash_of(first.data + n * first.sample, first.length));
    ++ends[places[n] + 1];
  }
  for (int64_t place = 0; place < samples; ++place) ends[place + 1] += ends[place];
  for (int64_t n = 0; n < samples; ++n) order[ends[places[n]]++] = n;
  const auto before = [&](int64_t a, int64_t b) {
    for (const Contents& operand : contents) {
      if (const int found = operand.compare(a, b)) return found < 0;
    }
    return false;
  };
  int64_t begin = 0;
  for (int64_t place = 0; place < samples; begin = ends[place++]) {
    if (ends[place] > begin + 1) std::sort(order.begin() + begin, order.begin() + ends[place], before);
  }
}

}  // namespace

Mix::Mix(Work& w, const MixedTasks& tasks, Cut cut, std::initializer_list<const Operand*> contents)
    : order_(w.N), cuts_(tasks.count) {
  const auto& [task_of_sample, T] = tasks;
  STD_TORCH_CHECK(task_of_sample.scalar_type() == ScalarType::Long && task_of_sample.dim() == 1 &&
                      task_of_sample.size(0) == w.N,
                  "tsbn: task_of_sample must be int64 with a task for each sample");
  const auto* index = static_cast<const int64_t*>(task_of_sample.const_data_ptr());
  const int64_t stride = task_of_sample.stride(0);
  std::vector<int64_t> next(T + 1);
  for (int64_t n = 0; n < w.N; ++n) {
    const int64_t task = index[n * stride];
    STD_TORCH_CHECK(task >= 0 && task < T, "tsbn: sample ", n, " has task ", task, ", and there are ", T, " tasks");
    ++next[task + 1];
  }
  for (int64_t task = 0; task < T; ++task) {
    cuts_[task] = cut(w, next[task + 1]);
    cuts_[task].first = next[task];
    next[task + 1] += next[task];
  }

  std::vector<Contents> operands;
  for (const Operand* o : contents) {
    if (o->data != nullptr) operands.emplace_back(w, *o);
  }
  if (operands.empty()) {
    for (int64_t n = 0; n < w.N; ++n) order_[next[index[n * stride]]++] = n;
  } else {
    order_by(operands, order_, [&](int64_t n, uint64_t hash) {
      const Partition& own = cuts_[index[n * stride]];
      return own.first + int64_t(hash * uint64_t(own.N) >> 32);
    });
  }
  w.T = T;
  for (Operand* o : {&w.x, &w.dy, &w.out, &w.residual, &w.dresidual}) o->t = 0;
  w.order = order_.data();
  w.cuts = cuts_.data();
}

void Mix::clear_absent(Tensor& vectors) const {
  if (vectors.numel() == 0) return;
  const int64_t channels = vectors.numel() / vectors.size(0);
  with_element_type(vectors, [&](auto zero) {
    auto* data = static_cast<decltype(zero)*>(vectors.mutable_data_ptr());
    for (size_t task = 0; task < cuts_.size(); ++task) {
      if (cuts_[task].N == 0) std::fill_n(data + int64_t(task) * channels, channels, zero);
    }
  });
}

}  // namespace tsbn::cpu
