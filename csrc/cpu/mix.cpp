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

// A sample, and the first of its bytes, which mostly tell two apart.
struct Entry {
  uint64_t head;
  int64_t sample;
};

}  // namespace

Mix::Mix(Work& w, const Tensor& task_of_sample, int64_t T, std::initializer_list<const Operand*> contents)
    : order_(w.N), cuts_(T) {
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
    cuts_[task] = partition_of(w, next[task + 1]);
    cuts_[task].first = next[task];
    next[task + 1] += next[task];
  }
  for (int64_t n = 0; n < w.N; ++n) order_[next[index[n * stride]]++] = n;

  std::vector<Contents> operands;
  for (const Operand* o : contents) {
    if (o->data != nullptr) operands.emplace_back(w, *o);
  }
  if (!operands.empty()) {
    std::vector<Entry> entries(w.N);
    const size_t head = std::min(sizeof(uint64_t), size_t(operands[0].length));
    for (int64_t i = 0; i < w.N; ++i) {
      entries[i] = {0, order_[i]};
      std::memcpy(&entries[i].head, operands[0].data + order_[i] * operands[0].sample, head);
    }
    const auto before = [&](const Entry& a, const Entry& b) {
      if (a.head != b.head) return a.head < b.head;
      for (const Contents& operand : operands) {
        if (const int found = operand.compare(a.sample, b.sample)) return found < 0;
      }
      return false;
    };
    for (const Partition& cut : cuts_) {
      std::sort(entries.begin() + cut.first, entries.begin() + cut.first + cut.N, before);
    }
    for (int64_t i = 0; i < w.N; ++i) order_[i] = entries[i].sample;
  }
  w.T = T;
  for (Operand* o : {&w.x, &w.dy, &w.out, &w.residual, &w.dresidual}) o->t = 0;
  w.order = order_.data();
  w.cuts = cuts_.data();
}

void Mix::clear_absent(Tensor& vectors) const {
  if (vectors.numel() == 0) return;
  const int64_t channels = vectors.size(1);
  with_element_type(vectors, [&](auto zero) {
    auto* data = static_cast<decltype(zero)*>(vectors.mutable_data_ptr());
    for (size_t task = 0; task < cuts_.size(); ++task) {
      if (cuts_[task].N == 0) std::fill_n(data + int64_t(task) * channels, channels, zero);
    }
  });
}

}  // namespace tsbn::cpu
