// Conv2d: products of single weights with runs of output pixels.
//
// A run is up to 8 cells of pixels (conv2d_grid.h). A stored weight reads the run of its channel and tap:
// cells that follow each other at a byte offset `off` from x (or d). Panels are [channel][cells of the run].
// Entries come as a stream in segment order, as in csr.inl.

#define SK_CASES8(j) \
  SK_CASE(j)         \
  SK_CASE(j - 1) SK_CASE(j - 2) SK_CASE(j - 3) SK_CASE(j - 4) SK_CASE(j - 5) SK_CASE(j - 6) SK_CASE(j - 7)
#define SK_CASES32 SK_CASES8(32) SK_CASES8(24) SK_CASES8(16) SK_CASES8(8)

template <int cells>
SK_INLINE void fetch(const Ahead& ahead, int64_t row, int64_t s) {
  if (ahead.write[0] != nullptr)
    SK_UNROLL for (int r = 0; r < cells; ++r) __builtin_prefetch(ahead.write[r] + row * ahead.write_plane, 1);
  if (ahead.read[0] != nullptr)
    SK_UNROLL for (int r = 0; r < cells; ++r)
        __builtin_prefetch(ahead.read[r] + row * ahead.read_plane, 0, 2);
  if (ahead.next != nullptr)
    SK_UNROLL for (int r = 0; r < cells; ++r)
        __builtin_prefetch(ahead.next + (s * cells + r) * kCellBytes, 0, 2);
}

// y[row] += sum of value * x over each segment, for `cells` cells of runs of y_row elements.
#define SK_CASE(j)                                                                \
  case j: {                                                                       \
    const Vec<T> w = splat(val[-(j)]);                                            \
    const T* at = reinterpret_cast<const T*>(x + off[-(j)]);                      \
    SK_UNROLL for (int v = 0; v < V; ++v) acc[v] += w * load(at + v * kLanes<T>); \
  }                                                                               \
    [[fallthrough]];
template <class T, int cells>
void conv_spmm_fixed(const char* x, const RowLength* segments, int64_t n_segments, const uint32_t* off,
                     const T* val, int64_t y_row, const Ahead& ahead, T* y) {
  constexpr int V = cells * kVectors;
  for (int64_t s = 0; s < n_segments; ++s) {
    const int64_t soon = (s + 2 < n_segments ? segments[s + 2].row : segments[s].row) * y_row;
    SK_UNROLL for (int r = 0; r < cells; ++r) __builtin_prefetch(y + soon + r * kCell<T>, 1);
    fetch<cells>(ahead, segments[s].row, s);
    T* out = y + segments[s].row * y_row;
    Vec<T> acc[V];
    SK_UNROLL for (int v = 0; v < V; ++v) acc[v] = load(out + v * kLanes<T>);
    for (int64_t left = segments[s].length; left > 0; left -= 32) {
      const int64_t take = left < 32 ? left : 32;
      off += take, val += take;
      switch (take) {
        SK_CASES32
        default:
          break;
      }
    }
    SK_UNROLL for (int v = 0; v < V; ++v) store(out + v * kLanes<T>, acc[v]);
  }
}
#undef SK_CASE

// Runs of 1, 2, 4 or 8 cells. 8 accumulators whatever the vectors: narrower ones take a run in parts.
template <class T>
void conv_spmm(int64_t cells, const char* x, const RowLength* segments, int64_t n_segments,
               const uint32_t* off, const T* val, const Ahead& ahead, T* y) {
  constexpr int most = kVectors == 1 ? 8 : kVectors == 2 ? 4 : 2;
  const int64_t row = cells * kCell<T>;
  for (int64_t c = 0; c < cells;) {
    const char* at = x + c * kCellBytes;
    T* out = y + c * kCell<T>;
    if (most == 8 && cells - c >= 8) {
      conv_spmm_fixed<T, most>(at, segments, n_segments, off, val, row, ahead, out), c += 8;
    } else if (most >= 4 && cells - c >= 4) {
      conv_spmm_fixed<T, most == 8 ? 4 : most>(at, segments, n_segments, off, val, row, ahead, out), c += 4;
    } else if (cells - c >= 2) {
      conv_spmm_fixed<T, 2>(at, segments, n_segments, off, val, row, ahead, out), c += 2;
    } else {
      conv_spmm_fixed<T, 1>(at, segments, n_segments, off, val, row, ahead, out), c += 1;
    }
  }
}

// out[i] += sum over the lanes of x[row] * d[off[i]]: the weight gradient, a segment being an input channel.
#define SK_CASE(j)                                                         \
  case j: {                                                                \
    const T* at = reinterpret_cast<const T*>(d + off[-(j)]);               \
    Vec<T> dot = in[0] * load(at);                                         \
    SK_UNROLL for (int v = 1; v < V; ++v) dot += in[v] * load(at + v * L); \
    sums.put(j, dot);                                                      \
  }                                                                        \
    [[fallthrough]];
