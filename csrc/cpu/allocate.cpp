#include "allocate.h"

#include <dlfcn.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <algorithm>

#include "checked.h"
#include "pool.h"

namespace tsbn::cpu {
namespace {

// torch_from_blob, with a deleter, came with PyTorch 2.11; the library is built for 2.10. nullptr where it is missing.
using FromBlob = AOTITorchError (*)(void*, int64_t, const int64_t*, const int64_t*, int64_t, int32_t, int32_t, int32_t,
                                    AtenTensorHandle*, int32_t, const uint8_t*, int64_t, void (*)(void*, void*), void*);

FromBlob from_blob() {
  static const auto function = reinterpret_cast<FromBlob>(dlsym(RTLD_DEFAULT, "torch_from_blob"));
  return function;
}

void release(void* data, void* bytes) { BlockPool::instance().release(data, reinterpret_cast<size_t>(bytes)); }

int32_t shim_dtype(ScalarType dtype) {
  return torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
}

}  // namespace

Tensor allocate(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides, ScalarType dtype) {
  const int64_t ndim = int64_t(sizes.size());
  const int32_t code = shim_dtype(dtype), cpu = aoti_torch_device_type_cpu();
  size_t bytes = aoti_torch_dtype_element_size(code);
  for (const int64_t size : sizes) bytes *= size_t(size);
  AtenTensorHandle handle = nullptr;
  BlockPool& pool = BlockPool::instance();
  if (bytes >= BlockPool::kSmallest && from_blob() != nullptr && pool.limit() > 0) {
    if (void* data = pool.allocate(bytes)) {
      const AOTITorchError error =
          from_blob()(data, ndim, sizes.data(), strides.data(), 0, code, cpu, -1, &handle,
                      aoti_torch_layout_strided(), nullptr, 0, release, reinterpret_cast<void*>(bytes));
      if (error != AOTI_TORCH_SUCCESS) pool.release(data, bytes);
      TSBN_CHECKED(error);
      return Tensor(handle);
    }
  }
  TSBN_CHECKED(aoti_torch_empty_strided(ndim, sizes.data(), strides.data(), code, cpu, -1, &handle));
  return Tensor(handle);
}

Tensor allocate_like(const Tensor& x, const std::vector<int64_t>& strides) {
  const auto sizes = x.sizes();
  return allocate({sizes.begin(), sizes.end()}, strides, x.scalar_type());
}

void fill_zero(Tensor& tensor) {
  std::fill_n(static_cast<char*>(tensor.mutable_data_ptr()), size_t(tensor.numel()) * tensor.element_size(), 0);
}

}  // namespace tsbn::cpu
