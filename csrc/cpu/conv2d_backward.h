// The gradients of a Conv2d on raw pointers.
//
// Both run over the input pixels, by phases of the stride: for its channel, a run of them reads the outputs
// that a tap leads to, from tiles of shifted copies of dY. x and dX themselves are never packed.
#pragma once

#include <cmath>

#include "conv2d_forward.h"

namespace sparse_kernels {

template <class T>
class ConvBackward {
 public:
  // The gradients that are not null.
  ConvBackward(const ConvShape& s, const T* dy, const T* x, const T* values, const int32_t* index, T* dx,
               T* dw, T* db)
      : s_(s),
        index_(index, s.index()),
        values_(values),
        dy_(images(s, false, dy)),
        x_(images(s, true, x)),
        dx_(images(s, true, dx)),
        dw_(dw),
        db_(db),
        grid_(make_grid<T>(s.n, s.y.lattice(0), s.x.lattice(0))) {
    std::vector<int64_t> down, right;
    for (int64_t phase = 0, shift; phase < s.y.phases(); ++phase)
      for (int64_t k = 0; k < s.y.kernel; ++k)
        if (s.y.reads(phase, k, &shift)) down.push_back(shift);
    for (int64_t phase = 0, shift; phase < s.x.phases(); ++phase)
      for (int64_t k = 0; k < s.x.kernel; ++k)
        if (s.x.reads(phase, k, &shift)) right.push_back(shift);
    const int64_t copies = static_cast<int64_t>(std::min<size_t>(right.size(), s.x.kernel));
    cut_bands(&grid_, s.out * copies * grid_.row_cells() * kCellSize);
    tile_ = std::make_unique<TileShape>(s.out, down, right, 1, 1, grid_.band, grid_.row_cells());
    check_tile_bytes(tile_->cells() * kCellSize);
    packer_ = std::make_unique<Packer<T>>(*tile_, grid_, dy_);
    for (int64_t y = 0; y < s.y.phases(); ++y)
      for (int64_t x = 0; x < s.x.stride; ++x) add_phase(y, x);
  }

  void run() {
    const Buffer<T> sums(parts() * entries()), of_images(need_sums() ? s_.n * s_.out : 0);
    parallel(parts(), s_.work(), [&](int64_t first, int64_t last) {
      Worker worker(*this);
      for (int64_t part = first; part < last; ++part) {
        T* into = sums.get() + part * entries();
        std::fill_n(into, entries(), T(0));
        for (int64_t i = grid_.tasks() * part / parts(); i < grid_.tasks() * (part + 1) / parts(); ++i)
          task(worker, i, into, of_images.get());
      }
    });
    std::vector<double> totals(s_.out);
    for (int64_t i = 0; need_sums() && i < s_.n; ++i)
      for (int64_t c = 0; c < s_.out; ++c) totals[c] += of_images[i * s_.out + c];
    for (int64_t c = 0; db_ != nullptr && c < s_.out; ++c) db_[c] = static_cast<T>(totals[c]);
    if (dw_ == nullptr) return;
    add_up(sums.get());
    mend(totals);
  }

 private:
  // Input pixels (y + i * stride, x + j * stride), and the taps that lead from them.
  struct Phase {
    TapStream taps;
    std::unique_ptr<Buffer<T>> val;
    TapBlocks blocks;
    std::vector<BlockRow<T>> rows;
    int64_t first;  // of its entries' sums
  };

  struct Worker {
    explicit Worker(const ConvBackward& b)
        : tile(b.tile_->cells() * lanes),
          stage(b.packer_->stage_elements()),
          x(b.panel() * b.s_.x.stride),
          dx(b.panel() * b.s_.x.stride) {
      for (int64_t y = 0; y < b.s_.y.phases(); ++y) {
        from.emplace_back(b.x_, b.grid_, y, b.s_.y.stride, b.s_.x.stride);
        to.emplace_back(b.dx_, b.grid_, y, b.s_.y.stride, b.s_.x.stride);
      }
    }
    const Buffer<T> tile, stage, x, dx;
    std::vector<Pixels<const T>> from;
    std::vector<Pixels<T>> to;
  };

  void add_phase(int64_t y, int64_t x) {
    std::vector<int64_t> place;
    for (int64_t ky = 0; ky < s_.y.kernel; ++ky)
      for (int64_t kx = 0, down, right; kx < s_.x.kernel; ++kx) {
        const bool both = s_.y.reads(y, ky, &down) & s_.x.reads(x, kx, &right) & (x < s_.x.phases());
        place.push_back(both ? tile_->offset(0, down, right) : -1);
      }
    const uint32_t channel = static_cast<uint32_t>(tile_->pitch * kCellSize);
    Phase phase{{}, nullptr, {}, {}, entries_};
    if (s_.csr) {
      phase.taps = column_taps(s_, index_, place, channel);
      phase.val = gather_values(phase.taps.slot, values_);
      entries_ += phase.taps.entries();
    } else {
      phase.blocks = column_blocks(s_, index_, place, channel);
    }
    phases_.push_back(std::move(phase));
    if (!s_.csr) phases_.back().rows = block_rows(s_, phases_.back().blocks, values_, true);
  }

