// A mixed batch: which samples each task has, and how they are cut.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <vector>

#include "work.h"

namespace tsbn::cpu {

using torch::stable::Tensor;

// Samples by tasks. Those of a task are ordered by what the operands `contents` hold of them, so that sums over them do
// not depend on where they lie in the batch; without operands, as they lie.
class Mix {
 public:
  // Makes `w`, a batch of one task, that of T tasks.
  Mix(Work& w, const Tensor& task_of_sample, int64_t T, std::initializer_list<const Operand*> contents);

  // Zeroes the rows of tasks without a sample in a [T,C] tensor (or an empty one).
  void clear_absent(Tensor& vectors) const;

 private:
  std::vector<int64_t> order_;
  std::vector<Partition> cuts_;
};

}  // namespace tsbn::cpu
