// What a launch is told. Plain numbers that tsbn_kernels/backends/plan/cuda.py computes: the kernels choose nothing themselves.
#pragma once
#include <cstdint>

#include "../activations.h"

namespace tsbn::cuda {

// The order of CPU's DType, and of the codes in the plan.
enum DType : int64_t { f32, f64, f16, bf16 };

// What one launch does of: statistics from the slab, statistics to the partial buffer, statistics from it, the output. A
// launch that does all of it is one whose blocks run all at a time: between the second and the third they meet.
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
  int64_t channels, tiles, log_lanes;
  int64_t parts, blocks;  // of a slab; of all slabs: of those a block of the launch has one, or one of each few slabs
  int64_t slots, part_slots;
  int64_t resident;  // slots of a block kept in shared memory between the two passes
  // (slot >> log_lanes) / divisor is the run (rows) or the sample (columns): by multiplication, see Walk::place.
  int64_t divisor, multiplier, shift;
  int64_t run;        // elements of a run, for masks
  int64_t positions;  // N * S
  Activation activation;
  int64_t tasks;  // that share a slab of x: T in a fan-out, else 1
  // Of a mixed batch, whose blocks have samples of one task: all samples, those of a block at most, all tasks. `parts` are
  // its blocks of samples, `positions` those of one sample.
  int64_t samples, part_samples, all_tasks;
  Operand x, dy, out, residual, dresidual;
  Vector weight, bias, mean, var;
};

// The operands of a launch of either normalisation.
struct Pointers {
  const void *x_data, *dy_data, *residual_data;
  void *out_data, *dresidual_data;
  const void *weight_data, *bias_data;
  void *mean_data, *var_data;  // given statistics; in a forward of training the running ones, which are updated, or none
  void *first, *second;  // forward: mean and var, of the accumulate type; backward: dweight and dbias, of weight's type
  void* partial;         // split: [slab][part][channel] states; see Walk::combine_together for what else
  void* staged;          // fan-out of half precision: the sum over tasks, of the accumulate type, see fan_out.cuh
  const int64_t* mix;    // mixed batch: which samples, see Mix in walk.cuh
  unsigned long long* batches;  // beside running statistics: how many were seen, of each row
  const int64_t* rows;          // the row of each task; null: the task
  double eps, slope, momentum;  // momentum: the share of a batch in running statistics; NaN: 1 / batches
};

struct Params : Pointers {
  Numbers n;
};

// A row of layer normalisation is cut into slots as a slab is; 1 << log_lanes threads share it, the lanes of a group.
// Lane l has the slots l, l + lanes, and so on, of each row that its group meets: the same columns of all of them.
struct RowNumbers {
  int64_t rms, sigmoid, needs_dweight, needs_dbias;
  int64_t channels;            // values of a row
  int64_t slots, pieces;       // slots of a piece of a row; pieces: one, but for sums that need no row as a whole
  int64_t log_lanes, steps;    // steps: slots that a lane has at most
  int64_t tasks, met, staged;  // T; tasks that a block meets: T of one input, else 1; whose gates it has at a time
  int64_t x_tasks;             // 1 where x is one input, else T
  int64_t rows;                // of a task
  int64_t inner, multiplier, shift;  // rows that follow one another before the task changes; to divide by that
  int64_t splits, share;       // blocks that share a task's tiles of rows; tiles of a block
  Vector weight, bias;
};

// Forward: residual_data is added to x, dresidual_data is that sum, first and second are mean and rstd. Backward:
// residual_data is added to dx (out_data), var_data is rstd. slope is 1 / channels. partial holds the sums of dy * xhat,
// then those of dy: [splits][T][channels] each.
struct RowParams : Pointers {
  RowNumbers n;
};

// Threads of a block, and the blocks that a multiprocessor's registers must hold: enough loads in flight to keep the
// memory busy. The compile gate holds every kernel to it.
constexpr int kThreads = 256, kForwardBlocks = 3, kBackwardBlocks = 2;
// Slots that a thread keeps in registers where blocks run together, of all activations that a pass sums. What is summed in
// double precision leaves no room for them, nor does a backward with an epilogue.
constexpr int kHeldSlots = 6;
// The most threads of a row of layer normalisation, and bytes of the accumulate type that one of them holds of it. A
// multiprocessor has registers for so many threads; for more in a forward pass, which holds less, but in double precision.
constexpr int kRowThreads = 512, kRowForwardThreads = 768, kRowBytes = 128;

}  // namespace tsbn::cuda
