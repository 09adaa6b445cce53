// Tiles of images for Conv2d: [channel][row][column][cell], the lanes of a cell being images. Every
// tap of every channel is then one byte offset, whatever the padding, stride and dilation. A tile
// holds the rows that a band of output rows reads, with the padding as zeros.
#pragma once

#include <cstring>

#include "conv2d_stream.h"

namespace sparse_kernels {

template <class T>
constexpr int64_t kImages = kCellSize / static_cast<int64_t>(sizeof(T));  // images a cell

template <class T>
struct Images {
  T* data;
  int64_t n, channels, h, w;
  bool channels_last;  // memory is NHWC
};

struct TileShape {
  int64_t channels, rows, cols;
  int64_t top, left;  // tile row r, column c hold image row first + r - top, column c - left
  int64_t pitch;      // cells from a channel to the next

  TileShape(int64_t channels, int64_t rows, int64_t cols, int64_t top, int64_t left)
      : channels(channels), rows(rows), cols(cols), top(top), left(left), pitch(spread(rows * cols)) {}

  int64_t cells() const { return channels * pitch; }
  int64_t offset(int64_t channel, int64_t row, int64_t col) const {  // bytes
    return (channel * pitch + row * cols + col) * kCellSize;
  }

  // At 4 modulo 8 cells apart, the 4 cells of the same pixels in different channels fall into
  // different sets of the caches; at a power of two they would all share a few.
  static int64_t spread(int64_t cells) { return cells < 4 ? cells | 1 : (cells + 3) / 8 * 8 + 4; }
};

// The cells of a tile that no image pixel fills: rows outside [r0, r1), columns outside [left, left + width).
template <class T>
void zero_borders(const TileShape& shape, int64_t r0, int64_t r1, int64_t width, T* tile) {
  const auto zero = [&](T* row, int64_t begin, int64_t end) {
    if (begin < end) std::memset(row + begin * kImages<T>, 0, (end - begin) * kCellSize);
  };
  const int64_t cols = shape.cols, left = std::min(shape.left, cols);
  for (int64_t c = 0; c < shape.channels; ++c) {
    T* plane = tile + c * shape.pitch * kImages<T>;
    zero(plane, 0, r0 * cols);
    zero(plane, r1 * cols, shape.rows * cols);
    if (width == cols) continue;
    for (int64_t r = r0; r < r1; ++r) {
      zero(plane, r * cols, r * cols + left);
      zero(plane, r * cols + left + width, (r + 1) * cols);
    }
  }
}

// Starts loading `length` pixels of each of `count` images. Images are far apart, often by a power of
// two: no hardware prefetcher follows so many streams.
template <bool write, class T>
void prefetch(const T* from, int64_t stride, int64_t count, int64_t length) {
  constexpr int64_t line = kCellSize / static_cast<int64_t>(sizeof(T));
  for (int64_t t = 0; t < count; ++t)
    for (int64_t i = 0; i < length; i += line) __builtin_prefetch(from + t * stride + i, write, 2);
}

// Cells of scratch memory that pack_tile needs.
inline int64_t scratch_cells(const TileShape& shape, int64_t w) { return shape.rows * w; }

// Images `image`... of a cell, rows first - top... -> tile.
template <class T>
void pack_tile(const Kernels<T>& kernel, const Images<const T>& from, int64_t image, int64_t first,
               const TileShape& shape, T* scratch, T* tile) {
  constexpr int64_t lanes = kImages<T>;
  const int64_t count = std::min(lanes, from.n - image), plane = from.h * from.w;
  const int64_t row0 = first - shape.top;  // image row of tile row 0
  const int64_t r0 = std::clamp<int64_t>(-row0, 0, shape.rows);
  const int64_t r1 = std::clamp<int64_t>(from.h - row0, r0, shape.rows);
  const int64_t width = std::clamp<int64_t>(shape.cols - shape.left, 0, from.w);
  zero_borders(shape, r0, r1, width, tile);
  if (r0 == r1 || width == 0) return;

  const T* src = from.data + image * from.channels * plane;
  const int64_t stride = from.channels * plane, channel = shape.pitch * lanes;
  if (from.channels_last) {
    // A few channels of all pixels of a row at a time: the tile's lines of a channel are neighbours.
    for (int64_t r = r0; r < r1; ++r)
      for (int64_t f = 0; f < from.channels; f += lanes)
        for (int64_t c = 0; c < width; ++c) {
          const T* pixel = src + ((row0 + r) * from.w + c) * from.channels + f;
          prefetch<false>(pixel + 4 * from.channels, stride, count, 1);
          kernel.pack(pixel, stride, count, std::min(lanes, from.channels - f),
                      tile + f * channel + (r * shape.cols + shape.left + c) * lanes, channel, 1, nullptr);
        }
    return;
  }
  for (int64_t c = 0; c < from.channels; ++c) {
    const T* rows = src + c * plane + (row0 + r0) * from.w;
    T* to = tile + c * channel + (r0 * shape.cols + shape.left) * lanes;
    if (c + 1 < from.channels) prefetch<false>(rows + plane, stride, count, (r1 - r0) * from.w);
    if (width == from.w && shape.cols == width) {  // one run of pixels
      kernel.pack(rows, stride, count, (r1 - r0) * width, to, lanes, 1, nullptr);
    } else if (width % lanes == 0) {
      for (int64_t r = r0; r < r1; ++r, rows += from.w, to += shape.cols * lanes)
        kernel.pack(rows, stride, count, width, to, lanes, 1, nullptr);
    } else {  // the transposes want whole vectors of pixels, which such rows do not give
      kernel.pack(rows, stride, count, (r1 - r0) * from.w, scratch, lanes, 1, nullptr);
      for (int64_t r = r0; r < r1; ++r, to += shape.cols * lanes)
        std::memcpy(to, scratch + (r - r0) * from.w * lanes, width * kCellSize);
    }
  }
}

// The weights of one phase of a pass, as the kernels take them.
template <class T>
struct Taps {
  std::unique_ptr<ConvStream<T>> stream;  // CSR
  std::vector<BlockRow<T>> rows;          // BSR: every row of blocks, its lists in off and block
  std::vector<uint32_t> off;
  std::vector<int32_t> block;

