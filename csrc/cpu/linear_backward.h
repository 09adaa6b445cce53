// Gradients of a Linear.
#pragma once

#include "linear_bsr.h"

namespace sparse_kernels {

// dY [tokens, out] as panels, tile by tile, and the bias gradient on the way.
template <class T, class S>
class OutputGradient {
 public:
  OutputGradient(const LinearShape& shape, const S* dy, int64_t cells, S* db)
      : shape_(shape),
        dy_(dy),
        cells_(cells),
        lanes_(cells * kCellSize / static_cast<int64_t>(sizeof(T))),
        db_(db),
        sums_(db != nullptr ? tiles() * shape.out : 0) {}

  int64_t lanes() const { return lanes_; }
  int64_t tiles() const { return (shape_.tokens + lanes_ - 1) / lanes_; }
  int64_t tokens(int64_t tile) const { return std::min(lanes_, shape_.tokens - tile * lanes_); }

  void pack(int64_t tile, T* panel) const {
    stored_for<T, S>().pack(dy_ + tile * lanes_ * shape_.out, shape_.out, tokens(tile), shape_.out, panel,
                            lanes_, cells_, db_ != nullptr ? sums_.get() + tile * shape_.out : nullptr);
  }

  // When every tile has been packed: adds their sums up in order, whoever packed them.
  void finish() const {
    if (db_ == nullptr) return;
    for (int64_t tile = 1; tile < tiles(); ++tile)
      for (int64_t f = 0; f < shape_.out; ++f) sums_[f] += sums_[tile * shape_.out + f];
    stored_for<T, S>().narrow(sums_.get(), shape_.out, db_);
  }

 private:
  const LinearShape shape_;
  const S* const dy_;
  const int64_t cells_, lanes_;
  S* const db_;
  const Buffer<T> sums_;  // of every tile
};

// Cells of tokens that a block's gradient is summed over in registers before lanes are added up.
constexpr int64_t kCellsAtOnce = 16;

// Weight gradient of a chunk of packed tiles: dw (in plan order for CSR) += dY^T X at the active positions;
// `fresh`, CSR only: = instead. Each thread owns some entries over all tiles, in order: the same sums for any
// number of threads.
template <class T, class S>
void weight_gradient(const LinearShape& shape, const Side<T, S>& side, int64_t cells, const T* xs,
                     const T* ds, int64_t tiles, bool fresh, T* dw) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t pitch = cells * kCellSize;
  const char *x0 = reinterpret_cast<const char*>(xs), *d0 = reinterpret_cast<const char*>(ds);
  const double work = static_cast<double>(tiles) * pitch / sizeof(T) * shape.n * shape.b_out * shape.b_in;
  if (shape.csr) {
    const PlanView<const int32_t>& plan = side.csr().plan();
    const int64_t parts = worthwhile_threads(work);
    // By rows a plan has one block: its pieces are its tiles.
    const std::vector<SegmentCut> cut =
        cut_segments(plan.runs(), plan.piece_segment, plan.piece_entry, plan.shape.tiles, parts);
    parallel(parts, work, [&](int64_t first, int64_t last) {
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t t = 0; t < plan.shape.tiles; ++t)
          for (int64_t part = first; part < last; ++part) {
            const SegmentCut *at = &cut[t * (parts + 1) + part], *end = at + 1;
            kernel.csr_sddmm(cells, x0 + (tile * shape.in + t * plan.shape.width) * pitch,
                             ds + tile * shape.out * pitch / static_cast<int64_t>(sizeof(T)),
                             plan.runs() + at->segment, end->segment - at->segment, plan.near() + at->entry,
                             fresh && tile == 0, dw + at->entry);
          }
    });
    return;
  }
  parallel(shape.rows, work, [&](int64_t first, int64_t last) {
    std::vector<int64_t> x_cell, d_cell;
    const BsrSide<T>& blocks = side.bsr();
    for (int64_t c0 = 0; c0 < tiles * cells; c0 += kCellsAtOnce) {
      x_cell.clear(), d_cell.clear();
      for (int64_t c = c0; c < std::min(c0 + kCellsAtOnce, tiles * cells); ++c) {
        x_cell.push_back(c / cells * shape.in * pitch + c % cells * kCellSize);
        d_cell.push_back(c / cells * shape.out * pitch + c % cells * kCellSize);
      }
      for (int64_t r = first; r < last; ++r) {
        const BlockRow<T> row = blocks.block_row(r);
        for (int64_t b = row.begin; b < row.end; ++b)
          kernel.bsr_sddmm(shape.b_out, shape.b_in, x0 + row.off[b], pitch, x_cell.data(),
                           d0 + r * shape.b_out * pitch, pitch, d_cell.data(),
                           static_cast<int64_t>(x_cell.size()), dw + row.block[b] * row.block_numel);
      }
    }
  });
}

