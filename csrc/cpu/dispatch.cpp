// Chooses the instruction set, once. SPARSE_KERNELS_ISA=scalar|avx2|avx512 forces one (tests, bug reports).
#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <string>
#include <vector>

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

// The median of short runs: the fastest ones are bursts of the clock that no kernel is long enough to enjoy.
double cpu_fma_peak(double seconds) {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 100000;  // about a millisecond
  float sink[16];
  std::vector<double> found;
  const auto begin = Clock::now();
  do {
    const auto start = Clock::now();
    const double flops = kernels().fma_peak(kRounds, sink);
    found.push_back(flops / std::chrono::duration<double>(Clock::now() - start).count());
  } while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds);
  std::nth_element(found.begin(), found.begin() + found.size() / 2, found.end());
  return found[found.size() / 2];
}

// From now on; returns a new tensor, to show for it.
Tensor poison_outputs(bool on) {
  poisoned = on;
  return new_empty({16}, ScalarType::Float);
}

}  // namespace sparse_kernels

// No tensor argument, so no dispatch by device.
STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&sparse_kernels::cpu_isa));
  m.impl("cpu_fma_peak", TORCH_BOX(&sparse_kernels::cpu_fma_peak));
  m.impl("poison_outputs", TORCH_BOX(&sparse_kernels::poison_outputs));
}
