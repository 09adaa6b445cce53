// Building and updating the index buffer of a Topology (csrc/common/index.h). Always on the CPU,
// always into a fresh buffer: the caller swaps it in when everything has gone well.
#include <algorithm>
#include <limits>
#include <numeric>
#include <vector>

#include "driver.h"

namespace sparse_kernels {
namespace {

constexpr double kEntryWork = 16;  // multiply-adds that take as long as placing an entry

// Lists the segments of every piece, shortest first (stable, so the order is a function of the topology
// alone), by a counting sort. at[tile * rows + row]: how many entries a row has in a tile; becomes where the
// first of them stands in the order of the plan. ptr: where the values of a row start, for a plan that says
// so.
void order_segments(PlanView<int32_t> plan, int32_t* at, const int32_t* ptr) {
  const PlanShape& shape = plan.shape;
  std::vector<int32_t> begin, segment(shape.width + 1), first(shape.width + 1);
  if (shape.begins) begin.assign(ptr, ptr + shape.rows);
  int32_t written = 0, entry = 0;
  for (int64_t piece = 0; piece < shape.pieces(); ++piece) {
    int32_t* lengths = at + piece / shape.blocks * shape.rows;
    const int64_t low = piece % shape.blocks * shape.block, high = std::min(low + shape.block, shape.rows);
    plan.piece_segment[piece] = written, plan.piece_entry[piece] = entry;
    for (int64_t row = low; row < high; ++row) ++segment[lengths[row]];
    // The first tile of a Linear has empty ones, too.
    const bool empty = shape.entries && piece < shape.blocks;
    if (!empty) segment[0] = 0;
    for (int32_t length = 0; length <= shape.width; ++length) {
      const int32_t count = segment[length];
      segment[length] = written, first[length] = entry;
      written += count, entry += count * length;
    }
    for (int64_t row = low; row < high; ++row) {
      const int32_t length = lengths[row];
      if (length == 0 && !empty) continue;
      const int32_t slot = segment[length]++;
      plan.segments[2 * slot] = static_cast<int32_t>(row), plan.segments[2 * slot + 1] = length;
      lengths[row] = first[length], first[length] += length;
      if (shape.begins) plan.begin[slot] = begin[row], begin[row] += length;
    }
    std::fill(segment.begin(), segment.end(), 0);
  }
  plan.piece_segment[shape.pieces()] = written, plan.piece_entry[shape.pieces()] = entry;
  std::fill(plan.segments + 2 * written, plan.segments + 2 * shape.capacity, 0);
  if (shape.begins) std::fill(plan.begin + written, plan.begin + shape.capacity, 0);
  if (shape.entries && shape.n % 2 == 1)
    reinterpret_cast<uint16_t*>(plan.near_entries)[shape.n] = 0;  // the other half of the last integer
}

constexpr uint32_t kStep = 64;  // divides the width of every tile

// near of all segments of a piece, in the order of the plan: what is written too much behind one of them, the
// next one overwrites. Reads up to 7 columns too many, which are still in the index.
void fill_near(const PlanView<int32_t>& plan, int64_t piece, const int32_t* col_idx) {
  constexpr int32_t kLanes = 8;
  uint16_t* near = reinterpret_cast<uint16_t*>(plan.near_entries);
  uint16_t *out = near + plan.piece_entry[piece], *end = near + plan.piece_entry[piece + 1];
  const int32_t first = static_cast<int32_t>(piece / plan.shape.blocks * plan.shape.width);
  const auto near_of = [&](int32_t col) { return static_cast<uint16_t>((col - first) * kNear); };
  for (int32_t slot = plan.piece_segment[piece]; slot < plan.piece_segment[piece + 1]; ++slot) {
    const int32_t* cols = col_idx + plan.begin[slot];
    const int32_t length = plan.segments[2 * slot + 1];
    if (end - out < length + kLanes)
      for (int32_t i = 0; i < length; ++i) out[i] = near_of(cols[i]);
    else
      for (int32_t i = 0; i < length; i += kLanes)
        for (int32_t lane = 0; lane < kLanes; ++lane) out[i + lane] = near_of(cols[i + lane]);
    out += length;
  }
}

// The plan of the rows.
void fill_row_plan(IndexView<int32_t> view) {
  const PlanView<int32_t>& plan = view.row_plan;
  const PlanShape& shape = plan.shape;
  const double work = kEntryWork / 4 * static_cast<double>(shape.n);
  Buffer<int32_t> at(shape.tiles * shape.rows), tile_of(view.shape.cols / kStep + 1);
  for (int64_t i = 0; i <= view.shape.cols / kStep; ++i)
    tile_of[i] = static_cast<int32_t>(i * kStep / shape.width);
  parallel(shape.rows, work, [&](int64_t low, int64_t high) {
    Buffer<int32_t> ends(shape.tiles + 1);
    for (int64_t row = low; row < high; ++row) {
      // Columns ascend: of all entries of a tile the last one's end stays.
      int32_t from = view.row_ptr[row];
      std::fill_n(ends.get(), shape.tiles, from);
      for (int32_t i = from; i < view.row_ptr[row + 1]; ++i)
        ends[tile_of[static_cast<uint32_t>(view.col_idx[i]) / kStep]] = i + 1;
      for (int64_t tile = 0; tile < shape.tiles; ++tile) {
        const int32_t to = std::max(from, ends[tile]);
        at[tile * shape.rows + row] = to - from;
        from = to;
      }
    }
  });
  order_segments(plan, at.get(), view.row_ptr);
  if (!shape.entries) return;
  parallel(shape.pieces(), work, [&](int64_t low, int64_t high) {
    for (int64_t piece = low; piece < high; ++piece) fill_near(plan, piece, view.col_idx);
  });
}

// A tile of the plan of the columns. next: where the next entry of each column is to stand. One block of
// columns after the other, so that what is written to by turns stays in the cache.
void fill_entries(IndexView<int32_t> view, int64_t tile, int32_t* next) {
  const PlanView<int32_t>& plan = view.col_plan;
  const PlanShape& shape = plan.shape;
  uint16_t* near = reinterpret_cast<uint16_t*>(plan.near_entries);
  const int64_t first = tile * shape.width, rows = std::min(shape.width, view.shape.rows - first);
  const int32_t* ends = view.row_ptr + first + 1;
  Buffer<int32_t> entry(rows + 1);  // of each row the first one that is left
  std::copy_n(view.row_ptr + first, rows, entry.get());
  for (int64_t limit = shape.block; limit - shape.block < shape.rows; limit += shape.block)
    for (int64_t row = 0; row < rows; ++row) {
      const uint16_t here = static_cast<uint16_t>(row * kNear);
      int32_t i = entry[row];
      for (; i < ends[row] && view.col_idx[i] < limit; ++i) {
        const int32_t k = next[view.col_idx[i]]++;
        near[k] = here, plan.source[k] = i;
      }
      entry[row] = i;
    }
}

// The plan of the columns, without their lists: a tile is a run of rows, whose entries come in the order that
// each column has them in; and the sizes by columns.
void fill_col_plan(IndexView<int32_t> view) {
  const PlanView<int32_t>& plan = view.col_plan;
  const PlanShape& shape = plan.shape;  // its rows are columns of the weight
  const double work = kEntryWork / 2 * static_cast<double>(shape.n);
  Buffer<int32_t> at(shape.tiles * shape.rows);
  std::fill_n(at.get(), shape.tiles * shape.rows, 0);
  const auto edge = [&](int64_t tile) { return view.row_ptr[std::min(tile * shape.width, view.shape.rows)]; };
  parallel(shape.tiles, work, [&](int64_t low, int64_t high) {
    for (int64_t tile = low; tile < high; ++tile) {
      int32_t* count = at.get() + tile * shape.rows;
      for (int32_t i = edge(tile); i < edge(tile + 1); ++i) ++count[view.col_idx[i]];
    }
  });
  std::fill(view.col_ptr, view.col_ptr + shape.rows + 1, 0);
  for (int64_t tile = 0; tile < shape.tiles; ++tile)
    for (int64_t col = 0; col < shape.rows; ++col) view.col_ptr[col + 1] += at[tile * shape.rows + col];
  std::partial_sum(view.col_ptr, view.col_ptr + shape.rows + 1, view.col_ptr);
  order_segments(plan, at.get(), nullptr);
  parallel(shape.tiles, work, [&](int64_t low, int64_t high) {
    for (int64_t tile = low; tile < high; ++tile) fill_entries(view, tile, at.get() + tile * shape.rows);
  });
}

// Each group has columns of its own.
int64_t first_column(const IndexShape& shape, int64_t row) {
  return row / std::max<int64_t>(1, shape.rows / shape.groups) * shape.cols;
}

// The lists by columns.
void fill_columns(IndexView<int32_t> view) {
  const IndexShape& shape = view.shape;
  const int64_t columns = shape.groups * shape.cols;
  std::fill(view.col_ptr, view.col_ptr + columns + 1, 0);
  for (int64_t row = 0; row < shape.rows; ++row) {
    int32_t* count = view.col_ptr + first_column(shape, row) + 1;
    for (int32_t i = view.row_ptr[row]; i < view.row_ptr[row + 1]; ++i) ++count[view.col_idx[i]];
  }
  std::partial_sum(view.col_ptr, view.col_ptr + columns + 1, view.col_ptr);
  std::vector<int32_t> next(view.col_ptr, view.col_ptr + columns);
  for (int64_t row = 0; row < shape.rows; ++row) {
    int32_t* slots = next.data() + first_column(shape, row);
    for (int32_t i = view.row_ptr[row]; i < view.row_ptr[row + 1]; ++i) {
      const int32_t slot = slots[view.col_idx[i]]++;
      view.row_idx[slot] = static_cast<int32_t>(row);
      view.perm[slot] = i;
    }
  }
}

// All that follows from row_ptr and col_idx.
void fill_rest(IndexView<int32_t> view) {
  const IndexShape& shape = view.shape;
  if (shape.transposed()) fill_columns(view);
  if (shape.blocks()) std::iota(view.slot, view.slot + shape.n, 0);
  if (shape.planned()) fill_row_plan(view);
  if (shape.plans == Plans::kLinear) fill_col_plan(view);
}

// Positions ascending, whatever the order they came in: in [0, limit), none of them twice.
class Positions {
 public:
  Positions(const Tensor& positions, int64_t limit, const char* holds)
      : at_(positions.const_data_ptr<int64_t>()) {
    const int64_t n = positions.numel();
    bool ascend = true;
    for (int64_t i = 1; i < n; ++i) ascend &= at_[i - 1] < at_[i];
    if (!ascend) {
      sorted_.assign(at_, at_ + n);
      std::sort(sorted_.begin(), sorted_.end());
      at_ = sorted_.data();
    }
    for (int64_t i : {int64_t{0}, n - 1})
      STD_TORCH_CHECK(n == 0 || (at_[i] >= 0 && at_[i] < limit), holds, at_[i], ", out of range [0, ", limit,
                      ")");
    for (int64_t i = 1; i < n && !ascend; ++i)
      STD_TORCH_CHECK(at_[i] != at_[i - 1], holds, at_[i], " more than once");
  }