template <class T, int cells>
void conv_sddmm_fixed(const char* d, const T* x, const RowLength* segments, int64_t n_segments,
                      const uint32_t* off, T* out) {
  constexpr int L = kLanes<T>, V = cells * kVectors;
  alignas(64) T room[LaneSums<T>::kRoom];
  LaneSums<T> sums(room, false, out);
  for (int64_t s = 0; s < n_segments; ++s) {
    const T* row = x + segments[s].row * (cells * kCell<T>);
    Vec<T> in[V];
    SK_UNROLL for (int v = 0; v < V; ++v) in[v] = load(row + v * L);
    for (int64_t left = segments[s].length; left > 0; left -= 32) {
      const int64_t take = left < 32 ? left : 32;
      off += take;
      sums.take(take);
      switch (take) {
        SK_CASES32
        default:
          break;
      }
      sums.reduce_full();
    }
  }
  sums.reduce_rest();
}
#undef SK_CASE

// Both gradients in one pass, which loads every cell of d once for two multiply-adds: dx[row] += sum of
// value * d[off], out[i] += sum over the lanes of x[row] * d[off[i]]. The bits are those of the two apart.
#define SK_CASE(j)                                           \
  case j: {                                                  \
    const Vec<T> w = splat(val[-(j)]);                       \
    const T* at = reinterpret_cast<const T*>(d + off[-(j)]); \
    Vec<T> dot;                                              \
    SK_UNROLL for (int v = 0; v < V; ++v) {                  \
      Vec<T> cell = load(at + v * L);                        \
      keep(cell);                                            \
      acc[v] += w * cell;                                    \
      dot = v == 0 ? in[v] * cell : dot + in[v] * cell;      \
    }                                                        \
    sums.put(j, dot);                                        \
  }                                                          \
    [[fallthrough]];
template <class T, int cells>
void conv_backward_fixed(const char* d, const T* x, const RowLength* segments, int64_t n_segments,
                         const uint32_t* off, const T* val, const Ahead& ahead, T* dx, T* out) {
  constexpr int L = kLanes<T>, V = cells * kVectors;
  constexpr int64_t row = int64_t(cells) * kCell<T>;
  alignas(64) T room[LaneSums<T>::kRoom];
  LaneSums<T> sums(room, false, out);
  for (int64_t s = 0; s < n_segments; ++s) {
    const int64_t soon = (s + 2 < n_segments ? segments[s + 2].row : segments[s].row) * row;
    SK_UNROLL for (int r = 0; r < cells; ++r) {
      __builtin_prefetch(dx + soon + r * kCell<T>, 1);
      __builtin_prefetch(x + soon + r * kCell<T>);
    }
    fetch<cells>(ahead, segments[s].row, s);
    Vec<T> acc[V], in[V];
    SK_UNROLL for (int v = 0; v < V; ++v) {
      acc[v] = load(dx + segments[s].row * row + v * L);
      in[v] = load(x + segments[s].row * row + v * L);
    }
    for (int64_t left = segments[s].length; left > 0; left -= 32) {
      const int64_t take = left < 32 ? left : 32;
      off += take, val += take;
      sums.take(take);
      switch (take) {
        SK_CASES32
        default:
          break;
      }
      sums.reduce_full();
    }
    SK_UNROLL for (int v = 0; v < V; ++v) store(dx + segments[s].row * row + v * L, acc[v]);
  }
  sums.reduce_rest();
}
#undef SK_CASE
#undef SK_CASES8
#undef SK_CASES32

#define SK_RUNS(call) \
  switch (cells) {    \
    case 8:           \
      return call(8); \
    case 4:           \
      return call(4); \
    case 2:           \
      return call(2); \
    default:          \
      return call(1); \
  }
template <class T>
void conv_sddmm(int64_t cells, const char* d, const T* x, const RowLength* segments, int64_t n_segments,
                const uint32_t* off, T* out) {
#define SK_CALL(n) conv_sddmm_fixed<T, n>(d, x, segments, n_segments, off, out)
  SK_RUNS(SK_CALL)
#undef SK_CALL
}

template <class T>
void conv_backward(int64_t cells, const char* d, const T* x, const RowLength* segments, int64_t n_segments,
                   const uint32_t* off, const T* val, const Ahead& ahead, T* dx, T* out) {
  if constexpr (kVectors == 1) {
#define SK_CALL(n) conv_backward_fixed<T, n>(d, x, segments, n_segments, off, val, ahead, dx, out)
    SK_RUNS(SK_CALL)
#undef SK_CALL
  } else {  // too few registers for both
    conv_spmm<T>(cells, d, segments, n_segments, off, val, ahead, dx);
    conv_sddmm<T>(cells, d, x, segments, n_segments, off, out);
  }
}
#undef SK_RUNS
