// Linear: y = x W^T + b and its gradients, CSR and BSR. Tiles of tokens are packed into panels
// [feature][cells] whose lanes are tokens; the kernels run on those.
#include <algorithm>

#include "driver.h"

namespace sparse_kernels {
namespace {

struct Shape {
  int64_t tokens, in, out, rows, cols, b_out, b_in, n;
  bool csr;
  IndexShape index() const { return {rows, cols, 1, n, csr}; }
  double work() const { return static_cast<double>(tokens) * n * b_out * b_in; }
};

Shape shape_of(const Tensor& x, const Tensor& values, int64_t rows, int64_t cols) {
  const bool csr = values.dim() == 1;
  STD_TORCH_CHECK(csr || values.dim() == 3, "values must be [nnz] or [n_blocks, b_out, b_in]");
  const int64_t b_out = csr ? 1 : values.size(1), b_in = csr ? 1 : values.size(2);
  STD_TORCH_CHECK(x.dim() == 2, "x must be [tokens, in]");
  return {x.size(0), cols * b_in, rows * b_out, rows, cols, b_out, b_in, values.size(0), csr};
}

// One direction of the weight, ready for the kernels: outputs += W * inputs on panels of `cells`.
template <class T>
class Side {
 public:
  // Row-wise (forward, weight gradient) or column-wise (input gradient).
  Side(const Shape& shape, const IndexView<const int32_t>& index, const T* values, bool transposed,
       bool with_values, int64_t cells)
      : shape_(shape), transposed_(transposed), cells_(cells) {
    const uint32_t stride = static_cast<uint32_t>(cells * kCellSize);
    const int32_t *idx = transposed ? index.row_idx : index.col_idx, *perm = index.perm;
    if (shape.csr) {
      const StreamSource<T> from{
          idx, shape.n, stride, nullptr, with_values ? values : nullptr, transposed ? perm : nullptr};
      stream_ = std::make_unique<CsrStream<T>>(transposed ? index.col_plan : index.row_plan, from, false,
                                               [](int32_t r) { return SegmentPlace{r, 0}; });
      return;
    }
    ptr_ = transposed ? index.col_ptr : index.row_ptr;
    values_ = values;
    off_.resize(shape.n), block_.resize(shape.n);
    const uint32_t span = static_cast<uint32_t>(transposed ? shape.b_out : shape.b_in) * stride;
    for (int64_t i = 0; i < shape.n; ++i) {
      off_[i] = static_cast<uint32_t>(idx[i]) * span;
      block_[i] = transposed ? perm[i] : static_cast<int32_t>(i);
    }
  }

  // out [features][cells] += W * in.
  void spmm(const Kernels<T>& kernel, const T* in, T* out) const {
    const char* x = reinterpret_cast<const char*>(in);
    if (stream_) return stream_->spmm(kernel, cells_, x, 0, kCellSize, out, 0, 1);
    const int64_t outputs = transposed_ ? shape_.b_in : shape_.b_out;
    const int64_t lanes = cells_ * kCellSize / static_cast<int64_t>(sizeof(T));
    for (int64_t r = 0; r < (transposed_ ? shape_.cols : shape_.rows); ++r) {
      const BlockRow<T> row = block_row(r);
      if (row.begin < row.end)
        kernel.bsr_spmm(cells_, &row, x, cells_ * kCellSize, kCellSize, out + r * outputs * lanes);
    }
  }

