#include "plan.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <vector>

#include "allocate.h"
#include "layout.h"
#include "parameter.h"

namespace tsbn::cpu {
namespace {

// Outputs of so many bytes and more are streamed.
std::atomic<int64_t>& stream_bytes() {
  static std::atomic<int64_t> bytes = [] {
    const char* text = std::getenv("TSBN_STREAMING");
    return text == nullptr || std::strcmp(text, "0") != 0 ? int64_t(8) << 20 : std::numeric_limits<int64_t>::max();
  }();
  return bytes;
}

// Blocks of fp32 rows fill a third of a 48 KiB L1 cache; a column's fp32 sum has at most 128 terms.
constexpr int64_t kRowBlock = 4096, kRowChunk = 32768, kColumnBlock = 128, kColumnChunkElements = 131072;

bool reads(Family family, const std::optional<View>& view) {
  return view && (family == Family::rows ? view->rows() : view->columns());
}

std::optional<View> checked_view(const Tensor& x, int64_t num_tasks, const std::string& stacking) {
  STD_TORCH_CHECK(stacking == "task_major" || stacking == "sample_major" || stacking == "task_axis",
                  "tsbn: unknown stacking '", stacking, "'");
  const int64_t leading = stacking == "task_axis" ? 2 : 1;
  STD_TORCH_CHECK(x.dim() > leading && num_tasks > 0, "tsbn: x has too few dimensions, or num_tasks is not positive");
  STD_TORCH_CHECK(leading == 2 ? x.size(0) == num_tasks : x.size(0) % num_tasks == 0,
                  "tsbn: the first dimension of x does not hold ", num_tasks, " tasks");
  return view_of(x, num_tasks, stacking);
}

View input_view(Tensor& x, const Stacking& stacking) {
  static const std::string one_task = "task_major";
  STD_TORCH_CHECK(stacking.num_tasks > 0, "tsbn: num_tasks is not positive");
  const int64_t tasks = stacking.shared ? 1 : stacking.num_tasks;
  const std::string& name = stacking.shared ? one_task : stacking.name;
  std::optional<View> view = checked_view(x, tasks, name);
  if (!reads(Family::rows, view) && !reads(Family::columns, view)) {
    x = copy_in(Family::rows, x, name);
    view = checked_view(x, tasks, name);
  }
  if (stacking.shared) view->operand.t = 0;
  return *view;
}

Activation activation_of(const std::string& name) {
  const auto found = std::find(std::begin(kActivationNames), std::end(kActivationNames), name);
  STD_TORCH_CHECK(found != std::end(kActivationNames), "tsbn: unknown activation '", name, "'");
  return Activation(found - kActivationNames);
}

// Several samples whose positions follow one another are one long sample.
void join_samples(Work& w) {
  Operand* operands[] = {&w.x, &w.dy, &w.out, &w.residual, &w.dresidual};
  for (const Operand* o : operands) {
    if (o->data != nullptr && w.N != 1 && w.S != 1 && o->n != w.S * o->s) return;
  }
  for (Operand* o : operands) {
    if (w.S == 1) o->s = o->n;
  }
  w.S *= w.N;
  w.N = 1;
}

}  // namespace

size_t element_size(DType dtype) {
  switch (dtype) {
    case DType::f64: return 8;
    case DType::f32: return 4;
    default: return 2;
  }
}

Partition partition_of(const Work& w, int64_t samples) {
  if (w.family == Family::rows) return {samples, w.S, kRowBlock, w.shared ? 2 * kRowBlock : kRowChunk};
  if (!w.shared) return {samples, w.S, kColumnBlock, std::max(kColumnBlock, kColumnChunkElements / w.C)};
  // One group must be work for all threads, though its partial sums, 2*T*C for each chunk, should stay few; and a block
  // of x and of h stays in the L1 cache while T tasks go by.
  return {samples, w.S, std::clamp<int64_t>(kRowBlock / w.C, 16, kColumnBlock),
          std::max({int64_t(64), 4 * kRowBlock / w.C, samples * w.S / 64})};
}

Tensor copy_in(Family family, const Tensor& tensor, const std::string& stacking) {
  const auto sizes = tensor.sizes();
  Tensor copy = allocate_like(tensor, family_strides({sizes.begin(), sizes.end()}, family, stacking));
  torch::stable::copy_(copy, tensor);
  return copy;
}

std::vector<int64_t> stacked_sizes(const Tensor& x, const Stacking& stacking) {
  const auto sizes = x.sizes();
  std::vector<int64_t> result(sizes.begin(), sizes.end());
  if (!stacking.shared) return result;
  if (stacking.name == "task_axis") result.insert(result.begin(), stacking.num_tasks);
  else result[0] *= stacking.num_tasks;
  return result;
}

Work work_of(Tensor& x, const Stacking& stacking, double eps, const std::string& activation, double slope) {
  const View view = input_view(x, stacking);
  Work w;
  w.family = view.rows() ? Family::rows : Family::columns;
  w.dtype = dtype_of(x);
  w.activation = activation_of(activation);
  w.T = stacking.num_tasks, w.N = view.N, w.C = view.C, w.S = view.S;
  w.positions = double(view.N * view.S);
  w.eps = eps;
  w.slope = slope;
  w.shared = stacking.shared;
  w.x = view.operand;
  return w;
}

Operand stacked_operand(const Work& w, Tensor& tensor, const Tensor& x, const Stacking& stacking,
                        const char* name) {
  const auto sizes = tensor.sizes();
  const std::vector<int64_t> expected = stacked_sizes(x, stacking);
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type() &&
                      std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end()),
                  "tsbn: ", name, " must have the shape of y and the dtype of x");
  std::optional<View> view = checked_view(tensor, stacking.num_tasks, stacking.name);
  if (!reads(w.family, view)) {
    tensor = copy_in(w.family, tensor, stacking.name);
    view = checked_view(tensor, stacking.num_tasks, stacking.name);
  }
  return view->operand;
}

