// The operators under the cuda backend: the plan's numbers, and the tensors' addresses, become a launch.
#include "launch.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "../checked.h"

namespace tsbn::cuda {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class S> S filled(const std::vector<int64_t>& numbers) {
  STD_TORCH_CHECK(numbers.size() * sizeof(int64_t) == sizeof(S), "tsbn: the plan has ", numbers.size(),
                  " numbers, the kernels take ", sizeof(S) / sizeof(int64_t));
  S result;
  std::memcpy(&result, numbers.data(), sizeof(S));
  return result;
}

const void* address(const MaybeTensor& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }
void* output(const MaybeTensor& tensor) { return tensor ? tensor->mutable_data_ptr() : nullptr; }

#ifdef TSBN_WITHOUT_DEVICE  // a test of what a launch is told: tensors are the CPU's, nothing runs
struct Guard {
  explicit Guard(int32_t) {}
};
void* current_stream(int32_t) { return nullptr; }
#else
using Guard = torch::stable::accelerator::DeviceGuard;

// Looked up when a launch needs it: this library also loads beside a PyTorch without CUDA. Python loads libtorch_cuda.so
// for torch alone, so no search among what everybody sees finds its symbols.
void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  static const auto get =
      library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  STD_TORCH_CHECK(get != nullptr, "tsbn: this PyTorch has no CUDA");
  void* stream = nullptr;
  TSBN_CHECKED(get(device, &stream));
  return stream;
}
#endif

void launch_kernel(std::vector<int64_t> launch_numbers, std::vector<int64_t> numbers, double eps, double slope, Tensor x,
                   MaybeTensor dy, MaybeTensor residual, MaybeTensor out, MaybeTensor dresidual, Tensor weight,
                   MaybeTensor bias, MaybeTensor mean, MaybeTensor var, MaybeTensor first, MaybeTensor second,
                   MaybeTensor partial, MaybeTensor staged, MaybeTensor mix, MaybeTensor batches, MaybeTensor rows,
                   std::optional<double> momentum) {
  const Pointers pointers{x.const_data_ptr(), address(dy),             address(residual), output(out),
                          output(dresidual),  weight.const_data_ptr(), address(bias),     output(mean),
                          output(var),        output(first),           output(second),    output(partial),
                          output(staged),     static_cast<const int64_t*>(address(mix)),
                          static_cast<unsigned long long*>(output(batches)),
                          static_cast<const int64_t*>(address(rows)),
                          eps, slope, momentum.value_or(std::numeric_limits<double>::quiet_NaN())};
  const int32_t device = x.get_device_index();
  const Guard guard(device);
  const auto kernel = filled<Launch>(launch_numbers);
  const auto launched = [&](const auto& params) { return launch(kernel, &params, current_stream(device)); };
  const char* error = kernel.pass < kRowForward ? launched(Params{pointers, filled<Numbers>(numbers)})
                                                : launched(RowParams{pointers, filled<RowNumbers>(numbers)});
  STD_TORCH_CHECK(error == nullptr, "tsbn: the CUDA kernel was not launched: ", error);
}

int64_t clusters_at_a_time(std::vector<int64_t> launch_numbers, int64_t device) {
  const Guard guard{int32_t(device)};
  return active_clusters(filled<Launch>(launch_numbers));
}

// Numbers tell the kernels which activation: the plan must have the same rows.
std::string activations() {
  std::string names;
  for (const char* name : kActivationNames) names += std::string(names.empty() ? "" : " ") + name;
  return names;
}

}  // namespace
}  // namespace tsbn::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(tsbn, m) {
  m.def(
      "_cuda_launch(int[] launch, int[] numbers, float eps, float slope, Tensor x, Tensor? dy, Tensor? residual,"
      " Tensor(a!)? out, Tensor(b!)? dresidual, Tensor weight, Tensor? bias, Tensor(g!)? mean, Tensor(h!)? var,"
      " Tensor(c!)? first, Tensor(d!)? second, Tensor(e!)? partial, Tensor(f!)? staged, Tensor? mix,"
      " Tensor(i!)? batches, Tensor? rows, float? momentum) -> ()");
  m.def("_cuda_active_clusters(int[] launch, int device) -> int");
  m.def("_cuda_activations() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(tsbn, CompositeExplicitAutograd, m) {
  m.impl("_cuda_launch", TORCH_BOX(&tsbn::cuda::launch_kernel));
  m.impl("_cuda_active_clusters", TORCH_BOX(&tsbn::cuda::clusters_at_a_time));
  m.impl("_cuda_activations", TORCH_BOX(&tsbn::cuda::activations));
}
