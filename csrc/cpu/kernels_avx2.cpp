// The kernels for AVX2 and FMA. Everything between push and pop is compiled for that set, whatever
// the command line says, and stays inside this file (unnamed namespace, nothing of the standard library).
#include "kernels.h"

#if defined(__x86_64__)

#define SK_VECTOR_BYTES 32
#define SK_ISA_NAME "avx2"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace sparse_kernels::isa_avx2 {
#include "kernels.inl"
}

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64
