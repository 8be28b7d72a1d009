// The operators of layer normalisation for CPU tensors. Shapes, formulas and errors are those of
// tsbn_kernels/operator/layer_ops.py and, of mixed batches, mixed_layer_ops.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "allocate.h"
#include "dispatch.h"
#include "layout.h"
#include "mix.h"
#include "parameter.h"
#include "plan.h"
#include "schedule.h"

namespace tsbn::cpu {
namespace {

constexpr int64_t kBlockElements = 65536, kChunkElements = 131072;

std::vector<int64_t> sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return {sizes.begin(), sizes.end()};
}

Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) {
  return allocate(sizes, family_strides(sizes, Family::rows, "task_major"), dtype);
}

// A parameter [T, *normalized_shape] as [T, D].
Tensor matrix(const Tensor& parameter) {
  return parameter.dim() == 2 ? parameter : torch::stable::flatten(parameter, 1);
}

// A call: its rows are the positions of a Work, and where they lie is counted in rows. y has streams; x has, too, unless
// all tasks share it.
struct Call {
  Work work;
  Operand stream, input;
  int64_t rows = 0;  // of x
};

Operand operand(const Operand& places, const Tensor& tensor, int64_t width) {
  return {const_cast<void*>(tensor.const_data_ptr()), places.t * width, places.n * width, 1, places.s * width};
}

Call call_of(const Tensor& x, const Tensor& weight, const Stacking& stacking, double eps, bool rms, bool mixed) {
  const auto sizes = sizes_of(x), shape = sizes_of(weight);
  const bool sample_major = stacking.name == "sample_major", task_axis = stacking.name == "task_axis";
  STD_TORCH_CHECK(sample_major || task_axis || stacking.name == "task_major", "tsbn: unknown stacking '",
                  stacking.name, "'");
  const size_t leading = task_axis && !stacking.shared ? 2 : 1, normalized = shape.size() - 1;
  STD_TORCH_CHECK(shape.size() > 1 && sizes.size() >= leading + normalized &&
                      std::equal(shape.begin() + 1, shape.end(), sizes.end() - normalized),
                  "tsbn: the last dimensions of x are not those of weight, [T, *normalized_shape]");
  Call call;
  Work& w = call.work;
  w.family = Family::columns;
  w.dtype = dtype_of(x);
  w.T = stacking.num_tasks, w.C = 1, w.S = 1;
  const int64_t tasks = stacking.shared ? 1 : w.T;
  STD_TORCH_CHECK(w.T > 0 && (leading == 2 ? sizes[0] == tasks : sizes[0] % tasks == 0),
                  "tsbn: the first dimension of x does not hold ", w.T, " tasks");
  w.N = leading == 2 ? sizes[1] : sizes[0] / tasks;
  for (size_t axis = leading; axis < sizes.size(); ++axis) (axis < sizes.size() - normalized ? w.S : w.C) *= sizes[axis];
  w.eps = eps;
  w.rms = rms;
  w.shared = stacking.shared;
  call.rows = tasks * w.N * w.S;

  call.stream = {nullptr, mixed ? 0 : sample_major ? w.S : w.N * w.S, sample_major ? w.T * w.S : w.S, 1, 1};
  call.input = w.shared ? Operand{nullptr, 0, w.S, 1, 1} : call.stream;
  const bool adjacent = w.S == 1 || call.stream.n == w.S;
  if (w.S == 1) call.stream.s = call.stream.n, call.input.s = call.input.n;
  if (mixed || !adjacent) return call;
  w.S *= w.N;  // samples that follow one another are one
  w.N = 1;
  return call;
}

// A contiguous operand of `rows` rows of `width` values.
Operand checked(const Operand& places, Tensor& tensor, ScalarType dtype, int64_t rows, int64_t width, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == rows * width, "tsbn: ", name,
                  " has the wrong dtype or number of elements");
  if (!tensor.is_contiguous()) tensor = copy_in(Family::rows, tensor, "task_major");
  return operand(places, tensor, width);
}

