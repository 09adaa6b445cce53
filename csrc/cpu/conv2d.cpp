// Conv2d: a direct sparse convolution and its gradients, CSR and BSR. Lanes are images: on a zero-padded
// tile (conv2d_tiles.h) a stored weight is one byte offset, and the kernels of Linear run on pixels.
#include <algorithm>
#include <numeric>

#include "conv2d_tiles.h"

namespace sparse_kernels {
namespace {

struct Axis {
  int64_t size, out, kernel, stride, padding, dilation;

  // Input pixels that `count` outputs read.
  int64_t extent(int64_t count) const { return (count - 1) * stride + (kernel - 1) * dilation + 1; }
  // Does tap k contribute to the input pixels phase + stride * i? Then from the outputs i + *shift.
  bool reads(int64_t phase, int64_t k, int64_t* shift) const {
    const int64_t at = phase + padding - k * dilation;
    *shift = at / stride;
    return at % stride == 0;
  }
  // Furthest shifts in both directions, 0 included.
  void reach(int64_t* low, int64_t* high) const {
    *low = *high = 0;
    for (int64_t phase = 0; phase < std::min(stride, size); ++phase)
      for (int64_t k = 0, shift; k < kernel; ++k)
        if (reads(phase, k, &shift)) *low = std::min(*low, shift), *high = std::max(*high, shift);
  }
  // Input pixels of a phase.
  int64_t lattice(int64_t phase) const { return (size - phase + stride - 1) / stride; }
};

struct Shape {
  int64_t n, in, out, rows, cols, b_out, b_in, blocks, groups;
  Axis y, x;
  bool csr, channels_last;

