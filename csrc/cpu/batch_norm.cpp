// The operators of batch normalisation for CPU tensors. Shapes, formulas and errors are those of
// tsbn_kernels/operator/ops.py and, of mixed batches, mixed_ops.py.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "allocate.h"
#include "dispatch.h"
#include "mix.h"
#include "parameter.h"
#include "plan.h"
#include "running.h"
#include "schedule.h"

namespace tsbn::cpu {
namespace {

using torch::headeronly::ScalarType;

// The factors of z, by which a forward in evaluation computes y and a backward act'(z).
template <class A>
void set_preactivation(Work& w, Workspace<A>& space, const std::optional<Tensor>& bias) {
  w.vectors.bias = space.values_or_none(bias, "bias");
  w.vectors.z_scale = space.vector();
  w.vectors.z_shift = space.vector();
}

// What is asked of a call.
struct How {
  Stacking stacking;
  double eps;
  const std::string& gate;
  const std::string& activation;
  double slope;
};
struct Needs {
  bool dx, dweight, dbias, dresidual;
};

void prepare_all(const Work& w) { kernels(w.family, w.dtype).vectors.prepare(w, 0, w.T * w.C); }

// Cuts the slabs, of equal tasks or of a mixed batch with T tasks; `contents` are summed.
std::optional<Mix> cut(Work& w, const MixedTasks* tasks, std::initializer_list<const Operand*> contents) {
  if (tasks != nullptr) return std::optional<Mix>(std::in_place, w, *tasks, partition_of, contents);
  cut(w);
  return std::nullopt;
}

// y, and the work of writing it.
Tensor prepare_forward(Work& w, const Tensor& x, std::optional<Tensor>& residual, const Stacking& stacking) {
  STD_TORCH_CHECK(w.activation != Activation::inverse_leaky_relu, "tsbn: there is no forward of inverse_leaky_relu");
  Tensor y = empty_stacked(w, x, stacking, w.out);
  if (residual) w.residual = stacked_operand(w, *residual, x, stacking, "residual");
  return y;
}

Apply forward_kernel(const Work& w) {
  const Kernels& kernel = kernels(w.family, w.dtype);
  const bool adds = w.activation == Activation::none && w.residual.data != nullptr;
  return adds ? kernel.slabs.add_residual : kernel.epilogue(w.activation).forward;
}

// For a thread's reductions: five vectors over the channels.
size_t scratch_bytes(const Work& w) { return 5 * size_t(w.channels() + 64) * sizeof(double); }

// The backward of tasks that have an x each.
void run_separate(Work& w, bool sums) {
  const Kernels& kernel = kernels(w.family, w.dtype);
  const EpilogueKernels& epilogue = kernel.epilogue(w.activation);
  const Operand &dx = w.out, &other = w.dresidual;
  const bool alike = dx.data == nullptr || other.data == nullptr ||
                     (reinterpret_cast<uintptr_t>(dx.data) - reinterpret_cast<uintptr_t>(other.data)) % 64 == 0;
  w.stream = alike && should_stream(w, dx.data == nullptr ? other : dx, w.streams());

  Work last = w;
  Apply write = epilogue.backward;
  if (!w.training) {  // dx = g * z_scale; without an activation g is dy, and x is not read
    last.vectors.dy_scale = w.vectors.z_scale;
    if (w.activation == Activation::none) {
      write = epilogue.forward;
      last.x = w.dy;
      last.vectors.center = last.vectors.shift = w.vectors.z_shift;  // zeros
      last.vectors.scale = w.vectors.z_scale;
    }
  }
  const auto apply = [&](int64_t group, int64_t chunk) { write(last, group, chunk); };
  const bool writes = dx.data != nullptr || other.data != nullptr;
  const Reduction products{kernel.vectors.prepare, epilogue.products, merge_sums, kernel.vectors.backward,
                           2 * w.channels(), scratch_bytes(w)};
  if (sums) reduce_then_apply(w, products, writes, apply);
  else if (writes) apply_all(w, apply);
}

// The backward of tasks that share one x: a first pass sums h over the tasks, the second makes dx of it. h lies in dx's
// own memory where that holds the accumulate type; else in a workspace, so that nothing is rounded twice.
void run_shared(Work& w, Prepare prepare, Finish finish) {
  const Kernels& kernel = kernels(w.family, w.dtype);
  const bool needs_dx = w.out.data != nullptr, half = w.dtype == DType::f16 || w.dtype == DType::bf16;
  PooledMemory workspace(needs_dx && half ? size_t(w.N * w.C * w.S) * sizeof(float) : 0);
  w.h = needs_dx && half ? workspace.data() : w.out.data;
  w.stream = should_stream(w, w.dresidual, w.T);
  Work last = w;
  last.stream = half && should_stream(w, w.out, 1);
  const Reduction products{prepare, kernel.epilogue(w.activation).shared_products, merge_sums, finish,
                           2 * w.channels() * w.T, scratch_bytes(w)};
  reduce_then_apply(w, products, needs_dx && (half || w.training),
                    [&](int64_t group, int64_t chunk) { kernel.slabs.finish_shared(last, group, chunk); });
}

// Mean and variance of a group, with all their digits.
void store_moments(const Work& w, int64_t group, const double* total) {
  const int64_t channels = w.channels();
  for (int64_t k = 0; k < w.fan(); ++k) {
    const int64_t first = group * channels + k * w.C;
    double *mean = static_cast<double*>(w.vectors.center) + first, *var = static_cast<double*>(w.vectors.var) + first;
    for (int64_t c = 0; c < channels; ++c) {
      mean[c] = total[c];
      var[c] = total[channels + c] / w.positions;
    }
  }
}

std::vector<double> values_of_tasks(const Work& w) {
  std::vector<double> values(w.T);
  for (int64_t task = 0; task < w.T; ++task) values[task] = w.positions_of(task * w.slabs());
  return values;
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// `running` statistics are updated, where there are some.
Three train(Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, std::optional<Tensor>& residual,
            const How& how, const MixedTasks* tasks, const Running* running = nullptr) {
  Work w = work_of(x, how.stacking, how.eps, how.activation, how.slope);
  Tensor y = prepare_forward(w, x, residual, how.stacking);
  const int64_t T = tasks == nullptr ? w.T : tasks->count;
  Tensor mean = allocate({T, w.C}, {w.C, 1}, accumulate_type(x)), var = allocate_like(mean, {w.C, 1});
  if (x.numel() == 0) {
    fill_zero(mean), fill_zero(var);
    return {y, mean, var};
  }
  const auto mix = cut(w, tasks, {&w.x});
  w.stream = should_stream(w, w.out, w.streams());
  const Kernels& kernel = kernels(w.family, w.dtype);
  const Apply apply = forward_kernel(w);

  with_accumulate_type(w, [&](auto zero) {
    Workspace<decltype(zero)> space(w.T, w.C);
    set_gates(w, space, weight, how.gate);
    w.vectors.bias = space.values_or_none(bias, "bias");
    w.vectors.center = mean.mutable_data_ptr();
    w.vectors.var = var.mutable_data_ptr();
    w.vectors.scale = space.vector();
    w.vectors.shift = space.vector();
    const Reduction moments{kernel.vectors.prepare, kernel.slabs.moments, merge_all_moments, kernel.vectors.forward,
                            2 * w.channels(), scratch_bytes(w)};
    reduce_then_apply(w, moments, true, [&](int64_t group, int64_t chunk) { apply(w, group, chunk); });
  });
  if (running != nullptr) track(*running, mean, var, values_of_tasks(w));
  return {y, mean, var};
}

Tensor evaluate(Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, std::optional<Tensor>& residual,
                const Tensor& mean, const Tensor& var, const How& how, const MixedTasks* tasks) {
  Work w = work_of(x, how.stacking, how.eps, how.activation, how.slope);
  Tensor y = prepare_forward(w, x, residual, how.stacking);
  if (x.numel() == 0) return y;
  const auto mix = cut(w, tasks, {});
  w.stream = should_stream(w, w.out, w.streams());
  const Apply apply = forward_kernel(w);

  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    set_gates(w, space, weight, how.gate);
    w.vectors.center = const_cast<A*>(space.values(mean, "mean"));
    w.vectors.var = const_cast<A*>(space.values(var, "var"));
    set_preactivation(w, space, bias);
    w.vectors.scale = w.vectors.z_scale;
    w.vectors.shift = w.vectors.z_shift;
    prepare_all(w);
    apply_all(w, [&](int64_t group, int64_t chunk) { apply(w, group, chunk); });
  });
  return y;
}

Four differentiate(Tensor& dy, Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                   std::optional<Tensor>& residual, const Tensor& mean, const Tensor& var, const How& how,
                   bool training, const Needs& needs, const MixedTasks* tasks) {
  const Stacking& stacked = how.stacking;
  Work w = work_of(x, stacked, how.eps, how.activation, how.slope);
  w.training = training;
  const bool plain = w.activation == Activation::none, inverse = w.activation == Activation::inverse_leaky_relu;
  const bool shared = stacked.shared;
  STD_TORCH_CHECK(!needs.dresidual || !(plain || inverse),
                  "tsbn: without an activation dy is the gradient of residual");
  STD_TORCH_CHECK(!inverse || (how.slope > 0 && !residual && !shared),
                  "tsbn: inverse_leaky_relu takes a positive slope, no residual and no shared x");
  const auto nothing = [](ScalarType dtype) { return allocate({0}, {1}, dtype); };
  const int64_t T = tasks == nullptr ? w.T : tasks->count;
  const auto vector_if = [&](bool needed) {
    return needed ? allocate({T, w.C}, {w.C, 1}, weight.scalar_type()) : nothing(weight.scalar_type());
  };
  Tensor dx = needs.dx ? empty_input(w, x, stacked, w.out) : nothing(x.scalar_type());
  Tensor dresidual = needs.dresidual ? empty_stacked(w, x, stacked, w.dresidual) : nothing(x.scalar_type());
  Tensor dweight = vector_if(needs.dweight), dbias = vector_if(needs.dbias);
  if (x.numel() == 0) {
    fill_zero(dweight), fill_zero(dbias);
    return {dx, dweight, dbias, dresidual};
  }
  w.dy = stacked_operand(w, dy, x, stacked, "dy");
  if (residual && !plain) w.residual = stacked_operand(w, *residual, x, stacked, "residual");
  const auto mix = cut(w, tasks, {&w.x, &w.dy, &w.residual});
  const Kernels& kernel = kernels(w.family, w.dtype);

  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    w.vectors.slope = space.vector();
    set_gates(w, space, weight, how.gate);
    w.vectors.center = const_cast<A*>(space.values(mean, "mean"));
    w.vectors.var = const_cast<A*>(space.values(var, "var"));
    for (void** v : {&w.vectors.scale, &w.vectors.shift, &w.vectors.dy_scale}) *v = space.vector();
    w.vectors.dweight = space.place(dweight);
    w.vectors.dbias = space.place(dbias);
    if (!(plain || inverse) || shared || !training) {
      set_preactivation(w, space, plain || inverse ? std::nullopt : bias);
    }
    const bool sums = needs.dweight || needs.dbias || (training && needs.dx);
    if (!sums && !shared) prepare_all(w);
    if (shared) run_shared(w, kernel.vectors.prepare, kernel.vectors.backward);
    else run_separate(w, sums);
    if (needs.dweight) space.write(dweight, static_cast<const A*>(w.vectors.dweight));
    if (needs.dbias) space.write(dbias, static_cast<const A*>(w.vectors.dbias));
  });
  if (mix) mix->clear_absent(dweight);
  return {dx, dweight, dbias, dresidual};
}

