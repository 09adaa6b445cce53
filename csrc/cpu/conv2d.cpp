// Conv2d: a direct sparse convolution and its gradients, CSR and BSR. Lanes are images: on a zero-padded
// tile (conv2d_tiles.h) a stored weight is one byte offset, and the kernels of Linear run on pixels.
// Padding takes part as zeros: a weight that is not finite gives NaN there.
#include <algorithm>
#include <numeric>

#include "conv2d_taps.h"

namespace sparse_kernels {
namespace {

template <class T>
void forward(const ConvShape& s, const T* x, const T* values, const T* bias, const int32_t* index, T* y) {
  const Kernels<T>& kernel = kernels_for<T>();
  const IndexView<const int32_t> view(index, s.index());
  const int64_t cells = s.cells<T>(), row = s.in * s.x.extent(s.x.out) * kCellSize;
  const int64_t band = band_rows(s.y.out, row * s.y.stride, s.y.extent(1) / s.y.stride, 1, cells, s.work());
  const int64_t bands = (s.y.out + band - 1) / band;
  const TileShape tile = input_tile(s, band);
  check_tile_bytes(tile.cells() * kCellSize);
  Pass<T> pass{tile, band, s.y.stride, s.x.stride, 1, 1, images(s, false, y), bias, {}};
  pass.phases.push_back({0, 0, s.y.out, s.x.out, row_taps(s, view, values, tile)});
  parallel(cells * bands, s.work(), [&](int64_t first, int64_t last) {
    const Buffer<T> in(tile.cells() * kImages<T>), panel(pass.panel_cells() * kImages<T>),
        gather(pass.gather_cells() * kImages<T>), scratch(scratch_cells(tile, s.x.size) * kImages<T>);
    for (int64_t task = first; task < last; ++task) {
      const int64_t image = task / bands * kImages<T>, at = task % bands * band;
      pack_tile(kernel, images(s, true, x), image, at * s.y.stride, tile, scratch.get(), in.get());
      pass.run(kernel, in.get(), image, at, panel.get(), gather.get());
    }
  });
}

// dw += dY^T X at the active positions, over packed tiles of x and dY. Every sum runs over images,
// rows and pixels in this order, in groups that depend on the shape alone: the same result for any
// number of threads, whatever their bands.
template <class T>
class WeightGradient {
 public:
  WeightGradient(const ConvShape& s, const IndexView<const int32_t>& index, const TileShape& x,
                 const TileShape& d)
      : s_(s), x_(x), d_(d), rows_(row_taps<T>(s, index, nullptr, x)) {}

  // Rows of pixels follow each other without a gap in both tiles.
  static bool is_flat(const ConvShape& s, const TileShape& x, const TileShape& d) {
    return s.y.stride == 1 && s.x.stride == 1 && x.cols == s.x.out && d.cols == s.x.out;
  }

  // Bands must be a multiple of this many rows: groups of pixels do not straddle them.
  static int64_t unit(const ConvShape& s, bool flat) {
    if (s.csr) return flat ? 8 / std::gcd(s.x.out, int64_t{8}) : 1;
    return (kBlockCells + s.x.out - 1) / s.x.out;
  }

  // Output rows [first, ...) of `count` tiles; tile i holds rows[i] of them. dw: stream order for CSR.
  void add(const T* xs, const T* ds, const std::vector<int64_t>& rows, T* dw) const {
    const double work = s_.work() / std::max<double>(1, static_cast<double>(s_.n) * s_.y.out) * kImages<T> *
                        std::accumulate(rows.begin(), rows.end(), int64_t{0});
    if (s_.csr) return add_entries(xs, ds, rows, work, dw);
    std::vector<int64_t> x_cell, d_cell;
    for (int64_t i = 0; i < *std::max_element(rows.begin(), rows.end()); ++i)
      for (int64_t j = 0; j < s_.x.out; ++j) x_cell.push_back(x_at(i, j)), d_cell.push_back(d_at(i, j));
    const int64_t step = unit(s_, false) * s_.x.out, numel = s_.b_out * s_.b_in;
    parallel(s_.rows, work, [&](int64_t first, int64_t last) {
      for (size_t tile = 0; tile < rows.size(); ++tile)
        for (int64_t c = 0; c < rows[tile] * s_.x.out; c += step)
          for (int64_t r = first; r < last; ++r)
            for (int64_t b = rows_.rows[r].begin; b < rows_.rows[r].end; ++b)
              kernel_.bsr_sddmm(s_.b_out, s_.b_in, x_tile(xs, tile) + rows_.off[b], x_.pitch * kCellSize,
                                x_cell.data() + c, d_tile(ds, tile) + d_.offset(r * s_.b_out, 0, 0),
                                d_.pitch * kCellSize, d_cell.data() + c,
                                std::min(step, rows[tile] * s_.x.out - c), dw + rows_.block[b] * numel);
    });
  }

