// What a kernel is told: the view, the operands, the coefficients, and how the slabs are cut.
#pragma once
#include <algorithm>
#include <cstdint>

#include "../activations.h"

namespace tsbn::cpu {

enum class Family { rows, columns };            // positions contiguous (NCHW) | channels contiguous (NHWC, [N,C])
enum class DType { f32, f64, f16, bf16 };
inline constexpr int kFamilies = 2, kDTypes = 4;

// A tensor seen as [T,N,C,S]; strides in elements.
struct Operand {
  void* data = nullptr;
  int64_t t = 0, n = 0, c = 0, s = 0;
};

// The places in memory of the samples of blocks. A loop keeps this in registers: what it stores could lie in a Work.
struct Samples {
  const int64_t* order;  // nullptr: they lie as they are counted
  int64_t operator[](int64_t n) const { return order == nullptr ? n : order[n]; }
};

// A range of one slab: samples [n0,n1) by positions [s0,s1). Either several whole samples or a piece of one.
struct Block {
  int64_t n0, n1, s0, s1;
  int64_t positions() const { return (n1 - n0) * (s1 - s0); }
};

// A slab's N*S positions are cut into blocks (short enough for fp32 partial sums and the L1 cache), and blocks into
// chunks (the unit of parallel work). The cut depends on the shape alone, so the order of every sum does too: the
// result is bitwise the same for any number of threads.
struct Partition {
  static constexpr int64_t kMostSamples = 256;  // bounds the terms of one fp32 sum where samples are short
  int64_t first = 0;  // sample: of a task in a mixed batch
  int64_t N = 0, S = 0;
  int64_t samples_per_block = 1, piece = 1, pieces = 1;
  int64_t blocks = 0, blocks_per_chunk = 1, chunks = 0;

  Partition() = default;
  Partition(int64_t N, int64_t S, int64_t block_positions, int64_t chunk_positions) : N(N), S(S) {
    if (N == 0 || S == 0) return;
    samples_per_block = std::clamp<int64_t>(block_positions / S, 1, kMostSamples);
    pieces = (S + block_positions - 1) / block_positions;
    piece = (S + pieces - 1) / pieces;
    blocks = pieces > 1 ? N * pieces : (N + samples_per_block - 1) / samples_per_block;
    const int64_t per_block = pieces > 1 ? piece : samples_per_block * S;
    blocks_per_chunk = std::max<int64_t>(1, chunk_positions / per_block);
    chunks = (blocks + blocks_per_chunk - 1) / blocks_per_chunk;
  }

  Block block(int64_t b) const {
    if (pieces > 1) {
      const int64_t n = b / pieces, s0 = (b % pieces) * piece;
      return {first + n, first + n + 1, std::min(S, s0), std::min(S, s0 + piece)};
    }
    return {first + b * samples_per_block, first + std::min(N, (b + 1) * samples_per_block), 0, S};
  }
  int64_t first_block(int64_t chunk) const { return chunk * blocks_per_chunk; }
  int64_t last_block(int64_t chunk) const { return std::min(blocks, (chunk + 1) * blocks_per_chunk); }
  int64_t positions(int64_t chunk) const {
    int64_t total = 0;
    for (int64_t b = first_block(chunk); b < last_block(chunk); ++b) total += block(b).positions();
    return total;
  }
};

// Vectors over [T*C] in the accumulate type: float, or double for f64.
struct Vectors {
  const void *weight = nullptr, *bias = nullptr;  // of the identity gate `gate` is the weight; no bias: zeros
  void *gate = nullptr, *slope = nullptr, *center = nullptr, *var = nullptr;
  void *scale = nullptr, *shift = nullptr, *dy_scale = nullptr;
  void *z_scale = nullptr, *z_shift = nullptr;  // z = (x - center) * z_scale + z_shift + residual
  void *dweight = nullptr, *dbias = nullptr;
  const void *dz_mean = nullptr, *dz_xhat_mean = nullptr;  // given: of dz = dy * act'(z), and of dz * xhat
  const void* factors = nullptr;  // of a double backward: kDoubleFactors vectors, one after the other
  double* sums = nullptr;         // kDoubleSums; of a layer norm's kLayerFactors, and kLayerSums
};

// What a double backward sums up over a slab, with d = x - center: ddx, dy, ddx * d, dy * d, ddx * dy. What it writes is
// ddy = ddx * f0 + d * f1 + f2 and dx = ddx * f3 + dy * f4 + d * f5 + f6.
inline constexpr int kDoubleSums = 5, kDoubleFactors = 7;
// That of a layer norm takes the gates, what ddweight makes of xhat in ddy, and ddbias; and sums up dy * rest and
// dy * xhat over rows, where rest is what the statistics make of ddx.
inline constexpr int kLayerFactors = 3, kLayerSums = 2;

// A group is what one reduction yields: rows, one (task, channel) slab; columns, one task with all its channels. Where x
// is shared by all tasks, a group is a slab of x, and has one of each other operand for each of `fan()` tasks.
struct Work {
  Family family = Family::rows;
  DType dtype = DType::f32;
  Activation activation = Activation::none;
  int64_t T = 0, N = 0, C = 0, S = 0;
  double positions = 0, eps = 0, slope = 0;  // positions: N * S; slope: of leaky ReLU
  Operand x, dy, out, residual, dresidual;   // the last two may be missing; x and dx have no task stride where shared
  Operand sum, mean, rstd;                   // layer norm: x + residual, if there is one; of each row. residual is like x,
                                             // and in the backward it is what is added to dx. Double backward: they
                                             // are ddx and ddy
  void* h = nullptr;                         // shared: sum of g * z_scale over the tasks, in the accumulate type, cut like dx
  Vectors vectors;
  Partition partition;
  const int64_t* order = nullptr;    // of a mixed batch: its N samples, those of a task one after the other, and
  const Partition* cuts = nullptr;   // how those of each task are cut
  bool shared = false;
  bool training = true;  // the backward's statistics are functions of x
  bool stream = false;   // write past the caches
  bool rms = false;      // layer norm: without a mean

