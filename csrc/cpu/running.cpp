#include "running.h"

#include <type_traits>
#include <vector>

#include "parameter.h"

namespace tsbn::cpu {
namespace {

int64_t* numbers(Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.dim() == 1 && tensor.is_contiguous(), "tsbn: ",
                  name, " must be contiguous int64 of one dimension");
  return static_cast<int64_t*>(tensor.mutable_data_ptr());
}

// How a task moves its row.
struct Step {
  int64_t task, row;
  double share, unbiased;  // of the batch; what makes the variance unbiased
};

// Those of the tasks that have values.
std::vector<Step> steps_of(std::optional<Tensor>& rows, const std::vector<double>& values, double share) {
  const int64_t tasks = int64_t(values.size());
  const int64_t* given = rows ? numbers(*rows, "rows") : nullptr;
  STD_TORCH_CHECK(!rows || rows->size(0) == tasks, "tsbn: there are ", tasks, " tasks and ", rows->size(0), " rows");
  std::vector<Step> steps;
  steps.reserve(values.size());
  for (int64_t task = 0; task < tasks; ++task) {
    const double count = values[task];
    STD_TORCH_CHECK(count != 1, "tsbn: task ", task, " has one value per channel");
    if (count > 0) steps.push_back({task, given == nullptr ? task : given[task], share, count / (count - 1)});
  }
  return steps;
}

void check_rows(const Tensor& tensor, const std::vector<Step>& steps) {
  const int64_t size = tensor.size(0);
  for (const Step& step : steps) {
    STD_TORCH_CHECK(step.row >= 0 && step.row < size, "tsbn: running statistics have ", size, " rows, and none is ",
                    step.row);
  }
}

// Statistics that may be missing.
void check_statistics(const std::optional<Tensor>& running, const Tensor& batch, const std::vector<Step>& steps) {
  if (!running) return;
  const int64_t channels = batch.size(1);
  STD_TORCH_CHECK(running->dim() == 2 && running->size(1) == channels && running->is_contiguous(),
                  "tsbn: running statistics must be contiguous [R, ", channels, "]");
  check_rows(*running, steps);
}

// running = (1 - share) * running + share * batch * factor, from the nearer end: a share of 0 or 1 rounds nothing.
template <class R, class A>
void move(R* running, const A* batch, int64_t channels, double factor, double share) {
  using W = std::conditional_t<std::is_same_v<R, double>, double, A>;
  const W f = W(factor), near = W(share), far = W(1 - share);
  for (int64_t c = 0; c < channels; ++c) {
    const W before = W(running[c]), after = W(batch[c]) * f;
    running[c] = R(share < 0.5 ? before + near * (after - before) : after - far * (after - before));
  }
}

// The same for all tasks.
void move_all(std::optional<Tensor>& running, const Tensor& batch, const std::vector<Step>& steps, bool unbiased) {
  if (!running) return;
  const int64_t channels = batch.size(1);
  const auto move_from = [&](const auto* from) {
    with_element_type(*running, [&](auto zero) {
      auto* to = static_cast<decltype(zero)*>(running->mutable_data_ptr());
      for (const Step& step : steps) {
        const double factor = unbiased ? step.unbiased : 1;
        move(to + step.row * channels, from + step.task * channels, channels, factor, step.share);
      }
    });
  };
  const void* data = batch.const_data_ptr();
  if (batch.scalar_type() == ScalarType::Double) move_from(static_cast<const double*>(data));
  else move_from(static_cast<const float*>(data));
}

}  // namespace

void track(Running running, const Tensor& mean, const Tensor& var, const std::vector<double>& values) {
  STD_TORCH_CHECK(running.momentum || running.batches, "tsbn: the cumulative average needs the number of batches");
  std::vector<Step> steps = steps_of(running.rows, values, running.momentum.value_or(0));
  check_statistics(running.mean, mean, steps);  // all of it before anything changes
  check_statistics(running.var, var, steps);
  if (running.batches) {
    int64_t* batches = numbers(*running.batches, "batches");
    check_rows(*running.batches, steps);
    for (Step& step : steps) {
      const int64_t seen = ++batches[step.row];
      if (!running.momentum) step.share = 1 / double(seen);
    }
  }
  move_all(running.mean, mean, steps, false);
  move_all(running.var, var, steps, true);
}

}  // namespace tsbn::cpu
