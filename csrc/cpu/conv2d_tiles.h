// Moving the pixels of a task: images -> tiles of copies, runs <-> panels [channel][cells of the run].
#pragma once

#include <cstring>

#include "conv2d_grid.h"

namespace sparse_kernels {

// Fills tiles. A plane is first staged: its rows one below the other, zeros around them, split by the
// remainder of the column modulo the stride. Each copy is then a shifted read of that.
template <class T>
class Packer {
 public:
  Packer(const TileShape& tile, const Grid& grid, const Images<const T>& from)
      : tile_(tile), grid_(grid), from_(from) {
    const int64_t lanes = kCellLanes<T>;
    for (int64_t shift : tile.shifts) {
      const int64_t residue = (shift - tile.left) % tile.stride_x, at = (shift - tile.left) / tile.stride_x;
      if (std::none_of(parts_.begin(), parts_.end(), [&](const Part& p) { return p.residue == residue; })) {
        // Entries t of this part hold column left + residue + stride * t. The first that there is stands at
        // the start of a cell.
        const int64_t column = tile.left + residue;
        const int64_t t = column >= 0 ? 0 : ceil_div(-column, tile.stride_x), x = column + t * tile.stride_x;
        const int64_t count = x < from.w ? ceil_div(from.w - x, tile.stride_x) : 0;
        parts_.push_back({residue, pitch_ + round_up(t, lanes) - t, t, x, count});
        int64_t most = 0;
        for (int64_t other : tile.shifts) most = std::max(most, (other - tile.left) / tile.stride_x);
        pitch_ +=
            round_up(t, lanes) + round_up(std::max(count, most + grid.width * grid.unit), lanes) + lanes;
      }
      for (const Part& part : parts_)
        if (part.residue == residue) reads_.push_back(part.at + at);
    }
    last_ = grid.cols - (grid.width - 1) * grid.unit;
  }

  int64_t channels() const { return from_.channels_last ? kCellLanes<T> : 1; }  // staged at once
  int64_t stage_elements() const { return channels() * grid_.group() * image(); }

  void pack(const Kernels<T>& kernel, const Task& task, T* stage, T* tile) const {
    if (reads_.empty()) return;
    std::fill_n(stage, stage_elements(), T(0));
    for (int64_t c = 0; c < tile_.channels; c += channels()) {
      const int64_t count = std::min(channels(), tile_.channels - c);
      for (int64_t i = 0; i < task.images; ++i)
        for (const TileShape::Plane& plane : tile_.planes) {
          // Rows of the plane that the images have.
          const int64_t y = task.row * tile_.stride_y + tile_.top + plane.residue;
          const int64_t r0 = y >= 0 ? 0 : std::min(ceil_div(-y, tile_.stride_y), plane.rows);
          const int64_t r1 =
              std::clamp(y < from_.h ? ceil_div(from_.h - y, tile_.stride_y) : 0, r0, plane.rows);
          if (r0 == r1) continue;
          const T* source = from_.data + (task.image + i) * from_.image() + c * from_.plane() +
                            (y + r0 * tile_.stride_y) * from_.w * from_.pixel();
          for (const Part& part : parts_)
            stage_rows(kernel, part, source + part.x * from_.pixel(), count, r1 - r0,
                       stage + i * image() + (plane.first + r0) * pitch_ + part.at + part.t);
        }
      for (int64_t j = 0; j < count; ++j)
        copy(kernel, stage + j * grid_.group() * image(), tile + (c + j) * tile_.pitch * kCellLanes<T>);
    }
  }

  // What it reads of a task, if that is whole images: [begin, end).
  const char* begin(const Task& task) const {
    return reinterpret_cast<const char*>(from_.data + task.image * from_.image());
  }
  const char* end(const Task& task) const {
    return grid_.bands() > 1
               ? begin(task)
               : reinterpret_cast<const char*>(from_.data + (task.image + task.images) * from_.image());
  }

 private:
  struct Part {
    int64_t residue, at, t, x, count;  // entry t of a row at `at` + t; from column x on, `count` of them
  };

  int64_t image() const { return tile_.rows * pitch_; }

  void stage_rows(const Kernels<T>& kernel, const Part& part, const T* source, int64_t channels, int64_t rows,
                  T* to) const {
    const int64_t row = tile_.stride_y * from_.w * from_.pixel(), lanes = kCellLanes<T>;
    if (!from_.channels_last)
      return kernel.conv_rows(source, row, rows, part.count, tile_.stride_x, to, pitch_);
    const int64_t step = tile_.stride_x * from_.channels;
    const T* at[kCellLanes<T>];
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < part.count; t += lanes) {
        for (int64_t l = 0; l < lanes; ++l)
          at[l] = t + l < part.count ? source + r * row + (t + l) * step : nullptr;
        kernel.conv_pack_pixels(at, channels, to + r * pitch_ + t, grid_.group() * image());
      }
  }

  void copy(const Kernels<T>& kernel, const T* stage, T* tile) const {
    for (size_t b = 0; b < reads_.size(); ++b)
      for (int64_t set = 0; set < grid_.sets; ++set)
        kernel.conv_copy(stage + set * grid_.per_cell * image() + reads_[b], pitch_, image(), grid_.unit,
                         tile_.rows, grid_.width, last_,
                         tile + (b * tile_.copy + set * grid_.width) * kCellLanes<T>,
                         grid_.row_cells() * kCellLanes<T>);
  }

