// CSR products on packed tiles. `x` is a tile of cells; a stored weight at (row, column) reads the
// `cells` cells at a byte offset from it, `step` bytes apart:
//   Linear: a tile of the plan, the column's cells follow each other; offset kCellBytes * cells * (column
//     within the tile), kept as 16 bits of `near` (index.h).
//   Conv2d: one tap of one channel for `cells` pixels; 32-bit byte offsets, step the stride.
// Entries come as a stream in segment order.

template <class Off, int cells>
SK_INLINE int64_t csr_offset(Off off) {
  return sizeof(Off) == 2 ? int64_t(off) * (kCellBytes * cells / kNear) : int64_t(off);
}

// One entry: acc[r] += value * x[...]. `cells * kVectors` accumulators.
template <class T, int cells, bool dense_step>
SK_INLINE void csr_step(Vec<T>* acc, const char* at, T value, int64_t step) {
  const Vec<T> w = splat(value);
  SK_UNROLL for (int r = 0; r < cells; ++r) {
    const T* cell = reinterpret_cast<const T*>(at + r * (dense_step ? int64_t(kCellBytes) : step));
    SK_UNROLL for (int v = 0; v < kVectors; ++v) acc[r * kVectors + v] += w * load(cell + v * kLanes<T>);
  }
}

#define SK_CASES8(j) \
  SK_CASE(j)         \
  SK_CASE(j - 1) SK_CASE(j - 2) SK_CASE(j - 3) SK_CASE(j - 4) SK_CASE(j - 5) SK_CASE(j - 6) SK_CASE(j - 7)
#define SK_CASES32 SK_CASES8(32) SK_CASES8(24) SK_CASES8(16) SK_CASES8(8)

// y[row] += sum of value * x over each segment, by a loop. Segments come in the order of their lengths, so
// its branches are foreseen as well as a jump into unrolled code is, at a seventh less time. The first tile
// starts from the bias (zero if null), the others from y. With several chains of accumulators, one entry need
// not wait for the sums of the last.
template <class T, int cells, int chains>
void csr_spmm_linear(const char* x, const RowLength* segments, int64_t n_segments, const uint16_t* near,
                     const T* val, bool first, const T* bias, T* y) {
  constexpr int V = cells * kVectors;
  constexpr int64_t row = int64_t(cells) * kCell<T>;
  for (int64_t s = 0; s < n_segments; ++s) {
    T* out = y + segments[s].row * row;
    Vec<T> acc[chains][V] = {};
    if (!first) {
      SK_UNROLL for (int v = 0; v < V; ++v) acc[0][v] = load(out + v * kLanes<T>);
    } else if (bias != nullptr) {
      const Vec<T> from = splat(bias[segments[s].row]);
      SK_UNROLL for (int v = 0; v < V; ++v) acc[0][v] = from;
    }
    int64_t left = segments[s].length;
    for (; left >= 4; left -= 4, near += 4, val += 4)
      SK_UNROLL for (int j = 0; j < 4; ++j)
          csr_step<T, cells, true>(acc[j % chains], x + csr_offset<uint16_t, cells>(near[j]), val[j], 0);
    for (; left > 0; --left, ++near, ++val)
      csr_step<T, cells, true>(acc[0], x + csr_offset<uint16_t, cells>(*near), *val, 0);
    SK_UNROLL for (int v = 0; v < V; ++v) {
      SK_UNROLL for (int c = 1; c < chains; ++c) acc[0][v] += acc[c][v];
      store(out + v * kLanes<T>, acc[0][v]);
    }
  }
}

#define SK_CELLS(run)     \
  if (cells == 4) run(4); \
  if (cells == 2) run(2); \
  run(1)
template <class T>
void csr_spmm(int64_t cells, bool chained, const char* x, const RowLength* segments, int64_t n_segments,
              const uint16_t* near, const T* val, bool first, const T* bias, T* y) {
  // Two where there are registers for them; the same for any number of cells, which follows the threads.
  constexpr int most = kVectors == 1 ? 2 : 1;
#define SK_CHAINS(n, c) csr_spmm_linear<T, n, c>(x, segments, n_segments, near, val, first, bias, y)
#define SK_RUN(n) return chained ? SK_CHAINS(n, most) : SK_CHAINS(n, 1)
  if (cells == 8) SK_RUN(8);
  SK_CELLS(SK_RUN);
#undef SK_CHAINS
#undef SK_RUN
}

