// What the drivers of the CPU operators share: scratch memory, threads, and the streams that the CSR
// kernels read.
#pragma once

#include <algorithm>
#include <memory>
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

struct SegmentPlace {
  int32_t row;
  uint32_t base;
};

// The entries of one direction of a CSR topology in plan order, as the kernels read them: byte offsets
// into a tile of cells, and values. Tile t has segments tile_segment[t]..[t+1], entries tile_entry[t]..[t+1].
template <class T>
struct CsrStream {
  std::vector<int64_t> tile_segment, tile_entry;
  Buffer<RowLength> segments;
  Buffer<int32_t> begin;  // canonical position of each segment's first entry
  Buffer<uint32_t> off;
  Buffer<T> val;

  // place(r): for plan row r, the output row that it adds to (-1 leaves it out) and the byte offset
  // added to all of its entries' (0 for all: `based` false).
  template <class Place>
  CsrStream(const PlanView<const int32_t>& plan, const StreamSource<T>& from, bool based, const Place& place)
      : segments(plan.shape.capacity),
        begin(plan.shape.capacity),
        off(from.n),
        val(from.values != nullptr ? from.n : 0) {
    const Buffer<uint32_t> base(based ? plan.shape.capacity : 0);
    int64_t entries = 0, count = 0;
    for (int64_t tile = 0; tile < plan.shape.tiles; ++tile) {
      tile_segment.push_back(count), tile_entry.push_back(entries);
      for (int32_t s = plan.tile_ptr[tile]; s < plan.tile_ptr[tile + 1]; ++s) {
        const int32_t* segment = plan.segments + 3 * s;
        const SegmentPlace at = place(segment[0]);
        if (at.row < 0) continue;
        if (based) base[count] = at.base;
        begin[count] = segment[1];
        segments[count++] = {at.row, segment[2] - segment[1]};
        entries += segment[2] - segment[1];
      }
    }
    tile_segment.push_back(count), tile_entry.push_back(entries);
    // A multiply-add is worth about 1/32 of copying an entry.
    parallel(plan.shape.tiles, 32.0 * static_cast<double>(entries), [&](int64_t first, int64_t last) {
      const int64_t from_segment = tile_segment[first], at = tile_entry[first];
      kernels_for<T>().csr_stream(&from, segments.get() + from_segment, begin.get() + from_segment,
                                  based ? base.get() + from_segment : nullptr,
                                  tile_segment[last] - from_segment, tile_entry[last] - at, off.get() + at,
                                  from.values != nullptr ? val.get() + at : nullptr);
    });
  }

  int64_t tiles() const { return static_cast<int64_t>(tile_entry.size()) - 1; }
  int64_t entries() const { return tile_entry.back(); }

  // y [rows][cells] += W * x for `count` activation tiles, x_pitch bytes and y_pitch elements apart. Tile
  // of columns by tile of columns, so that its piece of the stream stays in cache for all of them.
  void spmm(const Kernels<T>& kernel, int64_t cells, const char* x, int64_t x_pitch, int64_t step, T* y,
            int64_t y_pitch, int64_t count) const {
    for (int64_t t = 0; t < tiles(); ++t)
      for (int64_t i = 0; i < count; ++i)
        kernel.csr_spmm(cells, x + i * x_pitch, step, segments.get() + tile_segment[t],
                        tile_segment[t + 1] - tile_segment[t], off.get() + tile_entry[t],
                        val.get() + tile_entry[t], y + i * y_pitch);
  }

  // Cuts every tile's segments into `parts` of nearly equal entries: part p of tile t is segments
  // [cut[t * (parts + 1) + p], ...+ p + 1]), its entries start at entry_cut of the same place.
  void split(int64_t parts, std::vector<int64_t>* cut, std::vector<int64_t>* entry_cut) const {
    for (int64_t t = 0; t < tiles(); ++t) {
      int64_t s = tile_segment[t], at = tile_entry[t];
      const int64_t total = tile_entry[t + 1] - tile_entry[t];
      for (int64_t p = 0; p <= parts; ++p) {
        const int64_t target = tile_entry[t] + total * p / parts;
        while (s < tile_segment[t + 1] && at < target) at += segments[s++].length;
        cut->push_back(s), entry_cut->push_back(at);
      }
    }
  }

  // Results in stream order -> canonical order.
  void scatter(const T* from, T* to) const {
    parallel(tiles(), 32.0 * static_cast<double>(entries()), [&](int64_t first, int64_t last) {
      const T* next = from + tile_entry[first];
      for (int64_t s = tile_segment[first]; s < tile_segment[last]; ++s)
        for (int32_t i = 0; i < segments[s].length; ++i) to[begin[s] + i] = *next++;
    });
  }
};

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