  void finish(const T* sums, T* dw) const { rows_.stream->restore(sums, dw); }

 private:
  static constexpr int64_t kBlockCells = 32;  // at once for BSR, at least

  int64_t x_at(int64_t i, int64_t j) const { return x_.offset(0, i * s_.y.stride, j * s_.x.stride); }
  int64_t d_at(int64_t i, int64_t j) const { return d_.offset(0, i + d_.top, j + d_.left); }
  const char* x_tile(const T* xs, int64_t i) const {
    return reinterpret_cast<const char*>(xs) + i * x_.cells() * kCellSize;
  }
  const char* d_tile(const T* ds, int64_t i) const {
    return reinterpret_cast<const char*>(ds) + i * d_.cells() * kCellSize;
  }

  // Each thread owns some entries of every tile of the plan.
  void add_entries(const T* xs, const T* ds, const std::vector<int64_t>& rows, double work, T* dw) const {
    const ConvStream<T>& stream = *rows_.stream;
    const int64_t parts = worthwhile_threads(work);
    const std::vector<SegmentCut> cut = cut_segments(stream.segments.get(), stream.tile_segment.data(),
                                                     stream.tile_entry.data(), stream.tiles(), parts);
    const bool flat = is_flat(s_, x_, d_);
    parallel(parts, work, [&](int64_t first, int64_t last) {
      for (size_t tile = 0; tile < rows.size(); ++tile)
        for (int64_t t = 0; t < stream.tiles(); ++t)
          for (int64_t part = first; part < last; ++part) {
            const SegmentCut *at = &cut[t * (parts + 1) + part], *end = at + 1;
            const int64_t cols = flat ? rows[tile] * s_.x.out : s_.x.out;
            for (int64_t i = 0; i < (flat ? 1 : rows[tile]); ++i)
              for (int64_t j = 0, cells; j < cols; j += cells) {
                for (cells = 8; cells > cols - j;) cells /= 2;
                kernel_.conv_sddmm(cells, x_tile(xs, tile) + x_at(i, j), s_.x.stride * kCellSize,
                                   d_tile(ds, tile) + d_at(i, j), d_.pitch * kCellSize, kCellSize,
                                   stream.segments.get() + at->segment, end->segment - at->segment,
                                   stream.off.get() + at->entry, dw + at->entry);
              }
          }
    });
  }