  bool need_sums() const { return db_ != nullptr || dw_ != nullptr; }
  int64_t entries() const { return dw_ == nullptr ? 0 : s_.csr ? entries_ : s_.numel(); }

  // Tasks are summed up by parts, whose number depends on the shape alone: so do the bits.
  int64_t parts() const {
    constexpr int64_t kBytes = 16 << 20;
    const int64_t fit = kBytes / (std::max<int64_t>(entries(), 1) * static_cast<int64_t>(sizeof(T)));
    return std::clamp<int64_t>(fit, 1,
                               std::clamp<int64_t>(grid_.tasks(), 1, dw_ != nullptr ? 8 : grid_.tasks()));
  }

  void task(Worker& w, int64_t number, T* sums, T* of_images) const {
    const Task task = grid_.task(number);
    packer_->pack(kernel_, task, w.stage.get(), w.tile.get());
    if (need_sums() && task.row == 0)
      for (int64_t i = task.image; i < task.image + task.images; ++i)
        kernel_.conv_sums(dy_.data + i * dy_.image(), dy_.pixel(), dy_.plane(), s_.y.out * s_.x.out, s_.out,
                          of_images + i * s_.out);
    if (dx_.data == nullptr && dw_ == nullptr) return;
    const int64_t step = s_.x.stride;
    NextTask next(*packer_, grid_.task(std::min(number + 1, grid_.tasks() - 1)));
    for (int64_t y = 0; y < s_.y.phases(); ++y) {
      const int64_t rows = std::clamp<int64_t>(s_.y.lattice(y) - task.row, 0, task.rows);
      for (int64_t at = 0, cells, end = rows * grid_.row_cells(); at < end; at += cells) {
        cells = run_cells(s_.csr, end - at);
        const char* d = reinterpret_cast<const char*>(w.tile.get() + at * lanes);
        if (dw_ != nullptr) w.from[y].find(task, at, cells), w.from[y].load(kernel_, w.x.get(), panel());
        if (dx_.data != nullptr) w.to[y].find(task, at, cells);
        if (dw_ != nullptr && at + 2 * cells <= end) w.from[y].find(task, at + cells, cells);
        for (int64_t p = 0; p < step; ++p) {
          const Phase& phase = phases_[y * step + p];
          T *x = w.x.get() + p * panel(), *dx = w.dx.get() + p * panel();
          if (dx_.data != nullptr) kernel_.fill(dx, s_.in, cells * lanes, nullptr);
          Ahead ahead;
          if (dx_.data != nullptr && s_.csr) w.to[y].lines(p, ahead.write, &ahead.write_plane);
          if (dw_ != nullptr && s_.csr && at + 2 * cells <= end)
            w.from[y].lines(p, ahead.read, &ahead.read_plane);
          if (s_.csr)
            entries_of_run(phase, cells, d, x, dx, sums, ahead, &next);
          else
            blocks_of_run(phase, cells, d, x, dx, sums);
        }
        if (dx_.data != nullptr) w.to[y].store(kernel_, w.dx.get(), panel());
      }
    }
  }

  int64_t panel() const { return s_.in * run_cells(s_.csr, 4 * kRunCells) * lanes; }  // elements

  void entries_of_run(const Phase& phase, int64_t cells, const char* d, const T* x, T* dx, T* sums,
                      Ahead ahead, NextTask* next) const {
    const TapStream& taps = phase.taps;
    for (int64_t t = 0; t < taps.tiles(); ++t) {
      const RowLength* segments = taps.segments.data() + taps.tile_segment[t];
      const int64_t count = taps.tile_segment[t + 1] - taps.tile_segment[t], at = taps.tile_entry[t];
      const uint32_t* off = taps.off.data() + at;
      T* out = sums + phase.first + at;
      Ahead now;
      if (t == 0) std::copy_n(ahead.write, 8, now.write), now.write_plane = ahead.write_plane;
      if (t == std::min<int64_t>(1, taps.tiles() - 1))
        std::copy_n(ahead.read, 8, now.read), now.read_plane = ahead.read_plane;
      if (t >= std::min<int64_t>(2, taps.tiles() - 1)) now.next = next->take(count * cells);
      if (dw_ == nullptr)
        kernel_.conv_spmm(cells, d, segments, count, off, phase.val->get() + at, now, dx);
      else if (dx_.data == nullptr)
        kernel_.conv_sddmm(cells, d, x, segments, count, off, out);
      else
        kernel_.conv_backward(cells, d, x, segments, count, off, phase.val->get() + at, now, dx, out);
    }
  }