  const CsrStream<T>& stream() const { return *stream_; }

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
  Shape shape_;
  bool transposed_;
  int64_t cells_;
  std::unique_ptr<CsrStream<T>> stream_;
  const int32_t* ptr_ = nullptr;
  const T* values_ = nullptr;
  std::vector<uint32_t> off_;
  std::vector<int32_t> block_;
};

template <class T>
void forward(const Shape& shape, const T* x, const T* values, const T* bias, const int32_t* index, T* y) {
  const Kernels<T>& kernel = kernels_for<T>();
  const IndexView<const int32_t> view(index, shape.index());
  const int64_t cells = tile_cells<T>(shape.tokens, worthwhile_threads(shape.work()));
  const int64_t lanes = cells * kCellSize / static_cast<int64_t>(sizeof(T));
  check_tile_bytes(shape.in * cells * kCellSize);
  const Side<T> side(shape, view, values, false, true, cells);
  parallel((shape.tokens + lanes - 1) / lanes, shape.work(), [&](int64_t first, int64_t last) {
    const Buffer<T> in(shape.in * lanes), out(shape.out * lanes);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t token = tile * lanes, count = std::min(lanes, shape.tokens - token);
      kernel.pack(x + token * shape.in, shape.in, count, shape.in, in.get(), lanes, cells);
      kernel.fill(out.get(), shape.out, lanes, bias);
      side.spmm(kernel, in.get(), out.get());
      kernel.unpack(out.get(), lanes, count, shape.out, y + token * shape.out, shape.out);
    }
  });
}

// Cells of tokens that a block's gradient is summed over in registers before lanes are added up.
constexpr int64_t kCellsAtOnce = 16;

// Weight gradient of a chunk of packed tiles: dw (stream order for CSR) += dY^T X at the active
// positions. Each thread owns some entries over all tiles, in order: the same sums for any number of
// threads.
template <class T>
void weight_gradient(const Shape& shape, const Side<T>& side, int64_t cells, const T* xs, const T* ds,
                     int64_t tiles, T* dw) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t pitch = cells * kCellSize;
  const char *x0 = reinterpret_cast<const char*>(xs), *d0 = reinterpret_cast<const char*>(ds);
  const double work = static_cast<double>(tiles) * pitch / sizeof(T) * shape.n * shape.b_out * shape.b_in;
  if (shape.csr) {
    const CsrStream<T>& stream = side.stream();
    const int64_t parts = worthwhile_threads(work);
    std::vector<int64_t> cut, entry;
    stream.split(parts, &cut, &entry);
    parallel(parts, work, [&](int64_t first, int64_t last) {
      for (int64_t tile = 0; tile < tiles; ++tile)
        for (int64_t t = 0; t < stream.tiles(); ++t)
          for (int64_t part = first; part < last; ++part) {
            const int64_t at = t * (parts + 1) + part;
            kernel.csr_sddmm(cells, x0 + tile * shape.in * pitch, kCellSize, d0 + tile * shape.out * pitch,
                             pitch, kCellSize, stream.segments.get() + cut[at], cut[at + 1] - cut[at],
                             stream.off.get() + entry[at], dw + entry[at]);
          }
    });
    return;
  }
  parallel(shape.rows, work, [&](int64_t first, int64_t last) {
    std::vector<int64_t> x_cell, d_cell;
    for (int64_t c0 = 0; c0 < tiles * cells; c0 += kCellsAtOnce) {
      x_cell.clear(), d_cell.clear();
      for (int64_t c = c0; c < std::min(c0 + kCellsAtOnce, tiles * cells); ++c) {
        x_cell.push_back(c / cells * shape.in * pitch + c % cells * kCellSize);
        d_cell.push_back(c / cells * shape.out * pitch + c % cells * kCellSize);
      }
      for (int64_t r = first; r < last; ++r) {
        const BlockRow<T> row = side.block_row(r);
        for (int64_t b = row.begin; b < row.end; ++b)
          kernel.bsr_sddmm(shape.b_out, shape.b_in, x0 + row.off[b], pitch, x_cell.data(),
                           d0 + r * shape.b_out * pitch, pitch, d_cell.data(),
                           static_cast<int64_t>(x_cell.size()), dw + b * row.block_numel);
      }
    }
  });
}

