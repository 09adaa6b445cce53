// The weights of a Linear as the drivers hand them to the kernels: one direction at a time, CSR or BSR.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "driver.h"

namespace sparse_kernels {

struct LinearShape {
  int64_t tokens, in, out, rows, cols, b_out, b_in, n;
  bool csr;
  IndexShape index() const { return {rows, cols, 1, n, csr ? Plans::kLinear : Plans::kBlocks}; }
  double work() const { return static_cast<double>(tokens) * n * b_out * b_in; }
};

inline LinearShape linear_shape(int64_t tokens, const std::vector<int64_t>& values, int64_t rows,
                                int64_t cols) {
  const bool csr = values.size() == 1;
  STD_TORCH_CHECK(csr || values.size() == 3, "values must be [nnz] or [n_blocks, b_out, b_in]");
  const int64_t b_out = csr ? 1 : values[1], b_in = csr ? 1 : values[2];
  return {tokens, cols * b_in, rows * b_out, rows, cols, b_out, b_in, values[0], csr};
}

// One direction of CSR weights, in the order of its plan: row-wise (forward, weight gradient) or column-wise
// (input gradient).
template <class T, class S = T>
class CsrSide {
 public:
  // The positions alone, for a weight gradient.
  CsrSide(const IndexView<const int32_t>& index, bool transposed)
      : plan_(transposed ? index.col_plan : index.row_plan), values_(0), bias_(0) {}

  // For products, whose rows start from bias [rows], or zero if it is null.
  CsrSide(const IndexView<const int32_t>& index, bool transposed, const S* values, const S* bias)
      : plan_(transposed ? index.col_plan : index.row_plan),
        values_(plan_.shape.n),
        bias_(bias != nullptr ? plan_.shape.rows : 0),
        has_bias_(bias != nullptr) {
    collect(values);
    if (has_bias_) stored_for<T, S>().widen(bias, plan_.shape.rows, bias_.get());
  }

  // f(x's first column, segments, their number, near, index of the first entry) for every tile, of the
  // segments of blocks [first, last).
  template <class F>
  void each_tile(int64_t first, int64_t last, const F& f) const {
    for (int64_t tile = 0; tile < plan_.shape.tiles; ++tile) {
      const int64_t piece = tile * plan_.shape.blocks, segment = plan_.piece_segment[piece + first],
                    entry = plan_.piece_entry[piece + first];
      f(tile * plan_.shape.width, plan_.runs() + segment, plan_.piece_segment[piece + last] - segment,
        plan_.near() + entry, entry);
    }
  }

  // out [rows][cells] = bias + W * in [columns][cells]. By columns the order of the sums is csr_backward's.
  void spmm(const Kernels<T>& kernel, int64_t cells, const T* in, T* out) const {
    each_tile(
        0, plan_.shape.blocks,
        [&](int64_t column, const RowLength* segments, int64_t count, const uint16_t* near, int64_t entry) {
          kernel.csr_spmm(cells, !plan_.shape.reordered,
                          reinterpret_cast<const char*>(in) + column * cells * kCellSize, segments, count,
                          near, values() + entry, column == 0, has_bias_ ? bias_.get() : nullptr, out);
        });
  }

  // Results in plan order -> order of the values.
  void restore(const T* from, S* to) const {
    if (plan_.shape.reordered)
      return each_run([&](int64_t begin, int64_t n) {
        stored_for<T, S>().scatter(from + begin, plan_.source + begin, n, to);
      });
    parallel(plan_.shape.pieces(), copying(), [&](int64_t first, int64_t last) {
      const T* next = from + plan_.piece_entry[first];
      for (int64_t s = plan_.piece_segment[first]; s < plan_.piece_segment[last]; ++s) {
        stored_for<T, S>().narrow(next, plan_.runs()[s].length, to + plan_.begin[s]);
        next += plan_.runs()[s].length;
      }
    });
  }

  const PlanView<const int32_t>& plan() const { return plan_; }
  const T* values() const { return values_.get(); }

 private:
  // Values in their order -> plan order.
  void collect(const S* values) const {
    if (plan_.shape.reordered)
      return each_run([&](int64_t begin, int64_t n) {
        stored_for<T, S>().gather(values, plan_.source + begin, n, values_.get() + begin);
      });
    parallel(plan_.shape.pieces(), copying(), [&](int64_t first, int64_t last) {
      const int64_t segment = plan_.piece_segment[first], entry = plan_.piece_entry[first];
      stored_for<T, S>().collect(values, plan_.shape.n, plan_.runs() + segment, plan_.begin + segment,
                                 plan_.piece_segment[last] - segment, plan_.piece_entry[last] - entry,
                                 values_.get() + entry);
    });
  }