Tensor empty_stacked(const Work& w, const Tensor& x, const Stacking& stacking, Operand& operand) {
  const std::vector<int64_t> sizes = stacked_sizes(x, stacking);
  const auto strides =
      w.shared ? family_strides(sizes, w.family, stacking.name) : dense_strides(x, w.family, stacking.name);
  Tensor result = allocate(sizes, strides, x.scalar_type());
  if (x.numel() > 0) operand = view_of(result, stacking.num_tasks, stacking.name)->operand;
  return result;
}

Tensor empty_input(const Work& w, const Tensor& x, const Stacking& stacking, Operand& operand) {
  Tensor result = allocate_like(x, dense_strides(x, w.family, w.shared ? "task_major" : stacking.name));
  if (x.numel() > 0) operand = input_view(result, stacking).operand;
  return result;
}

void cut(Work& w) {
  join_samples(w);
  w.partition = partition_of(w, w.N);
}

int64_t set_stream_bytes(int64_t bytes) { return stream_bytes().exchange(bytes); }

// Streaming pays where the output outgrows the caches near the core and is written in whole lines.
bool should_stream(const Work& w, const Operand& out, int64_t tasks) {
  const int64_t size = int64_t(element_size(w.dtype));
  if (out.data == nullptr || tasks * w.N * w.C * w.S * size < stream_bytes().load(std::memory_order_relaxed)) return false;
  constexpr int64_t line = 64;
  const bool aligned = reinterpret_cast<uintptr_t>(out.data) % line == 0 && out.t * size % line == 0 &&
                       (w.N == 1 || out.n * size % line == 0);
  if (w.family == Family::rows) return w.S * size >= (aligned && out.c * size % line == 0 ? 2 : 8) * line;
  return aligned && (w.S == 1 || out.s * size % line == 0);
}

}  // namespace tsbn::cpu
