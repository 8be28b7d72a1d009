// Fresh output tensors: large ones from the pool of huge-page blocks, small ones from PyTorch's allocator.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace tsbn::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype);
Tensor allocate_like(const Tensor& x, const std::vector<int64_t>& strides);
void fill_zero(Tensor& tensor);  // contiguous

}  // namespace tsbn::cpu