  const ConvShape s_;
  const TileShape x_, d_;
  const Taps<T> rows_;
  const Kernels<T>& kernel_ = kernels_for<T>();
};

// The gradients that are not null. A task is a band of rows of a cell of images.
template <class T>
class Backward {
 public:
  Backward(const ConvShape& s, const T* dy, const T* x, const T* values, const int32_t* index, T* dx, T* dw,
           T* db)
      : s_(s),
        dy_(images(s, false, dy)),
        x_(images(s, true, x)),
        dx_(dx),
        dw_(dw),
        db_(db),
        x_tile_(input_tile(s, 1)),
        d_tile_(output_tile(s, 1, dx != nullptr)) {
    const IndexView<const int32_t> view(index, s.index());
    const int64_t total = std::max(s.y.out, dx != nullptr ? s.y.lattice(0) : 0);
    const int64_t x_row = dw != nullptr ? s.in * x_tile_.cols * s.y.stride : 0, d_row = s.out * d_tile_.cols;
    const bool flat = WeightGradient<T>::is_flat(s, x_tile_, d_tile_);
    band_ = band_rows(total, std::max(x_row, d_row) * kCellSize, d_tile_.rows - 1,
                      dw != nullptr ? WeightGradient<T>::unit(s, flat) : 1, s.cells<T>(), s.work());
    bands_ = (total + band_ - 1) / band_;
    x_tile_ = input_tile(s, band_), d_tile_ = output_tile(s, band_, dx != nullptr);
    check_tile_bytes(std::max(x_tile_.cells(), d_tile_.cells()) * kCellSize);
    if (dx != nullptr) pass_ = std::make_unique<Pass<T>>(input_gradient(s, view, values, d_tile_, band_, dx));
    if (dw != nullptr) gradient_ = std::make_unique<WeightGradient<T>>(s, view, x_tile_, d_tile_);
  }

  void run() const {
    constexpr int64_t kChunkBytes = 8 << 20;  // of tiles of x and dY, kept for the weight gradient
    const int64_t lanes = kImages<T>, tasks = s_.cells<T>() * bands_, threads = worthwhile_threads(s_.work());
    const int64_t bytes = std::max<int64_t>((x_tile_.cells() + d_tile_.cells()) * kCellSize, 1);
    const int64_t chunk = std::min(tasks, dw_ != nullptr ? std::max(kChunkBytes / bytes, threads) : tasks);
    const Buffer<T> xs(dw_ != nullptr ? chunk * x_tile_.cells() * lanes : 0);
    const Buffer<T> ds(dw_ != nullptr ? chunk * d_tile_.cells() * lanes : 0);
    const Buffer<T> sums(dw_ != nullptr && s_.csr ? s_.blocks : 0);
    T* into = s_.csr ? sums.get() : dw_;
    if (dw_ != nullptr) std::fill_n(into, s_.blocks * s_.b_out * s_.b_in, T(0));

    // Allocated once, for a thread's scratch memory only grows during a call.
    const int64_t workers = std::min(chunk, threads), own = worker_cells() * lanes;
    const Buffer<T> scratch(workers * own),
        sums_of_rows(db_ != nullptr ? s_.cells<T>() * s_.y.out * s_.out : 0);
    for (int64_t start = 0; start < tasks; start += chunk) {
      const int64_t count = std::min(chunk, tasks - start);
      std::vector<int64_t> rows(count);
      parallel(workers, s_.work() * count / tasks, [&](int64_t first, int64_t last) {
        for (int64_t w = first; w < last; ++w)
          for (int64_t i = count * w / workers; i < count * (w + 1) / workers; ++i)
            rows[i] = task(start + i, xs.get() + i * x_tile_.cells() * lanes,
                           dw_ != nullptr ? ds.get() + i * d_tile_.cells() * lanes : nullptr,
                           sums_of_rows.get(), scratch.get() + w * own);
      });
      if (dw_ != nullptr) gradient_->add(xs.get(), ds.get(), rows, into);
    }
    if (dw_ != nullptr && s_.csr) gradient_->finish(sums.get(), dw_);
    for (int64_t c = 0; db_ != nullptr && c < s_.out; ++c) {
      double sum = 0;
      for (int64_t row = 0; row < s_.cells<T>() * s_.y.out; ++row) sum += sums_of_rows[row * s_.out + c];
      db_[c] = static_cast<T>(sum);
    }
  }

