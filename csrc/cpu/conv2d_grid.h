// How a convolution is laid out for the kernels: the geometry, and which pixels share a cell.
#pragma once

#include <algorithm>
#include <vector>

#include "driver.h"

namespace sparse_kernels {

template <class T>
constexpr int64_t kCellLanes = kCellSize / static_cast<int64_t>(sizeof(T));

constexpr int64_t kRunCells = 8;  // what the CSR kernels keep in registers

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// One of the two dimensions of the images.
struct Axis {
  int64_t size, out, kernel, stride, padding, dilation;

  // Does tap k contribute to the input pixels phase + stride * i? Then from the outputs i + *shift.
  bool reads(int64_t phase, int64_t k, int64_t* shift) const {
    const int64_t at = phase + padding - k * dilation;
    *shift = at / stride;
    return at % stride == 0;
  }
  // Input pixels of a phase, and phases that there are.
  int64_t lattice(int64_t phase) const { return (size - phase + stride - 1) / stride; }
  int64_t phases() const { return std::min(stride, size); }
};

struct ConvShape {
  int64_t n, in, out, rows, cols, b_out, b_in, blocks, groups;
  Axis y, x;
  bool csr, channels_last;

  IndexShape index() const { return {rows, cols, groups, blocks, csr ? Plans::kConv : Plans::kBlocks}; }
  int64_t taps() const { return y.kernel * x.kernel; }
  int64_t group_in() const { return in / groups; }
  int64_t group_of(int64_t row) const { return row / (rows / groups); }
  int64_t numel() const { return blocks * b_out * b_in; }  // stored weights
  double work() const { return static_cast<double>(n) * numel() * y.out * x.out; }
};

template <class T>
struct Images {
  T* data;
  int64_t n, channels, h, w;
  bool channels_last;  // memory is NHWC

  // Elements from a pixel, channel or image to the next.
  int64_t pixel() const { return channels_last ? channels : 1; }
  int64_t plane() const { return channels_last ? 1 : h * w; }
  int64_t image() const { return channels * h * w; }
};

// A piece of work: lattice rows [row, row + rows) of `images` images.
struct Task {
  int64_t image, images, row, rows;
};

// A product runs over a lattice of rows x cols pixels of each image. Lanes are pixels of a row; where a row
// does not fill half a cell, the same pixels of several images: a cell has `unit` lanes of each of `per_cell`
// images. A row of a task is a row of `sets` sets of such images, one after the other.
struct Grid {
  int64_t n, rows, cols, unit, per_cell, sets, width;  // width: cells of an image's row
  int64_t band;                                        // rows of a task

  int64_t row_cells() const { return sets * width; }
  int64_t group() const { return per_cell * sets; }  // images of a task
  int64_t bands() const { return ceil_div(rows, band); }
  int64_t tasks() const { return ceil_div(n, group()) * bands(); }
  Task task(int64_t i) const {
    const int64_t image = i / bands() * group(), row = i % bands() * band;
    return {image, std::min(group(), n - image), row, std::min(band, rows - row)};
  }
};

// Depends on the shape alone, not on threads: so does the order of all sums.
template <class T>
Grid make_grid(int64_t n, int64_t rows, int64_t cols) {
  constexpr int64_t lanes = kCellLanes<T>;
  Grid g{n, rows, cols, lanes, 1, 1, ceil_div(cols, lanes), std::max<int64_t>(rows, 1)};
  while (g.unit / 2 >= cols && g.unit > 1) g.unit /= 2;
  g.per_cell = lanes / g.unit;
  const int64_t cells = std::max<int64_t>(1, rows * g.width);
  g.sets = std::clamp<int64_t>(ceil_div(n, g.per_cell), 1, std::max<int64_t>(1, kRunCells / cells));
  return g;
}

// Copies of the pixels that a task reads: [channel][column shift][row][cell]. The lattice pixel (i, j) of a
// tap with shifts (a, b) reads the pixel (i * stride_y + a, j * stride_x + b). Each column shift has a copy
// of its own, in which the pixels of a lattice row fill cells as that row's do; rows that a tap reads follow
// each other. So a tap is one byte offset, and a run of cells anywhere in the lattice a run of cells in the
// copy. What is outside the images is zero.
struct TileShape {
  struct Plane {
    int64_t residue, first, rows;  // source rows top + residue + stride_y * i, from row `first` of a copy
  };

  int64_t channels, stride_y, stride_x, top, left, row_cells;
  std::vector<int64_t> shifts;
  std::vector<Plane> planes;
  int64_t rows = 0, copy, pitch;  // rows of a copy; cells to the next copy, channel

  // Of these taps' shifts, for `band` lattice rows.
  TileShape(int64_t channels, const std::vector<int64_t>& down, const std::vector<int64_t>& right,
            int64_t stride_y, int64_t stride_x, int64_t band, int64_t row_cells)
      : channels(channels),
        stride_y(stride_y),
        stride_x(stride_x),
        top(0),
        left(0),
        row_cells(row_cells),
        shifts(right) {
    if (!down.empty()) top = *std::min_element(down.begin(), down.end());
    if (!right.empty()) left = *std::min_element(right.begin(), right.end());
    std::sort(shifts.begin(), shifts.end());
    shifts.erase(std::unique(shifts.begin(), shifts.end()), shifts.end());
    for (int64_t residue = 0; residue < stride_y; ++residue) {
      int64_t most = -1;
      for (int64_t a : down)
        if ((a - top) % stride_y == residue) most = std::max(most, (a - top) / stride_y);
      if (most < 0) continue;
      planes.push_back({residue, rows, band + most});
      rows += band + most;
    }
    copy = spread(rows * row_cells);
    pitch = spread(static_cast<int64_t>(shifts.size()) * copy);
  }

  int64_t cells() const { return channels * pitch; }
  int64_t offset(int64_t channel, int64_t down, int64_t right) const {  // bytes
    int64_t row = 0;
    for (const Plane& plane : planes)
      if ((down - top) % stride_y == plane.residue) row = plane.first + (down - top) / stride_y;
    const int64_t at = std::lower_bound(shifts.begin(), shifts.end(), right) - shifts.begin();
    return (channel * pitch + at * copy + row * row_cells) * kCellSize;
  }

  // At 4 modulo 8 cells apart, the same cells of neighbouring copies fall into different sets of the caches;
  // at a power of two they would all share a few.
  static int64_t spread(int64_t cells) { return cells < 4 ? cells | 1 : (cells + 3) / 8 * 8 + 4; }
};

// Rows of a task: tiles that leave room in L2 for the rest; more tasks than images when those are few and
// large.
inline void cut_bands(Grid* g, int64_t row_bytes) {
  const int64_t fit = std::max<int64_t>(1, second_level_cache() / 2 / std::max<int64_t>(row_bytes, 1));
  const int64_t groups = std::max<int64_t>(1, ceil_div(g->n, g->group()));
  const int64_t least = std::max<int64_t>(1, ceil_div(kRunCells, g->row_cells()));  // rows worth a task
  int64_t bands = ceil_div(g->rows, std::max(fit, least));
  bands = std::max(bands, std::min(ceil_div(8, groups), g->rows / least));
  g->band = std::max<int64_t>(1, ceil_div(g->rows, std::max<int64_t>(bands, 1)));
  const int64_t cells = kRunCells / std::max<int64_t>(1, g->row_cells());
  if (cells > 1) g->band = std::min(round_up(g->band, cells), std::max<int64_t>(g->rows, 1));
}

}  // namespace sparse_kernels
