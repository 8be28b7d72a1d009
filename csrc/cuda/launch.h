// Between the operators (launch.cpp, the host's compiler) and the kernels (kernels.cu, nvcc).
#pragma once
#include "params.h"

namespace tsbn::cuda {

enum Pass : int64_t { kForward, kBackward, kForwardEpilogue, kBackwardEpilogue, kBackwardFanOut, kPasses };

// In the order in which the plan gives them.
struct Launch {
  int64_t dtype, access, pass;  // access: rows, columns, scalar; pass: see Pass
  int64_t blocks, threads, cluster, shared;
};

// The CUDA runtime's message, or nullptr.
const char* launch(const Launch& launch, const Params& params, void* stream);
// Whether the current device runs a cluster of this size.
bool fits(const Launch& launch);

}  // namespace tsbn::cuda
