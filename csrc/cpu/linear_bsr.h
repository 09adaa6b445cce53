// Linear with blocks of weights. Where blocks are cells of features, those are the lanes (bsr_strips.inl);
// other blocks run on panels whose lanes are tokens, as single weights do.
#pragma once

#include <memory>

#include "linear_weights.h"

namespace sparse_kernels {

// How lanes can be features: 1 if `outputs` are whole cells, and `inputs` never astride two strips; 2 if a
// cell is the outputs times pairs of inputs; 0 if they cannot, or panels are faster: those cost more for each
// activation and less for each weight than pairs, the same in all at one block in ten or eight (measured,
// 1024 -> 1024).
template <class T>
int64_t strip_group(const LinearShape& shape, int64_t outputs, int64_t inputs) {
  constexpr int64_t cell = kCellSize / static_cast<int64_t>(sizeof(T));
  if (outputs % cell == 0 && (inputs % cell == 0 || cell % inputs == 0)) return 1;
  const bool pairs = sizeof(T) == 4 && outputs == cell / 2 && inputs == outputs;
  return pairs && shape.n * 9 < shape.rows * shape.cols ? 2 : 0;
}

// Activations in strips for `tokens` at a time.
template <class T>
class Strips {
 public:
  Strips(int64_t tokens, int64_t features)
      : pitch_(tokens * kCell + kCell),  // off the powers of two, which share sets of the first cache
        data_((features + kCell - 1) / kCell * pitch_) {}

  // Tokens from `at` on; sums, if not null: of each group of kStripGroup.
  void pack(const T* src, int64_t features, int64_t at, int64_t tokens, T* sums) const {
    kernels_for<T>().strip_pack(src, features, tokens, features, data_.get() + at * kCell, pitch_, sums);
  }

  const T* at(int64_t token) const { return data_.get() + token * kCell; }
  int64_t pitch() const { return pitch_; }

