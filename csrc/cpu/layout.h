// Reads a stacked activation as [T,N,C,S] with strides, without a copy. The Python twin is tsbn_kernels/definition/layout.py.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "work.h"

namespace tsbn::cpu {

using torch::stable::Tensor;

struct View {
  int64_t T = 0, N = 0, C = 0, S = 0;
  Operand operand;
  bool rows() const { return S != 1 && operand.s == 1; }  // an empty tensor counts as rows
  bool columns() const { return C == 1 || operand.c == 1; }
};

// nullopt where the positions after the channel axis have no single stride.
std::optional<View> view_of(const Tensor& x, int64_t num_tasks, const std::string& stacking);

// The strides of a fresh tensor like `x`: those of `x` where it is dense, else dense ones in the family's order.
std::vector<int64_t> dense_strides(const Tensor& x, Family family, const std::string& stacking);
// Dense ones in the family's order.
std::vector<int64_t> family_strides(const std::vector<int64_t>& sizes, Family family, const std::string& stacking);

}  // namespace tsbn::cpu
