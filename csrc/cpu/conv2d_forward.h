// The forward of a Conv2d on raw pointers.
#pragma once

#include <memory>

#include "conv2d_taps.h"
#include "conv2d_tiles.h"

namespace sparse_kernels {

// Cells of the next run, with `left` of them to go: CSR kernels take powers of two, the others what there is.
inline int64_t run_cells(bool csr, int64_t left) {
  if (!csr) return std::min(left, 4 * kRunCells);
  int64_t cells = kRunCells;
  while (cells > left) cells /= 2;
  return cells;
}

template <class T>
std::unique_ptr<Buffer<T>> gather_values(const std::vector<int32_t>& slot, const T* values) {
  auto to = std::make_unique<Buffer<T>>(static_cast<int64_t>(slot.size()));
  for (size_t i = 0; i < slot.size(); ++i) (*to)[i] = values[slot[i]];
  return to;
}

// Lines of the images that the next task packs, handed out to be prefetched.
class NextTask {
 public:
  template <class P>
  NextTask(const P& packer, const Task& task) : at_(packer.begin(task)), end_(packer.end(task)) {}
  const char* take(int64_t lines) {
    const char* at = at_ < end_ ? at_ : nullptr;
    if (at != nullptr) at_ += lines * kCellSize;
    return at;
  }

 private:
  const char *at_, *end_;
};

template <class T>
void conv_forward(const ConvShape& s, const T* x, const T* values, const T* bias, const int32_t* index,
                  T* y) {
  const Kernels<T>& kernel = kernels_for<T>();
  const IndexView<const int32_t> view(index, s.index());
  std::vector<int64_t> down, right;
  for (int64_t k = 0; k < s.y.kernel; ++k) down.push_back(k * s.y.dilation - s.y.padding);
  for (int64_t k = 0; k < s.x.kernel; ++k) right.push_back(k * s.x.dilation - s.x.padding);
  Grid grid = make_grid<T>(s.n, s.y.out, s.x.out);
  cut_bands(&grid, s.in * s.x.kernel * std::min(s.y.stride, s.y.kernel) * grid.row_cells() * kCellSize);
  const TileShape tile(s.in, down, right, s.y.stride, s.x.stride, grid.band, grid.row_cells());
  check_tile_bytes(tile.cells() * kCellSize);

  std::vector<uint32_t> place(s.cols);
  for (int64_t c = 0; c < s.cols; ++c) {
    const int64_t tap = c % s.taps();
    place[c] = static_cast<uint32_t>(
        tile.offset(c / s.taps() * s.b_in, down[tap / s.x.kernel], right[tap % s.x.kernel]));
  }
  const uint32_t channel = static_cast<uint32_t>(tile.pitch * kCellSize);
  const TapStream taps = s.csr ? row_taps(s, view, place, channel) : TapStream{};
  const auto val = gather_values(taps.slot, values);
  const TapBlocks blocks = s.csr ? TapBlocks{} : row_blocks(s, view, place, channel);
  const std::vector<BlockRow<T>> rows = block_rows(s, blocks, values, false);
  const Packer<T> packer(tile, grid, images(s, true, x));

  parallel(grid.tasks(), s.work(), [&](int64_t first, int64_t last) {
    constexpr int64_t lanes = kCellLanes<T>;
    const Buffer<T> in(tile.cells() * lanes), stage(packer.stage_elements()),
        panel(s.out * run_cells(s.csr, 4 * kRunCells) * lanes);
    Pixels<T> out(images(s, false, y), grid, 0, 1, 1);
    for (int64_t i = first; i < last; ++i) {
      const Task task = grid.task(i);
      packer.pack(kernel, task, stage.get(), in.get());
      NextTask next(packer, grid.task(std::min(i + 1, last - 1)));
      for (int64_t at = 0, cells, end = task.rows * grid.row_cells(); at < end; at += cells) {
        cells = run_cells(s.csr, end - at);
        const char* from = reinterpret_cast<const char*>(in.get() + at * lanes);
        kernel.fill(panel.get(), s.out, cells * lanes, bias);
        out.find(task, at, cells);
        for (int64_t t = 0; t < taps.tiles(); ++t) {
          const int64_t count = taps.tile_segment[t + 1] - taps.tile_segment[t];
          Ahead ahead;
          if (t == 0) out.lines(0, ahead.write, &ahead.write_plane);
          if (t >= std::min<int64_t>(1, taps.tiles() - 1)) ahead.next = next.take(count * cells);
          kernel.conv_spmm(cells, from, taps.segments.data() + taps.tile_segment[t], count,
                           taps.off.data() + taps.tile_entry[t], val->get() + taps.tile_entry[t], ahead,
                           panel.get());
        }
        T* to = panel.get();
        for (const BlockRow<T>& row : rows) {
          if (row.begin < row.end) kernel.bsr_spmm(cells, &row, from, channel, kCellSize, to);
          to += row.outputs * cells * lanes;
        }
        out.store(kernel, panel.get(), 0);
      }
    }
  });
}

}  // namespace sparse_kernels