const std::string one_task = "task_major";

Three forward_training(Tensor x, Tensor weight, std::optional<Tensor> bias, int64_t num_tasks, double eps,
                       std::string gate, std::string stacking, std::optional<Tensor> residual, std::string activation,
                       double slope, bool shared) {
  return train(x, weight, bias, residual, {{num_tasks, stacking, shared}, eps, gate, activation, slope}, nullptr);
}

// forward_training that updates running statistics and the number of batches in place, in the row of each task.
Three forward_tracked(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> running_mean,
                      std::optional<Tensor> running_var, std::optional<Tensor> batches, std::optional<double> momentum,
                      std::optional<Tensor> rows, int64_t num_tasks, double eps, std::string gate,
                      std::string stacking, std::optional<Tensor> residual, std::string activation, double slope,
                      bool shared) {
  const How how{{num_tasks, stacking, shared}, eps, gate, activation, slope};
  const Running running{running_mean, running_var, batches, momentum, rows};
  return train(x, weight, bias, residual, how, nullptr, &running);
}

Tensor forward_eval(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor mean, Tensor var, int64_t num_tasks,
                    double eps, std::string gate, std::string stacking, std::optional<Tensor> residual,
                    std::string activation, double slope, bool shared) {
  const How how{{num_tasks, stacking, shared}, eps, gate, activation, slope};
  return evaluate(x, weight, bias, residual, mean, var, how, nullptr);
}