// The lanes of one entry's weight gradient, summed over the cells.
template <class T, int cells, bool dense_step>
SK_INLINE Vec<T> sddmm_step(const Vec<T>* grad, const char* at, int64_t step) {
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

// The lane sums of consecutive entries, a vector each, until they are reduced: out[i] += sum over the lanes,
// or = if `fresh`. Entries of all rows follow each other, so that the transpose-reduce always has kLanes of
// them.
// kSums: vectors held before they are reduced. Few, for the tile needs L1.
template <class T, int kSums = 64>
class LaneSums {
 public:
  static constexpr int kHeld = kSums + 32;  // at most
  static constexpr int kRoom = kHeld * kLanes<T>;
  static constexpr int H = kLanes<T> / 2;

  // room: kRoom elements, aligned. Not a member, so that the members can live in registers.
  SK_INLINE LaneSums(T* room, bool fresh, T* out)
      : low_(room), high_(room + kRoom / 2), fresh_(fresh), out_(out) {}

  // Announces `count` more entries, 32 at most; the entry `back` from their end is then `put`.
  SK_INLINE void take(int64_t count) { end_ = low_ + (pending_ += count) * H; }
  SK_INLINE void put(int64_t back, Vec<T> sum) { put_at(end_ - back * H, sum); }

  // Where the next entry's sum goes, after which they are H elements apart; to be announced afterwards.
  SK_INLINE T* next() const { return low_ + pending_ * H; }
  SK_INLINE void put_at(T* at, Vec<T> sum) const { store_halves(at, at + kRoom / 2, sum); }

  // To be called when those are there.
  SK_INLINE void reduce_full() {
    if (pending_ < kSums) return;
    int64_t i = 0;
    for (; i + L <= pending_; i += L, out_ += L) {
      const Vec<T> total = reduce_halves(low_ + i * H, high_ + i * H);
      store_loose(out_, fresh_ ? total : load_loose(out_) + total);
    }
    for (int64_t j = i; j < pending_; j += 2) {  // two halves at a time
      store(low_ + (j - i) * H, load(low_ + j * H));
      store(high_ + (j - i) * H, load(high_ + j * H));
    }
    pending_ -= i;
  }

  SK_INLINE void reduce_rest() {
    for (int64_t i = pending_ * H; i < (pending_ + L) * H; ++i) low_[i] = high_[i] = 0;
    for (int64_t i = 0; i < pending_; i += L) {
      const Vec<T> total = reduce_halves(low_ + i * H, high_ + i * H);
      for (int64_t j = 0; j < L && i + j < pending_; ++j, ++out_)
        *out_ = fresh_ ? total[j] : *out_ + total[j];
    }
    pending_ = 0;
  }

 private:
  static constexpr int L = kLanes<T>;
  T *low_, *high_;
  const bool fresh_;
  T* end_ = nullptr;
  int64_t pending_ = 0;
  T* out_;
};

// out[i] += sum over the lanes of d[row] * x[off[i]]: the weight gradient at the stored positions, in
// stream order. d: row r at byte r * d_row, its cells d_step apart.
#define SK_CASE(j)                                                                                    \
  case j:                                                                                             \
    sums.put(j, sddmm_step<T, cells, dense_step>(grad, x + csr_offset<Off, cells>(off[-(j)]), step)); \
    [[fallthrough]];
template <class T, int cells, bool dense_step, class Off>
void csr_sddmm_fixed(const char* x, int64_t step, const char* d, int64_t d_row, int64_t d_step,
                     const RowLength* segments, int64_t n_segments, const Off* off, bool fresh, T* out) {
  constexpr int L = kLanes<T>;
  alignas(64) T room[LaneSums<T>::kRoom];
  LaneSums<T> sums(room, fresh, out);
  for (int64_t s = 0; s < n_segments; ++s) {
    const char* row = d + segments[s].row * d_row;
    Vec<T> grad[cells * kVectors];
    SK_UNROLL for (int r = 0; r < cells; ++r) SK_UNROLL for (int v = 0; v < kVectors; ++v)
        grad[r * kVectors + v] = load(reinterpret_cast<const T*>(row + r * d_step) + v * L);
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

// Both gradients of a Linear in one pass, which loads every cell of d once for two multiply-adds. A segment
// is a column of the weight: dx[column] += sum of value * d (= if `first`), out[i] += sum over the lanes of
// x[column] * d[row of i]. x, dx: [columns][cells] cells, from `column` on. The sums are those of csr_spmm
// and csr_sddmm, bit for bit. Not `both`: out alone.
template <class T, int cells, bool both>
void csr_backward_fixed(const char* d, int64_t column, const T* x, const RowLength* segments,
                        int64_t n_segments, const uint16_t* near, const T* val, bool first, T* dx, bool fresh,
                        T* out) {
  constexpr int L = kLanes<T>, V = cells * kVectors;
  constexpr int64_t row = int64_t(cells) * kCell<T>;
  typedef LaneSums<T, 32> Sums;
  alignas(64) T room[Sums::kRoom];
  Sums sums(room, fresh, out);
  for (int64_t s = 0; s < n_segments; ++s) {
    const T* in_row = x + (segments[s].row - column) * row;
    T* out_row = both ? dx + (segments[s].row - column) * row : nullptr;
    Vec<T> acc[V] = {}, in[V];
    SK_UNROLL for (int v = 0; v < V; ++v) {
      if (both && !first) acc[v] = load(out_row + v * L);
      in[v] = load(in_row + v * L);
    }
    const auto step = [&](int64_t i, T * to) __attribute__((always_inline)) {
      const uint16_t off = near[i];
      const Vec<T> w = both ? splat(val[i]) : Vec<T>{};
      const T* at = reinterpret_cast<const T*>(d + csr_offset<uint16_t, cells>(off));
      Vec<T> dot;
      SK_UNROLL for (int v = 0; v < V; ++v) {
        Vec<T> cell = load(at + v * L);
        if (both) keep(cell);
        if (both) acc[v] += w * cell;
        dot = v == 0 ? in[v] * cell : dot + in[v] * cell;
      }
      sums.put_at(to, dot);
    };
    for (int64_t left = segments[s].length; left > 0; left -= 32) {
      const int64_t take = left < 32 ? left : 32;
      T* to = sums.next();
      sums.take(take);
      int64_t i = 0;
      for (; i + 4 <= take; i += 4, to += 4 * Sums::H)
        SK_UNROLL for (int j = 0; j < 4; ++j) step(i + j, to + j * Sums::H);
      for (; i < take; ++i, to += Sums::H) step(i, to);
      near += take;
      if (both) val += take;
      sums.reduce_full();
    }
    if (both) SK_UNROLL for (int v = 0; v < V; ++v) store(out_row + v * L, acc[v]);
  }
  sums.reduce_rest();
}
#undef SK_CASES8
#undef SK_CASES32

template <class T>
void csr_sddmm(int64_t cells, const char* x, const T* d, const RowLength* segments, int64_t n_segments,
               const uint16_t* near, bool fresh, T* out) {
  const char* rows = reinterpret_cast<const char*>(d);
#define SK_RUN(n)                                                                                           \
  return csr_sddmm_fixed<T, n, true>(x, kCellBytes, rows, n * kCellBytes, kCellBytes, segments, n_segments, \
                                     near, fresh, out)
  if (cells == 8) SK_RUN(8);
  SK_CELLS(SK_RUN);
#undef SK_RUN
}

template <class T>
void csr_backward(int64_t cells, const char* d, int64_t column, const T* x, const RowLength* segments,
                  int64_t n_segments, const uint16_t* near, const T* val, bool first, T* dx, bool fresh,
                  T* out) {
#define SK_RUN(n)                                                                                       \
  return dx != nullptr ? csr_backward_fixed<T, n, true>(d, column, x, segments, n_segments, near, val,  \
                                                        first, dx, fresh, out)                          \
                       : csr_backward_fixed<T, n, false>(d, column, x, segments, n_segments, near, val, \
                                                         first, dx, fresh, out)
  if (cells == 8) SK_RUN(8);
  SK_CELLS(SK_RUN);
#undef SK_RUN
}
#undef SK_CELLS
