#include "work.h"
// Any processor that the compiler knows: 16-byte vectors are SSE2 on x86-64 and NEON on AArch64.
#define TSBN_ISA portable
#define TSBN_VECTOR_BYTES 16
#include "isa.h"
