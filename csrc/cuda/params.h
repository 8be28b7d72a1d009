// What a launch is told. Plain numbers that tsbn_kernels/backends/plan/cuda.py computes: the kernels choose nothing themselves.
#pragma once
#include <cstdint>

#include "../activations.h"

namespace tsbn::cuda {

// The order of CPU's DType, and of the codes in the plan.
enum DType : int64_t { f32, f64, f16, bf16 };

// What one launch does of: statistics from the slab, statistics to the partial buffer, statistics from it, the output.
enum Phase : int64_t { kReduce = 1, kSpill = 2, kCombine = 4, kApply = 8 };

// Strides, in elements, of a [T, N, C, S] view. Rows: `s` steps over one slot of the run. Columns: over a position.
struct Operand {
  int64_t t, n, c, s;
};

// A [T, C] vector of any floating dtype.
struct Vector {
  int64_t dtype, t, c;
};

// A slab is cut into slots of 16 bytes (of one element where nothing is aligned). Rows: a slab is one (t, c), a slot
// holds V positions of it. Columns: a slab is V * lanes channels of one task; a slot is V channels of one position,
// slots of a position are adjacent. A slab has `slots` slots, a block the `part_slots` of its part.
struct Numbers {
  int64_t phases, training, sigmoid;
  int64_t masked;  // rows: runs begin or end within a slot
  int64_t channels, tiles, log_lanes, parts;
  int64_t slots, part_slots;
  int64_t resident;  // slots of a block kept in shared memory between the two passes
  // (slot >> log_lanes) / divisor is the run (rows) or the sample (columns): by multiplication, see Walk::place.
  int64_t divisor, multiplier, shift;
  int64_t run;        // elements of a run, for masks
  int64_t positions;  // N * S
  Activation activation;
  int64_t tasks;  // that share a slab of x: T in a fan-out, else 1
  Operand x, dy, out, residual, dresidual;
  Vector weight, bias, mean, var;
};

struct Params {
  const void *x_data, *dy_data, *residual_data;
  void *out_data, *dresidual_data;
  const void *weight_data, *bias_data, *mean_data, *var_data;
  void *first, *second;  // forward: mean and var, of the accumulate type; backward: dweight and dbias, of weight's type
  void* partial;         // split: [slab][part][channel] states
  void* staged;          // fan-out of half precision: the sum over tasks, of the accumulate type, see fan_out.cuh
  double eps, slope;
  Numbers n;
};

// Threads of a block, and the blocks that a multiprocessor's registers must hold: enough loads in flight to keep the
// memory busy. The compile gate holds every kernel to it.
constexpr int kThreads = 256, kForwardBlocks = 3, kBackwardBlocks = 2;

}  // namespace tsbn::cuda
