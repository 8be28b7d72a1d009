// The operators of the second derivative for CPU tensors, each one pass: x, dy and ddx are read for their sums, and again
// when ddy and dx are written. What the factors are made of is said in tsbn_kernels/definition/double_backward.py.
#include <torch/csrc/stable/library.h>

#include "allocate.h"
#include "dispatch.h"
#include "parameter.h"
#include "plan.h"
#include "schedule.h"

namespace tsbn::cpu {
namespace {

Work work_of_three(Tensor& ddx, Tensor& dy, Tensor& x, const Stacking& stacking) {
  Work w = work_of(x, stacking, 0, "none", 0);
  if (x.numel() == 0) return w;
  w.dy = stacked_operand(w, dy, x, stacking, "dy");
  w.residual = stacked_operand(w, ddx, x, stacking, "ddx");
  return w;
}

void store_sums(const Work& w, int64_t group, const double* total) {
  const int64_t channels = w.channels();
  for (int64_t k = 0; k < kDoubleSums; ++k) {
    std::copy_n(total + k * channels, channels, w.vectors.sums + k * w.T * w.C + group * channels);
  }
}

Tensor double_backward_sums(Tensor ddx, Tensor dy, Tensor x, Tensor mean, int64_t num_tasks, std::string stacking) {
  Work w = work_of_three(ddx, dy, x, {num_tasks, stacking, false});
  Tensor sums = allocate({kDoubleSums, w.T, w.C}, {w.T * w.C, w.C, 1}, ScalarType::Double);
  if (x.numel() == 0) {
    fill_zero(sums);
    return sums;
  }
  cut(w);
  w.vectors.sums = static_cast<double*>(sums.mutable_data_ptr());
  const size_t scratch = kDoubleSums * size_t(w.channels() + 64) * sizeof(double);
  const Reduction reduction{nullptr, kernels(w.family, w.dtype).slabs.double_sums, merge_sums, store_sums,
                            kDoubleSums * w.channels(), scratch};
  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    w.vectors.center = const_cast<A*>(space.values(mean, "mean"));
    reduce_then_apply(w, reduction, false, [](int64_t, int64_t) {});
  });
  return sums;
}

std::tuple<Tensor, Tensor> double_backward(Tensor ddx, Tensor dy, Tensor x, Tensor mean, Tensor factors,
                                           int64_t num_tasks, std::string stacking) {
  const Stacking stacked{num_tasks, stacking, false};
  Work w = work_of_three(ddx, dy, x, stacked);
  STD_TORCH_CHECK(factors.dim() == 3 && factors.size(0) == kDoubleFactors && factors.size(1) == w.T &&
                      factors.size(2) == w.C && factors.is_contiguous() && factors.scalar_type() == accumulate_type(x),
                  "tsbn: factors must be contiguous, of the statistics' dtype and of shape [", kDoubleFactors, ", ", w.T,
                  ", ", w.C, "]");
  Tensor ddy = empty_stacked(w, x, stacked, w.dresidual), dx = empty_input(w, x, stacked, w.out);
  if (x.numel() == 0) return {ddy, dx};
  cut(w);
  w.stream = should_stream(w, w.out, w.T) && should_stream(w, w.dresidual, w.T) &&
             (reinterpret_cast<uintptr_t>(w.out.data) - reinterpret_cast<uintptr_t>(w.dresidual.data)) % 64 == 0;
  w.vectors.factors = factors.const_data_ptr();
  const Apply apply = kernels(w.family, w.dtype).slabs.double_backward;
  with_accumulate_type(w, [&](auto zero) {
    using A = decltype(zero);
    Workspace<A> space(w.T, w.C);
    w.vectors.center = const_cast<A*>(space.values(mean, "mean"));
    apply_all(w, [&](int64_t group, int64_t chunk) { apply(w, group, chunk); });
  });
  return {ddy, dx};
}

STABLE_TORCH_LIBRARY_IMPL(tsbn, CPU, m) {
  m.impl("double_backward_sums", TORCH_BOX(&double_backward_sums));
  m.impl("double_backward", TORCH_BOX(&double_backward));
}

}  // namespace
}  // namespace tsbn::cpu
