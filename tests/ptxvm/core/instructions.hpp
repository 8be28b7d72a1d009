// The instruction set, declared by chapter.
#pragma once

namespace ptxvm {

void declare_arithmetic();   // arithmetic.cpp: integers, bits, floats, comparisons
void declare_conversions();  // conversions.cpp: cvt, mov, address arithmetic
void declare_memory();       // loads.cpp: ld, st, atom, red, fences
void declare_control();      // control.cpp: branches, barriers, shuffles, votes

}  // namespace ptxvm
