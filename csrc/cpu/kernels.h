// The CPU kernels as tables of function pointers, one table for each instruction set.
//
// Kernels take raw pointers and byte offsets into tiles of 64-byte cells (16 float or 8 double token
// lanes); what tiles are, and who owns them, is the drivers' business (linear.cpp, conv2d.cpp).
#pragma once

#include <cstdint>

#include "../common/index.h"

namespace sparse_kernels {

constexpr int64_t kCellSize = 64;  // bytes

// The canonical arrays of one direction of a CSR topology, as the stream of a Conv2d is made from them:
// off = base of the segment + (table[idx] or idx * scale), val = values[perm[i] or i].
template <class T>
struct StreamSource {
  const int32_t* idx;
  int64_t n;
  uint32_t scale;
  const uint32_t* table;  // byte offset of every index, or null
  const T* values;        // or null: offsets alone
  const int32_t* perm;    // or null
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

template <class T>
struct Kernels {
  void (*pack)(const T* src, int64_t stride, int64_t tokens, int64_t features, T* panel, int64_t panel_stride,
               int64_t cells, T* sums);
  void (*unpack)(const T* panel, int64_t panel_stride, int64_t tokens, int64_t features, T* dst,
                 int64_t stride);
  void (*column_sums)(const T* src, int64_t stride, int64_t tokens, int64_t features, T* out);
  void (*fill)(T* panel, int64_t features, int64_t lanes, const T* bias);
  void (*csr_collect)(const T* values, int64_t n, const RowLength* segments, const int32_t* begin,
                      int64_t n_segments, int64_t entries, T* val);
  void (*csr_scatter)(const T* values, const int32_t* slot, int64_t n, T* to);
  void (*csr_gather)(const T* from, const int32_t* slot, int64_t n, T* values);
  void (*csr_spmm)(int64_t cells, const char* x, const RowLength* segments, int64_t n_segments,
                   const uint16_t* near, const T* val, const T* start, T* y);
  void (*csr_sddmm)(int64_t cells, const char* x, const T* d, const RowLength* segments, int64_t n_segments,
                    const uint16_t* near, bool fresh, T* out);
  void (*csr_backward)(int64_t cells, const char* d, const T* x, const RowLength* segments,
                       int64_t n_segments, const uint16_t* near, const T* val, bool first, T* dx, bool fresh,
                       T* out);
  void (*conv_stream)(const StreamSource<T>* from, const RowLength* segments, const int32_t* begin,
                      const uint32_t* base, int64_t n_segments, int64_t entries, uint32_t* off, T* val);
  void (*conv_spmm)(int64_t cells, const char* x, int64_t step, const RowLength* segments, int64_t n_segments,
                    const uint32_t* off, const T* val, T* y);
  void (*conv_sddmm)(int64_t cells, const char* x, int64_t step, const char* d, int64_t d_row, int64_t d_step,
                     const RowLength* segments, int64_t n_segments, const uint32_t* off, T* out);
  void (*bsr_spmm)(int64_t cells, const BlockRow<T>* row, const char* x, int64_t x_row, int64_t step, T* y);
  void (*bsr_sddmm)(int64_t outputs, int64_t inputs, const char* x, int64_t x_row, const int64_t* x_cell,
                    const char* d, int64_t d_row, const int64_t* d_cell, int64_t count, T* out);
};

struct KernelTable {
  const char* isa;
  Kernels<float> f32;
  Kernels<double> f64;
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

}  // namespace sparse_kernels