Four backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, int64_t num_tasks, double eps,
              std::string gate, std::string stacking, bool training, bool need_dx, bool need_dweight, bool need_dbias,
              std::optional<Tensor> bias, std::optional<Tensor> residual, std::string activation, double slope,
              bool shared, bool need_dresidual) {
  const How how{{num_tasks, stacking, shared}, eps, gate, activation, slope};
  const Needs needs{need_dx, need_dweight, need_dbias, need_dresidual};
  return differentiate(dy, x, weight, bias, residual, mean, var, how, training, needs, nullptr);
}

// Mixed batches: task_of_sample tells the task of each sample of x, [N,C,*].
Three mixed_forward_training(Tensor x, Tensor task_of_sample, Tensor weight, std::optional<Tensor> bias,
                             std::optional<Tensor> residual, double eps, std::string gate, std::string activation,
                             double slope) {
  const MixedTasks tasks{task_of_sample, weight.size(0)};
  return train(x, weight, bias, residual, {{1, one_task, false}, eps, gate, activation, slope}, &tasks);
}

// mixed_forward_training that updates the rows of tasks that have a sample in place.
Three mixed_forward_tracked(Tensor x, Tensor task_of_sample, Tensor weight, std::optional<Tensor> bias,
                            std::optional<Tensor> residual, std::optional<Tensor> running_mean,
                            std::optional<Tensor> running_var, std::optional<Tensor> batches,
                            std::optional<double> momentum, double eps, std::string gate, std::string activation,
                            double slope) {
  const MixedTasks tasks{task_of_sample, weight.size(0)};
  const How how{{1, one_task, false}, eps, gate, activation, slope};
  const Running running{running_mean, running_var, batches, momentum, std::nullopt};
  return train(x, weight, bias, residual, how, &tasks, &running);
}