Partition partition_of_rows(const Work& w, int64_t samples) {
  return {samples, w.S, std::clamp<int64_t>(kBlockElements / w.C, 16, 512), std::max<int64_t>(16, kChunkElements / w.C)};
}

// Cuts the rows, of equal tasks or of a mixed batch; over the rows of a task `contents` are summed.
std::optional<Mix> cut_rows(Work& w, const MixedTasks* tasks, std::initializer_list<const Operand*> contents) {
  if (tasks != nullptr) return std::optional<Mix>(std::in_place, w, *tasks, partition_of_rows, contents);
  w.partition = partition_of_rows(w, w.N);
  return std::nullopt;
}

bool is_aligned(const Operand& o) { return reinterpret_cast<uintptr_t>(o.data) % 64 == 0; }

// Calls body(group, chunk, scratch) for every chunk, with `scratch` bytes for each thread.
template <class Body>
void run_chunks(const Work& w, size_t scratch, Body body) {
  const Chunks chunks(w);
  parallel_each(chunks.count(), threads_for(w), [&] {
    return [&, memory = std::vector<double>(scratch / sizeof(double) + 1)](int64_t i) mutable {
      chunks.at(i, [&](int64_t group, int64_t chunk) { body(group, chunk, memory.data()); });
    };
  });
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

Four normalize(Tensor& x, Tensor& weight, std::optional<Tensor>& bias, std::optional<Tensor>& residual, double eps,
               const std::string& gate, const Stacking& stacked, bool rms, const MixedTasks* tasks) {
  Call call = call_of(x, weight, stacked, eps, rms, tasks != nullptr);
  Work& w = call.work;
  const ScalarType dtype = x.scalar_type(), accumulate = accumulate_type(x);
  Tensor y = empty(stacked_sizes(x, stacked), dtype);
  Tensor s = residual ? empty(sizes_of(x), dtype) : empty({0}, dtype);
  Tensor mean = empty({rms ? 0 : call.rows}, accumulate), rstd = empty({call.rows}, accumulate);
  if (x.numel() == 0) {
    fill_zero(mean), fill_zero(rstd);
    return {y, s, mean, rstd};
  }
  w.x = checked(call.input, x, dtype, call.rows, w.C, "x");
  w.out = operand(call.stream, y, w.C);
  if (residual) {
    w.residual = checked(call.input, *residual, dtype, call.rows, w.C, "residual");
    w.sum = operand(call.input, s, w.C);
  }
  w.mean = operand(call.input, mean, 1), w.rstd = operand(call.input, rstd, 1);
  const auto mix = cut_rows(w, tasks, {});
  w.stream = is_aligned(w.sum) && should_stream(w, w.out, w.streams());
  const Kernels& kernel = kernels(w.family, w.dtype);

  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    weight = matrix(weight);
    if (bias) bias = matrix(*bias);
    set_gates(w, space, weight, gate);
    w.vectors.bias = space.values_or_none(bias, "bias");
    kernel.vectors.prepare(w, 0, w.T * w.C);
    run_chunks(w, sizeof(A) * size_t(kRowsTogether * w.layer_piece()),
               [&](int64_t group, int64_t chunk, void* scratch) { kernel.layer(w).forward(w, group, chunk, scratch); });
  });
  return {y, s, mean, rstd};
}

struct Needs {
  bool dx, dweight, dbias;
};

