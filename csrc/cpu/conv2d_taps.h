// The geometry of a Conv2d and its weights as lists of taps: byte offsets into tiles (conv2d_tiles.h).
#pragma once

#include <algorithm>
#include <utility>

#include "conv2d_tiles.h"

namespace sparse_kernels {

// One of the two dimensions of the images.
struct Axis {
  int64_t size, out, kernel, stride, padding, dilation;

  // Input pixels that `count` outputs read.
  int64_t extent(int64_t count) const { return (count - 1) * stride + (kernel - 1) * dilation + 1; }
  // Does tap k contribute to the input pixels phase + stride * i? Then from the outputs i + *shift.
  bool reads(int64_t phase, int64_t k, int64_t* shift) const {
    const int64_t at = phase + padding - k * dilation;
    *shift = at / stride;
    return at % stride == 0;
  }
  // Furthest shifts in both directions, 0 included.
  void reach(int64_t* low, int64_t* high) const {
    *low = *high = 0;
    for (int64_t phase = 0; phase < std::min(stride, size); ++phase)
      for (int64_t k = 0, shift; k < kernel; ++k)
        if (reads(phase, k, &shift)) *low = std::min(*low, shift), *high = std::max(*high, shift);
  }
  // Input pixels of a phase.
  int64_t lattice(int64_t phase) const { return (size - phase + stride - 1) / stride; }
};

struct ConvShape {
  int64_t n, in, out, rows, cols, b_out, b_in, blocks, groups;
  Axis y, x;
  bool csr, channels_last;

  IndexShape index() const { return {rows, cols, groups, blocks, csr ? Plans::kConv : Plans::kBlocks}; }
  int64_t taps() const { return y.kernel * x.kernel; }
  int64_t group_in() const { return in / groups; }
  int64_t group_of(int64_t row) const { return row / (rows / groups); }
  double work() const { return static_cast<double>(n) * blocks * b_out * b_in * y.out * x.out; }
  template <class T>
  int64_t cells() const {
    return (n + kImages<T> - 1) / kImages<T>;
  }
};

// Output rows at a time: what keeps a tile in L2 ("row" bytes each and `halo` rows more), or less if
// threads would be idle, and a multiple of `unit`.
inline int64_t band_rows(int64_t total, int64_t row, int64_t halo, int64_t unit, int64_t cells, double work) {
  const int64_t fit = std::max(second_level_cache() / 4 / std::max<int64_t>(row, 1) - halo, 2 * halo);
  const int64_t tasks = std::max<int64_t>(1, worthwhile_threads(work) / std::max<int64_t>(cells, 1));
  const int64_t bands = std::max((total + fit - 1) / std::max<int64_t>(fit, 1), std::min(tasks, total));
  const int64_t rows = (total + bands - 1) / std::max<int64_t>(bands, 1);
  return std::min((rows + unit - 1) / unit * unit, total);
}

inline TileShape input_tile(const ConvShape& s, int64_t band) {
  return {s.in, s.y.extent(band), s.x.extent(s.x.out), s.y.padding, s.x.padding};
}

// Tile of dY: for the weight gradient the band itself, for the input gradient all that taps reach.
inline TileShape output_tile(const ConvShape& s, int64_t band, bool need_x) {
  if (!need_x) return {s.out, band, s.x.out, 0, 0};
  int64_t y0, y1, x0, x1;
  s.y.reach(&y0, &y1), s.x.reach(&x0, &x1);
  return {s.out, band - y0 + y1, std::max(s.x.lattice(0) + x1, s.x.out) - x0, -y0, -x0};
}

// Weight rows -> lists of input taps, for the forward and the weight gradient.
template <class T>
Taps<T> row_taps(const ConvShape& s, const IndexView<const int32_t>& index, const T* values,
                 const TileShape& tile) {
  Taps<T> taps;
  std::vector<uint32_t> table(s.cols);
  for (int64_t c = 0; c < s.cols; ++c) {
    const int64_t tap = c % s.taps(), ky = tap / s.x.kernel, kx = tap % s.x.kernel;
    table[c] =
        static_cast<uint32_t>(tile.offset(c / s.taps() * s.b_in, ky * s.y.dilation, kx * s.x.dilation));
  }
  const auto base = [&](int64_t row) {
    return static_cast<uint32_t>(tile.offset(s.group_of(row) * s.group_in(), 0, 0));
  };
  if (s.csr) {
    const StreamSource<T> from{index.col_idx, s.blocks, 0, table.data(), values, nullptr};
    taps.stream = std::make_unique<ConvStream<T>>(row_segments(index.row_plan), from, s.groups > 1,
                                                  [&](int32_t r) { return SegmentPlace{r, base(r)}; });
    return taps;
  }
  taps.off.resize(s.blocks), taps.block.assign(index.slot, index.slot + s.blocks);
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t i = index.row_ptr[r]; i < index.row_ptr[r + 1]; ++i)
      taps.off[i] = base(r) + table[index.col_idx[i]];
    taps.rows.push_back({index.row_ptr[r], index.row_ptr[r + 1], taps.off.data(), taps.block.data(), values,
                         s.b_out, s.b_in, s.b_out * s.b_in, s.b_in, 1});
  }
  return taps;
}

// Consecutive segments of a row become one.
template <class T>
void join_segments(ConvStream<T>* stream) {
  int64_t count = 0, s = 0;
  for (int64_t t = 0; t < stream->tiles(); ++t) {
    const int64_t first = count, end = stream->tile_segment[t + 1];
    for (; s < end; ++s) {
      const RowLength segment = stream->segments[s];
      if (count > first && stream->segments[count - 1].row == segment.row)
        stream->segments[count - 1].length += segment.length;
      else
        stream->segments[count++] = segment;
    }
    stream->tile_segment[t + 1] = count;
  }
}