  IndexShape index() const { return {rows, cols, groups, blocks, csr}; }
  int64_t taps() const { return y.kernel * x.kernel; }
  int64_t group_in() const { return in / groups; }
  int64_t group_of(int64_t row) const { return row / (rows / groups); }
  double work() const { return static_cast<double>(n) * blocks * b_out * b_in * y.out * x.out; }
  template <class T>
  int64_t cells() const {
    return (n + kImages<T> - 1) / kImages<T>;
  }
};

// Output rows at a time: what keeps a tile in L2 ("row" bytes each and `halo` rows more), or less if
// threads would be idle, and a multiple of `unit`.
int64_t band_rows(int64_t total, int64_t row, int64_t halo, int64_t unit, int64_t cells, double work) {
  constexpr int64_t kTileBytes = 1 << 20;
  const int64_t fit = std::max(kTileBytes / std::max<int64_t>(row, 1) - halo, 2 * halo);
  const int64_t tasks = std::max<int64_t>(1, worthwhile_threads(work) / std::max<int64_t>(cells, 1));
  const int64_t bands = std::max((total + fit - 1) / std::max<int64_t>(fit, 1), std::min(tasks, total));
  const int64_t rows = (total + bands - 1) / std::max<int64_t>(bands, 1);
  return std::min((rows + unit - 1) / unit * unit, total);
}

TileShape input_tile(const Shape& s, int64_t band) {
  return {s.in, s.y.extent(band), s.x.extent(s.x.out), s.y.padding, s.x.padding};
}

// Tile of dY: for the weight gradient the band itself, for the input gradient all that taps reach.
TileShape output_tile(const Shape& s, int64_t band, bool need_x) {
  if (!need_x) return {s.out, band, s.x.out, 0, 0};
  int64_t y0, y1, x0, x1;
  s.y.reach(&y0, &y1), s.x.reach(&x0, &x1);
  return {s.out, band - y0 + y1, std::max(s.x.lattice(0) + x1, s.x.out) - x0, -y0, -x0};
}

// Weight rows -> lists of input taps, for the forward and the weight gradient.
template <class T>
Taps<T> row_taps(const Shape& s, const IndexView<const int32_t>& index, const T* values, const TileShape& tile) {
  Taps<T> taps;
  std::vector<uint32_t> table(s.cols);
  for (int64_t c = 0; c < s.cols; ++c) {
    const int64_t tap = c % s.taps(), ky = tap / s.x.kernel, kx = tap % s.x.kernel;
    table[c] = static_cast<uint32_t>(tile.offset(c / s.taps() * s.b_in, ky * s.y.dilation, kx * s.x.dilation));
  }
  const auto base = [&](int64_t row) {
    return static_cast<uint32_t>(tile.offset(s.group_of(row) * s.group_in(), 0, 0));
  };
  if (s.csr) {
    const StreamSource<T> from{index.col_idx, s.blocks, 0, table.data(), values, nullptr};
    taps.stream = std::make_unique<CsrStream<T>>(index.row_plan, from, s.groups > 1, [&](int32_t r) {
      return SegmentPlace{r, base(r)};
    });
    return taps;
  }
  taps.off.resize(s.blocks), taps.block.resize(s.blocks);
  std::iota(taps.block.begin(), taps.block.end(), 0);
  for (int64_t r = 0; r < s.rows; ++r) {
    for (int64_t i = index.row_ptr[r]; i < index.row_ptr[r + 1]; ++i)
      taps.off[i] = base(r) + table[index.col_idx[i]];
    taps.rows.push_back({index.row_ptr[r], index.row_ptr[r + 1], taps.off.data(), taps.block.data(), values,
                         s.b_out, s.b_in, s.b_out * s.b_in, s.b_in, 1});
  }
  return taps;
}

// Consecutive segments of a row become one.
template <class T>
void join_segments(CsrStream<T>* stream) {
  int64_t count = 0, s = 0;
  for (int64_t t = 0; t < stream->tiles(); ++t) {
    const int64_t first = count, end = stream->tile_segment[t + 1];
    for (; s < end; ++s) {
      const RowLength segment = stream->segments[s];
      if (count > first && stream->segments[count - 1].row == segment.row)
        stream->segments[count - 1].length += segment.length;
      else
        stream->segments[count++] = segment;
    }
    stream->tile_segment[t + 1] = count;
  }
}

// CSR lists of the output taps that each input channel receives from: those of the taps with a shift
// (in bytes of dY's tile; negative: not of this phase). Output channels are cut into tiles, like the
// plans of a topology, of a width at which a channel's taps together have about 16 entries.
template <class T>
std::unique_ptr<CsrStream<T>> column_stream(const Shape& s, const IndexView<const int32_t>& index,
                                            const T* values, const TileShape& tile,
                                            const std::vector<int64_t>& shift) {
  const int64_t taps = s.taps(), rows = s.rows / s.groups;
  const double density = static_cast<double>(s.blocks) / std::max<double>(1.0, static_cast<double>(s.rows) * s.cols);
  const double live = std::count_if(shift.begin(), shift.end(), [](int64_t b) { return b >= 0; });
  const int64_t width = static_cast<int64_t>(std::clamp(16 / std::max(live * density, 1e-3), 16.0, 4096.0));
  std::vector<int32_t> tile_ptr{0}, segments, end(s.groups * s.cols), at(index.col_ptr, index.col_ptr + s.groups * s.cols);
  std::vector<std::pair<int32_t, int32_t>> order;  // length, channel
  for (int64_t first = 0; first < rows; first += width) {
    order.clear();
    for (int64_t ic = 0; ic < s.in; ++ic) {
      const int64_t limit = ic / s.group_in() * rows + std::min(first + width, rows);
      int32_t length = 0;
      for (int64_t tap = 0, c = ic * taps; tap < taps; ++tap, ++c) {
        if (shift[tap] < 0) continue;
        for (end[c] = at[c]; end[c] < index.col_ptr[c + 1] && index.row_idx[end[c]] < limit;) ++end[c];
        length += end[c] - at[c];
      }
      if (length > 0) order.emplace_back(length, static_cast<int32_t>(ic));
    }
    std::sort(order.begin(), order.end());
    for (const auto& [length, ic] : order)
      for (int64_t tap = 0, c = ic * taps; tap < taps; ++tap, ++c) {
        if (shift[tap] < 0 || at[c] == end[c]) continue;
        segments.insert(segments.end(), {static_cast<int32_t>(c), at[c], end[c]});
        at[c] = end[c];
      }
    tile_ptr.push_back(static_cast<int32_t>(segments.size() / 3));
  }
  const PlanView<const int32_t> plan{{width, static_cast<int64_t>(tile_ptr.size()) - 1, tile_ptr.back()},
                                     tile_ptr.data(), segments.data()};
  const StreamSource<T> from{index.row_idx, s.blocks, static_cast<uint32_t>(tile.offset(1, 0, 0)), nullptr, values,
                             index.perm};
  auto stream = std::make_unique<CsrStream<T>>(plan, from, true, [&](int32_t c) {
    return SegmentPlace{static_cast<int32_t>(c / taps), static_cast<uint32_t>(shift[c % taps])};
  });
  join_segments(stream.get());
  return stream;
}

// The same for blocks.
template <class T>
Taps<T> column_blocks(const Shape& s, const IndexView<const int32_t>& index, const T* values,
                      const TileShape& tile, const std::vector<int64_t>& shift) {
  Taps<T> taps;
  taps.off.reserve(s.blocks), taps.block.reserve(s.blocks);
  for (int64_t ic = 0; ic < s.in / s.b_in; ++ic) {
    const int64_t begin = static_cast<int64_t>(taps.off.size());
    for (int64_t tap = 0; tap < s.taps(); ++tap) {
      if (shift[tap] < 0) continue;
      const int64_t c = ic * s.taps() + tap;
      for (int64_t i = index.col_ptr[c]; i < index.col_ptr[c + 1]; ++i) {
        taps.off.push_back(static_cast<uint32_t>(tile.offset(index.row_idx[i] * s.b_out, 0, 0) + shift[tap]));
        taps.block.push_back(index.perm[i]);
      }
    }
    taps.rows.push_back({begin, static_cast<int64_t>(taps.off.size()), taps.off.data(), taps.block.data(), values,
                         s.b_in, s.b_out, s.b_out * s.b_in, 1, s.b_in});
  }
  return taps;
}

template <class T>
Images<T> images(const Shape& s, bool input, T* data) {
  return input ? Images<T>{data, s.n, s.in, s.y.size, s.x.size, s.channels_last}
               : Images<T>{data, s.n, s.out, s.y.out, s.x.out, s.channels_last};
}

template <class T>
Pass<T> input_gradient(const Shape& s, const IndexView<const int32_t>& index, const T* values,
                       const TileShape& tile, int64_t band, T* dx) {
  Pass<T> pass{tile, band, 1, 1, s.y.stride, s.x.stride, images(s, true, dx), nullptr, {}};
  for (int64_t py = 0; py < std::min(s.y.stride, s.y.size); ++py)
    for (int64_t px = 0; px < std::min(s.x.stride, s.x.size); ++px) {
      std::vector<int64_t> shift;
      for (int64_t ky = 0, y, x; ky < s.y.kernel; ++ky)
        for (int64_t kx = 0; kx < s.x.kernel; ++kx) {
          const bool both = s.y.reads(py, ky, &y) & s.x.reads(px, kx, &x);
          shift.push_back(both ? tile.offset(0, y + tile.top, x + tile.left) : -1);
        }
      Taps<T> taps;
      if (s.csr)
        taps.stream = column_stream(s, index, values, tile, shift);
      else
        taps = column_blocks(s, index, values, tile, shift);
      pass.phases.push_back({py, px, s.y.lattice(py), s.x.lattice(px), std::move(taps)});
    }
  return pass;
}

template <class T>
void forward(const Shape& s, const T* x, const T* values, const T* bias, const int32_t* index, T* y) {
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
  WeightGradient(const Shape& s, const IndexView<const int32_t>& index, const TileShape& x, const TileShape& d)
      : s_(s), x_(x), d_(d), rows_(row_taps<T>(s, index, nullptr, x)) {}

  // Bands must be a multiple of this many rows: groups of pixels do not straddle them.
  static int64_t unit(const Shape& s, bool flat) {
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
                                d_.pitch * kCellSize, d_cell.data() + c, std::min(step, rows[tile] * s_.x.out - c),
                                dw + b * numel);
    });
  }

  void finish(const T* sums, T* dw) const { rows_.stream->scatter(sums, dw); }

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
    const CsrStream<T>& stream = *rows_.stream;
    const int64_t parts = worthwhile_threads(work);
    std::vector<int64_t> cut, entry;
    stream.split(parts, &cut, &entry);
    const bool flat = is_flat(s_, x_, d_);
    parallel(parts, work, [&](int64_t first, int64_t last) {
      for (size_t tile = 0; tile < rows.size(); ++tile)
        for (int64_t t = 0; t < stream.tiles(); ++t)
          for (int64_t part = first; part < last; ++part) {
            const int64_t at = t * (parts + 1) + part, cols = flat ? rows[tile] * s_.x.out : s_.x.out;
            for (int64_t i = 0; i < (flat ? 1 : rows[tile]); ++i)
              for (int64_t j = 0, cells; j < cols; j += cells) {
                for (cells = 8; cells > cols - j;) cells /= 2;
                kernel_.csr_sddmm(cells, x_tile(xs, tile) + x_at(i, j), s_.x.stride * kCellSize,
                                  d_tile(ds, tile) + d_at(i, j), d_.pitch * kCellSize, kCellSize,
                                  stream.segments.get() + cut[at], cut[at + 1] - cut[at],
                                  stream.off.get() + entry[at], dw + entry[at]);
              }
          }
    });
  }

 public:
  // Rows of pixels follow each other without a gap in both tiles.
  static bool is_flat(const Shape& s, const TileShape& x, const TileShape& d) {
    return s.y.stride == 1 && s.x.stride == 1 && x.cols == s.x.out && d.cols == s.x.out;
  }

 private:
  const Shape s_;
  const TileShape x_, d_;
  const Taps<T> rows_;
  const Kernels<T>& kernel_ = kernels_for<T>();
};