  // f(begin, count) for runs of the entries.
  template <class F>
  void each_run(const F& f) const {
    constexpr int64_t kRun = 4096;
    const int64_t n = plan_.shape.n;
    parallel((n + kRun - 1) / kRun, copying(),
             [&](int64_t first, int64_t last) { f(first * kRun, std::min(last * kRun, n) - first * kRun); });
  }

  // Multiply-adds that copying all entries is worth.
  double copying() const { return 16.0 * static_cast<double>(plan_.shape.n); }

  const PlanView<const int32_t> plan_;
  const Buffer<T> values_;
  const Buffer<T> bias_;
  const bool has_bias_ = false;
};

// The same for BSR weights.
template <class T>
class BsrSide {
 public:
  BsrSide(const LinearShape& shape, const IndexView<const int32_t>& index, bool transposed, const T* values,
          const T* bias, int64_t cells)
      : shape_(shape),
        transposed_(transposed),
        cells_(cells),
        bias_(bias),
        ptr_(transposed ? index.col_ptr : index.row_ptr),
        values_(values),
        off_(shape.n),
        block_(shape.n) {
    const int32_t* idx = transposed ? index.row_idx : index.col_idx;
    const uint32_t span = static_cast<uint32_t>((transposed ? shape.b_out : shape.b_in) * cells * kCellSize);
    for (int64_t i = 0; i < shape.n; ++i) {
      off_[i] = static_cast<uint32_t>(idx[i]) * span;
      block_[i] = transposed ? index.perm[i] : index.slot[i];
    }
  }

  // out [features][cells] = bias + W * in.
  void spmm(const Kernels<T>& kernel, const T* in, T* out) const {
    const int64_t outputs = transposed_ ? shape_.b_in : shape_.b_out;
    const int64_t lanes = cells_ * kCellSize / static_cast<int64_t>(sizeof(T));
    kernel.fill(out, transposed_ ? shape_.in : shape_.out, lanes, bias_);
    for (int64_t r = 0; r < (transposed_ ? shape_.cols : shape_.rows); ++r) {
      const BlockRow<T> row = block_row(r);
      if (row.begin < row.end)
        kernel.bsr_spmm(cells_, &row, reinterpret_cast<const char*>(in), cells_ * kCellSize, kCellSize,
                        out + r * outputs * lanes);
    }
  }

  BlockRow<T> block_row(int64_t r) const {
    const int64_t outputs = transposed_ ? shape_.b_in : shape_.b_out;
    const int64_t inputs = transposed_ ? shape_.b_out : shape_.b_in;
    return {ptr_[r],
            ptr_[r + 1],
            off_.data(),
            block_.data(),
            values_,
            outputs,
            inputs,
            outputs * inputs,
            transposed_ ? 1 : inputs,
            transposed_ ? outputs : 1};
  }

 private:
  const LinearShape shape_;
  const bool transposed_;
  const int64_t cells_;
  const T* const bias_;
  const int32_t* ptr_;
  const T* values_;
  std::vector<uint32_t> off_;
  std::vector<int32_t> block_;
};

// Either, with panels of `cells`.
template <class T, class S = T>
class Side {
 public:
  Side(const LinearShape& shape, const IndexView<const int32_t>& index, bool transposed, const S* values,
       const S* bias, int64_t cells)
      : cells_(cells) {
    if (shape.csr)
      csr_ = std::make_unique<CsrSide<T, S>>(index, transposed, values, bias);
    else if constexpr (std::is_same_v<T, S>)  // there are no kernels for blocks of 16-bit values
      bsr_ = std::make_unique<BsrSide<T>>(shape, index, transposed, values, bias, cells);
  }

  // The positions by rows.
  Side(const LinearShape& shape, const IndexView<const int32_t>& index, int64_t cells) : cells_(cells) {
    if (shape.csr)
      csr_ = std::make_unique<CsrSide<T, S>>(index, false);
    else
      bsr_ = std::make_unique<BsrSide<T>>(shape, index, false, nullptr, nullptr, cells);
  }

  // out [features][cells] = bias + W * in.
  void spmm(const Kernels<T>& kernel, const T* in, T* out) const {
    if (csr_) return csr_->spmm(kernel, cells_, in, out);
    bsr_->spmm(kernel, in, out);
  }

  const CsrSide<T, S>& csr() const { return *csr_; }
  const BsrSide<T>& bsr() const { return *bsr_; }

 private:
  const int64_t cells_;
  std::unique_ptr<CsrSide<T, S>> csr_;
  std::unique_ptr<BsrSide<T>> bsr_;
};

}  // namespace sparse_kernels
