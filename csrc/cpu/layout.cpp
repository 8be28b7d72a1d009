#include "layout.h"

#include <algorithm>
#include <numeric>

namespace tsbn::cpu {
namespace {

int64_t channel_axis(const std::string& stacking) { return stacking == "task_axis" ? 2 : 1; }

bool is_dense(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  std::vector<int64_t> axes(sizes.size());
  std::iota(axes.begin(), axes.end(), 0);
  std::sort(axes.begin(), axes.end(), [&](int64_t a, int64_t b) { return strides[a] < strides[b]; });
  int64_t expected = 1;
  for (const int64_t axis : axes) {
    if (sizes[axis] == 1) continue;
    if (strides[axis] != expected) return false;
    expected *= sizes[axis];
  }
  return true;
}

}  // namespace

std::optional<View> view_of(const Tensor& x, int64_t num_tasks, const std::string& stacking) {
  const auto sizes = x.sizes(), strides = x.strides();
  const int64_t channel = channel_axis(stacking);
  View view;
  view.T = num_tasks;
  view.C = sizes[channel];
  Operand& o = view.operand;
  o.data = const_cast<void*>(x.const_data_ptr());
  o.c = strides[channel];
  if (stacking == "task_axis") {
    view.N = sizes[1];
    o.t = strides[0];
    o.n = strides[1];
  } else {
    view.N = sizes[0] / num_tasks;
    const bool task_major = stacking == "task_major";
    o.t = strides[0] * (task_major ? view.N : 1);
    o.n = strides[0] * (task_major ? 1 : num_tasks);
  }
  view.S = 1;
  o.s = 1;
  if (x.numel() == 0) {
    view.S = 0;
    return view;
  }
  for (int64_t axis = int64_t(sizes.size()); --axis > channel;) {
    if (sizes[axis] == 1) continue;
    if (view.S == 1) o.s = strides[axis];
    else if (strides[axis] != view.S * o.s) return std::nullopt;
    view.S *= sizes[axis];
  }
  return view;
}

std::vector<int64_t> dense_strides(const Tensor& x, Family family, const std::string& stacking) {
  const auto sizes = x.sizes(), strides = x.strides();
  if (x.numel() > 0 && is_dense(x)) return {strides.begin(), strides.end()};
  return family_strides({sizes.begin(), sizes.end()}, family, stacking);
}

std::vector<int64_t> family_strides(const std::vector<int64_t>& sizes, Family family, const std::string& stacking) {
  std::vector<int64_t> axes(sizes.size());  // outermost first
  std::iota(axes.begin(), axes.end(), 0);
  if (family == Family::columns) {
    const auto channel = axes.begin() + channel_axis(stacking);
    std::rotate(channel, channel + 1, axes.end());
  }
  std::vector<int64_t> result(sizes.size());
  int64_t next = 1;
  for (auto axis = axes.rbegin(); axis != axes.rend(); ++axis) {
    result[*axis] = next;
    next *= std::max<int64_t>(1, sizes[*axis]);
  }
  return result;
}

}  // namespace tsbn::cpu