// Cells to a tile for weight gradients of CSR. Twice as many halve the transpose-reduce, which is worth it if
// they waste no cells, dY's panel leaves half of the second-level cache to the rest, and there are weights
// enough to read it from the first-level one at times. Follows neither threads nor what is asked for, since
// the order of the sums must not.
template <class T>
int64_t gradient_cells(const LinearShape& shape) {
  const int64_t most = kernels().gradient_cells, lanes = most * kCellSize / static_cast<int64_t>(sizeof(T));
  const int64_t rest = shape.tokens % lanes;
  const bool fits = shape.out * most * kCellSize <= second_level_cache() / 2;
  const bool pays = shape.n >= shape.in * shape.out / 16 && (rest == 0 || rest > lanes / 2);
  return fits && pays ? most : tile_cells<T>(shape.tokens, 1);
}

// Bounds of `parts` runs of blocks of columns, of nearly equal entries.
inline std::vector<int64_t> block_cut(const IndexView<const int32_t>& view, int64_t parts) {
  const PlanShape& plan = view.col_plan.shape;
  std::vector<int64_t> cut{0};
  for (int64_t p = 1; p < parts; ++p) {
    const int32_t target = static_cast<int32_t>(plan.n * p / parts);
    const int64_t column = std::lower_bound(view.col_ptr, view.col_ptr + plan.rows, target) - view.col_ptr;
    cut.push_back(std::clamp((column + plan.block / 2) / plan.block, cut.back(), plan.blocks));
  }
  cut.push_back(plan.blocks);
  return cut;
}

// Both gradients of CSR weights in one pass over the columns, or dw alone (dx null). A thread owns a run of
// columns over all tokens, in order: no two add to the same sum, and the sums are those of any other number
// of threads.
template <class T, class S>
void csr_backward(const LinearShape& shape, const IndexView<const int32_t>& view, const S* x, const S* values,
                  int64_t cells, const OutputGradient<T, S>& dy, S* dx, S* dw) {
  const Kernels<T>& kernel = kernels_for<T>();
  const Stored<T, S>& stored = stored_for<T, S>();
  const int64_t lanes = dy.lanes(), parts = worthwhile_threads(shape.work());
  const CsrSide<T, S> side =
      dx != nullptr ? CsrSide<T, S>(view, true, values, nullptr) : CsrSide<T, S>(view, true);
  const std::vector<int64_t> cut = block_cut(view, parts);

  // A tile for each thread at a time, so that dY's panels are still in cache when all threads read them.
  const int64_t chunk = std::min(parts, dy.tiles());
  const Buffer<T> sums(shape.n), ds(chunk * shape.out * lanes);
  for (int64_t start = 0; start < dy.tiles(); start += chunk) {
    const int64_t end = std::min(start + chunk, dy.tiles());
    const double work = shape.work() * (end - start) / dy.tiles();
    parallel(end - start, work, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) dy.pack(start + i, ds.get() + i * shape.out * lanes);
    });
    parallel(parts, work, [&](int64_t first, int64_t last) {
      // A block of columns at a time, so that its panels leave the second-level cache to dY's.
      const int64_t block = side.plan().shape.block;
      const Buffer<T> in(block * lanes), sums_x(dx != nullptr ? block * lanes : 0);
      T* out = dx != nullptr ? sums_x.get() : nullptr;
      for (int64_t tile = start; tile < end; ++tile)
        for (int64_t b = cut[first]; b < cut[last]; ++b) {
          const int64_t column = b * block, width = std::min(block, shape.in - column);
          const int64_t at = tile * lanes * shape.in + column;
          stored.pack(x + at, shape.in, dy.tokens(tile), width, in.get(), lanes, cells, nullptr);
          const T* d = ds.get() + (tile - start) * shape.out * lanes;
          side.each_tile(
              b, b + 1,
              [&](int64_t row, const RowLength* segments, int64_t n, const uint16_t* near, int64_t entry) {
                kernel.csr_backward(cells, reinterpret_cast<const char*>(d + row * lanes), column, in.get(),
                                    segments, n, near, dx != nullptr ? side.values() + entry : nullptr,
                                    row == 0, out, tile == 0, sums.get() + entry);
              });
          if (dx != nullptr) stored.unpack(out, lanes, dy.tokens(tile), width, dx + at, shape.in);
        }
    });
  }
  side.restore(sums.get(), dw);
}

