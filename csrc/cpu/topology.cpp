// Building and updating the index buffer of a Topology (csrc/common/index.h). Always on the CPU,
// always into a fresh buffer: the caller swaps it in when everything has gone well.
#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "../common/check.h"
#include "../common/index.h"

namespace sparse_kernels {
namespace {

struct Segment {
  int32_t row, begin, length;
};

// The segments of every piece, shortest first (stable, so the order is a function of the topology alone), by
// a counting sort, and their entries. idx: columns in canonical order; perm, for a reordered plan: where the
// value of each stands. O(n + rows * tiles + pieces * width).
void fill_plan(PlanView<int32_t> plan, const int32_t* ptr, const int32_t* idx, const int32_t* perm) {
  const PlanShape& shape = plan.shape;
  const int64_t width = shape.width;
  std::vector<std::vector<Segment>> tiles(shape.tiles);
  for (int64_t row = 0; row < shape.rows; ++row) {
    int32_t at = ptr[row];
    const int32_t end = ptr[row + 1];
    while (at < end) {
      const int64_t tile = idx[at] / width;
      const int64_t limit = (tile + 1) * width;
      const int32_t begin = at;
      while (at < end && idx[at] < limit) ++at;
      tiles[tile].push_back({static_cast<int32_t>(row), begin, at - begin});
    }
  }
  int32_t written = 0, entry = 0;
  std::vector<int32_t> start(width + 2), begin(shape.capacity);
  for (int64_t piece = 0, s = 0; piece < shape.pieces(); ++piece) {
    const std::vector<Segment>& tile = tiles[piece / shape.blocks];
    const int64_t rows_end = (piece % shape.blocks + 1) * shape.block;
    if (piece % shape.blocks == 0) s = 0;
    const int64_t first = s, count = static_cast<int64_t>(tile.size());
    while (s < count && tile[s].row < rows_end) ++s;
    plan.piece_segment[piece] = written, plan.piece_entry[piece] = entry;
    if (first == s) continue;
    std::fill(start.begin(), start.end(), 0);
    for (int64_t i = first; i < s; ++i) ++start[tile[i].length + 1], entry += tile[i].length;
    for (int64_t length = 1; length < width + 2; ++length) start[length] += start[length - 1];
    for (int64_t i = first; i < s; ++i) {
      const int32_t slot = written + start[tile[i].length]++;
      plan.segments[2 * slot] = tile[i].row, plan.segments[2 * slot + 1] = tile[i].length;
      begin[slot] = tile[i].begin;
    }
    written += static_cast<int32_t>(s - first);
  }
  plan.piece_segment[shape.pieces()] = written, plan.piece_entry[shape.pieces()] = entry;
  std::fill(plan.segments + 2 * written, plan.segments + 2 * shape.capacity, 0);
  if (shape.begins) std::copy(begin.begin(), begin.end(), plan.begin);
  if (!shape.entries) return;

  uint16_t* near = reinterpret_cast<uint16_t*>(plan.near_entries);
  if (shape.n % 2 == 1) near[shape.n] = 0;  // the other half of the last integer
  for (int64_t piece = 0, k = 0; piece < shape.pieces(); ++piece) {
    const int32_t first_column = static_cast<int32_t>(piece / shape.blocks * width);
    for (int64_t s = plan.piece_segment[piece]; s < plan.piece_segment[piece + 1]; ++s)
      for (int32_t i = begin[s]; i < begin[s] + plan.segments[2 * s + 1]; ++i, ++k) {
        near[k] = static_cast<uint16_t>((idx[i] - first_column) * kNear);
        if (shape.reordered) plan.place[perm[i]] = static_cast<int32_t>(k);
      }
  }
}

// Each group has columns of its own.
int64_t column_of(const IndexShape& shape, int64_t row, int64_t col) {
  return row / std::max<int64_t>(1, shape.rows / shape.groups) * shape.cols + col;
}

// The arrays by rows, and the sizes by columns, from sorted, distinct positions.
void fill_rows(int32_t* base, IndexShape shape, const int64_t* positions) {
  IndexView<int32_t> view(base, shape);
  const int64_t columns = shape.groups * shape.cols;
  std::fill(view.row_ptr, view.row_ptr + shape.rows + 1, 0);
  std::fill(view.col_ptr, view.col_ptr + columns + 1, 0);
  for (int64_t i = 0; i < shape.n; ++i) {
    const int64_t row = positions[i] / shape.cols, col = positions[i] % shape.cols;
    view.col_idx[i] = static_cast<int32_t>(col);
    ++view.row_ptr[row + 1];
    ++view.col_ptr[column_of(shape, row, col) + 1];
  }
  for (int64_t r = 0; r < shape.rows; ++r) view.row_ptr[r + 1] += view.row_ptr[r];
  for (int64_t c = 0; c < columns; ++c) view.col_ptr[c + 1] += view.col_ptr[c];
}

// The rest. Apart from fill_rows, so that the positions can be let go: they are the largest array in an
// update.
void fill_rest(int32_t* base, IndexShape shape) {
  IndexView<int32_t> view(base, shape);
  const int64_t n = shape.n, columns = shape.groups * shape.cols;
  std::vector<int32_t> next(view.col_ptr, view.col_ptr + columns), transpose(shape.transposed() ? 0 : 2 * n);
  int32_t* row_idx = shape.transposed() ? view.row_idx : transpose.data();
  int32_t* perm = shape.transposed() ? view.perm : transpose.data() + n;
  for (int64_t row = 0; row < shape.rows; ++row)
    for (int32_t i = view.row_ptr[row]; i < view.row_ptr[row + 1]; ++i) {
      const int32_t slot = next[column_of(shape, row, view.col_idx[i])]++;
      row_idx[slot] = static_cast<int32_t>(row);
      perm[slot] = i;
    }
  if (shape.blocks()) std::iota(view.slot, view.slot + n, 0);
  if (shape.planned()) fill_plan(view.row_plan, view.row_ptr, view.col_idx, nullptr);
  if (shape.plans == Plans::kLinear) fill_plan(view.col_plan, view.col_ptr, row_idx, perm);
}

}  // namespace

Tensor index_build(const Tensor& positions, int64_t rows, int64_t cols, int64_t groups, int64_t plans) {
  check_cpu(positions, "positions");
  check_dtype(positions, ScalarType::Long, "positions");
  const IndexShape shape{rows, cols, groups, positions.numel(), plans_of(plans)};
  Tensor index = new_empty(positions, {shape.size()}, ScalarType::Int);
  fill_rows(index.mutable_data_ptr<int32_t>(), shape, positions.const_data_ptr<int64_t>());
  fill_rest(index.mutable_data_ptr<int32_t>(), shape);
  return index;
}

std::tuple<Tensor, Tensor> index_update(const Tensor& index, int64_t n, int64_t rows, int64_t cols,
                                        int64_t groups, int64_t plans, const Tensor& drop,
                                        const Tensor& grow) {
  for (const Tensor* t : {&drop, &grow}) {
    check_cpu(*t, "drop and grow");
    check_dtype(*t, ScalarType::Long, "drop and grow");
  }
  check_cpu(index, "index");
  const IndexShape shape{rows, cols, groups, n, plans_of(plans)};
  check_size(index, 0, shape.size(), "index");
  const IndexView<const int32_t> view(index.const_data_ptr<int32_t>(), shape);
  const int64_t k = drop.numel(), total = rows * cols;
  const int64_t *d = drop.const_data_ptr<int64_t>(), *g = grow.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < k; ++i) {
    STD_TORCH_CHECK(d[i] >= 0 && d[i] < n, "drop holds ", d[i], ", out of range [0, ", n, ")");
    STD_TORCH_CHECK(i == 0 || d[i] != d[i - 1], "drop holds ", d[i], " more than once");
    STD_TORCH_CHECK(g[i] >= 0 && g[i] < total, "grow holds position ", g[i], ", out of range [0, ", total,
                    ")");
    STD_TORCH_CHECK(i == 0 || g[i] != g[i - 1], "grow holds position ", g[i], " more than once");
  }

