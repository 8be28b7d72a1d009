// A mixed batch: which samples each task has, and how they are cut.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

#include "work.h"

namespace tsbn::cpu {

using torch::stable::Tensor;

// Of a mixed batch: the task of each sample, int64 [N], and how many tasks there are.
struct MixedTasks {
  const Tensor& of_sample;
  int64_t count;
};

// Samples by tasks. Those of a task are ordered by what the operands `contents` hold of them, so that sums over them do
// not depend on where they lie in the batch; without operands, as they lie.
class Mix {
 public:
  // How a slab of so many samples is cut.
  using Cut = Partition (*)(const Work&, int64_t samples);

  // Makes `w`, a batch of one task, that of all tasks.
  Mix(Work& w, const MixedTasks& tasks, Cut cut, std::initializer_list<const Operand*> contents);

  // Zeroes the rows of tasks without a sample in a [T,C] tensor (or an empty one).
  void clear_absent(Tensor& vectors) const;

 private:
  std::vector<int64_t> order_;
  std::vector<Partition> cuts_;
};

}  // namespace tsbn::cpu