// The gradients that are not null.
template <class T, class S>
void linear_gradients(const LinearShape& shape, const S* dy_data, const S* x, const S* values,
                      const int32_t* index, S* dx, S* dw, S* db) {
  const Kernels<T>& kernel = kernels_for<T>();
  const Stored<T, S>& stored = stored_for<T, S>();
  const IndexView<const int32_t> view(index, shape.index());
  if (shape.tokens == 0 && dw != nullptr) std::fill_n(dw, shape.n * shape.b_out * shape.b_in, S{});
  if (shape.tokens == 0 && db != nullptr) std::fill_n(db, shape.out, S{});
  if (shape.tokens == 0) return;
  if constexpr (std::is_same_v<T, S>)
    if (!shape.csr && strip_group<T>(shape, shape.b_in, shape.b_out) != 0)
      return strip_gradients<T>(shape, view, dy_data, x, values, dx, dw, db);

  // Not a function of the threads where sums over tokens follow the tiles.
  const bool sums_tokens = dw != nullptr || db != nullptr;
  const int64_t cells = sums_tokens && shape.csr
                            ? gradient_cells<T>(shape)
                            : tile_cells<T>(shape.tokens, sums_tokens ? 1 : worthwhile_threads(shape.work()));
  check_tile_bytes(std::max(shape.in, shape.out) * cells * kCellSize);
  const OutputGradient<T, S> dy(shape, dy_data, cells, db);
  const int64_t lanes = dy.lanes(), tiles = dy.tiles();
  // In one pass, unless that would leave threads without a block of columns.
  if (shape.csr && dw != nullptr &&
      worthwhile_threads(shape.work()) <= std::max<int64_t>(1, view.col_plan.shape.blocks)) {
    csr_backward(shape, view, x, values, cells, dy, dx, dw);
    return dy.finish();
  }

  std::unique_ptr<Side<T, S>> columns, rows;
  if (dx != nullptr) columns = std::make_unique<Side<T, S>>(shape, view, true, values, nullptr, cells);
  if (dw != nullptr) rows = std::make_unique<Side<T, S>>(shape, view, cells);
  // Panels of x and dY are kept for the weight gradient: one tile a thread at a time, so that they are
  // still in cache when it reads them; for blocks, whose sums are reduced once for kCellsAtOnce cells, a
  // whole number of those.
  const int64_t unit = shape.csr ? 1 : kCellsAtOnce / cells;
  const int64_t wanted = (worthwhile_threads(shape.work()) + unit - 1) / unit * unit;
  const int64_t chunk = std::min(dw == nullptr ? tiles : wanted, tiles);
  const Buffer<T> xs(dw != nullptr ? chunk * shape.in * lanes : 0),
      ds(dw != nullptr ? chunk * shape.out * lanes : 0);
  const Buffer<T> sums(dw != nullptr && shape.csr ? shape.n : 0);
  if (dw != nullptr && !shape.csr) std::fill_n(dw, shape.n * shape.b_out * shape.b_in, S{});

  for (int64_t start = 0; start < tiles; start += chunk) {
    const int64_t count = std::min(chunk, tiles - start);
    parallel(count, shape.work() * count / tiles, [&](int64_t first, int64_t last) {
      const Buffer<T> own(dw != nullptr ? 0 : shape.out * lanes), out(dx != nullptr ? shape.in * lanes : 0);
      for (int64_t i = first; i < last; ++i) {
        const int64_t at = (start + i) * lanes * shape.in, tokens = dy.tokens(start + i);
        T* d = dw != nullptr ? ds.get() + i * shape.out * lanes : own.get();
        dy.pack(start + i, d);
        if (dx != nullptr) {
          columns->spmm(kernel, d, out.get());
          stored.unpack(out.get(), lanes, tokens, shape.in, dx + at, shape.in);
        }
        if (dw != nullptr)
          stored.pack(x + at, shape.in, tokens, shape.in, xs.get() + i * shape.in * lanes, lanes, cells,
                      nullptr);
      }
    });
    if (dw == nullptr) continue;
    T* to = sums.get();
    if constexpr (std::is_same_v<T, S>) to = shape.csr ? to : dw;
    weight_gradient(shape, *rows, cells, xs.get(), ds.get(), count, start == 0, to);
  }
  if (dw != nullptr && shape.csr) rows->csr().restore(sums.get(), dw);
  dy.finish();
}

}  // namespace sparse_kernels
