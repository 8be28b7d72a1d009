// From tensors to a Work: checks operands, reads them as views, makes outputs, and cuts the slabs.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "work.h"

namespace tsbn::cpu {

using torch::stable::Tensor;

// How a call's tensors are stacked. A shared x, and its gradient, are the batch of one task.
struct Stacking {
  int64_t num_tasks;
  const std::string& name;
  bool shared;
};

// The Work of an input; everything but `x` is still missing. An x that no kernel family reads is made contiguous.
Work work_of(Tensor& x, const Stacking& stacking, double eps, const std::string& activation, double slope);

// The sizes of y.
std::vector<int64_t> stacked_sizes(const Tensor& x, const Stacking& stacking);

// An operand that is stacked like y, of its shape and dtype. One of another memory format is replaced by a copy.
Operand stacked_operand(const Work& w, Tensor& tensor, const Tensor& x, const Stacking& stacking,
                        const char* name);

// A copy of a stacked tensor in a family's memory format. It has no loops of its own: callers that care about speed pass
// what a kernel reads, and this serves those whose strides a compiler chose.
Tensor copy_in(Family family, const Tensor& tensor, const std::string& stacking);

// Fresh memory for y (or the gradient of a residual), and for dx; the operand is set.
Tensor empty_stacked(const Work& w, const Tensor& x, const Stacking& stacking, Operand& operand);
Tensor empty_input(const Work& w, const Tensor& x, const Stacking& stacking, Operand& operand);

// Cuts the slabs, once all operands are known.
void cut(Work& w);

// How a slab of so many samples is cut.
Partition partition_of(const Work& w, int64_t samples);

size_t element_size(DType dtype);

// Whether to write the operand `out`, of `tasks` tasks, past the caches.
bool should_stream(const Work& w, const Operand& out, int64_t tasks);
// From how many bytes of an output on that may be so: 8 MiB, unless set. Returns the former number.
int64_t set_stream_bytes(int64_t bytes);

}  // namespace tsbn::cpu
