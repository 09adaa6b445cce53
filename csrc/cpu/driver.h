// What the drivers of the CPU operators share: scratch memory, threads, cells of tokens.
#pragma once

#include <algorithm>
#include <vector>

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

constexpr double kWorthwhile = 2e6;  // multiply-adds that are worth waking threads for: 50 us of one core

// f(begin, end) over [0, n), in parallel if `work` (multiply-adds) is worth it.
template <class F>
void parallel(int64_t n, double work, const F& f) {
  if (n <= 0) return;
  if (n == 1 || work < kWorthwhile || forked()) return f(int64_t{0}, n);
  torch::stable::parallel_for(0, n, 1, f);
}

// Threads that a product of this much work will use.
inline int64_t worthwhile_threads(double work) { return work < kWorthwhile || forked() ? 1 : thread_count(); }

struct SegmentCut {
  int64_t segment, entry;
};

// Cuts every tile's segments into `parts` of nearly equal entries: those of part p of tile t are from the cut
// t * (parts + 1) + p to the next. Tile t has segments tile_segment[t]..[t+1], entries tile_entry[t]..[t+1].
template <class Int>
std::vector<SegmentCut> cut_segments(const RowLength* segments, const Int* tile_segment,
                                     const Int* tile_entry, int64_t tiles, int64_t parts) {
  std::vector<SegmentCut> cut;
  for (int64_t t = 0; t < tiles; ++t) {
    SegmentCut at{tile_segment[t], tile_entry[t]};
    const int64_t total = tile_entry[t + 1] - tile_entry[t];
    for (int64_t p = 0; p <= parts; ++p) {
      const int64_t target = tile_entry[t] + total * p / parts;
      while (at.segment < tile_segment[t + 1] && at.entry < target) at.entry += segments[at.segment++].length;
      cut.push_back(at);
    }
  }
  return cut;
}

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
