// Conv2d: moving pixels between images, tiles of copies and panels of runs (conv2d_tiles.h).

// Images come from far, and in runs too short for the hardware to see them coming: they are asked for this
// many bytes, or planes, before they are needed.
constexpr int64_t kAheadBytes = 4096, kAheadPlanes = 8;

template <class T>
SK_INLINE void copy_pixels(const T* from, int64_t count, T* to) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; i + L <= count; i += L) store_loose(to + i, load_loose(from + i));
  if (L > 8 && i + 8 <= count) __builtin_memcpy(to + i, from + i, 8 * sizeof(T)), i += 8;
  if (L > 4 && i + 4 <= count) __builtin_memcpy(to + i, from + i, 4 * sizeof(T)), i += 4;
  for (; i < count; ++i) to[i] = from[i];
}

// `count` pixels, `step` apart, of each of `rows` rows, one after the other. What comes next in memory is
// prefetched.
template <class T>
void conv_rows(const T* from, int64_t from_row, int64_t rows, int64_t count, int64_t step, T* to,
               int64_t to_row) {
  constexpr int L = kLanes<T>;
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
    const char* ahead = reinterpret_cast<const char*>(from) + kAheadBytes;
    const int64_t bytes = count * step * int64_t(sizeof(T));  // of a short row only if it begins a line
    if (bytes >= kCellBytes || (reinterpret_cast<uintptr_t>(ahead) & (kCellBytes - 1)) < uint64_t(bytes))
      for (int64_t i = 0; i < bytes; i += kCellBytes) __builtin_prefetch(ahead + i);
    int64_t i = 0;
    if (step == 1) copy_pixels<T>(from, i = count, to);
    if (step == 2)
      for (; i + L <= count; i += L)
        store_loose(to + i, even_of<T>(load_loose(from + 2 * i), load_loose(from + 2 * i + L - 1)));
    for (; i < count; ++i) to[i] = from[i * step];
  }
}

template <class T, int unit>
SK_INLINE void copy_unit(const T* from, int64_t count, T* to) {
  T lanes[unit];
  __builtin_memcpy(lanes, from, sizeof(lanes));
  for (int64_t i = count; i < unit; ++i) lanes[i] = 0;
  __builtin_memcpy(to, lanes, sizeof(lanes));
}

template <class T, int unit>
SK_INLINE void copy_units(const T* from, int64_t from_row, int64_t from_image, int64_t rows, int64_t last,
                          T* to, int64_t to_row) {
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row)
    SK_UNROLL for (int i = 0; i < kCell<T> / unit; ++i)
        copy_unit<T, unit>(from + i * from_image, last, to + i * unit);
}

// Rows of pixels that stand anywhere -> rows of `cells` cells. unit < a cell: a cell has that many pixels of
// each of several images, from_image apart. Only `last` lanes of a unit (of the last cell of a row) hold
// pixels.
template <class T>
void conv_copy(const T* from, int64_t from_row, int64_t from_image, int64_t unit, int64_t rows, int64_t cells,
               int64_t last, T* to, int64_t to_row) {
  constexpr int L = kLanes<T>;
  if (unit == 1) return copy_units<T, 1>(from, from_row, from_image, rows, last, to, to_row);
  if (unit == 2) return copy_units<T, 2>(from, from_row, from_image, rows, last, to, to_row);
  if (unit == 4 && kCell<T> > 4) return copy_units<T, 4>(from, from_row, from_image, rows, last, to, to_row);
  if (unit == 8 && kCell<T> > 8)
    return copy_units < T, kCell<T> < 8 ? kCell<T> : 8 > (from, from_row, from_image, rows, last, to, to_row);
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += to_row) {
    for (int64_t c = 0; c < cells; ++c)
      SK_UNROLL for (int v = 0; v < kVectors; ++v)
          store(to + c * kCell<T> + v * L, load_loose(from + c * kCell<T> + v * L));
    for (int64_t i = last; i < kCell<T>; ++i) to[(cells - 1) * kCell<T> + i] = 0;
  }
}

// `count` pixels that follow each other -> those of even number, and the others.
template <class T>
SK_INLINE void unzip(const T* from, int64_t count, T* even_ones, T* odd_ones) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; 2 * (i + L) <= count; i += L) {
    const Vec<T> a = load_loose(from + 2 * i), b = load_loose(from + 2 * i + L);
    store_loose(even_ones + i, even<T>(a, b));
    store_loose(odd_ones + i, odd<T>(a, b));
  }
  for (i *= 2; i < count; ++i) (i % 2 == 0 ? even_ones : odd_ones)[i / 2] = from[i];
}

template <class T>
SK_INLINE void zip(const T* even_ones, const T* odd_ones, int64_t count, T* to) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; 2 * (i + L) <= count; i += L) {
    const Vec<T> a = load_loose(even_ones + i), b = load_loose(odd_ones + i);
    store_loose(to + 2 * i, zip_low<T>(a, b));
    store_loose(to + 2 * i + L, zip_high<T>(a, b));
  }
  for (i *= 2; i < count; ++i) to[i] = (i % 2 == 0 ? even_ones : odd_ones)[i / 2];
}

template <class T>
SK_INLINE bool are_cells(const Piece* pieces, int64_t n) {
  for (int64_t p = 0; p < n; ++p)
    if (pieces[p].count != kCell<T>) return false;
  return true;
}

