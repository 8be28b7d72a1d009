// Between the operators (launch.cpp, the host's compiler) and the kernels (kernels.cu, nvcc).
#pragma once
#include "params.h"

namespace tsbn::cuda {

// In the order in which the plan gives them.
struct Launch {
  int64_t dtype, access, backward;  // access: 0 rows, 1 columns, 2 scalar
  int64_t blocks, threads, cluster, shared;
};

// The CUDA runtime's message, or nullptr.
const char* launch(const Launch& launch, const Params& params, void* stream);
// Whether the current device runs a cluster of this size.
bool fits(const Launch& launch);

}  // namespace tsbn::cuda
