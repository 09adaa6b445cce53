// Entries of CSR weights in the order in which the kernels of csr.inl take them.

// Linear, by rows: values into plan order, `entries` of consecutive segments. A segment's values stand
// together. Whole vectors are copied, also past its end (the next segment overwrites that), but never past
// the end of the n values or of these entries. Segments come in the order of lengths, so the next ones are
// prefetched.
template <class T>
void csr_collect(const T* values, int64_t n, const RowLength* segments, const int32_t* begin,
                 int64_t n_segments, int64_t entries, T* val) {
  constexpr int L = kLanes<T>;
  for (int64_t s = 0; s < n_segments; ++s) {
    const int64_t length = segments[s].length, at = begin[s];
    const T* next = values + begin[s + 12 < n_segments ? s + 12 : s];
    __builtin_prefetch(next);
    __builtin_prefetch(next + L);
    int64_t i = 0;
    for (; i < length && i + L <= entries && at + i + L <= n; i += L)
      store_loose(val + i, load_loose(values + at + i));
    for (; i < length; ++i) val[i] = values[at + i];
    val += length, entries -= length;
  }
}

// Linear, by columns: to[slot[i]] = values[i], and back. Stores retire in order, so that each line that is
// not in the first-level cache would be waited for: they are asked for ahead, which is 1.5 to 1.8 times
// faster.
template <class T>
void csr_scatter(const T* __restrict values, const int32_t* __restrict slot, int64_t n, T* __restrict to) {
  constexpr int64_t kAhead = 16;
  int64_t i = 0;
  for (; i + kAhead < n; ++i) {
    __builtin_prefetch(to + slot[i + kAhead], 1);
    to[slot[i]] = values[i];
  }
  for (; i < n; ++i) to[slot[i]] = values[i];
}

template <class T>
void csr_gather(const T* __restrict from, const int32_t* __restrict slot, int64_t n, T* __restrict values) {
  for (int64_t i = 0; i < n; ++i) values[i] = from[slot[i]];
}

// Conv2d: where the entries of a direction are read from, see conv_stream.
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
void conv_stream_fixed(const StreamSource<T>& from, const RowLength* segments, const int32_t* begin,
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
void conv_stream(const StreamSource<T>* from, const RowLength* segments, const int32_t* begin,
                 const uint32_t* base, int64_t n_segments, int64_t entries, uint32_t* off, T* val) {
  if (from->table != nullptr && from->perm != nullptr)
    conv_stream_fixed<T, true, true>(*from, segments, begin, base, n_segments, entries, off, val);
  else if (from->table != nullptr)
    conv_stream_fixed<T, true, false>(*from, segments, begin, base, n_segments, entries, off, val);
  else if (from->perm != nullptr)
    conv_stream_fixed<T, false, true>(*from, segments, begin, base, n_segments, entries, off, val);
  else
    conv_stream_fixed<T, false, false>(*from, segments, begin, base, n_segments, entries, off, val);
}