  bool mixed() const { return cuts != nullptr; }
  Samples samples() const { return {order}; }
  int64_t slabs() const { return family == Family::rows ? C : 1; }  // of a task
  const Partition& cut_of(int64_t group) const { return mixed() ? cuts[group / slabs()] : partition; }
  double positions_of(int64_t group) const { return mixed() ? double(cut_of(group).N * S) : positions; }
  int64_t streams() const { return mixed() ? 1 : T; }  // batches of N samples in memory
  int64_t fan() const { return shared ? T : 1; }
  int64_t groups() const { return (shared ? 1 : T) * slabs(); }
  int64_t layer_piece() const { return std::max<int64_t>(C + 16, 256); }  // a row in whole vectors, or a tile
  int64_t channels() const { return family == Family::rows ? 1 : C; }
};

// Sums over one chunk of one group. `partial` takes two vectors of channels() doubles, products() for each task of the
// group; `scratch` lends five vectors of channels() + 64 doubles.
using Reduce = void (*)(const Work&, int64_t group, int64_t chunk, double* partial, void* scratch);
// Writes one chunk of one group.
using Apply = void (*)(const Work&, int64_t group, int64_t chunk);
// `count` adjacent elements of the vectors, from `first` on: what they hold before any sums.
using Prepare = void (*)(const Work&, int64_t first, int64_t count);
// From one group's sums to its vectors.
using Finish = void (*)(const Work&, int64_t group, const double* total);

// With g = dy * act'(z); there is no forward of an inverse.
struct EpilogueKernels {
  Apply forward;           // out = act((x - center) * scale + shift + residual)
  Reduce products;         // sum g, sum g * (x - center)
  Reduce shared_products;  // the same; h = sum of g * z_scale over the tasks, dresidual = g
  Apply backward;          // out = g * dy_scale, and in training + (x - center) * scale + shift; dresidual = g
};

struct SlabKernels {
  Reduce moments;            // of x: mean, sum of squared deviations
  Apply add_residual;        // the forward without an activation, but with a residual
  Apply finish_shared;       // out = h, and in training + (x - center) * scale + shift
  Reduce double_sums;        // kDoubleSums vectors of channels() doubles, by as many vectors of `scratch`
  Apply double_backward;     // out and dresidual from x, dy and residual
  EpilogueKernels epilogues[kActivations];
};

struct VectorKernels {
  Prepare prepare;             // weight -> gate, slope; gate, bias, var -> z_scale, z_shift; each where it is wanted
  void (*given)(const Work&);  // gate, var, dz_mean, dz_xhat_mean -> scale, shift, dy_scale of the backward
  Finish forward;              // moments -> center, var, scale, shift
  Finish backward;             // products -> dweight, dbias, scale, shift, dy_scale
  Finish layer_gradients;      // sums of a layer norm's backward -> dweight, dbias
};

// Layer norm. A group is a task, and where x is shared all tasks; `scratch` lends so many pieces of layer_piece() values.
struct LayerKernels {
  void (*forward)(const Work&, int64_t group, int64_t chunk, void* scratch);  // kRowsTogether pieces
  Reduce backward;         // writes out, where there is one; sum dy, sum dy * xhat of each task, unless `partial` is
  Reduce shared_backward;  // nullptr. kRowsTogether + 2 * fan() pieces
};
inline constexpr int64_t kRowsTogether = 4;

struct Kernels {
  SlabKernels slabs;
  VectorKernels vectors;
  LayerKernels rows, tiles;  // of rows longer than a vector or 8 values, or of samples too short for a tile; and of others
  Reduce layer_double_backward;  // writes out and dresidual; kLayerSums vectors of doubles, by as many pieces of `scratch`
  int64_t lanes;
  const LayerKernels& layer(const Work& w) const {
    return w.C > std::min<int64_t>(lanes, 8) || (w.mixed() && w.S < lanes) ? rows : tiles;
  }
  const EpilogueKernels& epilogue(Activation activation) const { return slabs.epilogues[int(activation)]; }
};

// Chan, Golub and LeVeque (1983): merges the mean and the sum of squared deviations of two sets of values.
inline void merge_moments(double& mean, double& m2, double count, double other_mean, double other_m2,
                          double other_count) {
  const double share = other_count / (count + other_count), delta = other_mean - mean;
  mean += delta * share;
  m2 += other_m2 + delta * delta * count * share;
}

// Whether sums around an origin `offset` away from the mean lose too much: their relative error grows by
// offset^2 / variance.
inline bool is_far(double offset, double variance) { return offset * offset > 4 * variance; }

}  // namespace tsbn::cpu