// db = dY summed over images and pixels: a partial sum for each image, added up in their order.
template <class T>
void bias_gradient(const Shape& s, const T* dy, T* db) {
  const Kernels<T>& kernel = kernels_for<T>();
  const int64_t plane = s.y.out * s.x.out, wide = kImages<T>;
  const Buffer<T> partial(s.n * s.out);
  parallel(s.n, static_cast<double>(s.n) * s.out * plane / 4, [&](int64_t first, int64_t last) {
    for (int64_t image = first; image < last; ++image) {
      const T* from = dy + image * s.out * plane;
      T* sums = partial.get() + image * s.out;
      std::fill_n(sums, s.out, T(0));
      if (s.channels_last) {
        kernel.column_sums(from, s.out, plane, s.out, sums);
        continue;
      }
      for (int64_t c = 0; c < s.out; ++c, from += plane) {
        T lanes[kImages<T>] = {};
        kernel.column_sums(from, wide, plane / wide, wide, lanes);
        for (int64_t i = plane / wide * wide; i < plane; ++i) lanes[i % wide] += from[i];
        sums[c] = std::accumulate(lanes, lanes + wide, T(0));
      }
    }
  });
  for (int64_t c = 0; c < s.out; ++c) {
    double sum = 0;
    for (int64_t image = 0; image < s.n; ++image) sum += partial[image * s.out + c];
    db[c] = static_cast<T>(sum);
  }
}