  std::vector<bool> dropped(n);
  for (int64_t i = 0; i < k; ++i) dropped[d[i]] = true;
  int64_t found = shape.blocks() ? 0 : k;
  for (int64_t i = 0; shape.blocks() && i < n; ++i) {
    const int64_t place = view.slot[i];
    STD_TORCH_CHECK(place >= 0 && place < n, "slot holds ", place, ", out of range [0, ", n, ")");
    found += dropped[place];
  }
  STD_TORCH_CHECK(found == k, "slot holds a place more than once");

  // Merge the survivors, which are in order already, with the grown positions. The new values stand in the
  // order of the positions, wherever the old ones did.
  std::optional<Tensor> positions = new_empty(drop, {n}, ScalarType::Long);
  Tensor source = new_empty(drop, {n}, ScalarType::Long);
  int64_t *out = positions->mutable_data_ptr<int64_t>(), *from = source.mutable_data_ptr<int64_t>();
  int64_t gi = 0, o = 0, i = 0;
  for (int64_t row = 0; row < rows; ++row) {
    for (; i < view.row_ptr[row + 1]; ++i) {
      const int64_t place = shape.blocks() ? view.slot[i] : i;
      if (dropped[place]) continue;
      const int64_t position = row * cols + view.col_idx[i];
      while (gi < k && g[gi] < position) out[o] = g[gi++], from[o++] = -1;
      STD_TORCH_CHECK(gi == k || g[gi] != position, "grow holds position ", position,
                      ", which is active and not dropped");
      out[o] = position, from[o++] = place;
    }
  }
  while (gi < k) out[o] = g[gi++], from[o++] = -1;
  Tensor fresh = new_empty(drop, {shape.size()}, ScalarType::Int);
  fill_rows(fresh.mutable_data_ptr<int32_t>(), shape, out);
  positions.reset();
  fill_rest(fresh.mutable_data_ptr<int32_t>(), shape);
  return {fresh, source};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("index_build", TORCH_BOX(&sparse_kernels::index_build));
  m.impl("index_update", TORCH_BOX(&sparse_kernels::index_update));
}