 private:
  static constexpr int64_t kCell = kCellSize / static_cast<int64_t>(sizeof(T));
  const int64_t pitch_;
  const Buffer<T> data_;
};

// Tokens to a piece: the fewest that fill a kernel's registers, whose strips are soon in use again; more if
// each piece must fetch weights that the second cache cannot keep.
template <class T>
int64_t strip_tokens(const LinearShape& shape, int64_t few, int64_t many) {
  const int64_t bytes = shape.n * shape.b_out * shape.b_in * static_cast<int64_t>(sizeof(T));
  return bytes > second_level_cache() / 4 ? many : few;
}

constexpr double kCopying = 8.0;  // multiply-adds that copying a weight costs

template <class T>
void strip_forward(const LinearShape& shape, const IndexView<const int32_t>& view, const T* x,
                   const T* values, const T* bias, T* y) {
  constexpr int64_t cell = kCellSize / static_cast<int64_t>(sizeof(T));
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t numel = shape.b_out * shape.b_in, group = strip_group<T>(shape, shape.b_out, shape.b_in);
  const Buffer<T> ordered(shape.n * numel);
  parallel(shape.n, kCopying * shape.n * numel, [&](int64_t first, int64_t last) {
    if (group == 1)
      kernel.strip_transpose(values, view.slot, first, last, shape.b_out, shape.b_in, ordered.get());
    else
      kernel.pair_interleave(values, view.slot, first, last, false, ordered.get());
  });
  const StripWeights<T> weights{view.row_ptr,
                                view.col_idx,
                                nullptr,
                                ordered.get(),
                                numel,
                                cell,
                                shape.b_in * cell,
                                std::max<int64_t>(shape.b_out / cell, 1),
                                shape.b_in,
                                shape.n,
                                group};
  const int64_t piece = strip_tokens<T>(shape, 16, 32), pieces = (shape.tokens + piece - 1) / piece;
  if (pieces < worthwhile_threads(shape.work())) {  // few tokens: threads share the rows
    const Strips<T> strips(shape.tokens, shape.in);
    strips.pack(x, shape.in, 0, shape.tokens, nullptr);
    return parallel(shape.rows, shape.work(), [&](int64_t first, int64_t last) {
      kernel.strip_spmm(&weights, first, last, shape.tokens, strips.at(0), strips.pitch(), bias, y,
                        shape.out);
    });
  }
  parallel(pieces, shape.work(), [&](int64_t first, int64_t last) {
    const Strips<T> strips(std::min(piece, shape.tokens), shape.in);
    for (int64_t token = first * piece; token < std::min(last * piece, shape.tokens); token += piece) {
      const int64_t count = std::min(piece, shape.tokens - token);
      strips.pack(x + token * shape.in, shape.in, 0, count, nullptr);
      kernel.strip_spmm(&weights, 0, shape.rows, count, strips.at(0), strips.pitch(), bias,
                        y + token * shape.out, shape.out);
    }
  });
}

// Bounds of `parts` runs of rows of nearly equal numbers of blocks.
inline std::vector<int64_t> even_cut(const int32_t* ptr, int64_t rows, int64_t parts) {
  std::vector<int64_t> cut{0};
  for (int64_t p = 1; p < parts; ++p) {
    const int32_t target = static_cast<int32_t>(ptr[rows] * p / parts);
    cut.push_back(std::max<int64_t>(cut.back(), std::lower_bound(ptr, ptr + rows, target) - ptr));
  }
  cut.push_back(rows);
  return cut;
}

// The gradients that are not null; x if dw is not, values if dx is not.
template <class T>
void strip_gradients(const LinearShape& shape, const IndexView<const int32_t>& view, const T* dy, const T* x,
                     const T* values, T* dx, T* dw, T* db) {
  constexpr int64_t cell = kCellSize / static_cast<int64_t>(sizeof(T));
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t threads = worthwhile_threads(shape.work()), numel = shape.b_out * shape.b_in;
  const int64_t group = strip_group<T>(shape, shape.b_in, shape.b_out);
  const Buffer<T> ordered(group > 1 && dx != nullptr ? shape.n * numel : 0);
  if (group > 1 && dx != nullptr)
    parallel(shape.n, kCopying * shape.n * numel, [&](int64_t first, int64_t last) {
      kernel.pair_interleave(values, view.perm, first, last, true, ordered.get());
    });
  // Column-wise for dX, and for dW with it; row-wise for the dW of groups.
  const StripWeights<T> columns =
      group == 1 ? StripWeights<T>{view.col_ptr, view.row_idx,      view.perm,   values,  numel, shape.b_in,
                                   cell,         shape.b_in / cell, shape.b_out, shape.n, group}
                 : StripWeights<T>{view.col_ptr, view.row_idx, nullptr, ordered.get(), numel, cell, 0, 1,
                                   shape.b_out,  shape.n,      group};
  const StripWeights<T> rows{view.row_ptr, view.col_idx, view.slot, nullptr, numel, 0, 0, 1,
                             shape.b_in,   shape.n,      group};
  const Buffer<T> sums(db != nullptr ? (shape.tokens + kStripGroup - 1) / kStripGroup * shape.out : 0);
  // A weight's gradient is summed piece by piece, whatever the threads: the same bits. They share a chunk of
  // pieces, each thread some block columns of it.
  const int64_t piece = strip_tokens<T>(shape, 32, 64);
  const int64_t chunk =
      std::min(piece * threads, (shape.tokens + kStripGroup - 1) / kStripGroup * kStripGroup);
  const Strips<T> strips(chunk, shape.out);
  const std::vector<int64_t> column = even_cut(view.col_ptr, shape.cols, threads),
                             row = even_cut(view.row_ptr, shape.rows, threads);
  for (int64_t start = 0; start < shape.tokens; start += chunk) {
    const int64_t count = std::min(chunk, shape.tokens - start);
    const double work = shape.work() * count / shape.tokens;
    parallel((count + kStripGroup - 1) / kStripGroup, work, [&](int64_t first, int64_t last) {
      const int64_t from = first * kStripGroup, to = std::min(last * kStripGroup, count);
      strips.pack(dy + (start + from) * shape.out, shape.out, from, to - from,
                  db != nullptr ? sums.get() + (start + from) / kStripGroup * shape.out : nullptr);
    });
    parallel(threads, work, [&](int64_t first, int64_t last) {
      for (int64_t at = 0; at < count; at += piece) {
        const int64_t tokens = std::min(piece, count - at), token = start + at;
        T* out = dx != nullptr ? dx + token * shape.in : nullptr;
        const T *d = strips.at(at), *in = x + token * shape.in;
        if (dw != nullptr && group == 1) {
          kernel.strip_backward(&columns, column[first], column[last], tokens, d, strips.pitch(), in,
                                shape.in, token == 0, dw, out);
          continue;
        }
        if (dw != nullptr)
          kernel.pair_sddmm(&rows, row[first], row[last], tokens, d, strips.pitch(), in, shape.in, token == 0,
                            dw);
        if (dx != nullptr)
          kernel.strip_spmm(&columns, column[first], column[last], tokens, d, strips.pitch(), nullptr, out,
                            shape.in);
      }
    });
  }
  if (db == nullptr) return;
  std::fill_n(db, shape.out, T(0));
  for (int64_t group = 0; group * kStripGroup < shape.tokens; ++group)
    for (int64_t f = 0; f < shape.out; ++f) db[f] += sums[group * shape.out + f];
}

}  // namespace sparse_kernels
