#include "batch_norm.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "allocate.h"
#include "dispatch.h"
#include "layout.h"
#include "parameter.h"
#include "schedule.h"

namespace tsbn::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr size_t kStreamBytes = size_t(8) << 20;

bool streaming_enabled() {
  static const bool enabled = [] {
    const char* text = std::getenv("TSBN_STREAMING");
    return text == nullptr || std::strcmp(text, "0") != 0;
  }();
  return enabled;
}

// Blocks of fp32 rows fill a third of a 48 KiB L1 cache; a column's fp32 sum has at most 128 terms.
constexpr int64_t kRowBlock = 4096, kRowChunk = 32768, kColumnBlock = 128, kColumnChunkElements = 131072;

ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

View require_view(const Tensor& x, int64_t num_tasks, const std::string& stacking) {
  STD_TORCH_CHECK(stacking == "task_major" || stacking == "sample_major" || stacking == "task_axis",
                  "tsbn: unknown stacking '", stacking, "'");
  const int64_t leading = stacking == "task_axis" ? 2 : 1;
  STD_TORCH_CHECK(x.dim() > leading && num_tasks > 0, "tsbn: x has too few dimensions, or num_tasks is not positive");
  STD_TORCH_CHECK(leading == 2 ? x.size(0) == num_tasks : x.size(0) % num_tasks == 0,
                  "tsbn: the first dimension of x does not hold ", num_tasks, " tasks");
  const auto view = view_of(x, num_tasks, stacking);
  STD_TORCH_CHECK(view && (view->rows() || view->columns()),
                  "tsbn: neither the positions nor the channels of x are contiguous; pass x.contiguous()");
  return *view;
}

// Several samples whose positions follow one another are one long sample.
void join_samples(Work& w) {
  const auto joins = [&](const Operand& o) { return o.data == nullptr || w.N == 1 || w.S == 1 || o.n == w.S * o.s; };
  if (!joins(w.x) || !joins(w.dy) || !joins(w.out)) return;
  for (Operand* o : {&w.x, &w.dy, &w.out}) {
    if (w.S == 1) o->s = o->n;
  }
  w.S *= w.N;
  w.N = 1;
}

// Streaming pays where the output outgrows the caches near the core and is written in whole lines.
bool should_stream(const Work& w, size_t element) {
  if (!streaming_enabled() || size_t(w.T * w.N * w.C * w.S) * element < kStreamBytes) return false;
  constexpr int64_t line = 64;
  const int64_t size = int64_t(element);
  const bool aligned = reinterpret_cast<uintptr_t>(w.out.data) % line == 0 && w.out.t * size % line == 0 &&
                       (w.N == 1 || w.out.n * size % line == 0);
  if (w.family == Family::rows) return w.S * size >= (aligned && w.out.c * size % line == 0 ? 4 : 8) * line;
  return aligned && (w.S == 1 || w.out.s * size % line == 0);
}

Work work_of(const View& view, const Tensor& x, double eps) {
  Work w;
  w.family = view.rows() ? Family::rows : Family::columns;
  w.dtype = dtype_of(x);
  w.T = view.T, w.N = view.N, w.C = view.C, w.S = view.S;
  w.positions = double(view.N * view.S);
  w.eps = eps;
  w.x = view.operand;
  return w;
}

// Cuts the slabs, once all operands are known.
void plan(Work& w, const Tensor& x) {
  join_samples(w);
  w.partition = w.family == Family::rows
                    ? Partition(w.N, w.S, kRowBlock, kRowChunk)
                    : Partition(w.N, w.S, kColumnBlock, std::max(kColumnBlock, kColumnChunkElements / w.C));
  w.stream = w.out.data != nullptr && should_stream(w, x.element_size());
}

template <class F>
void with_accumulate_type(const Work& w, F f) {
  w.dtype == DType::f64 ? f(double{}) : f(float{});
}

// gate (and slope, where there is room for one) from the raw weight.
template <class A>
void set_gates(Work& w, Workspace<A>& space, const Tensor& weight, const std::string& gate) {
  STD_TORCH_CHECK(gate == "sigmoid" || gate == "identity", "tsbn: unknown gate '", gate, "'");
  const A* values = space.values(weight, "weight");
  if (gate == "sigmoid") {
    w.vectors.weight = values;
    w.vectors.gate = space.vector();
    kernels(w.family, w.dtype).vectors.gates(w);
  } else {
    w.vectors.gate = const_cast<A*>(values);
    if (w.vectors.slope != nullptr) std::fill_n(static_cast<A*>(w.vectors.slope), w.T * w.C, A(1));
  }
}

