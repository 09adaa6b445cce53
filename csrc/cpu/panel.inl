// Packing: activations [tokens, features] <-> panels [feature][cells], token lanes.

// A block of kLanes tokens x kLanes features, zero outside [tokens, features].
template <class T, class S>
SK_INLINE void load_square(Vec<T>* r, const S* src, int64_t stride, int64_t tokens, int64_t features) {
  constexpr int L = kLanes<T>;
  if (tokens >= L && features >= L) {
    SK_UNROLL for (int i = 0; i < L; ++i) r[i] = load_stored(src + i * stride);
    return;
  }
  alignas(64) S square[L][L] = {};
  for (int64_t i = 0; i < L && i < tokens; ++i)
    for (int64_t j = 0; j < L && j < features; ++j) square[i][j] = src[i * stride + j];
  SK_UNROLL for (int i = 0; i < L; ++i) r[i] = load_stored(square[i]);
}

template <class T, class S>
SK_INLINE void store_square(const Vec<T>* r, S* dst, int64_t stride, int64_t tokens, int64_t features) {
  constexpr int L = kLanes<T>;
  if (tokens >= L && features >= L) {
    SK_UNROLL for (int i = 0; i < L; ++i) store_stored(dst + i * stride, r[i]);
    return;
  }
  alignas(64) S square[L][L];
  SK_UNROLL for (int i = 0; i < L; ++i) store_stored(square[i], r[i]);
  for (int64_t i = 0; i < L && i < tokens; ++i)
    for (int64_t j = 0; j < L && j < features; ++j) dst[i * stride + j] = square[i][j];
}

// src [tokens][stride] -> panel: lane t of feature f at f * panel_stride + t, for cells * kCell tokens;
// lanes past `tokens` are zero. Strides in elements. With sums: sums[f] = sum over the tokens, by twos. A few
// tokens at a time: their rows are what the hardware prefetches, and it follows no more than 32 at once.
template <class T, class S, bool with_sums>
void pack_fixed(const S* src, int64_t stride, int64_t tokens, int64_t features, T* panel,
                int64_t panel_stride, int64_t cells, T* sums) {
  constexpr int L = kLanes<T>;
  for (int64_t t = 0; t < cells * kCell<T>; t += L)
    for (int64_t f = 0; f < features; f += L) {
      const bool whole = features - f >= L;
      Vec<T> r[L];
      load_square<T>(r, src + t * stride + f, stride, tokens - t, features - f);
      if (with_sums) {
        Vec<T> total{};
        if (t > 0 && whole) total = load_loose(sums + f);
        if (t > 0 && !whole)
          for (int64_t i = 0; i < features - f; ++i) total[i] = sums[f + i];
        SK_UNROLL for (int i = 0; i < L; i += 2) total += r[i] + r[i + 1];
        if (whole)
          store_loose(sums + f, total);
        else
          for (int64_t i = 0; i < features - f; ++i) sums[f + i] = total[i];
      }
      transpose<T>(r);
      T* out = panel + f * panel_stride + t;
      if (whole) {
        SK_UNROLL for (int i = 0; i < L; ++i) store(out + i * panel_stride, r[i]);
      } else {
        for (int64_t i = 0; i < features - f; ++i) store(out + i * panel_stride, r[i]);
      }
    }
}

template <class T, class S>
void pack(const S* src, int64_t stride, int64_t tokens, int64_t features, T* panel, int64_t panel_stride,
          int64_t cells, T* sums) {
  if (sums != nullptr)
    return pack_fixed<T, S, true>(src, stride, tokens, features, panel, panel_stride, cells, sums);
  pack_fixed<T, S, false>(src, stride, tokens, features, panel, panel_stride, cells, nullptr);
}

// The inverse: panel -> dst [tokens][stride].
template <class T, class S>
void unpack(const T* panel, int64_t panel_stride, int64_t tokens, int64_t features, S* dst, int64_t stride) {
  constexpr int L = kLanes<T>;
  for (int64_t t = 0; t < tokens; t += L)
    for (int64_t f = 0; f < features; f += L) {
      const T* in = panel + f * panel_stride + t;
      Vec<T> r[L];
      SK_UNROLL for (int i = 0; i < L; ++i) r[i] = i < features - f ? load(in + i * panel_stride) : Vec<T>{};
      transpose<T>(r);
      store_square<T>(r, dst + t * stride + f, stride, tokens - t, features - f);
    }
}

// panel [features][lanes]: every lane of feature f is bias[f] (0 without a bias).
template <class T>
void fill(T* panel, int64_t features, int64_t lanes, const T* bias) {
  for (int64_t f = 0; f < features; ++f) {
    const Vec<T> v = splat(bias != nullptr ? bias[f] : T(0));
    for (int64_t t = 0; t < lanes; t += kLanes<T>) store(panel + f * lanes + t, v);
  }
}