// CSR lists of the output taps that each input channel receives from: those of the taps with a shift
// (in bytes of dY's tile; negative: not of this phase). Output channels are cut into tiles, like the
// plans of a topology, of a width at which a channel's taps together have about 16 entries.
template <class T>
std::unique_ptr<ConvStream<T>> column_stream(const ConvShape& s, const IndexView<const int32_t>& index,
                                             const T* values, const TileShape& tile,
                                             const std::vector<int64_t>& shift) {
  const int64_t taps = s.taps(), rows = s.rows / s.groups;
  const double density =
      static_cast<double>(s.blocks) / std::max<double>(1.0, static_cast<double>(s.rows) * s.cols);
  const double live = std::count_if(shift.begin(), shift.end(), [](int64_t b) { return b >= 0; });
  const int64_t width = static_cast<int64_t>(std::clamp(16 / std::max(live * density, 1e-3), 16.0, 4096.0));
  std::vector<RowLength> runs;
  std::vector<int32_t> tile_ptr{0}, begin, end(s.groups * s.cols),
      at(index.col_ptr, index.col_ptr + s.groups * s.cols);
  std::vector<std::pair<int32_t, int32_t>> order;  // length, channel
  for (int64_t first = 0; first < rows; first += width) {
    order.clear();
    for (int64_t ic = 0; ic < s.in; ++ic) {
      const int64_t limit = ic / s.group_in() * rows + std::min(first + width, rows);
      int32_t length = 0;
      for (int64_t tap = 0, c = ic * taps; tap < taps; ++tap, ++c) {
        if (shift[tap] < 0) continue;
        for (end[c] = at[c]; end[c] < index.col_ptr[c + 1] && index.row_idx[end[c]] < limit;) ++end[c];
        length += end[c] - at[c];
      }
      if (length > 0) order.emplace_back(length, static_cast<int32_t>(ic));
    }
    std::sort(order.begin(), order.end());
    for (const auto& [length, ic] : order)
      for (int64_t tap = 0, c = ic * taps; tap < taps; ++tap, ++c) {
        if (shift[tap] < 0 || at[c] == end[c]) continue;
        runs.push_back({static_cast<int32_t>(c), end[c] - at[c]}), begin.push_back(at[c]);
        at[c] = end[c];
      }
    tile_ptr.push_back(static_cast<int32_t>(runs.size()));
  }
  const Segments plan{static_cast<int64_t>(tile_ptr.size()) - 1, tile_ptr.data(), runs.data(), begin.data()};
  const StreamSource<T> from{index.row_idx, s.blocks, static_cast<uint32_t>(tile.offset(1, 0, 0)),
                             nullptr,       values,   index.perm};
  auto stream = std::make_unique<ConvStream<T>>(plan, from, true, [&](int32_t c) {
    return SegmentPlace{static_cast<int32_t>(c / taps), static_cast<uint32_t>(shift[c % taps])};
  });
  join_segments(stream.get());
  return stream;
}

// The same for blocks.
template <class T>
Taps<T> column_blocks(const ConvShape& s, const IndexView<const int32_t>& index, const T* values,
                      const TileShape& tile, const std::vector<int64_t>& shift) {
  Taps<T> taps;
  taps.off.reserve(s.blocks), taps.block.reserve(s.blocks);
  for (int64_t ic = 0; ic < s.in / s.b_in; ++ic) {
    const int64_t begin = static_cast<int64_t>(taps.off.size());
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      if (shift[tap] < 0) continue;
      const int64_t c = ic * s.taps() + tap;
      for (int64_t i = index.col_ptr[c]; i < index.col_ptr[c + 1]; ++i) {
        taps.off.push_back(static_cast<uint32_t>(tile.offset(index.row_idx[i] * s.b_out, 0, 0) + shift[tap]));
        taps.block.push_back(index.perm[i]);
      }
    }
    taps.rows.push_back({begin, static_cast<int64_t>(taps.off.size()), taps.off.data(), taps.block.data(),
                         values, s.b_in, s.b_out, s.b_out * s.b_in, 1, s.b_in});
  }
  return taps;
}

template <class T>
Images<T> images(const ConvShape& s, bool input, T* data) {
  return input ? Images<T>{data, s.n, s.in, s.y.size, s.x.size, s.channels_last}
               : Images<T>{data, s.n, s.out, s.y.out, s.x.out, s.channels_last};
}

template <class T>
Pass<T> input_gradient(const ConvShape& s, const IndexView<const int32_t>& index, const T* values,
                       const TileShape& tile, int64_t band, T* dx) {
  Pass<T> pass{tile, band, 1, 1, s.y.stride, s.x.stride, images(s, true, dx), nullptr, {}};
  for (int64_t py = 0; py < std::min(s.y.stride, s.y.size); ++py)
    for (int64_t px = 0; px < std::min(s.x.stride, s.x.size); ++px) {
      std::vector<int64_t> shift;
      for (int64_t ky = 0, y, x; ky < s.y.kernel; ++ky)
        for (int64_t kx = 0; kx < s.x.kernel; ++kx) {
          const bool both = s.y.reads(py, ky, &y) & s.x.reads(px, kx, &x);
          shift.push_back(both ? tile.offset(0, y + tile.top, x + tile.left) : -1);
        }
      Taps<T> taps;
      if (s.csr)
        taps.stream = column_stream(s, index, values, tile, shift);
      else
        taps = column_blocks(s, index, values, tile, shift);
      pass.phases.push_back({py, px, s.y.lattice(py), s.x.lattice(px), std::move(taps)});
    }
  return pass;
}

}  // namespace sparse_kernels