Tensor empty_like(const Tensor& x, const Work& w, const std::string& stacking) {
  return allocate_like(x, dense_strides(x, w.family, stacking));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> forward_training(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                    int64_t num_tasks, double eps, std::string gate,
                                                    std::string stacking, std::optional<Tensor> residual,
                                                    std::string activation, double, bool shared) {
  STD_TORCH_CHECK(activation == "none" && !residual && !shared, "tsbn: no such CPU kernel yet");
  Work w = work_of(require_view(x, num_tasks, stacking), x, eps);
  Tensor y = empty_like(x, w, stacking);
  Tensor mean = allocate({w.T, w.C}, {w.C, 1}, accumulate_type(x)), var = allocate_like(mean, {w.C, 1});
  if (x.numel() == 0) {
    fill_zero(mean), fill_zero(var);
    return {y, mean, var};
  }
  w.out = view_of(y, num_tasks, stacking)->operand;
  plan(w, x);
  const Kernels& kernel = kernels(w.family, w.dtype);

  with_accumulate_type(w, [&](auto zero) {
    Workspace<decltype(zero)> space(w.T, w.C);
    set_gates(w, space, weight, gate);
    w.vectors.bias = space.values_or_zeros(bias, "bias");
    w.vectors.center = mean.mutable_data_ptr();
    w.vectors.var = var.mutable_data_ptr();
    w.vectors.scale = space.vector();
    w.vectors.shift = space.vector();
    reduce_then_apply(w, kernel.slabs.moments, merge_all_moments, kernel.vectors.forward,
                      [&](int64_t group, int64_t chunk) { kernel.slabs.affine(w, group, chunk); });
  });
  return {y, mean, var};
}

Tensor forward_eval(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor mean, Tensor var, int64_t num_tasks,
                    double eps, std::string gate, std::string stacking, std::optional<Tensor> residual,
                    std::string activation, double, bool shared) {
  STD_TORCH_CHECK(activation == "none" && !residual && !shared, "tsbn: no such CPU kernel yet");
  Work w = work_of(require_view(x, num_tasks, stacking), x, eps);
  Tensor y = empty_like(x, w, stacking);
  if (x.numel() == 0) return y;
  w.out = view_of(y, num_tasks, stacking)->operand;
  plan(w, x);
  const Kernels& kernel = kernels(w.family, w.dtype);

  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    set_gates(w, space, weight, gate);
    w.vectors.bias = space.values_or_zeros(bias, "bias");
    w.vectors.center = const_cast<A*>(space.values(mean, "mean"));
    w.vectors.var = const_cast<A*>(space.values(var, "var"));
    w.vectors.scale = space.vector();
    w.vectors.shift = space.vector();
    kernel.vectors.eval(w);
    apply_all(w, [&](int64_t group, int64_t chunk) { kernel.slabs.affine(w, group, chunk); });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var,
                                            int64_t num_tasks, double eps, std::string gate, std::string stacking,
                                            bool training, bool need_dx, bool need_dweight, bool need_dbias,
                                            std::optional<Tensor>, std::optional<Tensor> residual,
                                            std::string activation, double, bool shared, bool) {
  STD_TORCH_CHECK(activation == "none" && !residual && !shared, "tsbn: no such CPU kernel yet");
  Work w = work_of(require_view(x, num_tasks, stacking), x, eps);
  const auto vector_if = [&](bool needed) {
    return needed ? allocate({w.T, w.C}, {w.C, 1}, weight.scalar_type()) : allocate({0}, {1}, weight.scalar_type());
  };
  Tensor dx = need_dx ? empty_like(x, w, stacking) : allocate({0}, {1}, x.scalar_type());
  Tensor dweight = vector_if(need_dweight), dbias = vector_if(need_dbias);
  if (x.numel() == 0) {
    fill_zero(dweight), fill_zero(dbias);
    return {dx, dweight, dbias, allocate({0}, {1}, x.scalar_type())};
  }
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.sizes().equals(x.sizes()),
                  "tsbn: dy must have the shape and dtype of x");
  const View dy_view = require_view(dy, num_tasks, stacking);
  STD_TORCH_CHECK(w.family == Family::rows ? dy_view.rows() : dy_view.columns(),
                  "tsbn: dy must have the memory format of x");
  w.dy = dy_view.operand;
  if (need_dx) w.out = view_of(dx, num_tasks, stacking)->operand;
  plan(w, x);
  const Kernels& kernel = kernels(w.family, w.dtype);

  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    w.vectors.slope = space.vector();
    set_gates(w, space, weight, gate);
    w.vectors.center = const_cast<A*>(space.values(mean, "mean"));
    w.vectors.var = const_cast<A*>(space.values(var, "var"));
    for (void** v : {&w.vectors.scale, &w.vectors.shift, &w.vectors.dy_scale, &w.vectors.dweight, &w.vectors.dbias}) {
      *v = space.vector();
    }
    Work scaling = w;  // in evaluation dx = gate * rstd * dy, and x is not read
    if (!training) {
      scaling.x = w.dy;
      scaling.vectors.bias = scaling.vectors.center = space.filled(0);
      scaling.vectors.scale = space.vector();
      scaling.vectors.shift = space.vector();
      kernel.vectors.eval(scaling);
    }
    const auto apply = [&](int64_t group, int64_t chunk) {
      training ? kernel.slabs.affine_with_dy(w, group, chunk) : kernel.slabs.affine(scaling, group, chunk);
    };
    if (need_dweight || need_dbias || (training && need_dx)) {
      reduce_then_apply(w, kernel.slabs.products, merge_sums, kernel.vectors.backward, apply);
    } else if (need_dx) {
      apply_all(w, apply);
    }
    if (need_dweight) space.write(dweight, static_cast<const A*>(w.vectors.dweight));
    if (need_dbias) space.write(dbias, static_cast<const A*>(w.vectors.dbias));
  });
  return {dx, dweight, dbias, allocate({0}, {1}, x.scalar_type())};
}

}  // namespace tsbn::cpu