  int64_t operator[](int64_t i) const { return at_[i]; }

 private:
  const int64_t* at_;
  std::vector<int64_t> sorted_;
};

// Columns of a row with a place for each, ascending; before the first one there is -1, behind the last kNone.
constexpr int32_t kNone = std::numeric_limits<int32_t>::max();

// The entries [begin, end) of a row that stay: their columns, and where their values stand. How many.
int64_t stay(IndexView<const int32_t> old, int32_t begin, int32_t end, const uint8_t* staying,
             int32_t* __restrict cols, int32_t* __restrict places) {
  int64_t kept = 0;
  const auto take = [&](int32_t i, int32_t place) {
    cols[kept] = old.col_idx[i], places[kept] = place;
    kept += staying[place];
  };
  if (old.shape.blocks())
    for (int32_t i = begin; i < end; ++i) take(i, old.slot[i]);
  else
    for (int32_t i = begin; i < end; ++i) take(i, i);
  cols[kept] = kNone;
  return kept;
}

// Merges them with the columns of the grown positions. From both ends, because each step waits for the one
// before; without a branch on the data, which no processor could foresee. Returns whether a column is in
// both, and so comes twice.
bool merge(const int32_t* __restrict stays, const int32_t* __restrict places, int64_t kept,
           const int32_t* __restrict grown, int64_t came, int32_t* __restrict cols,
           int64_t* __restrict source) {
  const int64_t n = kept + came;
  const auto put = [&](int64_t o, int64_t i, int32_t col, int64_t grow) {
    cols[o] = col;
    source[o] = places[i] | -grow;  // -1 where it is new
  };
  int64_t begin = 0, end = came - 1;  // of the grown ones that are left
  for (int64_t o = 0; o < (n + 1) / 2; ++o) {
    const int32_t low = stays[o - begin], low_grown = grown[begin];
    const int64_t low_grow = low_grown < low;
    put(o, o - begin, std::min(low, low_grown), low_grow);
    begin += low_grow;
    const int64_t at = n - 1 - o;  // the middle one of an odd number is put twice, the same
    const int32_t high = stays[at - 1 - end], high_grown = grown[end];
    const int64_t high_grow = high_grown > high;
    put(at, at - 1 - end, std::max(high, high_grown), high_grow);
    end -= high_grow;
  }
  bool clash = false;
  for (int64_t i = 1; i < n; ++i) clash |= cols[i] == cols[i - 1];
  return clash;
}

}  // namespace

Tensor index_build(const Tensor& positions, int64_t rows, int64_t cols, int64_t groups, int64_t plans) {
  check_cpu(positions, "positions");
  check_dtype(positions, ScalarType::Long, "positions");
  const IndexShape shape{rows, cols, groups, positions.numel(), plans_of(plans)};
  Tensor index = new_empty({shape.size()}, ScalarType::Int);
  const IndexView<int32_t> view(index.mutable_data_ptr<int32_t>(), shape);
  const int64_t* position = positions.const_data_ptr<int64_t>();
  view.row_ptr[0] = 0;
  for (int64_t row = 0, i = 0; row < rows; ++row) {
    for (; i < shape.n && position[i] < (row + 1) * cols; ++i)
      view.col_idx[i] = static_cast<int32_t>(position[i] - row * cols);
    view.row_ptr[row + 1] = static_cast<int32_t>(i);
  }
  fill_rest(view);
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
  check_size(grow, 0, drop.numel(), "grow");
  const IndexView<const int32_t> old(index.const_data_ptr<int32_t>(), shape);
  const int64_t k = drop.numel(), total = rows * cols;
  const Positions d(drop, n, "drop holds "), g(grow, total, "grow holds position ");
  Buffer<uint8_t> staying(n);
  std::fill_n(staying.get(), n, uint8_t{1});
  for (int64_t i = 0; i < k; ++i) staying[d[i]] = 0;
  Tensor fresh = new_empty({shape.size()}, ScalarType::Int);
  Tensor source = new_empty({n}, ScalarType::Long);
  const IndexView<int32_t> view(fresh.mutable_data_ptr<int32_t>(), shape);
  int64_t* from = source.mutable_data_ptr<int64_t>();
  // What each row is to have, and where its grown positions begin.
  Buffer<int64_t> grown(rows + 1);
  grown[0] = 0;
  int64_t found = 0, longest = 0, most = 0;
  view.row_ptr[0] = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t begin = old.row_ptr[row], end = old.row_ptr[row + 1];
    int64_t gone = 0, next = grown[row];
    for (int32_t i = begin; shape.blocks() && i < end; ++i) {
      const int64_t place = old.slot[i];
      STD_TORCH_CHECK(place >= 0 && place < n, "slot holds ", place, ", out of range [0, ", n, ")");
      gone += 1 - staying[place];
    }
    if (!shape.blocks())
      while (found + gone < k && d[found + gone] < end) ++gone;
    while (next < k && g[next] < (row + 1) * cols) ++next;
    grown[row + 1] = next;
    view.row_ptr[row + 1] = static_cast<int32_t>(view.row_ptr[row] + end - begin - gone + next - grown[row]);
    found += gone;
    longest = std::max<int64_t>(longest, end - begin);
    most = std::max(most, next - grown[row]);
  }
  STD_TORCH_CHECK(found == k, "slot holds a place more than once");

