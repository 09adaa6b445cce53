// Growth: scores of one row of a dense gradient, and those of them that are good enough.

// Magnitudes as integers: those of numbers that are not finite are the largest.
template <class T>
using Magnitude = typename VectorOf<T>::mask;

template <class T>
SK_INLINE Magnitude<T> magnitude(Vec<T> v) {
  return (Magnitude<T>)v & ~(Magnitude<T>)splat<T>(-T(0));
}

// Whether all of n magnitudes are finite: `most` has the largest of each lane, the last few are in memory.
template <class T>
SK_INLINE bool are_finite(Magnitude<T> most, const T* rest, int64_t n) {
  const T infinity = T(__builtin_inf());
  const Magnitude<T> limit = (Magnitude<T>)splat<T>(infinity);
  bool finite = true;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) finite &= most[l] < limit[l];
  for (int64_t i = 0; i < n; ++i) finite &= rest[i] < infinity && rest[i] > -infinity;
  return finite;
}

template <class T>
bool all_finite(const T* x, int64_t n) {
  constexpr int L = kLanes<T>;
  Magnitude<T> most{};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Magnitude<T> bits = magnitude<T>(load_loose(x + i));
    most = most > bits ? most : bits;
  }
  return are_finite<T>(most, x + i, n - i);
}

// |g| in place. False if one is not finite.
template <class T>
bool growth_magnitudes(T* g, int64_t n) {
  constexpr int L = kLanes<T>;
  Magnitude<T> most{};
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const Magnitude<T> bits = magnitude<T>(load_loose(g + i));
    store_loose(g + i, (Vec<T>)bits);
    most = most > bits ? most : bits;
  }
  for (int64_t j = i; j < n; ++j) g[j] = g[j] < 0 ? -g[j] : g[j] + T(0);  // -0 + 0 is +0
  return are_finite<T>(most, g + i, n - i);
}

// Appends the scores that reach the threshold, and their columns; a whole vector may be written. Returns how
// many they are.
template <class T>
int64_t growth_offer(const T* score, int64_t n, T threshold, int32_t column, T* scores, int32_t* columns) {
  constexpr int L = kLanes<T>, kGroup = 4;
  const Vec<T> least = splat(threshold);
  int64_t count = 0, i = 0;
  for (; i + kGroup * L <= n; i += kGroup * L) {
    unsigned hits[kGroup], any = 0;
    SK_UNROLL for (int v = 0; v < kGroup; ++v) any |= hits[v] =
        at_least<T>(load_loose(score + i + v * L), least);
    if (any == 0) continue;  // most are not
    SK_UNROLL for (int v = 0; v < kGroup; ++v) count += append_lanes(
        score + i + v * L, column + int32_t(i) + v * L, hits[v], scores + count, columns + count);
  }
  for (; i < n; ++i) {
    scores[count] = score[i], columns[count] = column + int32_t(i);
    count += score[i] >= threshold;
  }
  return count;
}
