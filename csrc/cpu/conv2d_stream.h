// The streams that the CSR kernels of Conv2d read.
#pragma once

#include <memory>
#include <vector>

#include "driver.h"

namespace sparse_kernels {

struct SegmentPlace {
  int32_t row;
  uint32_t base;
};

// Segments of entries in the order to take them in, by tiles of columns: those of a topology's plan, or made
// for the occasion. Tile t has segments tile_segment[t]..[t+1], each of which begins at begin[s].
struct Segments {
  int64_t tiles;
  const int32_t* tile_segment;
  const RowLength* runs;
  const int32_t* begin;
  int64_t count() const { return tile_segment[tiles]; }
};

inline Segments row_segments(const PlanView<const int32_t>& plan) {
  return {plan.shape.pieces(), plan.piece_segment, plan.runs(), plan.begin};
}

// The entries of one direction of a CSR topology in such an order, as the kernels read them: byte offsets
// into a tile of cells, and values. Tile t has segments tile_segment[t]..[t+1], entries tile_entry[t]..[t+1].
template <class T>
struct ConvStream {
  std::vector<int64_t> tile_segment, tile_entry;
  Buffer<RowLength> segments;
  Buffer<int32_t> begin;  // canonical position of each segment's first entry
  Buffer<uint32_t> off;
  Buffer<T> val;

  // place(r): for row r of the plan, the output row that it adds to (-1 leaves it out) and the byte offset
  // added to all of its entries' (0 for all: `based` false).
  template <class Place>
  ConvStream(const Segments& plan, const StreamSource<T>& from, bool based, const Place& place)
      : segments(plan.count()), begin(plan.count()), off(from.n), val(from.values != nullptr ? from.n : 0) {
    const Buffer<uint32_t> base(based ? plan.count() : 0);
    int64_t entries = 0, count = 0;
    for (int64_t tile = 0; tile < plan.tiles; ++tile) {
      tile_segment.push_back(count), tile_entry.push_back(entries);
      for (int32_t s = plan.tile_segment[tile]; s < plan.tile_segment[tile + 1]; ++s) {
        const SegmentPlace at = place(plan.runs[s].row);
        if (at.row < 0) continue;
        if (based) base[count] = at.base;
        begin[count] = plan.begin[s];
        segments[count++] = {at.row, plan.runs[s].length};
        entries += plan.runs[s].length;
      }
    }
    tile_segment.push_back(count), tile_entry.push_back(entries);
    // A multiply-add is worth about 1/32 of copying an entry.
    parallel(plan.tiles, 32.0 * static_cast<double>(entries), [&](int64_t first, int64_t last) {
      const int64_t from_segment = tile_segment[first], at = tile_entry[first];
      kernels_for<T>().conv_stream(&from, segments.get() + from_segment, begin.get() + from_segment,
                                   based ? base.get() + from_segment : nullptr,
                                   tile_segment[last] - from_segment, tile_entry[last] - at, off.get() + at,
                                   from.values != nullptr ? val.get() + at : nullptr);
    });
  }

  int64_t tiles() const { return static_cast<int64_t>(tile_entry.size()) - 1; }
  int64_t entries() const { return tile_entry.back(); }

  // y [rows][cells] += W * x for `cells` pixels, `step` bytes apart.
  void spmm(const Kernels<T>& kernel, int64_t cells, const char* x, int64_t step, T* y) const {
    for (int64_t t = 0; t < tiles(); ++t)
      kernel.conv_spmm(cells, x, step, segments.get() + tile_segment[t],
                       tile_segment[t + 1] - tile_segment[t], off.get() + tile_entry[t],
                       val.get() + tile_entry[t], y);
  }

  // Results in stream order -> canonical order.
  void restore(const T* from, T* to) const {
    parallel(tiles(), 32.0 * static_cast<double>(entries()), [&](int64_t first, int64_t last) {
      const int64_t segment = tile_segment[first];
      scatter_segments(from + tile_entry[first], segments.get() + segment, begin.get() + segment,
                       tile_segment[last] - segment, to);
    });
  }
};

}  // namespace sparse_kernels