Three differentiate(Tensor& dy, std::optional<Tensor>& ds, Tensor& s, Tensor& weight, Tensor& mean, Tensor& rstd,
                    const std::string& gate, const Stacking& stacked, bool rms, const Needs& needs,
                    const MixedTasks* tasks) {
  const bool shared = stacked.shared;
  Call call = call_of(s, weight, stacked, 0, rms, tasks != nullptr);
  Work& w = call.work;
  const ScalarType dtype = s.scalar_type(), accumulate = accumulate_type(s);
  Tensor dx = empty(needs.dx ? sizes_of(s) : std::vector<int64_t>{0}, dtype);
  const auto vector_if = [&](bool needed) {
    return empty(needed ? sizes_of(weight) : std::vector<int64_t>{0}, weight.scalar_type());
  };
  Tensor dweight = vector_if(needs.dweight), dbias = vector_if(needs.dbias);
  if (s.numel() == 0) {
    fill_zero(dweight), fill_zero(dbias);
    return {dx, dweight, dbias};
  }
  w.x = checked(call.input, s, dtype, call.rows, w.C, "s");
  w.dy = checked(call.stream, dy, dtype, shared ? call.rows * w.T : call.rows, w.C, "dy");
  if (ds) w.residual = checked(call.input, *ds, dtype, call.rows, w.C, "ds");
  if (needs.dx) w.out = operand(call.input, dx, w.C);
  if (!rms) w.mean = checked(call.input, mean, accumulate, call.rows, 1, "mean");
  w.rstd = checked(call.input, rstd, accumulate, call.rows, 1, "rstd");
  const auto mix = cut_rows(w, tasks, {&w.x, &w.dy});
  w.stream = should_stream(w, w.out, shared ? 1 : w.streams());
  const Kernels& kernel = kernels(w.family, w.dtype);
  const Reduce backward = shared ? kernel.layer(w).shared_backward : kernel.layer(w).backward;

  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    w.vectors.slope = space.vector();
    weight = matrix(weight);
    set_gates(w, space, weight, gate);
    const size_t scratch = sizeof(A) * size_t((kRowsTogether + 2 * w.fan()) * w.layer_piece());
    if (!needs.dweight && !needs.dbias) {
      kernel.vectors.prepare(w, 0, w.T * w.C);
      run_chunks(w, scratch, [&](int64_t group, int64_t chunk, void* memory) {
        backward(w, group, chunk, nullptr, memory);
      });
      return;
    }
    w.vectors.dweight = space.place(dweight);
    w.vectors.dbias = space.place(dbias);
    const Reduction sums{kernel.vectors.prepare, backward, merge_sums, kernel.vectors.layer_gradients,
                         2 * w.C * w.fan(), scratch};
    reduce_then_apply(w, sums, false, [](int64_t, int64_t) {});
    if (needs.dweight) space.write(dweight, static_cast<const A*>(w.vectors.dweight));
    if (needs.dbias) space.write(dbias, static_cast<const A*>(w.vectors.dbias));
  });
  if (mix) mix->clear_absent(dweight);
  return {dx, dweight, dbias};
}

Four layer_norm(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> residual, double eps,
                std::string gate, std::string stacking, bool rms, bool shared) {
  return normalize(x, weight, bias, residual, eps, gate, {weight.size(0), stacking, shared}, rms, nullptr);
}

Three layer_norm_backward(Tensor dy, std::optional<Tensor> ds, Tensor s, Tensor weight, Tensor mean, Tensor rstd,
                          std::string gate, std::string stacking, bool rms, bool shared, bool need_dx,
                          bool need_dweight, bool need_dbias) {
  const Needs needs{need_dx, need_dweight, need_dbias};
  return differentiate(dy, ds, s, weight, mean, rstd, gate, {weight.size(0), stacking, shared}, rms, needs, nullptr);
}

// Mixed batches: task_of_sample tells the task of each sample of x, [N, *, *normalized_shape].
const std::string one_task = "task_major";

Four mixed_layer_norm(Tensor x, Tensor task_of_sample, Tensor weight, std::optional<Tensor> bias,
                      std::optional<Tensor> residual, double eps, std::string gate, bool rms) {
  const MixedTasks tasks{task_of_sample, weight.size(0)};
  return normalize(x, weight, bias, residual, eps, gate, {1, one_task, false}, rms, &tasks);
}

