// The CPU kernels as tables of function pointers, one table for each instruction set.
//
// Kernels take raw pointers and byte offsets into tiles of 64-byte cells (16 float or 8 double token
// lanes); what tiles are, and who owns them, is the drivers' business (linear.cpp, conv2d.cpp).
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/index.h"

namespace sparse_kernels {

constexpr int64_t kCellSize = 64;  // bytes

// Neighbouring pixels of a run of cells that stand at equal steps in memory, from element `at` of an image
// tensor: lanes [lane, lane + count) of the run.
struct Piece {
  int64_t at, lane, count;
};

// One row of blocks, with where each block's inputs and values stand.
template <class T>
struct BlockRow {
  int64_t begin, end;       // its blocks
  const uint32_t* off;      // byte offset of each block's first input in the tile
  const int32_t* block;     // index of each block's values
  const T* values;          //
  int64_t outputs, inputs;  // of a block, in this direction
  int64_t block_numel;      // outputs * inputs
  int64_t so, si;           // strides of the values by output and input
};

constexpr int64_t kStripGroup = 16;  // tokens whose sum strip_pack gives

// Block rows of a weight for the products with features as lanes (bsr_strips.inl): the values that go with
// input i of position p and a cell of its outputs are the vector at
// values + block[p] * numel + cell * cell_step + i * step.
template <class T>
struct StripWeights {
  const int32_t *ptr, *idx, *block;  // block null: p itself
  const T* values;
  int64_t numel, step, cell_step;
  int64_t cells, inputs;  // of a block: cells of outputs, inputs
  int64_t n;              // blocks in all
  int64_t group = 1;      // 2: a cell is half as many outputs times pairs of inputs
};

// Memory that a convolution will want soon, asked for while the kernel computes: of a segment of row r, the
// lines at r * plane from each of these (null: none).
struct Ahead {
  const char *write[8] = {}, *read[8] = {};
  int64_t write_plane = 0, read_plane = 0;  // bytes
  const char* next = nullptr;               // and as many lines again, segment after segment
};

// 16-bit types that tensors are stored in; arithmetic is in float.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

// The kernels between tensors of S and panels, values and sums of T. S is T, or T is float and S has 16 bits:
// read exactly, written rounded to nearest even.
template <class T, class S>
struct Stored {
  void (*pack)(const S* src, int64_t stride, int64_t tokens, int64_t features, T* panel, int64_t panel_stride,
               int64_t cells, T* sums);
  void (*unpack)(const T* panel, int64_t panel_stride, int64_t tokens, int64_t features, S* dst,
                 int64_t stride);
  void (*collect)(const S* values, int64_t n, const RowLength* segments, const int32_t* begin,
                  int64_t n_segments, int64_t entries, T* val);
  void (*gather)(const S* from, const int32_t* source, int64_t n, T* values);
  void (*scatter)(const T* values, const int32_t* source, int64_t n, S* to);
  void (*widen)(const S* from, int64_t n, T* to);
  void (*narrow)(const T* from, int64_t n, S* to);
};

template <class T>
struct Kernels {
  void (*pack)(const T* src, int64_t stride, int64_t tokens, int64_t features, T* panel, int64_t panel_stride,
               int64_t cells, T* sums);
  void (*unpack)(const T* panel, int64_t panel_stride, int64_t tokens, int64_t features, T* dst,
                 int64_t stride);
  void (*fill)(T* panel, int64_t features, int64_t lanes, const T* bias);
  void (*csr_spmm)(int64_t cells, bool chained, const char* x, const RowLength* segments, int64_t n_segments,
                   const uint16_t* near, const T* val, bool first, const T* bias, T* y);
  void (*csr_sddmm)(int64_t cells, const char* x, const T* d, const RowLength* segments, int64_t n_segments,
                    const uint16_t* near, bool fresh, T* out);
  void (*csr_backward)(int64_t cells, const char* d, int64_t column, const T* x, const RowLength* segments,
                       int64_t n_segments, const uint16_t* near, const T* val, bool first, T* dx, bool fresh,
                       T* out);
  void (*conv_spmm)(int64_t cells, const char* x, const RowLength* segments, int64_t n_segments,
                    const uint32_t* off, const T* val, const Ahead& ahead, T* y);
  void (*conv_sddmm)(int64_t cells, const char* d, const T* x, const RowLength* segments, int64_t n_segments,
                     const uint32_t* off, T* out);
  void (*conv_backward)(int64_t cells, const char* d, const T* x, const RowLength* segments,
                        int64_t n_segments, const uint32_t* off, const T* val, const Ahead& ahead, T* dx,
                        T* out);
  void (*conv_rows)(const T* from, int64_t from_row, int64_t rows, int64_t count, int64_t step, T* to,
                    int64_t to_row);
  void (*conv_copy)(const T* from, int64_t from_row, int64_t from_image, int64_t unit, int64_t rows,
                    int64_t cells, int64_t last, T* to, int64_t to_row);
  void (*conv_load)(const T* from, int64_t plane, int64_t channels, const Piece* pieces, int64_t n,
                    int64_t step, int64_t lanes, T* panel, int64_t panel_size);
  void (*conv_store)(const T* panel, int64_t panel_size, int64_t lanes, int64_t channels, const Piece* pieces,
                     int64_t n, int64_t step, T* to, int64_t plane);
  void (*conv_pack_pixels)(const T* const* lanes, int64_t channels, T* panel, int64_t row);
  void (*conv_unpack_pixels)(const T* panel, int64_t row, int64_t channels, T* const* lanes);
  void (*conv_sums)(const T* image, int64_t pixel, int64_t plane, int64_t pixels, int64_t channels, T* sums);
  void (*bsr_spmm)(int64_t cells, const BlockRow<T>* row, const char* x, int64_t x_row, int64_t step, T* y);
  void (*bsr_sddmm)(int64_t outputs, int64_t inputs, const char* x, int64_t x_row, const int64_t* x_cell,
                    const char* d, int64_t d_row, const int64_t* d_cell, int64_t count, T* out);
  void (*strip_pack)(const T* src, int64_t stride, int64_t tokens, int64_t features, T* dst, int64_t pitch,
                     T* sums);
  void (*strip_transpose)(const T* values, const int32_t* block, int64_t first, int64_t last, int64_t b_out,
                          int64_t b_in, T* out);
  void (*pair_interleave)(const T* values, const int32_t* block, int64_t first, int64_t last, bool transposed,
                          T* out);
  void (*strip_spmm)(const StripWeights<T>* w, int64_t first, int64_t last, int64_t tokens, const T* x,
                     int64_t pitch, const T* bias, T* y, int64_t stride);
  void (*strip_backward)(const StripWeights<T>* w, int64_t first, int64_t last, int64_t tokens, const T* d,
                         int64_t pitch, const T* x, int64_t row, bool fresh, T* dw, T* dx);
  void (*pair_sddmm)(const StripWeights<T>* w, int64_t first, int64_t last, int64_t tokens, const T* d,
                     int64_t pitch, const T* x, int64_t row, bool fresh, T* dw);
  bool (*all_finite)(const T* x, int64_t n);
  bool (*growth_magnitudes)(T* g, int64_t n);
  int64_t (*growth_offer)(const T* score, int64_t n, T threshold, int32_t column, T* scores,
                          int32_t* columns);
};

// Of features rounded to 8 bits (growth_screen.inl): value = base + scale * code; the largest magnitude; sums
// over the tokens: of squares in units of that, of squared errors in units of the scale, of codes.
struct ScreenGroup {
  float *scale, *base, *largest, *norm, *error, *sum;
};
// Of one output: scale and sum of its codes, norms of its values and of their error, and what a bound never
// falls below.
struct ScreenRow {
  float scale, sum, norm, error, least;
  int32_t number;
};
struct Screen {
  bool (*round)(const float* src, int64_t stride, int64_t tokens, int64_t features, bool signed_codes,
                uint32_t* codes, const ScreenGroup* out);
  int64_t (*tile)(const uint32_t* x, const uint32_t* d, int64_t steps, const float* scale, const float* base,
                  const float* norm, const float* error, const ScreenRow* rows, float least, uint32_t valid,
                  const uint32_t* active, int64_t active_stride, int32_t column, float* upper,
                  int32_t* columns, int32_t* numbers);
  void (*dots)(const float* row, const float* features, int64_t stride, int64_t cells, const int32_t* columns,
               int64_t n, float* out);
};

struct KernelTable {
  const char* isa;
  int64_t gradient_cells;  // to a tile of csr_backward at most: what the registers hold
  Kernels<float> f32;
  Kernels<double> f64;
  Stored<float, float> stored_f32;
  Stored<double, double> stored_f64;
  Stored<float, BFloat16> stored_bf16;
  Stored<float, Half> stored_f16;
  const Screen* screen;                             // null where bytes are not multiplied faster than floats
  double (*fma_peak)(int64_t rounds, float* sink);  // operations done; sink: 16 floats
};

namespace isa_scalar {
extern const KernelTable table;
}
namespace isa_avx2 {
extern const KernelTable table;
}
namespace isa_avx512 {
extern const KernelTable table;
}

// The table in use: the widest set of this machine, or the one SPARSE_KERNELS_ISA names.
const KernelTable& kernels();

template <class T>
const Kernels<T>& kernels_for();
template <>
inline const Kernels<float>& kernels_for<float>() {
  return kernels().f32;
}
template <>
inline const Kernels<double>& kernels_for<double>() {
  return kernels().f64;
}

template <class T, class S>
const Stored<T, S>& stored_for() {
  if constexpr (std::is_same_v<S, double>)
    return kernels().stored_f64;
  else if constexpr (std::is_same_v<S, float>)
    return kernels().stored_f32;
  else if constexpr (std::is_same_v<S, BFloat16>)
    return kernels().stored_bf16;
  else
    return kernels().stored_f16;
}

}  // namespace sparse_kernels
