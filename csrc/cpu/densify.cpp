// Between active values and rows of the dense weight, for backend "dense" (sparse_kernels/dense.py).
// Bytes are copied and nothing is computed: one code for every dtype of an element's size.
#include <cstring>

#include "driver.h"

namespace sparse_kernels {
namespace {

// Rows of blocks [begin, end) of a weight [out, in / groups, taps], and where their values stand.
struct Stripe {
  IndexView<const int32_t> index;
  int64_t b_out, b_in, taps, begin, end;

  int64_t columns() const { return index.shape.cols * b_in; }  // elements of a dense row
  int64_t entries() const { return index.row_ptr[end] - index.row_ptr[begin]; }
  double elements() const { return static_cast<double>(end - begin) * b_out * columns(); }
};

// f(row, first entry, last entry) for rows of blocks, on several threads if the stripe is worth it. A row has
// one owner: no two threads write to one place.
template <class F>
void each_row(const Stripe& s, const F& f) {
  constexpr int64_t kRows = 4;  // at a time, so that a thread's share is worth its start
  const int64_t groups = (s.end - s.begin + kRows - 1) / kRows;
  parallel(groups, 4 * s.elements(), [&](int64_t first, int64_t last) {
    const int64_t end = std::min(s.begin + last * kRows, s.end);
    for (int64_t r = s.begin + first * kRows; r < end; ++r) f(r, s.index.row_ptr[r], s.index.row_ptr[r + 1]);
  });
}

// f(offset in the stripe, offset in the values, elements) for each run of a block row that is contiguous in
// both: a row of a block, or one element where a convolution's taps lie between its channels.
template <class F>
void each_run(const Stripe& s, int64_t row, int64_t entry, const F& f) {
  const int64_t col = s.index.col_idx[entry], top = (row - s.begin) * s.b_out * s.columns();
  const int64_t from = static_cast<int64_t>(s.index.slot[entry]) * s.b_out * s.b_in;
  if (s.taps == 1) {
    for (int64_t o = 0; o < s.b_out; ++o) f(top + o * s.columns() + col * s.b_in, from + o * s.b_in, s.b_in);
    return;
  }
  const int64_t channel = col / s.taps * s.b_in, tap = col % s.taps;
  for (int64_t o = 0; o < s.b_out; ++o)
    for (int64_t i = 0; i < s.b_in; ++i)
      f(top + o * s.columns() + (channel + i) * s.taps + tap, from + o * s.b_in + i, 1);
}

template <class E>
void scatter(const Stripe& s, const E* values, E* dense) {
  const int64_t size = s.b_out * s.columns();
  each_row(s, [&](int64_t r, int64_t first, int64_t last) {
    E* row = dense + (r - s.begin) * size;
    std::memset(row, 0, size * sizeof(E));
    if (!s.index.shape.blocks()) {
      for (int64_t i = first; i < last; ++i) row[s.index.col_idx[i]] = values[i];
      return;
    }
    for (int64_t i = first; i < last; ++i)
      each_run(s, r, i, [&](int64_t to, int64_t from, int64_t n) {
        std::memcpy(dense + to, values + from, n * sizeof(E));
      });
  });
}

template <class E>
void sample(const Stripe& s, const E* dense, E* values) {
  const int64_t size = s.b_out * s.columns();
  each_row(s, [&](int64_t r, int64_t first, int64_t last) {
    const E* row = dense + (r - s.begin) * size;
    if (!s.index.shape.blocks()) {
      for (int64_t i = first; i < last; ++i) values[i] = row[s.index.col_idx[i]];
      return;
    }
    for (int64_t i = first; i < last; ++i)
      each_run(s, r, i, [&](int64_t from, int64_t to, int64_t n) {
        std::memcpy(values + to, dense + from, n * sizeof(E));
      });
  });
}

Stripe checked(const Tensor& values, const Tensor& stripe, const Tensor& index, int64_t rows, int64_t cols,
               int64_t groups, int64_t taps, int64_t begin) {
  check_cpu(values, "values");
  check_cpu(stripe, "stripe");
  check_cpu(index, "index");
  check_dtype(index, ScalarType::Int, "index");
  check_dtype(stripe, values.scalar_type(), "stripe");
  const bool csr = values.dim() == 1;
  STD_TORCH_CHECK(csr || values.dim() == 3, "values must be [nnz] or [n_blocks, b_out, b_in]");
  const int64_t b_out = csr ? 1 : values.size(1), b_in = csr ? 1 : values.size(2);
  // What follows these arrays differs with the device that the index was made for, and is not read.
  const IndexShape shape{rows, cols, groups, values.size(0), csr ? Plans::kNone : Plans::kBlocks};
  const int64_t row = b_out * cols * b_in, least = rows + 1 + shape.n;
  STD_TORCH_CHECK(index.dim() == 1 && index.numel() >= (csr ? least : shape.size()), "index is too short");
  STD_TORCH_CHECK(taps > 0 && cols % taps == 0, "taps must divide the columns");
  STD_TORCH_CHECK(row > 0 && stripe.numel() % row == 0, "stripe must hold whole rows of blocks");
  const int64_t end = begin + stripe.numel() / row;
  STD_TORCH_CHECK(begin >= 0 && end <= rows, "stripe outside the weight");
  return {{index.const_data_ptr<int32_t>(), shape}, b_out, b_in, taps, begin, end};
}

// f(an integer of the size of an element)
template <class F>
void for_size(const Tensor& t, const F& f) {
  switch (t.element_size()) {
    case 2:
      return f(uint16_t{});
    case 4:
      return f(uint32_t{});
    case 8:
      return f(uint64_t{});
    default:
      STD_TORCH_CHECK(false, "elements of ", t.element_size(), " bytes");
  }
}

}  // namespace

void dense_scatter(const Tensor& values, const Tensor& index, int64_t rows, int64_t cols, int64_t groups,
                   int64_t taps, int64_t begin, Tensor stripe) {
  const Stripe s = checked(values, stripe, index, rows, cols, groups, taps, begin);
  for_size(values, [&](auto zero) {
    using E = decltype(zero);
    scatter(s, static_cast<const E*>(values.const_data_ptr()), static_cast<E*>(stripe.mutable_data_ptr()));
  });
}

void dense_sample(const Tensor& stripe, const Tensor& index, int64_t rows, int64_t cols, int64_t groups,
                  int64_t taps, int64_t begin, Tensor values) {
  const Stripe s = checked(values, stripe, index, rows, cols, groups, taps, begin);
  for_size(values, [&](auto zero) {
    using E = decltype(zero);
    sample(s, static_cast<const E*>(stripe.const_data_ptr()), static_cast<E*>(values.mutable_data_ptr()));
  });
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("dense_scatter", TORCH_BOX(&sparse_kernels::dense_scatter));
  m.impl("dense_sample", TORCH_BOX(&sparse_kernels::dense_sample));
}