Three mixed_layer_norm_backward(Tensor dy, std::optional<Tensor> ds, Tensor s, Tensor task_of_sample, Tensor weight,
                                Tensor mean, Tensor rstd, std::string gate, bool rms, bool need_dx, bool need_dweight,
                                bool need_dbias) {
  const MixedTasks tasks{task_of_sample, weight.size(0)};
  const Needs needs{need_dx, need_dweight, need_dbias};
  return differentiate(dy, ds, s, weight, mean, rstd, gate, {1, one_task, false}, rms, needs, &tasks);
}

void store_layer_sums(const Work& w, int64_t task, const double* total) {
  for (int64_t k = 0; k < kLayerSums; ++k) {
    std::copy_n(total + k * w.C, w.C, w.vectors.sums + (k * w.T + task) * w.C);
  }
}

// ddx is like x, and ddy and the gradient of x like dy.
std::tuple<Tensor, Tensor, Tensor> layer_norm_double_backward(Tensor ddx, Tensor dy, Tensor s, Tensor weight, Tensor mean,
                                                              Tensor rstd, Tensor factors, std::string stacking, bool rms,
                                                              bool shared) {
  const Stacking stacked{weight.size(0), stacking, shared};
  Call call = call_of(s, weight, stacked, 0, rms, false);
  Work& w = call.work;
  w.shared = false;  // each task has a gradient of its own
  const ScalarType dtype = s.scalar_type(), accumulate = accumulate_type(s);
  STD_TORCH_CHECK(factors.scalar_type() == accumulate && factors.is_contiguous() && factors.dim() == weight.dim() + 1 &&
                      factors.size(0) == kLayerFactors && factors.numel() == kLayerFactors * weight.numel(),
                  "tsbn: factors must be contiguous, of the statistics' dtype and of shape [", kLayerFactors,
                  ", *weight.shape]");
  Tensor ddy = empty(stacked_sizes(s, stacked), dtype), dx = empty(stacked_sizes(s, stacked), dtype);
  std::vector<int64_t> sizes = sizes_of(weight);
  sizes.insert(sizes.begin(), kLayerSums);
  Tensor sums = empty(sizes, ScalarType::Double);
  if (s.numel() == 0) {
    fill_zero(sums);
    return {ddy, dx, sums};
  }
  w.x = checked(call.input, s, dtype, call.rows, w.C, "s");
  w.residual = checked(call.input, ddx, dtype, call.rows, w.C, "ddx");
  w.dy = checked(call.stream, dy, dtype, w.T * w.N * w.S, w.C, "dy");
  w.dresidual = operand(call.stream, ddy, w.C), w.out = operand(call.stream, dx, w.C);
  if (!rms) w.mean = checked(call.input, mean, accumulate, call.rows, 1, "mean");
  w.rstd = checked(call.input, rstd, accumulate, call.rows, 1, "rstd");
  w.vectors.factors = factors.const_data_ptr();
  w.vectors.sums = static_cast<double*>(sums.mutable_data_ptr());
  cut_rows(w, nullptr, {});
  w.stream = should_stream(w, w.out, w.T) && should_stream(w, w.dresidual, w.T);
  const size_t scratch = sizeof(double) * size_t(kLayerSums * w.layer_piece());
  const Reduction reduction{nullptr, kernels(w.family, w.dtype).layer_double_backward, merge_sums, store_layer_sums,
                            kLayerSums * w.C, scratch};
  reduce_then_apply(w, reduction, false, [](int64_t, int64_t) {});
  return {ddy, dx, sums};
}

STABLE_TORCH_LIBRARY_IMPL(tsbn, CPU, m) {
  m.impl("layer_norm", TORCH_BOX(&layer_norm));
  m.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  m.impl("mixed_layer_norm", TORCH_BOX(&mixed_layer_norm));
  m.impl("mixed_layer_norm_backward", TORCH_BOX(&mixed_layer_norm_backward));
  m.impl("layer_norm_double_backward", TORCH_BOX(&layer_norm_double_backward));
}

}  // namespace
}  // namespace tsbn::cpu
