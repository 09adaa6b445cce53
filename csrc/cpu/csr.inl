// CSR products on packed tiles. `x` is a tile of cells; a stored weight at (row, column) reads the
// `cells` cells at byte offset off[i] + r * step from it (Linear: one feature of the panel, step one
// cell; Conv2d: one tap of one channel, step the stride). Entries come as a stream in segment order.

// One entry: acc[r] += value * x[...]. `cells * kVectors` accumulators.
template <class T, int cells, bool dense_step>
SK_INLINE void csr_step(Vec<T>* acc, const char* x, uint32_t off, T value, int64_t step) {
  const Vec<T> w = splat(value);
  const char* at = x + off;
  SK_UNROLL for (int r = 0; r < cells; ++r) {
    const T* cell = reinterpret_cast<const T*>(at + r * (dense_step ? int64_t(kCellBytes) : step));
    SK_UNROLL for (int v = 0; v < kVectors; ++v) acc[r * kVectors + v] += w * load(cell + v * kLanes<T>);
  }
}

#define SK_CASES8(j) \
  SK_CASE(j)         \
  SK_CASE(j - 1) SK_CASE(j - 2) SK_CASE(j - 3) SK_CASE(j - 4) SK_CASE(j - 5) SK_CASE(j - 6) SK_CASE(j - 7)
#define SK_CASES32 SK_CASES8(32) SK_CASES8(24) SK_CASES8(16) SK_CASES8(8)

// y[row] += sum of value * x over each segment. y: [rows][cells] cells. Jumping into unrolled code by
// the segment's length makes one well-predicted branch a segment: the plan sorts them by length.
#define SK_CASE(j)                                                      \
  case j:                                                               \
    csr_step<T, cells, dense_step>(acc, x, off[-(j)], val[-(j)], step); \
    [[fallthrough]];
