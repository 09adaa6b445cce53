// All kernels of one instruction set; see simd.h for what the including file defines.
namespace {
#include "simd.h"
//
#include "panel.inl"
//
#include "bsr.inl"
#include "csr.inl"
#include "csr_stream.inl"

template <class T>
constexpr Kernels<T> all() {
  return {&pack<T>,        &unpack<T>,     &column_sums<T>, &fill<T>,      &csr_collect<T>,
          &csr_scatter<T>, &csr_gather<T>, &csr_spmm<T>,    &csr_sddmm<T>, &csr_backward<T>,
          &conv_stream<T>, &conv_spmm<T>,  &conv_sddmm<T>,  &bsr_spmm<T>,  &bsr_sddmm<T>};
}
}  // namespace

extern const KernelTable table = {SK_ISA_NAME, all<float>(), all<double>()};
