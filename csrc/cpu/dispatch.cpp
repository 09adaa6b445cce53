// Chooses the instruction set, once. SPARSE_KERNELS_ISA=scalar|avx2|avx512 forces one (tests, bug reports).
#include <cstdlib>
#include <string>

#include "../common/check.h"
#include "kernels.h"

namespace sparse_kernels {
namespace {

const KernelTable* widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq"))
    return &isa_avx512::table;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &isa_avx2::table;
#endif
  return &isa_scalar::table;
}

const KernelTable* choose() {
  const KernelTable* best = widest();
  const char* forced = std::getenv("SPARSE_KERNELS_ISA");
  if (forced == nullptr || *forced == '\0' || std::string(forced) == best->isa) return best;
  const std::string name = forced;
  if (name == isa_scalar::table.isa) return &isa_scalar::table;
#if defined(__x86_64__)
  if (name == isa_avx2::table.isa && best == &isa_avx512::table) return &isa_avx2::table;
#endif
  STD_TORCH_CHECK(name == "avx2" || name == "avx512",
                  "SPARSE_KERNELS_ISA must be scalar, avx2 or avx512, got \"", name, "\"");
  STD_TORCH_CHECK(false, "SPARSE_KERNELS_ISA=", name, ", but this processor's widest set is ", best->isa);
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable* const chosen = choose();
  return *chosen;
}

std::string cpu_isa() { return kernels().isa; }

}  // namespace sparse_kernels

// No tensor argument, so no dispatch by device.
STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&sparse_kernels::cpu_isa));
}
