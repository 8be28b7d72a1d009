// Running statistics, which a forward pass in training updates in place by those of its batch.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace tsbn::cpu {

using torch::stable::Tensor;

// All but `momentum` may be missing; tensors are contiguous.
struct Running {
  std::optional<Tensor> mean, var;  // [R, C]
  std::optional<Tensor> batches;    // int64 [R]: how many were seen
  std::optional<double> momentum;   // the batch's share; else 1 / batches, the cumulative average
  std::optional<Tensor> rows;       // int64 [T]: the row of each task; else there are T, in the order of the tasks
};

// `mean` and `var`, [T, C], are those of a batch with so many `values` of a channel of each task. One is an error, and a task
// without values is left alone.
void track(Running running, const Tensor& mean, const Tensor& var, const std::vector<double>& values);

}  // namespace tsbn::cpu
