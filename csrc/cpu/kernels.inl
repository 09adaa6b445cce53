// All kernels of one instruction set; see simd.h for what the including file defines.
namespace {
#include "simd.h"
//
#include "panel.inl"
//
#include "bsr.inl"
#include "csr.inl"

template <class T>
constexpr Kernels<T> all() {
  return {&pack<T>,     &unpack<T>,    &column_sums<T>, &fill<T>,     &csr_stream<T>,
          &csr_spmm<T>, &csr_sddmm<T>, &bsr_spmm<T>,    &bsr_sddmm<T>};
}
}  // namespace

extern const KernelTable table = {SK_ISA_NAME, all<float>(), all<double>()};