  const TileShape tile_;
  const Grid grid_;
  const Images<const T> from_;
  std::vector<Part> parts_;
  std::vector<int64_t> reads_;  // where in a staged row each copy starts
  int64_t pitch_ = 0, last_;
};

// Where the pixels of runs stand in images: a lattice pixel (i, j) stands for the `step` neighbours from
// (y0 + i * stride_y, j * step) on, of which each goes to a panel of its own.
template <class T>
class Pixels {
 public:
  Pixels(const Images<T>& images, const Grid& grid, int64_t y0, int64_t stride_y, int64_t step)
      : images_(images), grid_(grid), y0_(y0), stride_y_(stride_y), step_(step) {}

  // Cells [first, first + count) of a task.
  void find(const Task& task, int64_t first, int64_t count) {
    pieces_.clear(), whole_ = true, cells_ = count;
    for (int64_t k = 0; k < count; ++k) {
      const int64_t row = y0_ + (task.row + (first + k) / grid_.row_cells()) * stride_y_;
      const int64_t rest = (first + k) % grid_.row_cells(), col = rest % grid_.width * grid_.unit * step_;
      for (int64_t i = 0; i < grid_.per_cell; ++i) {
        const int64_t image = rest / grid_.width * grid_.per_cell + i;
        const int64_t pixels = std::min(grid_.unit * step_, images_.w - col);
        whole_ = whole_ && image < task.images && pixels == grid_.unit * step_;
        if (image >= task.images || pixels <= 0) continue;
        pieces_.push_back({(task.image + image) * images_.image() + (row * images_.w + col) * images_.pixel(),
                           k * kCellLanes<T> + i * grid_.unit, pixels});
      }
    }
  }

  // The lines of channel 0 that hold panel p of this run, a line for every cell. NCHW only.
  void lines(int64_t p, const char** at, int64_t* plane) const {
    if (images_.channels_last || pieces_.empty()) return;
    std::vector<int64_t> begins;
    for (const Piece& piece : pieces_) begins.push_back(piece.at);
    std::sort(begins.begin(), begins.end());
    for (int64_t k = 0; k < std::min(cells_, kRunCells); ++k)
      at[k] =
          reinterpret_cast<const char*>(images_.data + begins[k * begins.size() / cells_]) + p * kCellSize;
    *plane = images_.plane() * static_cast<int64_t>(sizeof(T));
  }

  // panels: [step][channels][cells], `size` elements each.
  void load(const Kernels<std::remove_const_t<T>>& kernel, std::remove_const_t<T>* panels,
            int64_t size) const {
    const int64_t row = cells_ * kCellLanes<T>;
    if (images_.channels_last) {
      const std::remove_const_t<T>* lanes[kMost];
      for (int64_t p = 0; p < step_; ++p) {
        spread(p, lanes);
        for (int64_t k = 0; k < row; k += kCellLanes<T>)
          kernel.conv_pack_pixels(lanes + k, images_.channels, panels + p * size + k, row);
      }
      return;
    }
    for (int64_t p = 0; !whole_ && p < step_; ++p) std::fill_n(panels + p * size, images_.channels * row, 0);
    kernel.conv_load(images_.data, images_.plane(), images_.channels, pieces_.data(), pieces_.size(), step_,
                     row, panels, size);
  }

  void store(const Kernels<T>& kernel, const T* panels, int64_t size) const {
    const int64_t row = cells_ * kCellLanes<T>;
    if (images_.channels_last) {
      T* lanes[kMost];
      for (int64_t p = 0; p < step_; ++p) {
        spread(p, lanes);
        for (int64_t k = 0; k < row; k += kCellLanes<T>)
          kernel.conv_unpack_pixels(panels + p * size + k, row, images_.channels, lanes + k);
      }
      return;
    }
    kernel.conv_store(panels, size, row, images_.channels, pieces_.data(), pieces_.size(), step_,
                      images_.data, images_.plane());
  }

 private:
  static constexpr int64_t kMost = 4 * kRunCells * kCellLanes<T>;

  // The pixel of every lane of panel p.
  template <class P>
  void spread(int64_t p, P* lanes) const {
    std::fill_n(lanes, cells_ * kCellLanes<T>, nullptr);
    for (const Piece& piece : pieces_)
      for (int64_t i = p; i < piece.count; i += step_)
        lanes[piece.lane + i / step_] = images_.data + piece.at + i * images_.channels;
  }

  const Images<T> images_;
  const Grid grid_;
  const int64_t y0_, stride_y_, step_;
  std::vector<Piece> pieces_;
  bool whole_ = false;
  int64_t cells_ = 0;
};

template <class T>
Images<T> images(const ConvShape& s, bool input, T* data) {
  return input ? Images<T>{data, s.n, s.in, s.y.size, s.x.size, s.channels_last}
               : Images<T>{data, s.n, s.out, s.y.out, s.x.out, s.channels_last};
}

}  // namespace sparse_kernels