Tensor mixed_forward_eval(Tensor x, Tensor task_of_sample, Tensor weight, std::optional<Tensor> bias,
                          std::optional<Tensor> residual, Tensor mean, Tensor var, double eps, std::string gate,
                          std::string activation, double slope) {
  const MixedTasks tasks{task_of_sample, weight.size(0)};
  const How how{{1, one_task, false}, eps, gate, activation, slope};
  return evaluate(x, weight, bias, residual, mean, var, how, &tasks);
}

Four mixed_backward(Tensor dy, Tensor x, Tensor task_of_sample, Tensor weight, std::optional<Tensor> bias,
                    std::optional<Tensor> residual, Tensor mean, Tensor var, double eps, std::string gate,
                    std::string activation, double slope, bool training, bool need_dx, bool need_dweight,
                    bool need_dbias, bool need_dresidual) {
  const MixedTasks tasks{task_of_sample, weight.size(0)};
  const How how{{1, one_task, false}, eps, gate, activation, slope};
  const Needs needs{need_dx, need_dweight, need_dbias, need_dresidual};
  return differentiate(dy, x, weight, bias, residual, mean, var, how, training, needs, &tasks);
}

// Of a batch that is spread over processes: its own part's moments, and the gradient by means over the whole.
std::tuple<Tensor, Tensor> moments(Tensor x, int64_t num_tasks, std::string stacking, bool shared) {
  Work w = work_of(x, {num_tasks, stacking, shared}, 0, "none", 0);
  Tensor mean = allocate({w.T, w.C}, {w.C, 1}, ScalarType::Double), var = allocate_like(mean, {w.C, 1});
  if (x.numel() == 0) {
    fill_zero(mean), fill_zero(var);
    return {mean, var};
  }
  cut(w);
  w.vectors.center = mean.mutable_data_ptr();
  w.vectors.var = var.mutable_data_ptr();
  const Kernels& kernel = kernels(w.family, w.dtype);
  const Reduction moments{nullptr, kernel.slabs.moments, merge_all_moments, store_moments, 2 * w.channels(),
                          scratch_bytes(w)};
  reduce_then_apply(w, moments, false, [](int64_t, int64_t) {});
  return {mean, var};
}

