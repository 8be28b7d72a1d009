#include "work.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define TSBN_ISA avx2
#define TSBN_VECTOR_BYTES 32
#define TSBN_HAS_F16C
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
