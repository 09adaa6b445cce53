// Entries of CSR weights in the order in which the kernels of csr.inl take them.

// Linear, by rows: values into plan order, `entries` of consecutive segments. A segment's values stand
// together. Whole vectors are copied, also past its end (the next segment overwrites that), but never past
// the end of the n values or of these entries. Segments come in the order of lengths, so the next ones are
// prefetched.
template <class T, class S>
void csr_collect(const S* values, int64_t n, const RowLength* segments, const int32_t* begin,
                 int64_t n_segments, int64_t entries, T* val) {
  constexpr int L = kLanes<T>;
  for (int64_t s = 0; s < n_segments; ++s) {
    const int64_t length = segments[s].length, at = begin[s];
    const S* next = values + begin[s + 12 < n_segments ? s + 12 : s];
    __builtin_prefetch(next);
    __builtin_prefetch(next + L);
    int64_t i = 0;
    for (; i < length && i + L <= entries && at + i + L <= n; i += L)
      store_loose(val + i, load_stored(values + at + i));
    if (i < length) widen(values + at + i, length - i, val + i);
    val += length, entries -= length;
  }
}

// Linear, by columns: values[i] = from[source[i]], and back. A piece of the plan has its values on few lines,
// which the first-level cache keeps while its columns go through them. Other types are converted a run at a
// time, so that no vector waits for its lanes in the store buffer.
constexpr int64_t kRun = 128;

template <class T, class S>
void csr_gather(const S* __restrict from, const int32_t* __restrict source, int64_t n, T* __restrict values) {
  if constexpr (sizeof(S) == sizeof(T)) {
    for (int64_t i = 0; i < n; ++i) values[i] = from[source[i]];
  } else {
    alignas(64) S few[kRun];
    for (int64_t i = 0; i < n; i += kRun) {
      const int64_t count = n - i < kRun ? n - i : kRun;
      for (int64_t j = 0; j < count; ++j) few[j] = from[source[i + j]];
      widen(few, count, values + i);
    }
  }
}

// Stores retire in order, so that each line that is not in the first-level cache would be waited for: they
// are asked for ahead.
template <class S>
SK_INLINE void scatter_run(const S* __restrict values, const int32_t* __restrict source, int64_t count,
                           int64_t left, S* __restrict to) {
  constexpr int64_t kAhead = 16;
  for (int64_t i = 0; i < count; ++i) {
    if (i + kAhead < left) __builtin_prefetch(to + source[i + kAhead], 1);
    to[source[i]] = values[i];
  }
}

template <class T, class S>
void csr_scatter(const T* __restrict values, const int32_t* __restrict source, int64_t n, S* __restrict to) {
  alignas(64) S few[sizeof(S) == sizeof(T) ? 1 : kRun];
  for (int64_t i = 0; i < n; i += kRun) {
    const int64_t count = n - i < kRun ? n - i : kRun;
    if constexpr (sizeof(S) == sizeof(T)) {
      scatter_run(values + i, source + i, count, n - i, to);
    } else {
      narrow(values + i, count, few);
      scatter_run(few, source + i, count, n - i, to);
    }
  }
}
