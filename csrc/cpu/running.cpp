#include "running.h"

#include <algorithm>
#include <numeric>
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

// The row of each of T tasks.
std::vector<int64_t> rows_of(std::optional<Tensor>& rows, int64_t tasks) {
  std::vector<int64_t> result(tasks);
  if (rows) {
    const int64_t* given = numbers(*rows, "rows");
    STD_TORCH_CHECK(rows->size(0) == tasks, "tsbn: there are ", tasks, " tasks and ", rows->size(0), " rows");
    std::copy_n(given, tasks, result.begin());
  } else {
    std::iota(result.begin(), result.end(), 0);
  }
  return result;
}

void check_rows(const Tensor& tensor, const std::vector<int64_t>& rows) {
  const int64_t size = tensor.size(0);
  for (int64_t row : rows) {
    STD_TORCH_CHECK(row >= 0 && row < size, "tsbn: running statistics have ", size, " rows, and none is ", row);
  }
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
void move_all(std::optional<Tensor>& running, const Tensor& batch, const std::vector<int64_t>& rows, double factor,
              const std::vector<double>& shares) {
  if (!running) return;
  const int64_t channels = batch.size(1);
  STD_TORCH_CHECK(running->dim() == 2 && running->size(1) == channels && running->is_contiguous(),
                  "tsbn: running statistics must be contiguous [R, ", channels, "]");
  check_rows(*running, rows);
  const auto move_from = [&](const auto* from) {
    with_element_type(*running, [&](auto zero) {
      auto* to = static_cast<decltype(zero)*>(running->mutable_data_ptr());
      for (size_t task = 0; task < rows.size(); ++task) {
        move(to + rows[task] * channels, from + int64_t(task) * channels, channels, factor, shares[task]);
      }
    });
  };
  const void* data = batch.const_data_ptr();
  if (batch.scalar_type() == ScalarType::Double) move_from(static_cast<const double*>(data));
  else move_from(static_cast<const float*>(data));
}

}  // namespace

void track(Running running, const Tensor& mean, const Tensor& var, double values) {
  const std::vector<int64_t> rows = rows_of(running.rows, mean.size(0));
  std::vector<double> shares(rows.size(), running.momentum.value_or(0));
  STD_TORCH_CHECK(running.momentum || running.batches, "tsbn: the cumulative average needs the number of batches");
  if (running.batches) {
    int64_t* batches = numbers(*running.batches, "batches");
    check_rows(*running.batches, rows);
    for (size_t task = 0; task < rows.size(); ++task) {
      const int64_t seen = ++batches[rows[task]];
      if (!running.momentum) shares[task] = 1 / double(seen);
    }
  }
  move_all(running.mean, mean, rows, 1, shares);
  move_all(running.var, var, rows, values / (values - 1), shares);
}

}  // namespace tsbn::cpu
