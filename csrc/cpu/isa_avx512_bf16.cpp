// AVX-512 with an instruction that rounds to bfloat16: the kernels of that dtype alone.
#include "work.h"
#if defined(__x86_64__)
#include <immintrin.h>
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
// GCC 12 takes the deliberately undefined registers of its own intrinsics for mistakes (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define TSBN_ISA avx512_bf16
#define TSBN_VECTOR_BYTES 64
#define TSBN_HAS_F16C
#define TSBN_HAS_BF16
#include "isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