 private:
  // Input gradient of a task; tiles of x and dY to xs and ds if they are wanted. Returns the rows in them.
  int64_t task(int64_t number, T* xs, T* ds, T* sums_of_rows, T* scratch) const {
    constexpr int64_t lanes = kImages<T>;
    const int64_t image = number / bands_ * lanes, at = number % bands_ * band_;
    T* d = ds != nullptr ? ds : scratch + (worker_cells() - d_tile_.cells()) * lanes;
    T* rest = scratch;
    if (dx_ != nullptr) rest += (pass_->panel_cells() + pass_->gather_cells()) * lanes;
    pack_tile(kernel_, dy_, image, at, d_tile_, rest, d);
    if (dx_ != nullptr) pass_->run(kernel_, d, image, at, scratch, scratch + pass_->panel_cells() * lanes);
    const int64_t rows = std::clamp<int64_t>(s_.y.out - at, 0, band_);
    if (db_ != nullptr) sum_rows(d, rows, sums_of_rows + (image / lanes * s_.y.out + at) * s_.out);
    if (ds != nullptr && rows > 0) pack_tile(kernel_, x_, image, at * s_.y.stride, x_tile_, rest, xs);
    return rows;
  }

  // Sums of dY over the images and pixels of each row: what the bias gradient is added up from, in an
  // order that neither bands nor the memory format change.
  void sum_rows(const T* d, int64_t rows, T* out) const {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t c = 0; c < s_.out; ++c) {
        const T* row = d + d_tile_.offset(c, i + d_tile_.top, d_tile_.left) / static_cast<int64_t>(sizeof(T));
        T lanes[kImages<T>] = {};
        kernel_.column_sums(row, kImages<T>, s_.x.out, kImages<T>, lanes);
        *out++ = std::accumulate(lanes, lanes + kImages<T>, T(0));
      }
  }

  // Scratch of a worker: for the pass, for packing, and a tile of dY unless that is kept.
  int64_t worker_cells() const {
    const int64_t pass = dx_ != nullptr ? pass_->panel_cells() + pass_->gather_cells() : 0;
    const int64_t rest = std::max(scratch_cells(x_tile_, s_.x.size), scratch_cells(d_tile_, s_.x.out));
    return pass + rest + (dw_ != nullptr ? 0 : d_tile_.cells());
  }

  const ConvShape s_;
  const Images<const T> dy_, x_;
  T *const dx_, *const dw_, *const db_;
  TileShape x_tile_, d_tile_;
  int64_t band_, bands_;
  std::unique_ptr<Pass<T>> pass_;
  std::unique_ptr<WeightGradient<T>> gradient_;
  const Kernels<T>& kernel_ = kernels_for<T>();
};

bool has_layout(const Tensor& t, bool channels_last) {
  if (!channels_last) return t.is_contiguous();
  const int64_t expected[4] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
  for (int64_t d = 0; d < 4; ++d)
    if (t.size(d) != 1 && t.stride(d) != expected[d]) return t.numel() == 0;
  return true;
}

// Whether 4-D images are channels_last and not NCHW. One that is both, for having one channel or pixel, is
// what its strides look like: the rule of torch's convolutions, as is_channels_last in _ops.py.
bool is_channels_last(const Tensor& t, const char* name) {
  if (!t.is_contiguous()) {
    STD_TORCH_CHECK(has_layout(t, true), name, " must be contiguous or channels_last");
    return true;
  }
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least || (d == 0 && least == t.stride(1))) return false;
    least = t.stride(d) * t.size(d);
  }
  return has_layout(t, true);
}

ConvShape shape_of(const Tensor& x, const Tensor& values, const Tensor& index, int64_t rows, int64_t cols,
                   const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                   int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "x must be a CPU tensor [n, in, h, w]");
  check_cpu(values, "values");
  check_cpu(index, "index");
  check_dtype(index, ScalarType::Int, "index");
  check_dtype(values, x.scalar_type(), "values");
  const bool csr = values.dim() == 1;
  STD_TORCH_CHECK(csr || values.dim() == 3, "values must be [nnz] or [n_blocks, b_out, b_in]");
  for (const auto* pair : {&kernel, &stride, &padding, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, "kernel, stride, padding and dilation must be pairs");
  const auto axis = [&](int64_t d) {
    const int64_t size = x.size(d + 2), reach = dilation[d] * (kernel[d] - 1) + 1;
    STD_TORCH_CHECK(kernel[d] > 0 && stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0 &&
                        size + 2 * padding[d] >= reach,
                    "kernel, stride, padding or dilation do not fit an image of ", size, " pixels");
    return Axis{size,       (size + 2 * padding[d] - reach) / stride[d] + 1, kernel[d], stride[d], padding[d],
                dilation[d]};
  };
  const int64_t b_out = csr ? 1 : values.size(1), b_in = csr ? 1 : values.size(2);
  STD_TORCH_CHECK(groups > 0 && rows % groups == 0 && cols % (kernel[0] * kernel[1]) == 0,
                  "rows, cols, kernel and groups do not fit");
  const int64_t in = cols / (kernel[0] * kernel[1]) * b_in * groups;
  const bool last = is_channels_last(x, "x");
  const ConvShape shape{x.size(0),      in,     rows * b_out, rows,    cols, b_out, b_in,
                        values.size(0), groups, axis(0),      axis(1), csr,  last};
  check_size(x, 1, in, "x");
  check_size(index, 0, shape.index().size(), "index");
  return shape;
}