  // y [channels][cells] += W * x for `cells` pixels, `step` bytes apart.
  void spmm(const Kernels<T>& kernel, int64_t cells, const char* x, int64_t x_row, int64_t step, T* y) const {
    if (stream) return stream->spmm(kernel, cells, x, step, y);
    for (const BlockRow<T>& row : rows) {
      if (row.begin < row.end) kernel.bsr_spmm(cells, &row, x, x_row, step, y);
      y += row.outputs * cells * kImages<T>;
    }
  }
};

// A lattice of output pixels that read the same taps: (y0 + i * out_y, x0 + j * out_x), see Pass.
template <class T>
struct Phase {
  int64_t y0, x0, rows, cols;
  Taps<T> taps;
};

// outputs = bias + W * inputs, band by band. The forward is one phase that steps over its inputs by
// the stride; the input gradient has a phase for every remainder modulo the stride, stepping by one.
template <class T>
struct Pass {
  TileShape tile;        // of the inputs
  int64_t band;          // lattice rows at once
  int64_t in_y, in_x;    // input pixels to the next row, column of the lattice
  int64_t out_y, out_x;  // output pixels to the same
  Images<T> out;
  const T* bias;
  std::vector<Phase<T>> phases;

  // Rows without a gap between them, in the tile and in the output, are one long row.
  bool long_rows() const { return in_y == 1 && in_x == 1 && out_y == 1 && out_x == 1 && tile.cols == out.w; }
  int64_t out_pitch() const { return TileShape::spread(band * out_y * out.w); }
  int64_t panel_cells() const { return 4 * out.channels; }
  // NCHW outputs are gathered so that an image's pixels can be written as runs.
  int64_t gather_cells() const { return out.channels_last ? 0 : out.channels * out_pitch(); }

  // Lattice rows [first, first + band) of a cell of images.
  void run(const Kernels<T>& kernel, const T* in, int64_t image, int64_t first, T* panel, T* gather) const {
    const char* x = reinterpret_cast<const char*>(in);
    for (const Phase<T>& phase : phases) {
      const int64_t rows = std::min(band, phase.rows - first);
      if (rows <= 0) continue;
      const bool flat = long_rows();
      const int64_t cols = flat ? rows * phase.cols : phase.cols;
      for (int64_t i = 0; i < (flat ? 1 : rows); ++i) {
        for (int64_t j = 0; j < cols;) {
          const int64_t cells = cols - j >= 4 ? 4 : cols - j >= 2 ? 2 : 1;
          kernel.fill(panel, out.channels, cells * kImages<T>, bias);
          phase.taps.spmm(kernel, cells, x + tile.offset(0, i * in_y, j * in_x), tile.pitch * kCellSize,
                          in_x * kCellSize, panel);
          const int64_t pixel = (phase.y0 + i * out_y) * out.w + phase.x0 + j * out_x;
          put(kernel, panel, cells, image, first * out_y * out.w, pixel, gather);
          j += cells;
        }
      }
    }
    if (!out.channels_last) unpack(kernel, image, first, gather);
  }

 private:
  // Pixels of a panel to where they belong; `pixel` counts from the band's first, `origin`.
  void put(const Kernels<T>& kernel, const T* panel, int64_t cells, int64_t image, int64_t origin,
           int64_t pixel, T* gather) const {
    constexpr int64_t lanes = kImages<T>;
    const int64_t plane = out.h * out.w;
    if (out.channels_last) {
      const int64_t count = std::min(lanes, out.n - image);
      T* to = out.data + (image * plane + origin + pixel) * out.channels;
      for (int64_t r = 0; r < cells; ++r)
        kernel.unpack(panel + r * lanes, cells * lanes, count, out.channels, to + r * out_x * out.channels,
                      plane * out.channels);
      return;
    }
    T* to = gather + pixel * lanes;
    const int64_t channel = out_pitch() * lanes;
    for (int64_t c = 0; c < out.channels; ++c, to += channel, panel += cells * lanes)
      for (int64_t r = 0; r < cells; ++r) std::memcpy(to + r * out_x * lanes, panel + r * lanes, kCellSize);
  }

  void unpack(const Kernels<T>& kernel, int64_t image, int64_t first, const T* gather) const {
    const int64_t y = first * out_y, rows = std::min(band * out_y, out.h - y), plane = out.h * out.w;
    if (rows <= 0) return;
    const int64_t count = std::min(kImages<T>, out.n - image);
    for (int64_t c = 0; c < out.channels; ++c) {
      T* to = out.data + (image * out.channels + c) * plane + y * out.w;
      if (c + 1 < out.channels) prefetch<true>(to + plane, out.channels * plane, count, rows * out.w);
      kernel.unpack(gather + c * out_pitch() * kImages<T>, kImages<T>, count, rows * out.w, to,
                    out.channels * plane);
    }
  }
};

}  // namespace sparse_kernels