std::tuple<Tensor, Tensor> input_gradient(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor dz_mean,
                                          Tensor dz_xhat_mean, int64_t num_tasks, double eps, std::string gate,
                                          std::string stacking, std::optional<Tensor> bias,
                                          std::optional<Tensor> residual, std::string activation, double slope,
                                          bool shared, bool need_dresidual) {
  const Stacking stacked{num_tasks, stacking, shared};
  Work w = work_of(x, stacked, eps, activation, slope);
  const bool plain = w.activation == Activation::none;
  STD_TORCH_CHECK(w.activation != Activation::inverse_leaky_relu, "tsbn: there is no input_gradient of an inverse");
  STD_TORCH_CHECK(!need_dresidual || !plain, "tsbn: without an activation dy is the gradient of residual");
  Tensor dx = empty_input(w, x, stacked, w.out);
  Tensor dresidual = need_dresidual ? empty_stacked(w, x, stacked, w.dresidual) : allocate({0}, {1}, x.scalar_type());
  if (x.numel() == 0) return {dx, dresidual};
  w.dy = stacked_operand(w, dy, x, stacked, "dy");
  if (residual && !plain) w.residual = stacked_operand(w, *residual, x, stacked, "residual");
  cut(w);
  const Kernels& kernel = kernels(w.family, w.dtype);

  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    set_gates(w, space, weight, gate);
    w.vectors.center = const_cast<A*>(space.values(mean, "mean"));
    w.vectors.var = const_cast<A*>(space.values(var, "var"));
    w.vectors.dz_mean = space.values(dz_mean, "dz_mean");
    w.vectors.dz_xhat_mean = space.values(dz_xhat_mean, "dz_xhat_mean");
    for (void** v : {&w.vectors.scale, &w.vectors.shift, &w.vectors.dy_scale}) *v = space.vector();
    if (!plain || shared) set_preactivation(w, space, plain ? std::nullopt : bias);
    prepare_all(w);
    kernel.vectors.given(w);
    if (shared) run_shared(w, nullptr, [](const Work&, int64_t, const double*) {});
    else run_separate(w, false);
  });
  return {dx, dresidual};
}

STABLE_TORCH_LIBRARY_IMPL(tsbn, CPU, m) {
  m.impl("forward_training", TORCH_BOX(&forward_training));
  m.impl("forward_tracked", TORCH_BOX(&forward_tracked));
  m.impl("forward_eval", TORCH_BOX(&forward_eval));
  m.impl("backward", TORCH_BOX(&backward));
  m.impl("mixed_forward_training", TORCH_BOX(&mixed_forward_training));
  m.impl("mixed_forward_tracked", TORCH_BOX(&mixed_forward_tracked));
  m.impl("mixed_forward_eval", TORCH_BOX(&mixed_forward_eval));
  m.impl("mixed_backward", TORCH_BOX(&mixed_backward));
  m.impl("moments", TORCH_BOX(&moments));
  m.impl("input_gradient", TORCH_BOX(&input_gradient));
}

}  // namespace
}  // namespace tsbn::cpu
