// Between the operators (launch.cpp), the CUDA runtime (runtime.cpp) and the kernels (kernels.cu, which nvcc compiles).
#pragma once
#include "params.h"

namespace tsbn::cuda {

// Those of batch normalisation, which take Params, then those of layer normalisation, which take RowParams.
enum Pass : int64_t {
  kForward, kBackward, kForwardEpilogue, kBackwardEpilogue, kBackwardFanOut, kForwardMixed,
  kBackwardMixed, kMixedKeys,
  kRowForward, kRowBackward, kRowParameters,
  kPasses
};
enum : int64_t { kAccesses = 3, kDTypes = 4 };

// In the order in which the plan gives them.
struct Launch {
  int64_t dtype, access, pass;  // access: rows, columns, scalar; pass: see Pass
  int64_t blocks, threads, cluster, shared;
  int64_t together;  // whether all blocks must run at a time: columns, the first four passes
};

// The CUDA runtime's message, or nullptr.
const char* launch(const Launch& launch, const void* params, void* stream);
// Clusters, or blocks of a launch without any, that the current device runs at a time; 0 where it does not run them so, or
// does not say.
int active_clusters(const Launch& launch);
// Of kernels.cu and layer_norm.cu, in the runtime's terms.
const void* kernel_of(const Launch& launch);
const void* row_kernel_of(const Launch& launch);

}  // namespace tsbn::cuda