  void blocks_of_run(const Phase& phase, int64_t cells, const char* d, const T* x, T* dx, T* sums) const {
    const int64_t channel = tile_->pitch * kCellSize, row = cells * kCellSize;
    int64_t cell[4 * kRunCells];
    for (int64_t c = 0; c < cells; ++c) cell[c] = c * kCellSize;
    for (const BlockRow<T>& r : phase.rows) {
      if (dx_.data != nullptr && r.begin < r.end) kernel_.bsr_spmm(cells, &r, d, channel, kCellSize, dx);
      for (int64_t b = r.begin; dw_ != nullptr && b < r.end; ++b)
        kernel_.bsr_sddmm(s_.b_out, s_.b_in, reinterpret_cast<const char*>(x), row, cell, d + r.off[b],
                          channel, cell, cells, sums + r.block[b] * r.block_numel);
      dx += r.outputs * cells * kCellLanes<T>, x += r.outputs * cells * kCellLanes<T>;
    }
  }

  void add_up(T* sums) const {
    parallel(entries(), 32.0 * static_cast<double>(entries() * parts()), [&](int64_t first, int64_t last) {
      for (int64_t p = 1; p < parts(); ++p) {
        const T* part = sums + p * entries();
        for (int64_t i = first; i < last; ++i) sums[i] += part[i];
      }
    });
    if (!s_.csr) return std::copy_n(sums, s_.numel(), dw_), void();
    if (entries_ < s_.numel()) std::fill_n(dw_, s_.numel(), T(0));  // some taps meet padding only
    for (const Phase& phase : phases_)
      for (size_t i = 0; i < phase.taps.slot.size(); ++i) dw_[phase.taps.slot[i]] = sums[phase.first + i];
  }

  // The sums above run over the input pixels of the images: they leave out dY where it meets padding and take
  // in pixels that no output of the tap reads, times zero. Only values that are not finite can tell, and
  // gradients that they may have reached are summed up once more, by definition.
  void mend(const std::vector<double>& totals) const {
    const auto finite = [](T v) { return v - v == T(0); };
    bool all = true;
    for (double total : totals) all = all && total - total == 0;
    T any = 0;
    for (int64_t i = 0; i < s_.numel(); ++i)
      any = std::max(any, std::abs(dw_[i] - dw_[i]) == T(0) ? T(0) : T(1));
    if (all && any == T(0)) return;
    for (int64_t r = 0; r < s_.rows; ++r)
      for (int64_t i = index_.row_ptr[r]; i < index_.row_ptr[r + 1]; ++i)
        for (int64_t k = 0; k < s_.b_out * s_.b_in; ++k) {
          T* dw = dw_ + (s_.csr ? i : index_.slot[i]) * s_.b_out * s_.b_in + k;
          const int64_t out = r * s_.b_out + k / s_.b_in;
          const double total = totals[out];
          if (finite(*dw) && total - total == 0) continue;
          const int64_t tap = index_.col_idx[i] % s_.taps(), in = s_.group_of(r) * s_.group_in() +
                                                                  index_.col_idx[i] / s_.taps() * s_.b_in +
                                                                  k % s_.b_in;
          *dw = gradient(out, in, tap / s_.x.kernel, tap % s_.x.kernel);
        }
  }

  T gradient(int64_t out, int64_t in, int64_t ky, int64_t kx) const {
    double sum = 0;
    for (int64_t i = 0; i < s_.n; ++i)
      for (int64_t p = 0; p < s_.y.out * s_.x.out; ++p) {
        const int64_t y = p / s_.x.out * s_.y.stride + ky * s_.y.dilation - s_.y.padding,
                      x = p % s_.x.out * s_.x.stride + kx * s_.x.dilation - s_.x.padding;
        const bool inside = y >= 0 && y < s_.y.size && x >= 0 && x < s_.x.size;
        const T seen =
            inside ? x_.data[i * x_.image() + in * x_.plane() + (y * x_.w + x) * x_.pixel()] : T(0);
        sum += static_cast<double>(seen) * dy_.data[i * dy_.image() + out * dy_.plane() + p * dy_.pixel()];
        if (sum != sum) return static_cast<T>(sum);
      }
    return static_cast<T>(sum);
  }

  static constexpr int64_t lanes = kCellLanes<T>;
  const ConvShape s_;
  const IndexView<const int32_t> index_;
  const T* values_;
  const Images<const T> dy_, x_;
  const Images<T> dx_;
  T *const dw_, *const db_;
  Grid grid_;
  std::unique_ptr<TileShape> tile_;
  std::unique_ptr<Packer<T>> packer_;
  std::vector<Phase> phases_;
  int64_t entries_ = 0;
  const Kernels<T>& kernel_ = kernels_for<T>();
};

}  // namespace sparse_kernels
