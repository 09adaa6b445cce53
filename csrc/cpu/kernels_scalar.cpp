// The kernels for any processor: 16-byte vectors (SSE2 on x86-64, NEON on Arm), no flags.
#include "kernels.h"

#define SK_VECTOR_BYTES 16
#define SK_ISA_NAME "scalar"

namespace sparse_kernels::isa_scalar {
#include "kernels.inl"
}
