#include "dispatch.h"

#include <atomic>
#include <vector>

namespace tsbn::cpu {

namespace portable { const Kernels& kernels(Family, DType); }
#if defined(__x86_64__)
namespace avx2 { const Kernels& kernels(Family, DType); }
namespace avx512 { const Kernels& kernels(Family, DType); }
namespace avx512_bf16 {
const Kernels& kernels(Family);
const Kernels& kernels(Family family, DType dtype) {
  return dtype == DType::bf16 ? kernels(family) : avx512::kernels(family, dtype);
}
}  // namespace avx512_bf16
#endif

namespace {

struct InstructionSet {
  const char* name;
  const Kernels& (*kernels)(Family, DType);
  bool available;
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
#endif

const std::vector<InstructionSet>& instruction_sets() {  // best first; the last runs everywhere
  static const std::vector<InstructionSet> sets = {
#if defined(__x86_64__)
      {"avx512_bf16", avx512_bf16::kernels, has_avx512() && __builtin_cpu_supports("avx512bf16")},
      {"avx512", avx512::kernels, has_avx512()},
      {"avx2", avx2::kernels,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {"portable", portable::kernels, true}};
  return sets;
}

// The best that this processor runs, of that name if one is given; nullptr where there is none.
const InstructionSet* find(const std::string& name) {
  for (const InstructionSet& set : instruction_sets()) {
    if (set.available && (name.empty() || name == set.name)) return &set;
  }
  return nullptr;
}

std::atomic<const InstructionSet*> chosen{nullptr};

const InstructionSet& current() {
  const InstructionSet* set = chosen.load(std::memory_order_relaxed);
  if (set == nullptr) chosen.store(set = find(""), std::memory_order_relaxed);
  return *set;
}

}  // namespace

const Kernels& kernels(Family family, DType dtype) { return current().kernels(family, dtype); }

const char* instruction_set() { return current().name; }

bool set_instruction_set(const std::string& name) {
  const InstructionSet* set = find(name);
  if (set != nullptr) chosen.store(set);
  return set != nullptr;
}

}  // namespace tsbn::cpu
