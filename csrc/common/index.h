// Layout of the one int32 buffer behind a Topology (sparse_kernels/topology.py), as raw pointers.
//
//   row_ptr [rows + 1] | col_idx [n] | col_ptr [groups * cols + 1]
//   and, but for CSR weights of a Linear: row_idx [n] | perm [n], the same by columns
//   and, for blocks: slot [n] = where the values of each block stand, so that they need not move when blocks
//   come and go
//   and, for CSR weights, plans: the order in which the CPU kernels take the entries. Conv2d has one of
//   the rows; Linear has one of the rows and one of the columns, with its entries in that order.
//
// perm says where the value of each position in column order stands: its slot, for blocks. On a GPU there
// are no plans; what blocks have there instead follows the arrays above (sparse_kernels/layout.py).
//
// A plan cuts the columns (of its direction) into tiles whose panel of activations stays in L1, and the
// rows into blocks, which threads may share out; tile t and block b make piece t * blocks + b. It lists
// every piece's row segments in order of their length, so that the number of entries to process, and with
// it the kernel's branch, repeats. For Linear the first tile has a segment of every row, empty ones too, so
// that it can set what the others add to:
//   piece_segment [pieces + 1] | piece_entry [pieces + 1] | segments [capacity][2] = (row, length)
//   and for rows: begin [capacity] = where the values of a segment start
//   and for Linear: near [n] (16 bits each) = column within the tile, times kNear
//   and for the columns of Linear: source [n] = which value each entry has
#pragma once

#include <algorithm>
#include <cstdint>

namespace sparse_kernels {

// A run of entries of one output row, in the stream of a tile.
struct RowLength {
  int32_t row, length;
};

constexpr int64_t kNear = 64;  // times up to 8, which an address can hold, a panel's row of 8 cells
constexpr int64_t kWidest = 65536 / kNear;  // columns of a tile at most

// What follows row_ptr, col_idx and col_ptr. kNone: CSR weights without plans, as on a GPU.
enum class Plans : int64_t { kNone = 0, kConv = 1, kLinear = 2, kBlocks = 3 };

struct PlanShape {
  int64_t rows, n;                  // as of the direction; entries
  int64_t width, tiles;             // columns a tile
  int64_t block, blocks;            // rows a block
  int64_t capacity;                 // segments at most
  bool begins, entries, reordered;  // holds `begin`; holds `near`; holds `source`

  int64_t pieces() const { return tiles * blocks; }
  int64_t size() const {
    return 2 * (pieces() + 1) + (begins ? 3 : 2) * capacity + (entries ? (n + 1) / 2 : 0) +
           (reordered ? n : 0);
  }
};

// Tile width: so many entries to a segment that loading and storing its accumulators is small against its
// arithmetic, within [128, 1024] columns: 128 of them times 64 fp32 tokens are 32 KiB, what stays in L1
// beside the streams. Measured: docs/cpu-kernels.md.
inline PlanShape plan_shape(int64_t rows, int64_t cols, int64_t n, bool linear, double per_segment) {
  PlanShape plan{};
  const double per_row = rows > 0 ? static_cast<double>(n) / static_cast<double>(rows) : 0.0;
  const double wanted = per_row > 0 ? per_segment * static_cast<double>(cols) / per_row : 1024.0;
  plan.rows = rows, plan.n = n;
  plan.width = std::clamp<int64_t>((static_cast<int64_t>(std::min(wanted, 1e6)) + 63) / 64 * 64, 128, 1024);
  plan.tiles = (cols + plan.width - 1) / plan.width;
  if (linear) plan.tiles = std::max<int64_t>(plan.tiles, 1);
  plan.block = std::max<int64_t>(rows, 1), plan.blocks = 1;
  plan.capacity = std::min<int64_t>(n + (linear ? rows : 0), rows * plan.tiles);
  plan.entries = linear;
  return plan;
}
static_assert(1024 <= kWidest, "near holds 16 bits");

struct IndexShape {
  int64_t rows, cols, groups, n;
  Plans plans;

  bool transposed() const { return plans != Plans::kLinear; }  // holds row_idx and perm
  bool blocks() const { return plans == Plans::kBlocks; }      // holds slot
  bool planned() const { return plans == Plans::kConv || plans == Plans::kLinear; }

  PlanShape row_plan() const {
    PlanShape plan = plan_shape(rows, cols, n, plans == Plans::kLinear, 12.0);
    plan.begins = true;
    return plan;
  }
  // Blocks of about 256 columns, so that lengths still repeat within them. A power of two of them, 32 at
  // most, so that threads share them out evenly.
  PlanShape col_plan() const {
    PlanShape plan = plan_shape(cols, rows, n, true, 24.0);
    while (plan.blocks < 32 && plan.blocks * 256 + 128 <= cols) plan.blocks *= 2;
    plan.block = std::max<int64_t>(1, (cols + plan.blocks * 16 - 1) / (plan.blocks * 16) * 16);
    plan.blocks = std::max<int64_t>(1, (cols + plan.block - 1) / plan.block);
    plan.reordered = true;
    return plan;
  }
  int64_t size() const {
    int64_t total = rows + 1 + n + groups * cols + 1 + (transposed() ? 2 * n : 0) + (blocks() ? n : 0);
    if (planned()) total += row_plan().size();
    if (plans == Plans::kLinear) total += col_plan().size();
    return total;
  }
};

// One direction's plan inside the buffer.
template <class Int>
struct PlanView {
  PlanShape shape{};
  Int *piece_segment = nullptr, *piece_entry = nullptr, *segments = nullptr, *begin = nullptr,
      *near_entries = nullptr, *source = nullptr;

  PlanView() = default;
  PlanView(Int* base, const PlanShape& s) : shape(s) {
    piece_segment = base;
    piece_entry = piece_segment + s.pieces() + 1;
    segments = piece_entry + s.pieces() + 1;
    begin = segments + 2 * s.capacity;
    near_entries = begin + (s.begins ? s.capacity : 0);
    source = near_entries + (s.entries ? (s.n + 1) / 2 : 0);
  }

  // The arrays whose elements are not int32.
  const RowLength* runs() const { return reinterpret_cast<const RowLength*>(segments); }
  const uint16_t* near() const { return reinterpret_cast<const uint16_t*>(near_entries); }
};

template <class Int>  // int32_t or const int32_t
struct IndexView {
  IndexShape shape;
  Int *row_ptr, *col_idx, *col_ptr, *row_idx, *perm, *slot;
  PlanView<Int> row_plan, col_plan;

  IndexView(Int* base, IndexShape s) : shape(s) {
    row_ptr = base;
    col_idx = row_ptr + s.rows + 1;
    col_ptr = col_idx + s.n;
    row_idx = col_ptr + s.groups * s.cols + 1;
    perm = row_idx + (s.transposed() ? s.n : 0);
    slot = perm + (s.transposed() ? s.n : 0);
    Int* next = slot + (s.blocks() ? s.n : 0);
    if (s.planned()) row_plan = {next, s.row_plan()};
    if (s.plans == Plans::kLinear) col_plan = {next + row_plan.shape.size(), s.col_plan()};
  }
};

}  // namespace sparse_kernels