template <class T>
void backward(const Shape& shape, const T* dy, const T* x, const T* values, const int32_t* index, T* dx,
              T* dw, T* db) {
  const Kernels<T>& kernel = kernels_for<T>();
  const IndexView<const int32_t> view(index, shape.index());
  if (db != nullptr) {
    std::fill_n(db, shape.out, T(0));
    constexpr int64_t kBlock = 512;  // features; not a function of the threads
    parallel((shape.out + kBlock - 1) / kBlock, static_cast<double>(shape.tokens) * shape.out / 4,
             [&](int64_t first, int64_t last) {
               const int64_t begin = first * kBlock, end = std::min(last * kBlock, shape.out);
               kernel.column_sums(dy + begin, shape.out, shape.tokens, end - begin, db + begin);
             });
  }
  if (dx == nullptr && dw == nullptr) return;

  // Not a function of the threads where sums over tokens follow the tiles.
  const int64_t cells = tile_cells<T>(shape.tokens, dw != nullptr ? 1 : worthwhile_threads(shape.work()));
  const int64_t lanes = cells * kCellSize / static_cast<int64_t>(sizeof(T));
  check_tile_bytes(std::max(shape.in, shape.out) * cells * kCellSize);
  std::unique_ptr<Side<T>> columns, rows;
  if (dx != nullptr) columns = std::make_unique<Side<T>>(shape, view, values, true, true, cells);
  if (dw != nullptr) rows = std::make_unique<Side<T>>(shape, view, values, false, false, cells);

  // Panels of x and dY are kept for the weight gradient: one tile a thread at a time, so that they are
  // still in cache when it reads them; for blocks, whose sums are reduced once for kCellsAtOnce cells, a
  // whole number of those.
  const int64_t tiles = (shape.tokens + lanes - 1) / lanes;
  const int64_t unit = shape.csr ? 1 : kCellsAtOnce / cells;
  const int64_t wanted = (worthwhile_threads(shape.work()) + unit - 1) / unit * unit;
  const int64_t chunk = std::min(dw == nullptr ? tiles : wanted, tiles);
  const Buffer<T> xs(dw != nullptr ? chunk * shape.in * lanes : 0),
      ds(dw != nullptr ? chunk * shape.out * lanes : 0);
  const Buffer<T> sums(dw != nullptr && shape.csr ? shape.n : 0);
  T* into = shape.csr ? sums.get() : dw;
  if (dw != nullptr) std::fill_n(into, shape.n * shape.b_out * shape.b_in, T(0));

  for (int64_t start = 0; start < tiles; start += chunk) {
    const int64_t count = std::min(chunk, tiles - start);
    parallel(count, shape.work() * count / tiles, [&](int64_t first, int64_t last) {
      const Buffer<T> own(dw != nullptr ? 0 : shape.out * lanes), out(dx != nullptr ? shape.in * lanes : 0);
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t token = (start + tile) * lanes, n = std::min(lanes, shape.tokens - token);
        T* d = dw != nullptr ? ds.get() + tile * shape.out * lanes : own.get();
        kernel.pack(dy + token * shape.out, shape.out, n, shape.out, d, lanes, cells);
        if (dx != nullptr) {
          kernel.fill(out.get(), shape.in, lanes, nullptr);
          columns->spmm(kernel, d, out.get());
          kernel.unpack(out.get(), lanes, n, shape.in, dx + token * shape.in, shape.in);
        }
        if (dw != nullptr)
          kernel.pack(x + token * shape.in, shape.in, n, shape.in, xs.get() + tile * shape.in * lanes, lanes,
                      cells);
      }
    });
    if (dw != nullptr) weight_gradient(shape, *rows, cells, xs.get(), ds.get(), count, into);
  }
  if (dw != nullptr && shape.csr) rows->stream().scatter(sums.get(), dw);
}

void check_inputs(const Shape& shape, const Tensor& x, const Tensor& values, const Tensor& index) {
  check_cpu(x, "x");
  check_cpu(values, "values");
  check_cpu(index, "index");
  check_dtype(index, ScalarType::Int, "index");
  check_dtype(values, x.scalar_type(), "values");
  check_size(x, 1, shape.in, "x");
  check_size(index, 0, shape.index().size(), "index");
}

}  // namespace

Tensor linear_forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                      const Tensor& index, int64_t rows, int64_t cols) {
  const Shape shape = shape_of(x, values, rows, cols);
  check_inputs(shape, x, values, index);
  if (bias) {
    check_cpu(*bias, "bias");
    check_dtype(*bias, x.scalar_type(), "bias");
    check_size(*bias, 0, shape.out, "bias");
  }
  Tensor y = new_empty(x, {shape.tokens, shape.out}, x.scalar_type());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(shape, x.const_data_ptr<T>(), values.const_data_ptr<T>(),
               bias ? bias->const_data_ptr<T>() : nullptr, index.const_data_ptr<int32_t>(),
               y.mutable_data_ptr<T>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                   const Tensor& index, int64_t rows, int64_t cols,
                                                   bool need_x, bool need_values, bool need_bias) {
  const Shape shape = shape_of(x, values, rows, cols);
  check_inputs(shape, x, values, index);
  check_cpu(dy, "dy");
  check_dtype(dy, x.scalar_type(), "dy");
  check_size(dy, 0, shape.tokens, "dy");
  check_size(dy, 1, shape.out, "dy");
  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> none{0}, values_size(values.sizes().begin(), values.sizes().end());
  Tensor dx = new_empty(x, need_x ? std::vector<int64_t>{shape.tokens, shape.in} : none, dtype);
  Tensor dw = new_empty(x, need_values ? values_size : none, dtype);
  Tensor db = new_empty(x, need_bias ? std::vector<int64_t>{shape.out} : none, dtype);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    backward<T>(shape, dy.const_data_ptr<T>(), x.const_data_ptr<T>(), values.const_data_ptr<T>(),
                index.const_data_ptr<int32_t>(), need_x ? dx.mutable_data_ptr<T>() : nullptr,
                need_values ? dw.mutable_data_ptr<T>() : nullptr,
                need_bias ? db.mutable_data_ptr<T>() : nullptr);
  });
  return {dx, dw, db};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&sparse_kernels::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&sparse_kernels::linear_backward));
}
