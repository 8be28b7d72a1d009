// Errors of PyTorch's C interface become exceptions, with PyTorch's message where its headers can fetch it (2.13 and later).
#pragma once

#include <torch/csrc/stable/tensor.h>

#ifdef STABLE_TORCH_ERROR_CODE_CHECK
#define TSBN_CHECKED(call) STABLE_TORCH_ERROR_CODE_CHECK(call)
#else
#define TSBN_CHECKED(call) TORCH_ERROR_CODE_CHECK(call)
#endif
