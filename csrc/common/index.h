// Layout of the one int32 buffer behind a Topology (sparse_kernels/topology.py), as raw pointers.
//
//   row_ptr [rows + 1] | col_idx [n] | col_ptr [groups * cols + 1] | row_idx [n] | perm [n]
//   and, for CSR weights ("planned"), a schedule for each direction:
//   row_plan | col_plan
//
// A plan cuts the columns (of that direction) into tiles whose panel of activations stays in L1
// and lists each tile's row segments in order of their length, so that the number of entries to
// process, and with it the kernel's branch, repeats:
//   tile_ptr [tiles + 1] | segments [capacity][3] = (row, begin, end)
// with begin and end into the canonical order of the direction (a segment is contiguous there).
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparse_kernels {

struct Segment {
  int32_t row, begin, end;
};

struct PlanShape {
  int64_t width;     // columns a tile
  int64_t tiles;     //
  int64_t capacity;  // segments at most
  int64_t size() const { return tiles + 1 + 3 * capacity; }
};

// Tile width: about 12 entries to a segment so that loading and storing its accumulators is small
// against its arithmetic, within [128, 1024] columns: 128 of them times 64 fp32 tokens are 32 KiB,
// what stays in L1 beside the streams. Measured: docs/cpu-kernels.md.
inline PlanShape plan_shape(int64_t rows, int64_t cols, int64_t n) {
  PlanShape plan{};
  const double per_row = rows > 0 ? static_cast<double>(n) / static_cast<double>(rows) : 0.0;
  const double wanted = per_row > 0 ? 12.0 * static_cast<double>(cols) / per_row : 1024.0;
  plan.width = std::clamp<int64_t>((static_cast<int64_t>(std::min(wanted, 1e6)) + 63) / 64 * 64, 128, 1024);
  plan.tiles = (cols + plan.width - 1) / plan.width;
  plan.capacity = std::min<int64_t>(n, rows * plan.tiles);
  return plan;
}

struct IndexShape {
  int64_t rows, cols, groups, n;
  bool planned;

  PlanShape row_plan() const { return plan_shape(rows, cols, n); }
  PlanShape col_plan() const { return plan_shape(groups * cols, rows, n); }
  int64_t size() const {
    int64_t total = rows + 1 + n + groups * cols + 1 + n + n;
    if (planned) total += row_plan().size() + col_plan().size();
    return total;
  }
};

// One direction's plan inside the buffer.
template <class Int>
struct PlanView {
  PlanShape shape;
  Int* tile_ptr;
  Int* segments;
};

template <class Int>  // int32_t or const int32_t
struct IndexView {
  IndexShape shape;
  Int *row_ptr, *col_idx, *col_ptr, *row_idx, *perm;
  PlanView<Int> row_plan, col_plan;

  IndexView(Int* base, IndexShape s) : shape(s) {
    row_ptr = base;
    col_idx = row_ptr + s.rows + 1;
    col_ptr = col_idx + s.n;
    row_idx = col_ptr + s.groups * s.cols + 1;
    perm = row_idx + s.n;
    Int* next = perm + s.n;
    if (s.planned) {
      row_plan = {s.row_plan(), next, next + s.row_plan().tiles + 1};
      next += row_plan.shape.size();
      col_plan = {s.col_plan(), next, next + s.col_plan().tiles + 1};
    }
  }
};

}  // namespace sparse_kernels