// Shapes and strides as the fakes in _ops.py.
Tensor empty_images(const Tensor& like, int64_t c, int64_t h, int64_t w, bool channels_last) {
  const std::vector<int64_t> size{like.size(0), c, h, w};
  if (!channels_last) return new_empty(like, size, like.scalar_type());
  // Not a permuted NHWC tensor: that would be a view, which forbids in-place operations on the output.
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace

Tensor conv2d_forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                      const Tensor& index, int64_t rows, int64_t cols, const std::vector<int64_t>& kernel,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvShape s = shape_of(x, values, index, rows, cols, kernel, stride, padding, dilation, groups);
  if (bias) {
    check_cpu(*bias, "bias");
    check_dtype(*bias, x.scalar_type(), "bias");
    check_size(*bias, 0, s.out, "bias");
  }
  Tensor y = empty_images(x, s.out, s.y.out, s.x.out, s.channels_last);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(s, x.const_data_ptr<T>(), values.const_data_ptr<T>(),
               bias ? bias->const_data_ptr<T>() : nullptr, index.const_data_ptr<int32_t>(),
               y.mutable_data_ptr<T>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                   const Tensor& index, int64_t rows, int64_t cols,
                                                   const std::vector<int64_t>& kernel,
                                                   const std::vector<int64_t>& stride,
                                                   const std::vector<int64_t>& padding,
                                                   const std::vector<int64_t>& dilation, int64_t groups,
                                                   bool need_x, bool need_values, bool need_bias) {
  const ConvShape s = shape_of(x, values, index, rows, cols, kernel, stride, padding, dilation, groups);
  STD_TORCH_CHECK(dy.is_cpu() && dy.dim() == 4, "dy must be a CPU tensor [n, out, oh, ow]");
  check_dtype(dy, x.scalar_type(), "dy");
  const int64_t sizes[4] = {s.n, s.out, s.y.out, s.x.out};
  for (int64_t d = 0; d < 4; ++d) check_size(dy, d, sizes[d], "dy");
  STD_TORCH_CHECK(has_layout(dy, s.channels_last), "dy must have the memory format of x");

  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> none{0}, values_size(values.sizes().begin(), values.sizes().end());
  Tensor dx = need_x ? empty_images(x, s.in, s.y.size, s.x.size, s.channels_last) : new_empty(x, none, dtype);
  Tensor dw = new_empty(x, need_values ? values_size : none, dtype);
  Tensor db = new_empty(x, need_bias ? std::vector<int64_t>{s.out} : none, dtype);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    Backward<T>(s, dy.const_data_ptr<T>(), x.const_data_ptr<T>(), values.const_data_ptr<T>(),
                index.const_data_ptr<int32_t>(), need_x ? dx.mutable_data_ptr<T>() : nullptr,
                need_values ? dw.mutable_data_ptr<T>() : nullptr,
                need_bias ? db.mutable_data_ptr<T>() : nullptr)
        .run();
  });
  return {dx, dw, db};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&sparse_kernels::conv2d_forward));
  m.impl("conv2d_forward", TORCH_BOX(&sparse_kernels::conv2d_forward));
  m.impl("conv2d_backward", TORCH_BOX(&sparse_kernels::conv2d_backward));
}
