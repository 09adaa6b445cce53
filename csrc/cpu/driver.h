// What the drivers of the CPU operators share: scratch memory, threads, cells of tokens.
#pragma once

#include <algorithm>

#include "../common/check.h"
#include "../common/index.h"
#include "kernels.h"
#include "scratch.h"

namespace sparse_kernels {

// True in a process forked from one that had loaded this library: the thread pool's workers did not
// come along, and waiting for them would hang. Products run serially there (threads.cpp).
bool forked();

int64_t thread_count();

// Bytes of this processor's second-level cache, one core's (1 MiB if it does not say).
int64_t second_level_cache();

// f(begin, end) over [0, n), in parallel if `work` (multiply-adds) is worth waking threads for.
template <class F>
void parallel(int64_t n, double work, const F& f) {
  constexpr double kWorthwhile = 2e6;  // about 50 us of one core
  if (n <= 0) return;
  if (n == 1 || work < kWorthwhile || forked()) return f(int64_t{0}, n);
  torch::stable::parallel_for(0, n, 1, f);
}

// Threads that a product of this much work will use.
inline int64_t worthwhile_threads(double work) { return work < 2e6 || forked() ? 1 : thread_count(); }

// Byte offsets in a tile are 32-bit.
inline void check_tile_bytes(int64_t bytes) {
  STD_TORCH_CHECK(bytes <= 0xffffffffLL, "a tile of activations of ", bytes,
                  " bytes exceeds the kernels' 4 GiB; use smaller images or fewer features");
}

// Cells (of 16 float or 8 double tokens) to a tile, for `tokens` tokens shared by `threads`: 4 give the best
// arithmetic per load; fewer when the tokens would not fill them or leave threads without a tile.
template <class T>
int64_t tile_cells(int64_t tokens, int64_t threads) {
  const int64_t cell = kCellSize / static_cast<int64_t>(sizeof(T));
  const int64_t share = (tokens + threads - 1) / threads;
  for (int64_t cells : {4, 2})
    if (share > cells / 2 * cell) return cells;
  return 1;
}

// f(float{}) or f(double{}), after the dtype of x.
template <class F>
void for_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  check_dtype(x, ScalarType::Float, "x");
  f(float{});
}

}  // namespace sparse_kernels
