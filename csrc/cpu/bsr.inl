// BSR products on packed tiles. A block's values are v[o * so + i * si] for output o and input i, so
// that the transposed product swaps the strides. Input i of a block at byte offset off reads its cells
// at x + off + i * x_row (+ r * step); see csr.inl for x and step.

// A strip of `outs` outputs x `cells` cells over one block row: acc stays in registers for all blocks.
template <class T, int outs, int cells, bool dense_step>
SK_INLINE void bsr_strip(const BlockRow<T>& row, const char* x, int64_t x_row, int64_t step, int64_t first,
                         T* y, int64_t y_row) {
  constexpr int V = cells * kVectors;
  Vec<T> acc[outs][V];
  SK_UNROLL for (int o = 0; o < outs; ++o) SK_UNROLL for (int v = 0; v < V; ++v) acc[o][v] =
      load(y + o * y_row + v * kLanes<T>);
  for (int64_t b = row.begin; b < row.end; ++b) {
    const T* value = row.values + int64_t(row.block[b]) * row.block_numel + first * row.so;
    const char* at = x + row.off[b];
    for (int64_t i = 0; i < row.inputs; ++i, at += x_row, value += row.si) {
      Vec<T> in[V];
      SK_UNROLL for (int r = 0; r < cells; ++r) {
        const T* cell = reinterpret_cast<const T*>(at + r * (dense_step ? int64_t(kCellBytes) : step));
        SK_UNROLL for (int v = 0; v < kVectors; ++v) in[r * kVectors + v] = load(cell + v * kLanes<T>);
      }
      SK_UNROLL for (int o = 0; o < outs; ++o) {
        const Vec<T> w = splat(value[o * row.so]);
        SK_UNROLL for (int v = 0; v < V; ++v) acc[o][v] += w * in[v];
      }
    }
  }
  SK_UNROLL for (int o = 0; o < outs; ++o) SK_UNROLL for (int v = 0; v < V; ++v)
      store(y + o * y_row + v * kLanes<T>, acc[o][v]);
}

// Registers: outs * cells * kVectors accumulators. 4 x 4 cells of one vector on AVX-512, 4 x 1 cell of
// two on AVX2, 2 x 1 cell of four on SSE.
constexpr int kBsrCells = kVectorBytes == 64 ? 4 : 1;
constexpr int kBsrOuts = kVectorBytes == 16 ? 2 : 4;

template <class T, int cells, bool dense_step>
SK_INLINE void bsr_rows(const BlockRow<T>& row, const char* x, int64_t x_row, int64_t step, T* y,
                        int64_t y_row) {
  int64_t o = 0;
  for (; o + kBsrOuts <= row.outputs; o += kBsrOuts)
    bsr_strip<T, kBsrOuts, cells, dense_step>(row, x, x_row, step, o, y + o * y_row, y_row);
  for (; o + 2 <= row.outputs; o += 2)
    bsr_strip<T, 2, cells, dense_step>(row, x, x_row, step, o, y + o * y_row, y_row);
  for (; o < row.outputs; ++o)
    bsr_strip<T, 1, cells, dense_step>(row, x, x_row, step, o, y + o * y_row, y_row);
}

template <class T, bool dense_step>
void bsr_spmm_step(int64_t cells, const BlockRow<T>& row, const char* x, int64_t x_row, int64_t step, T* y) {
  const int64_t y_row = cells * kCell<T>;
  for (int64_t c = 0; c < cells;) {
    const char* at = x + c * step;
    T* out = y + c * kCell<T>;
    if (kBsrCells == 4 && cells - c >= 4) {
      bsr_rows<T, kBsrCells, dense_step>(row, at, x_row, step, out, y_row);
      c += 4;
    } else {
      bsr_rows<T, 1, dense_step>(row, at, x_row, step, out, y_row);
      c += 1;
    }
  }
}

// y [outputs][cells] += one block row of the weight times x.
template <class T>
void bsr_spmm(int64_t cells, const BlockRow<T>* row, const char* x, int64_t x_row, int64_t step, T* y) {
  if (step == kCellBytes)
    bsr_spmm_step<T, true>(cells, *row, x, x_row, step, y);
  else
    bsr_spmm_step<T, false>(cells, *row, x, x_row, step, y);
}

// Weight gradient of one block, summed over `count` cells of x and d: a tile of tile_out x tile_in sums
// (kLanes of them) at a time, each a vector that one transpose-reduce turns into kLanes values.
// x: input i at x + i * x_row; d: output o at d + o * d_row; cell c of either at bytes x_cell[c], d_cell[c].
template <class T>
void bsr_sddmm(int64_t outputs, int64_t inputs, const char* x, int64_t x_row, const int64_t* x_cell,
               const char* d, int64_t d_row, const int64_t* d_cell, int64_t count, T* out) {
  constexpr int L = kLanes<T>;
  constexpr int tile_in = L >= 8 ? 4 : (L >= 4 ? 2 : (L > 1 ? 2 : 1));
  constexpr int tile_out = L / tile_in;
  for (int64_t o0 = 0; o0 < outputs; o0 += tile_out)
    for (int64_t i0 = 0; i0 < inputs; i0 += tile_in) {
      const char *ds[tile_out], *xs[tile_in];  // past the edge: the last one again, its sums unused
      SK_UNROLL for (int o = 0; o < tile_out; ++o) ds[o] =
          d + (o0 + o < outputs ? o0 + o : outputs - 1) * d_row;
      SK_UNROLL for (int i = 0; i < tile_in; ++i) xs[i] = x + (i0 + i < inputs ? i0 + i : inputs - 1) * x_row;
      Vec<T> acc[L] = {};
      for (int64_t c = 0; c < count; ++c) SK_UNROLL for (int v = 0; v < kVectors; ++v) {
          Vec<T> in[tile_in];
          SK_UNROLL for (int i = 0; i < tile_in; ++i) in[i] =
              load(reinterpret_cast<const T*>(xs[i] + x_cell[c]) + v * L);
          SK_UNROLL for (int o = 0; o < tile_out; ++o) {
            const Vec<T> g = load(reinterpret_cast<const T*>(ds[o] + d_cell[c]) + v * L);
            SK_UNROLL for (int i = 0; i < tile_in; ++i) acc[o * tile_in + i] += g * in[i];
          }
        }
      const Vec<T> total = reduce<T>(acc);
      for (int64_t o = 0; o < tile_out && o0 + o < outputs; ++o)
        for (int64_t i = 0; i < tile_in && i0 + i < inputs; ++i)
          out[(o0 + o) * inputs + i0 + i] += total[o * tile_in + i];
    }
}
