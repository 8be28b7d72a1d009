#include "dispatch.h"

#include <atomic>

namespace tsbn::cpu {

namespace portable { const Kernels& kernels(Family, DType); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& kernels(Family, DType); }
namespace avx512 { const Kernels& kernels(Family, DType); }
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)(Family, DType);
  bool available;
};

const InstructionSet* instruction_sets() {  // best first, portable last
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"avx512", avx512::kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
      {"avx2", avx2::kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {"portable", portable::kernels, true}};
  return sets;
}

const InstructionSet* best() {
  const InstructionSet* set = instruction_sets();
  while (!set->available) ++set;
  return set;
}

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& current() {
  const InstructionSet* set = chosen.load(std::memory_order_relaxed);
  if (set == nullptr) chosen.store(set = best(), std::memory_order_relaxed);
  return *set;
}

}  // namespace

const Kernels& kernels(Family family, DType dtype) { return current().kernels(family, dtype); }

const char* instruction_set() { return current().name; }

bool set_instruction_set(const std::string& name) {
  if (name.empty()) {
    chosen.store(best());
    return true;
  }
  for (const InstructionSet* set = instruction_sets();; ++set) {
    if (set->name == name) {
      if (set->available) chosen.store(set);
      return set->available;
    }
    if (std::string(set->name) == "portable") return false;
  }
}

}  // namespace tsbn::cpu