// The pixels of a run, in pieces, of `channels` planes -> panels, whose other lanes stay: of every `step`
// pixels the first to the first panel, and so on, `panel_size` elements apart.
template <class T>
void conv_load(const T* from, int64_t plane, int64_t channels, const Piece* pieces, int64_t n, int64_t step,
               int64_t lanes, T* panel, int64_t panel_size) {
  constexpr int L = kLanes<T>;
  const bool cells = step == 1 && are_cells<T>(pieces, n);
  for (int64_t c = 0; c < channels; ++c, from += plane, panel += lanes)
    for (int64_t p = 0; p < n; ++p) {
      const T* at = from + pieces[p].at;
      T* to = panel + pieces[p].lane;
      if (cells) {
        if (c + kAheadPlanes < channels) __builtin_prefetch(at + kAheadPlanes * plane);
        SK_UNROLL for (int v = 0; v < kVectors; ++v) store(to + v * L, load_loose(at + v * L));
      } else if (step == 1) {
        copy_pixels<T>(at, pieces[p].count, to);
      } else if (step == 2) {
        unzip<T>(at, pieces[p].count, to, to + panel_size);
      } else {
        for (int64_t i = 0; i < pieces[p].count; ++i) to[i % step * panel_size + i / step] = at[i];
      }
    }
}

// The inverse.
template <class T>
void conv_store(const T* panel, int64_t panel_size, int64_t lanes, int64_t channels, const Piece* pieces,
                int64_t n, int64_t step, T* to, int64_t plane) {
  constexpr int L = kLanes<T>;
  const bool cells = step == 1 && are_cells<T>(pieces, n);
  for (int64_t c = 0; c < channels; ++c, to += plane, panel += lanes)
    for (int64_t p = 0; p < n; ++p) {
      const T* from = panel + pieces[p].lane;
      T* at = to + pieces[p].at;
      if (cells) {
        if (c + kAheadPlanes < channels) __builtin_prefetch(at + kAheadPlanes * plane, 1);
        SK_UNROLL for (int v = 0; v < kVectors; ++v) store_loose(at + v * L, load(from + v * L));
      } else if (step == 1) {
        copy_pixels<T>(from, pieces[p].count, at);
      } else if (step == 2) {
        zip<T>(from, from + panel_size, pieces[p].count, at);
      } else {
        for (int64_t i = 0; i < pieces[p].count; ++i) at[i] = from[i % step * panel_size + i / step];
      }
    }
}

// Pixels with neighbouring channels: lane l of a cell is the pixel at lanes[l] (null: zeros). -> panel[f *
// row].
template <class T>
void conv_pack_pixels(const T* const* lanes, int64_t channels, T* panel, int64_t row) {
  constexpr int L = kLanes<T>;
  for (int64_t f = 0; f < channels; f += L)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t width = channels - f < L ? channels - f : L;
      Vec<T> r[L];
      for (int i = 0; i < L; ++i) {
        const T* at = lanes[v * L + i];
        r[i] = Vec<T>{};
        if (at == nullptr) continue;
        if (width == L)
          r[i] = load_loose(at + f);
        else
          for (int64_t j = 0; j < width; ++j) r[i][j] = at[f + j];
      }
      transpose<T>(r);
      for (int64_t i = 0; i < width; ++i) store(panel + (f + i) * row + v * L, r[i]);
    }
}

// The inverse: nothing is stored where lanes[l] is null.
template <class T>
void conv_unpack_pixels(const T* panel, int64_t row, int64_t channels, T* const* lanes) {
  constexpr int L = kLanes<T>;
  for (int64_t f = 0; f < channels; f += L)
    for (int v = 0; v < kVectors; ++v) {
      const int64_t width = channels - f < L ? channels - f : L;
      Vec<T> r[L];
      for (int64_t i = 0; i < L; ++i) r[i] = i < width ? load(panel + (f + i) * row + v * L) : Vec<T>{};
      transpose<T>(r);
      for (int i = 0; i < L; ++i) {
        T* at = lanes[v * L + i];
        if (at == nullptr) continue;
        if (width == L)
          store_loose(at + f, r[i]);
        else
          for (int64_t j = 0; j < width; ++j) at[f + j] = r[i][j];
      }
    }
}

// sums[c] = sum over the pixels of an image, in an order that the memory format does not change: a sum for
// every remainder modulo the lanes of a cell, and those by halves.
template <class T>
void conv_sums(const T* image, int64_t pixel, int64_t plane, int64_t pixels, int64_t channels, T* sums) {
  constexpr int L = kLanes<T>, C = kCell<T>;
  if (pixel == 1) {
    for (int64_t c = 0; c < channels; ++c, image += plane) {
      alignas(64) T lanes[C];
      Vec<T> acc[kVectors] = {};
      int64_t p = 0;
      for (; p + C <= pixels; p += C)
        SK_UNROLL for (int v = 0; v < kVectors; ++v) acc[v] += load_loose(image + p + v * L);
      SK_UNROLL for (int v = 0; v < kVectors; ++v) store(lanes + v * L, acc[v]);
      for (; p < pixels; ++p) lanes[p % C] += image[p];
      for (int half = C / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
      sums[c] = lanes[0];
    }
    return;
  }
  for (int64_t c = 0; c < channels; c += L) {
    const int64_t width = channels - c < L ? channels - c : L;
    Vec<T> acc[C] = {};
    for (int64_t p = 0; p < pixels; ++p) {
      const T* at = image + p * pixel + c;
      if (width == L)
        acc[p % C] += load_loose(at);
      else
        for (int64_t j = 0; j < width; ++j) acc[p % C][j] += at[j];
    }
    for (int half = C / 2; half > 0; half /= 2)
      for (int i = 0; i < half; ++i) acc[i] += acc[i + half];
    for (int64_t j = 0; j < width; ++j) sums[c + j] = acc[0][j];
  }
}
