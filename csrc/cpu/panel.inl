// Packing: activations [tokens, features] <-> panels [feature][cells], token lanes.

// A block of kLanes tokens x kLanes features, zero outside [tokens, features].
template <class T>
SK_INLINE void load_square(Vec<T>* r, const T* src, int64_t stride, int64_t tokens, int64_t features) {
  constexpr int L = kLanes<T>;
  if (tokens >= L && features >= L) {
    SK_UNROLL for (int i = 0; i < L; ++i) r[i] = load_loose(src + i * stride);
    return;
  }
  alignas(64) T square[L][L] = {};
  for (int64_t i = 0; i < L && i < tokens; ++i)
    for (int64_t j = 0; j < L && j < features; ++j) square[i][j] = src[i * stride + j];
  SK_UNROLL for (int i = 0; i < L; ++i) r[i] = load(square[i]);
}

template <class T>
SK_INLINE void store_square(const Vec<T>* r, T* dst, int64_t stride, int64_t tokens, int64_t features) {
  constexpr int L = kLanes<T>;
  if (tokens >= L && features >= L) {
    SK_UNROLL for (int i = 0; i < L; ++i) store_loose(dst + i * stride, r[i]);
    return;
  }
  alignas(64) T square[L][L];
  SK_UNROLL for (int i = 0; i < L; ++i) store(square[i], r[i]);
  for (int64_t i = 0; i < L && i < tokens; ++i)
    for (int64_t j = 0; j < L && j < features; ++j) dst[i * stride + j] = square[i][j];
}

// src [tokens][stride] -> panel: lane t of feature f at f * panel_stride + t, for cells * kCell tokens;
// lanes past `tokens` are zero. Strides in elements. With sums: sums[f] = sum over the tokens, four runs of
// every fourth token added up at the end.
template <class T, bool with_sums>
void pack_fixed(const T* src, int64_t stride, int64_t tokens, int64_t features, T* panel,
                int64_t panel_stride, int64_t cells, T* sums) {
  constexpr int L = kLanes<T>;
  for (int64_t f = 0; f < features; f += L) {
    Vec<T> runs[4] = {};
    for (int64_t t = 0; t < cells * kCell<T>; t += L) {
      Vec<T> r[L];
      load_square(r, src + t * stride + f, stride, tokens - t, features - f);
      if (with_sums) SK_UNROLL for (int i = 0; i < L; ++i) runs[(L < 4 ? t + i : i) % 4] += r[i];
      transpose<T>(r);
      T* out = panel + f * panel_stride + t;
      if (features - f >= L) {
        SK_UNROLL for (int i = 0; i < L; ++i) store(out + i * panel_stride, r[i]);
      } else {
        for (int64_t i = 0; i < features - f; ++i) store(out + i * panel_stride, r[i]);
      }
    }
    if (!with_sums) continue;
    const Vec<T> total = (runs[0] + runs[1]) + (runs[2] + runs[3]);
    if (features - f >= L)
      store_loose(sums + f, total);
    else
      for (int64_t i = 0; i < features - f; ++i) sums[f + i] = total[i];
  }
}

template <class T>
void pack(const T* src, int64_t stride, int64_t tokens, int64_t features, T* panel, int64_t panel_stride,
          int64_t cells, T* sums) {
  if (sums != nullptr)
    return pack_fixed<T, true>(src, stride, tokens, features, panel, panel_stride, cells, sums);
  pack_fixed<T, false>(src, stride, tokens, features, panel, panel_stride, cells, nullptr);
}

// The inverse: panel -> dst [tokens][stride].
template <class T>
void unpack(const T* panel, int64_t panel_stride, int64_t tokens, int64_t features, T* dst, int64_t stride) {
  constexpr int L = kLanes<T>;
  for (int64_t t = 0; t < tokens; t += L)
    for (int64_t f = 0; f < features; f += L) {
      const T* in = panel + f * panel_stride + t;
      Vec<T> r[L];
      SK_UNROLL for (int i = 0; i < L; ++i) r[i] = i < features - f ? load(in + i * panel_stride) : Vec<T>{};
      transpose<T>(r);
      store_square(r, dst + t * stride + f, stride, tokens - t, features - f);
    }
}

// out[f] += sum over tokens of src[t][f].
template <class T>
void column_sums(const T* src, int64_t stride, int64_t tokens, int64_t features, T* out) {
  constexpr int L = kLanes<T>;
  for (int64_t f = 0; f < features; f += L) {
    const int64_t width = features - f < L ? features - f : L;
    if (width == L) {
      Vec<T> sums[4] = {};
      int64_t t = 0;
      for (; t + 4 <= tokens; t += 4)
        SK_UNROLL for (int i = 0; i < 4; ++i) sums[i] += load_loose(src + (t + i) * stride + f);
      for (; t < tokens; ++t) sums[0] += load_loose(src + t * stride + f);
      store_loose(out + f, load_loose(out + f) + ((sums[0] + sums[1]) + (sums[2] + sums[3])));
    } else {
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < width; ++i) out[f + i] += src[t * stride + f + i];
    }
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