  // Merge the survivors, which are in order already, with the grown positions. The new values stand in the
  // order of the positions, wherever the old ones did.
  Buffer<uint8_t> clash(rows);
  parallel(rows, kEntryWork / 2 * static_cast<double>(n), [&](int64_t low, int64_t high) {
    Buffer<int32_t> stays(longest + 2), places(longest + 2), fresh_cols(most + 2);
    stays[0] = places[0] = fresh_cols[0] = -1;
    for (int64_t row = low; row < high; ++row) {
      const int64_t kept =
          stay(old, old.row_ptr[row], old.row_ptr[row + 1], staying.get(), stays.get() + 1, places.get() + 1);
      const int64_t came = grown[row + 1] - grown[row], at = view.row_ptr[row];
      for (int64_t i = 0; i < came; ++i)
        fresh_cols[i + 1] = static_cast<int32_t>(g[grown[row] + i] - row * cols);
      fresh_cols[came + 1] = kNone;
      clash[row] = merge(stays.get() + 1, places.get() + 1, kept, fresh_cols.get() + 1, came,
                         view.col_idx + at, from + at);
    }
  });
  for (int64_t row = 0; row < rows; ++row)
    for (int32_t i = view.row_ptr[row] + 1; clash[row] && i < view.row_ptr[row + 1]; ++i)
      STD_TORCH_CHECK(view.col_idx[i] != view.col_idx[i - 1], "grow holds position ",
                      row * cols + view.col_idx[i], ", which is active and not dropped");
  fill_rest(view);
  return {fresh, source};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("index_build", TORCH_BOX(&sparse_kernels::index_build));
  m.impl("index_update", TORCH_BOX(&sparse_kernels::index_update));
}
