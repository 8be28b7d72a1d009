// [T,C] tensors of any floating dtype and strides as contiguous vectors of the accumulate type.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <optional>
#include <string>
#include <type_traits>

#include "pool.h"
#include "work.h"

namespace tsbn::cpu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::Double: return DType::f64;
    case ScalarType::Half: return DType::f16;
    case ScalarType::BFloat16: return DType::bf16;
    default: STD_TORCH_CHECK(false, "tsbn: expected float32, float64, float16 or bfloat16");
  }
}

// Calls f with a value of the element type of `tensor`.
template <class F>
void with_element_type(const Tensor& tensor, F f) {
  switch (dtype_of(tensor)) {
    case DType::f32: return f(float{});
    case DType::f64: return f(double{});
    case DType::f16: return f(c10::Half{});
    case DType::bf16: return f(c10::BFloat16{});
  }
}

// Vectors over [T*C] for the length of one operator, from one block of the pool: fresh memory would cost page faults.
template <class A>
class Workspace {
 public:
  static constexpr int kVectors = 13;  // the most an operator takes: the backward in evaluation, all converted

  Workspace(int64_t T, int64_t C)
      : T_(T), C_(C), memory_(kVectors * size_t(T * C) * sizeof(A)), next_(static_cast<A*>(memory_.data())) {}

  A* vector() {
    A* result = next_;
    next_ += T_ * C_;
    STD_TORCH_CHECK(next_ <= static_cast<A*>(memory_.data()) + kVectors * T_ * C_, "tsbn: workspace too small");
    return result;
  }

  // The values of `tensor`: its own memory where that fits, else converted.
  const A* values(const Tensor& tensor, const char* name) {
    STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == T_ && tensor.size(1) == C_, "tsbn: ", name,
                    " must have shape [", T_, ", ", C_, "]");
    const A* result = nullptr;
    with_element_type(tensor, [&](auto zero) {
      using E = decltype(zero);
      const E* data = static_cast<const E*>(tensor.const_data_ptr());
      if constexpr (std::is_same_v<E, A>) {
        if (tensor.is_contiguous()) {
          result = data;
          return;
        }
      }
      A* converted = vector();
      for (int64_t t = 0; t < T_; ++t) {
        for (int64_t c = 0; c < C_; ++c) converted[t * C_ + c] = A(data[t * tensor.stride(0) + c * tensor.stride(1)]);
      }
      result = converted;
    });
    return result;
  }

  const A* values_or_none(const std::optional<Tensor>& tensor, const char* name) {
    return tensor ? values(*tensor, name) : nullptr;
  }

  // Where the values of the contiguous `tensor` are made: its own memory where that holds A (it may be empty).
  A* place(Tensor& tensor) {
    const bool fits = tensor.numel() == T_ * C_ && dtype_of(tensor) == (sizeof(A) == 8 ? DType::f64 : DType::f32);
    return fits ? static_cast<A*>(tensor.mutable_data_ptr()) : vector();
  }

  // Rounds `values` to the dtype of the contiguous `tensor`, whose place() they are.
  void write(Tensor& tensor, const A* values) const {
    with_element_type(tensor, [&](auto zero) {
      using E = decltype(zero);
      E* data = static_cast<E*>(tensor.mutable_data_ptr());
      if (static_cast<const void*>(data) == values) return;
      for (int64_t i = 0; i < T_ * C_; ++i) data[i] = static_cast<E>(values[i]);
    });
  }

 private:
  int64_t T_, C_;
  PooledMemory memory_;
  A* next_;
};

inline ScalarType accumulate_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

template <class F>
void with_accumulate_type(const Work& w, F f) {
  w.dtype == DType::f64 ? f(double{}) : f(float{});
}

// What gate (and slope, where there is room for one) are made of.
template <class A>
void set_gates(Work& w, Workspace<A>& space, const Tensor& weight, const std::string& gate) {
  STD_TORCH_CHECK(gate == "sigmoid" || gate == "identity", "tsbn: unknown gate '", gate, "'");
  const A* values = space.values(weight, "weight");
  if (gate == "sigmoid") {
    w.vectors.weight = values;
    w.vectors.gate = space.vector();
  } else {
    w.vectors.gate = const_cast<A*>(values);
    if (w.vectors.slope != nullptr) std::fill_n(static_cast<A*>(w.vectors.slope), w.T * w.C, A(1));
  }
}

}  // namespace tsbn::cpu