template <class T>
void backward(const Shape& s, const T* dy, const T* x, const T* values, const int32_t* index, T* dx, T* dw) {
  const Kernels<T>& kernel = kernels_for<T>();
  const IndexView<const int32_t> view(index, s.index());
  const int64_t cells = s.cells<T>(), lanes = kImages<T>;
  const bool need_x = dx != nullptr, need_w = dw != nullptr;
  const TileShape one_x = input_tile(s, 1), one_d = output_tile(s, 1, need_x);
  const bool flat = need_w && WeightGradient<T>::is_flat(s, one_x, one_d);
  const int64_t total = std::max(s.y.out, need_x ? s.y.lattice(0) : 0);
  const int64_t row = std::max(need_w ? one_x.channels * one_x.cols * s.y.stride : 0, one_d.channels * one_d.cols);
  const int64_t band = band_rows(total, row * kCellSize, one_d.rows - 1,
                                 need_w ? WeightGradient<T>::unit(s, flat) : 1, cells, s.work());
  const int64_t bands = (total + band - 1) / band, tasks = cells * bands;
  const TileShape x_tile = input_tile(s, band), d_tile = output_tile(s, band, need_x);
  check_tile_bytes(std::max(x_tile.cells(), d_tile.cells()) * kCellSize);

  std::unique_ptr<Pass<T>> pass;
  std::unique_ptr<WeightGradient<T>> gradient;
  if (need_x) pass = std::make_unique<Pass<T>>(input_gradient(s, view, values, d_tile, band, dx));
  if (need_w) gradient = std::make_unique<WeightGradient<T>>(s, view, x_tile, d_tile);
  const Buffer<T> sums(need_w && s.csr ? s.blocks : 0);
  T* into = s.csr ? sums.get() : dw;
  if (need_w) std::fill_n(into, s.blocks * s.b_out * s.b_in, T(0));

  // For the weight gradient the tiles of x and dY are kept, some MiB of them at a time.
  const int64_t bytes = (x_tile.cells() + d_tile.cells()) * kCellSize;
  const int64_t chunk = std::min(tasks, need_w ? std::max((8 << 20) / bytes, worthwhile_threads(s.work())) : tasks);
  const Buffer<T> xs(need_w ? chunk * x_tile.cells() * lanes : 0), ds(need_w ? chunk * d_tile.cells() * lanes : 0);
  for (int64_t start = 0; start < tasks; start += chunk) {
    const int64_t count = std::min(chunk, tasks - start);
    std::vector<int64_t> rows(count);
    parallel(count, s.work() * count / tasks, [&](int64_t first, int64_t last) {
      const Buffer<T> own(need_w ? 0 : d_tile.cells() * lanes), panel(need_x ? pass->panel_cells() * lanes : 0),
          gather(need_x ? pass->gather_cells() * lanes : 0),
          scratch(std::max(scratch_cells(x_tile, s.x.size), scratch_cells(d_tile, s.x.out)) * lanes);
      for (int64_t i = first; i < last; ++i) {
        const int64_t image = (start + i) / bands * lanes, at = (start + i) % bands * band;
        T* d = need_w ? ds.get() + i * d_tile.cells() * lanes : own.get();
        pack_tile(kernel, images(s, false, dy), image, at, d_tile, scratch.get(), d);
        if (need_x) pass->run(kernel, d, image, at, panel.get(), gather.get());
        rows[i] = std::clamp<int64_t>(s.y.out - at, 0, band);
        if (need_w && rows[i] > 0)
          pack_tile(kernel, images(s, true, x), image, at * s.y.stride, x_tile, scratch.get(),
                    xs.get() + i * x_tile.cells() * lanes);
      }
    });
    if (need_w) gradient->add(xs.get(), ds.get(), rows, into);
  }
  if (need_w && s.csr) gradient->finish(sums.get(), dw);
}