template <class T, int cells, bool dense_step>
void csr_spmm_fixed(const char* x, int64_t step, const RowLength* segments, int64_t n_segments,
                    const uint32_t* off, const T* val, T* y) {
  constexpr int V = cells * kVectors;
  constexpr int64_t row = int64_t(cells) * kCell<T>;
  for (int64_t s = 0; s < n_segments; ++s) {
    // The next rows of y come in the order of lengths, which no hardware prefetcher follows.
    const int64_t ahead = s + 2 < n_segments ? s + 2 : s;
    SK_UNROLL for (int r = 0; r < cells; ++r)
        __builtin_prefetch(y + segments[ahead].row * row + r * kCell<T>, 1);
    T* out = y + segments[s].row * row;
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

template <class T>
void csr_spmm(int64_t cells, const char* x, int64_t step, const RowLength* segments, int64_t n_segments,
              const uint32_t* off, const T* val, T* y) {
#define SK_RUN(n)                                                                                    \
  return step == kCellBytes ? csr_spmm_fixed<T, n, true>(x, step, segments, n_segments, off, val, y) \
                            : csr_spmm_fixed<T, n, false>(x, step, segments, n_segments, off, val, y)
  if (cells == 4) SK_RUN(4);
  if (cells == 2) SK_RUN(2);
  SK_RUN(1);
#undef SK_RUN
}

// The lanes of one entry's weight gradient, summed over the cells.
template <class T, int cells, bool dense_step>
SK_INLINE Vec<T> sddmm_step(const Vec<T>* grad, const char* x, uint32_t off, int64_t step) {
  const char* at = x + off;
  Vec<T> acc;
  SK_UNROLL for (int r = 0; r < cells; ++r) {
    const T* cell = reinterpret_cast<const T*>(at + r * (dense_step ? int64_t(kCellBytes) : step));
    SK_UNROLL for (int v = 0; v < kVectors; ++v) {
      const Vec<T> in = load(cell + v * kLanes<T>);
      if (r + v == 0)
        acc = grad[0] * in;
      else
        acc += grad[r * kVectors + v] * in;
    }
  }
  return acc;
}

constexpr int kSums = 96;  // vectors of sums held before they are reduced: what a tile leaves free of L1

// out[i] += sum over the lanes of d[row] * x[off[i]]: the weight gradient at the stored positions, in
// stream order. d: row r at byte r * d_row, its cells d_step apart. Entries leave a vector each in
// `sums`, whatever their row, so that the transpose-reduce always has kLanes of them.
#define SK_CASE(j)                                                                    \
  case j:                                                                             \
    store(end - (j) * L, sddmm_step<T, cells, dense_step>(grad, x, off[-(j)], step)); \
    [[fallthrough]];
template <class T, int cells, bool dense_step>
void csr_sddmm_fixed(const char* x, int64_t step, const char* d, int64_t d_row, int64_t d_step,
                     const RowLength* segments, int64_t n_segments, const uint32_t* off, T* out) {
  constexpr int L = kLanes<T>;
  alignas(64) T sums[(kSums + 32) * L];
  int64_t pending = 0;
  for (int64_t s = 0; s < n_segments; ++s) {
    const char* row = d + segments[s].row * d_row;
    Vec<T> grad[cells * kVectors];
    SK_UNROLL for (int r = 0; r < cells; ++r) SK_UNROLL for (int v = 0; v < kVectors; ++v)
        grad[r * kVectors + v] = load(reinterpret_cast<const T*>(row + r * d_step) + v * L);
    for (int64_t left = segments[s].length; left > 0; left -= 32) {
      const int64_t take = left < 32 ? left : 32;
      off += take, pending += take;
      T* end = sums + pending * L;
      switch (take) {
        SK_CASES32
        default:
          break;
      }
      if (pending < kSums) continue;
      int64_t i = 0;
      for (; i + L <= pending; i += L, out += L) {
        Vec<T> r[L];
        SK_UNROLL for (int j = 0; j < L; ++j) r[j] = load(sums + (i + j) * L);
        store_loose(out, load_loose(out) + reduce<T>(r));
      }
      for (int64_t j = i; j < pending; ++j) store(sums + (j - i) * L, load(sums + j * L));
      pending -= i;
    }
  }
  for (int64_t i = 0; i < pending; i += L) {
    Vec<T> r[L];
    SK_UNROLL for (int j = 0; j < L; ++j) r[j] = i + j < pending ? load(sums + (i + j) * L) : Vec<T>{};
    const Vec<T> total = reduce<T>(r);
    for (int64_t j = 0; j < L && i + j < pending; ++j) *out++ += total[j];
  }
}
#undef SK_CASE
#undef SK_CASES8
#undef SK_CASES32

template <class T>
void csr_sddmm(int64_t cells, const char* x, int64_t step, const char* d, int64_t d_row, int64_t d_step,
               const RowLength* segments, int64_t n_segments, const uint32_t* off, T* out) {
#define SK_RUN(n)                                                                                     \
  return step == kCellBytes                                                                           \
             ? csr_sddmm_fixed<T, n, true>(x, step, d, d_row, d_step, segments, n_segments, off, out) \
             : csr_sddmm_fixed<T, n, false>(x, step, d, d_row, d_step, segments, n_segments, off, out)
  if (cells == 8) SK_RUN(8);
  if (cells == 4) SK_RUN(4);
  if (cells == 2) SK_RUN(2);
  SK_RUN(1);
#undef SK_RUN
}

// Where the entries of a direction are read from, see csr_stream.
template <class T>
SK_INLINE void stream_entries(const StreamSource<T>& from, int64_t at, int64_t count, uint32_t base,
                              uint32_t* off, T* val) {
  for (int64_t j = 0; j < count; ++j) {
    const int32_t idx = from.idx[at + j];
    off[j] = base + (from.table != nullptr ? from.table[idx] : uint32_t(idx) * from.scale);
    if (from.values != nullptr) val[j] = from.values[from.perm != nullptr ? from.perm[at + j] : at + j];
  }
}

// `entries` entries of consecutive segments from canonical into stream order. Whole vectors are copied, also
// past a segment's end (the next segment overwrites that), but never past the end of the source or of these
// entries. Segments come in the order of lengths, so the next ones are prefetched.
template <class T, bool table, bool perm>
void csr_stream_fixed(const StreamSource<T>& from, const RowLength* segments, const int32_t* begin,
                      const uint32_t* base, int64_t n_segments, int64_t entries, uint32_t* off, T* val) {
  constexpr int L = 16;
  const uint32_t scale = from.scale;
  for (int64_t s = 0; s < n_segments; ++s) {
    const int64_t length = segments[s].length;
    const uint32_t first = base != nullptr ? base[s] : 0;
    const int64_t next = begin[s + 12 < n_segments ? s + 12 : s];
    __builtin_prefetch(from.idx + next);
    __builtin_prefetch(from.idx + next + 15);
    if (from.values != nullptr)
      __builtin_prefetch(perm ? (const void*)(from.perm + next) : from.values + next);
    if (from.values != nullptr)
      __builtin_prefetch(perm ? (const void*)(from.perm + next + 15) : from.values + next + 15);
    for (int64_t i = 0; i < length; i += L) {
      const int64_t at = begin[s] + i;
      if (at + L > from.n || i + L > entries) {
        stream_entries(from, at, length - i < L ? length - i : L, first, off + i, val + i);
        continue;
      }
      // All reads before all writes: the compiler cannot know that off, idx and val do not overlap.
      uint32_t offs[L];
      T vals[L];
      SK_UNROLL for (int j = 0; j < L; ++j) {
        const int32_t idx = from.idx[at + j];
        offs[j] = first + (table ? from.table[idx] : uint32_t(idx) * scale);
      }
      if (from.values != nullptr) {
        SK_UNROLL for (int j = 0; j < L; ++j) vals[j] = from.values[perm ? from.perm[at + j] : at + j];
        __builtin_memcpy(val + i, vals, sizeof(vals));
      }
      __builtin_memcpy(off + i, offs, sizeof(offs));
    }
    off += length, entries -= length;
    if (from.values != nullptr) val += length;
  }
}

template <class T>
void csr_stream(const StreamSource<T>* from, const RowLength* segments, const int32_t* begin,
                const uint32_t* base, int64_t n_segments, int64_t entries, uint32_t* off, T* val) {
  if (from->table != nullptr && from->perm != nullptr)
    csr_stream_fixed<T, true, true>(*from, segments, begin, base, n_segments, entries, off, val);
  else if (from->table != nullptr)
    csr_stream_fixed<T, true, false>(*from, segments, begin, base, n_segments, entries, off, val);
  else if (from->perm != nullptr)
    csr_stream_fixed<T, false, true>(*from, segments, begin, base, n_segments, entries, off, val);
  else
    csr_stream_fixed<T, false, false>(*from, segments, begin, base, n_segments, entries, off, val);
}
