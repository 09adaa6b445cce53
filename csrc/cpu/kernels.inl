// All kernels of one instruction set; see simd.h for what the including file defines.
namespace {
#include "simd.h"
//
#include "stored.inl"
//
#include "panel.inl"
//
#include "bsr.inl"
#include "bsr_strips.inl"
#include "csr.inl"
#include "csr_stream.inl"
#include "growth.inl"
#include "peak.inl"
//
#include "conv.inl"
#include "conv_pack.inl"

#if defined(__x86_64__) && SK_VECTOR_BYTES == 64
#include "growth_screen.inl"
constexpr const Screen* kScreen = &screen;
#else
constexpr const Screen* kScreen = nullptr;
#endif

template <class T>
constexpr Kernels<T> all() {
  return {&pack<T, T>,    &unpack<T, T>,         &fill<T>,
          &csr_spmm<T>,   &csr_sddmm<T>,         &csr_backward<T>,
          &conv_spmm<T>,  &conv_sddmm<T>,        &conv_backward<T>,
          &conv_rows<T>,  &conv_copy<T>,         &conv_load<T>,
          &conv_store<T>, &conv_pack_pixels<T>,  &conv_unpack_pixels<T>,
          &conv_sums<T>,  &bsr_spmm<T>,          &bsr_sddmm<T>,
          &strip_pack<T>, &strip_transpose<T>,   &pair_interleave<T>,
          &strip_spmm<T>, &strip_backward<T>,    &pair_sddmm<T>,
          &all_finite<T>, &growth_magnitudes<T>, &growth_offer<T>};
}

template <class T, class S>
constexpr Stored<T, S> stored() {
  return {&pack<T, S>,        &unpack<T, S>, &csr_collect<T, S>, &csr_gather<T, S>,
          &csr_scatter<T, S>, &widen<T, S>,  &narrow<T, S>};
}
}  // namespace

extern const KernelTable table = {SK_ISA_NAME,
                                  kVectorBytes == 64 ? 8 : 4,
                                  all<float>(),
                                  all<double>(),
                                  stored<float, float>(),
                                  stored<double, double>(),
                                  stored<float, BFloat16>(),
                                  stored<float, Half>(),
                                  kScreen,
                                  &fma_peak};