// 4-D images in NCHW or channels_last: whether it is the latter and not both.
bool channels_last(const Tensor& t, const char* name) {
  if (t.is_contiguous()) return false;
  const int64_t expected[4] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(t.size(d) == 1 || t.stride(d) == expected[d], name, " must be contiguous or channels_last");
  return true;
}

Shape shape_of(const Tensor& x, const Tensor& values, const Tensor& index, int64_t rows, int64_t cols,
               const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
               const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
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
    STD_TORCH_CHECK(kernel[d] > 0 && stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0 && size + 2 * padding[d] >= reach,
                    "kernel, stride, padding or dilation do not fit an image of ", size, " pixels");
    return Axis{size, (size + 2 * padding[d] - reach) / stride[d] + 1, kernel[d], stride[d], padding[d], dilation[d]};
  };
  const int64_t b_out = csr ? 1 : values.size(1), b_in = csr ? 1 : values.size(2);
  STD_TORCH_CHECK(groups > 0 && rows % groups == 0 && cols % (kernel[0] * kernel[1]) == 0, "rows, cols, kernel and groups do not fit");
  const int64_t in = cols / (kernel[0] * kernel[1]) * b_in * groups;
  const Shape shape{x.size(0), in, rows * b_out, rows, cols, b_out, b_in, values.size(0), groups,
                    axis(0), axis(1), csr, channels_last(x, "x")};
  check_size(x, 1, in, "x");
  check_size(index, 0, shape.index().size(), "index");
  return shape;
}

