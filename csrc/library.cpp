// What Python asks of the pool of memory, of the instruction sets and of streaming stores. The operators register themselves.
#include <torch/csrc/stable/library.h>

#include "cpu/dispatch.h"
#include "cpu/plan.h"
#include "cpu/pool.h"

namespace {

using tsbn::cpu::BlockPool;

int64_t pool_idle_bytes() { return int64_t(BlockPool::instance().idle_bytes()); }
int64_t pool_limit() { return int64_t(BlockPool::instance().limit()); }
int64_t pool_trim(int64_t keep) { return int64_t(BlockPool::instance().trim(size_t(keep))); }
int64_t pool_set_limit(int64_t bytes) {
  BlockPool::instance().set_limit(size_t(bytes));
  return bytes;
}
std::string cpu_instruction_set() { return tsbn::cpu::instruction_set(); }
bool set_cpu_instruction_set(std::string name) { return tsbn::cpu::set_instruction_set(name); }
int64_t set_cpu_stream_bytes(int64_t bytes) { return tsbn::cpu::set_stream_bytes(bytes); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(tsbn, m) {
  m.def("_pool_idle_bytes() -> int");
  m.def("_pool_limit() -> int");
  m.def("_pool_trim(int keep) -> int");
  m.def("_pool_set_limit(int bytes) -> int");
  m.def("_cpu_instruction_set() -> str");
  m.def("_set_cpu_instruction_set(str name) -> bool");
  m.def("_set_cpu_stream_bytes(int bytes) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(tsbn, CompositeExplicitAutograd, m) {
  m.impl("_pool_idle_bytes", TORCH_BOX(&pool_idle_bytes));
  m.impl("_pool_limit", TORCH_BOX(&pool_limit));
  m.impl("_pool_trim", TORCH_BOX(&pool_trim));
  m.impl("_pool_set_limit", TORCH_BOX(&pool_set_limit));
  m.impl("_cpu_instruction_set", TORCH_BOX(&cpu_instruction_set));
  m.impl("_set_cpu_instruction_set", TORCH_BOX(&set_cpu_instruction_set));
  m.impl("_set_cpu_stream_bytes", TORCH_BOX(&set_cpu_stream_bytes));
}
