// The operators of layer norm for CPU tensors. Shapes, formulas and errors are those of tsbn_kernels/operator/layer_ops.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace tsbn::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                      std::optional<Tensor> residual, double eps, std::string gate,
                                                      std::string stacking, bool rms, bool shared);

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(Tensor dy, std::optional<Tensor> ds, Tensor s, Tensor weight,
                                                       Tensor mean, Tensor rstd, std::string gate, std::string stacking,
                                                       bool rms, bool shared, bool need_dx, bool need_dweight,
                                                       bool need_dbias);

}  // namespace tsbn::cpu
