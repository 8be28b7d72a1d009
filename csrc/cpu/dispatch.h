// The instruction set in use, and the kernels compiled for it.
#pragma once
#include <string>

#include "work.h"

namespace tsbn::cpu {

const Kernels& kernels(Family family, DType dtype);

// "avx512_bf16", "avx512", "avx2" or "portable": the best that this processor runs, or the one chosen by
// set_instruction_set.
const char* instruction_set();
// False, and nothing changes, where this processor does not run `name`. Empty: the best.
bool set_instruction_set(const std::string& name);

}  // namespace tsbn::cpu
