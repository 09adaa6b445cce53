// The weights of a Conv2d as lists of taps: byte offsets into tiles (conv2d_grid.h).
#pragma once

#include "conv2d_grid.h"

namespace sparse_kernels {

// Single weights in the order in which the kernels take them. Segments of channels follow each other in
// tiles, as in a topology's plan.
struct TapStream {
  std::vector<int64_t> tile_segment{0}, tile_entry{0};
  std::vector<RowLength> segments;
  std::vector<uint32_t> off;
  std::vector<int32_t> slot;  // where the value of each stands

  int64_t tiles() const { return static_cast<int64_t>(tile_entry.size()) - 1; }
  int64_t entries() const { return tile_entry.back(); }
};

// For the forward: by output channels, in the order of the topology's plan. place[c]: byte offset of column
// c.
inline TapStream row_taps(const ConvShape& s, const IndexView<const int32_t>& index,
                          const std::vector<uint32_t>& place, uint32_t channel) {
  const PlanView<const int32_t>& plan = index.row_plan;
  TapStream taps;
  taps.off.resize(s.blocks), taps.slot.resize(s.blocks);
  taps.segments.assign(plan.runs(), plan.runs() + plan.piece_segment[plan.shape.pieces()]);
  int64_t k = 0;
  for (int64_t piece = 0; piece < plan.shape.pieces(); ++piece) {
    for (int32_t i = plan.piece_segment[piece]; i < plan.piece_segment[piece + 1]; ++i) {
      const uint32_t base = static_cast<uint32_t>(s.group_of(taps.segments[i].row) * s.group_in()) * channel;
      for (int32_t at = plan.begin[i]; at < plan.begin[i] + taps.segments[i].length; ++at, ++k)
        taps.off[k] = base + place[index.col_idx[at]], taps.slot[k] = at;
    }
    taps.tile_segment.push_back(plan.piece_segment[piece + 1]);
    taps.tile_entry.push_back(k);
  }
  return taps;
}

// For the backward: by input channels, the taps that are in `place` (byte offset of their shifts, or -1).
// Output channels are cut into tiles of a width at which a channel's taps together have about 16 entries.
inline TapStream column_taps(const ConvShape& s, const IndexView<const int32_t>& index,
                             const std::vector<int64_t>& place, uint32_t channel) {
  const int64_t taps = s.taps(), rows = s.rows / s.groups;
  const double density =
      static_cast<double>(s.blocks) / std::max<double>(1.0, static_cast<double>(s.rows) * s.cols);
  const double live = std::count_if(place.begin(), place.end(), [](int64_t p) { return p >= 0; });
  const int64_t width = static_cast<int64_t>(std::clamp(16 / std::max(live * density, 1e-3), 16.0, 4096.0));
  const int64_t tiles = std::max<int64_t>(1, ceil_div(rows, width));
  std::vector<int32_t> tile_of(s.rows), length(s.in * tiles), start(s.in * tiles), by_length;
  for (int64_t r = 0; r < s.rows; ++r) tile_of[r] = static_cast<int32_t>(r % rows / width);
  const auto each = [&](const auto& f) {  // f(channel and tile, entry, tap)
    for (int64_t ic = 0; ic < s.in; ++ic)
      for (int64_t tap = 0, c = ic * taps; tap < taps; ++tap, ++c)
        for (int32_t i = place[tap] < 0 ? index.col_ptr[c + 1] : index.col_ptr[c]; i < index.col_ptr[c + 1];
             ++i)
          f(ic * tiles + tile_of[index.row_idx[i]], i, tap);
  };
  each([&](int64_t at, int32_t, int64_t) { ++length[at]; });

  // The channels of a tile in the order of their lengths, by a counting sort.
  TapStream stream;
  int32_t total = 0;
  for (int64_t t = 0; t < tiles; ++t) {
    int32_t most = 0, count = 0;
    for (int64_t ic = 0; ic < s.in; ++ic) most = std::max(most, length[ic * tiles + t]);
    by_length.assign(most + 2, 0);
    for (int64_t ic = 0; ic < s.in; ++ic) ++by_length[length[ic * tiles + t] + 1];
    count = static_cast<int32_t>(s.in) - by_length[1];
    by_length[1] = 0;  // channels without entries have no segment
    for (int32_t l = 2; l < most + 2; ++l) by_length[l] += by_length[l - 1];
    const int64_t first = stream.segments.size();
    stream.segments.resize(first + count);
    for (int64_t ic = 0; ic < s.in; ++ic)
      if (const int32_t l = length[ic * tiles + t]; l > 0)
        stream.segments[first + by_length[l]++] = {static_cast<int32_t>(ic), l};
    for (int64_t i = first; i < first + count; ++i)
      start[stream.segments[i].row * tiles + t] = total, total += stream.segments[i].length;
    stream.tile_segment.push_back(first + count);
    stream.tile_entry.push_back(total);
  }
  stream.off.resize(total), stream.slot.resize(total);
  each([&](int64_t at, int32_t i, int64_t tap) {
    const int32_t to = start[at]++;
    stream.off[to] = static_cast<uint32_t>(place[tap]) + static_cast<uint32_t>(index.row_idx[i]) * channel;
    stream.slot[to] = index.perm[i];
  });
  return stream;
}

// Blocks: of every row (or column) of blocks, where each block's inputs and values stand.
struct TapBlocks {
  std::vector<int64_t> begin{0};
  std::vector<uint32_t> off;
  std::vector<int32_t> slot;
};

inline TapBlocks row_blocks(const ConvShape& s, const IndexView<const int32_t>& index,
                            const std::vector<uint32_t>& place, uint32_t channel) {
  TapBlocks taps;
  taps.off.reserve(s.blocks), taps.slot.assign(index.slot, index.slot + s.blocks);
  for (int64_t r = 0; r < s.rows; ++r) {
    const uint32_t base = static_cast<uint32_t>(s.group_of(r) * s.group_in()) * channel;
    for (int64_t i = index.row_ptr[r]; i < index.row_ptr[r + 1]; ++i)
      taps.off.push_back(base + place[index.col_idx[i]]);
    taps.begin.push_back(index.row_ptr[r + 1]);
  }
  return taps;
}

inline TapBlocks column_blocks(const ConvShape& s, const IndexView<const int32_t>& index,
                               const std::vector<int64_t>& place, uint32_t channel) {
  TapBlocks taps;
  taps.off.reserve(s.blocks), taps.slot.reserve(s.blocks);
  for (int64_t ic = 0; ic < s.in / s.b_in; ++ic) {
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      if (place[tap] < 0) continue;
      const int64_t c = ic * s.taps() + tap;
      for (int64_t i = index.col_ptr[c]; i < index.col_ptr[c + 1]; ++i) {
        taps.off.push_back(static_cast<uint32_t>(place[tap]) +
                           static_cast<uint32_t>(index.row_idx[i] * s.b_out) * channel);
        taps.slot.push_back(index.perm[i]);
      }
    }
    taps.begin.push_back(static_cast<int64_t>(taps.off.size()));
  }
  return taps;
}

// The same for the kernels. transposed: outputs are the blocks' inputs.
template <class T>
std::vector<BlockRow<T>> block_rows(const ConvShape& s, const TapBlocks& taps, const T* values,
                                    bool transposed) {
  std::vector<BlockRow<T>> rows;
  for (size_t r = 0; r + 1 < taps.begin.size(); ++r)
    rows.push_back({taps.begin[r], taps.begin[r + 1], taps.off.data(), taps.slot.data(), values,
                    transposed ? s.b_in : s.b_out, transposed ? s.b_out : s.b_in, s.b_out * s.b_in,
                    transposed ? 1 : s.b_in, transposed ? s.b_in : 1});
  return rows;
}

}  // namespace sparse_kernels
