// The operators of the CPU backend. Shapes, formulas and errors are those of tsbn_kernels/operator/ops.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

namespace tsbn::cpu {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor, Tensor> forward_training(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                    int64_t num_tasks, double eps, std::string gate,
                                                    std::string stacking, std::optional<Tensor> residual,
                                                    std::string activation, double slope, bool shared);

// The same; running statistics and the number of batches are updated in place, in the row of each task (running.h).
std::tuple<Tensor, Tensor, Tensor> forward_tracked(Tensor x, Tensor weight, std::optional<Tensor> bias,
                                                   std::optional<Tensor> running_mean,
                                                   std::optional<Tensor> running_var, std::optional<Tensor> batches,
                                                   std::optional<double> momentum, std::optional<Tensor> rows,
                                                   int64_t num_tasks, double eps, std::string gate,
                                                   std::string stacking, std::optional<Tensor> residual,
                                                   std::string activation, double slope, bool shared);

Tensor forward_eval(Tensor x, Tensor weight, std::optional<Tensor> bias, Tensor mean, Tensor var, int64_t num_tasks,
                    double eps, std::string gate, std::string stacking, std::optional<Tensor> residual,
                    std::string activation, double slope, bool shared);

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var,
                                                    int64_t num_tasks, double eps, std::string gate,
                                                    std::string stacking, bool training, bool need_dx,
                                                    bool need_dweight, bool need_dbias, std::optional<Tensor> bias,
                                                    std::optional<Tensor> residual, std::string activation,
                                                    double slope, bool shared, bool need_dresidual);

// What a batch that is spread over processes needs: its own part's moments, and the gradient by means over the whole.
std::tuple<Tensor, Tensor> moments(Tensor x, int64_t num_tasks, std::string stacking, bool shared);

std::tuple<Tensor, Tensor> input_gradient(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor var, Tensor dz_mean,
                                          Tensor dz_xhat_mean, int64_t num_tasks, double eps, std::string gate,
                                          std::string stacking, std::optional<Tensor> bias,
                                          std::optional<Tensor> residual, std::string activation, double slope,
                                          bool shared, bool need_dresidual);

}  // namespace tsbn::cpu