// Shapes and strides as the fakes in _ops.py.
Tensor empty_images(const Tensor& like, int64_t c, int64_t h, int64_t w, bool channels_last) {
  const int64_t n = like.size(0);
  if (!channels_last) return new_empty(like, {n, c, h, w}, like.scalar_type());
  const Tensor t = new_empty(like, {n, h, w, c}, like.scalar_type());
  return torch::stable::transpose(torch::stable::transpose(t, 1, 3), 2, 3);
}

template <class F>
void for_dtype(const Tensor& x, const F& f) {
  if (x.scalar_type() == ScalarType::Double) return f(double{});
  check_dtype(x, ScalarType::Float, "x");
  f(float{});
}

}  // namespace

Tensor conv2d_forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                      const Tensor& index, int64_t rows, int64_t cols, const std::vector<int64_t>& kernel,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, int64_t groups) {
  const Shape s = shape_of(x, values, index, rows, cols, kernel, stride, padding, dilation, groups);
  if (bias) {
    check_cpu(*bias, "bias");
    check_dtype(*bias, x.scalar_type(), "bias");
    check_size(*bias, 0, s.out, "bias");
  }
  Tensor y = empty_images(x, s.out, s.y.out, s.x.out, s.channels_last);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(s, x.const_data_ptr<T>(), values.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr,
               index.const_data_ptr<int32_t>(), y.mutable_data_ptr<T>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(
    const Tensor& dy, const Tensor& x, const Tensor& values, const Tensor& index, int64_t rows, int64_t cols,
    const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
    const std::vector<int64_t>& dilation, int64_t groups, bool need_x, bool need_values, bool need_bias) {
  const Shape s = shape_of(x, values, index, rows, cols, kernel, stride, padding, dilation, groups);
  STD_TORCH_CHECK(dy.is_cpu() && dy.dim() == 4, "dy must be a CPU tensor [n, out, oh, ow]");
  check_dtype(dy, x.scalar_type(), "dy");
  const int64_t sizes[4] = {s.n, s.out, s.y.out, s.x.out};
  for (int64_t d = 0; d < 4; ++d) check_size(dy, d, sizes[d], "dy");
  // One that is both formats (one channel, one pixel) has the same memory in either.
  const bool either = s.out == 1 || s.y.out * s.x.out == 1 || dy.numel() == 0;
  STD_TORCH_CHECK(channels_last(dy, "dy") == s.channels_last || either, "dy must have the memory format of x");

  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> none{0}, values_size(values.sizes().begin(), values.sizes().end());
  Tensor dx = need_x ? empty_images(x, s.in, s.y.size, s.x.size, s.channels_last) : new_empty(x, none, dtype);
  Tensor dw = new_empty(x, need_values ? values_size : none, dtype);
  Tensor db = new_empty(x, need_bias ? std::vector<int64_t>{s.out} : none, dtype);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    if (need_bias) bias_gradient<T>(s, dy.const_data_ptr<T>(), db.mutable_data_ptr<T>());
    if (need_x || need_values)
      backward<T>(s, dy.const_data_ptr<T>(), x.const_data_ptr<T>(), values.const_data_ptr<T>(),
                  index.const_data_ptr<int32_t>(), need_x ? dx.mutable_data_ptr<T>() : nullptr,
                  need_values ? dw.mutable_data_ptr<T>() : nullptr);
  });
  return {dx, dw, db};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("conv2d_forward", TORCH_BOX(&sparse_kernels::conv2d_forward));
  m.impl("conv2d_backward", TORCH_BOX(&sparse_kernels::conv2d_backward));
}
