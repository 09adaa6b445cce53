// Vectors of one instruction set, by compiler vector extensions: no intrinsics, no headers of others.
// Included once per instruction set inside its namespace and target region, after SK_VECTOR_BYTES
// (16, 32 or 64) is defined; no include guard for that reason. Calls nothing from the standard
// library: an inline function of it compiled here could be the copy the linker keeps for everyone.

#define SK_INLINE inline __attribute__((always_inline))
#define SK_UNROLL _Pragma("GCC unroll 16")

constexpr int kVectorBytes = SK_VECTOR_BYTES;
// Activations are packed in cells of 64 bytes (16 float or 8 double lanes) whatever the vector width,
// so layouts, offsets and the order of every sum are the same for all instruction sets.
constexpr int kCellBytes = 64;
constexpr int kVectors = kCellBytes / kVectorBytes;  // vectors a cell

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef float loose __attribute__((vector_size(kVectorBytes), aligned(4), may_alias));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef double loose __attribute__((vector_size(kVectorBytes), aligned(8), may_alias));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(T));
template <class T>
constexpr int kCell = kCellBytes / int(sizeof(T));

template <class T>
SK_INLINE Vec<T> load(const T* p) {
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
SK_INLINE void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
SK_INLINE Vec<T> load_loose(const T* p) {
  return *reinterpret_cast<const typename VectorOf<T>::loose*>(p);
}
template <class T>
SK_INLINE void store_loose(T* p, Vec<T> v) {
  *reinterpret_cast<typename VectorOf<T>::loose*>(p) = v;
}
template <class T>
SK_INLINE Vec<T> splat(T s) {
  return s - Vec<T>{};
}

// Keeps a loaded vector in its register: the compiler would rather load it again for every use, and
// loads are what the kernels are bound by.
template <class V>
SK_INLINE void keep(V& v) {
#if defined(__x86_64__) && SK_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif defined(__x86_64__)
  asm("" : "+x"(v));
#endif
}

// Lane l of the result is a[l] where bit `half` of l is clear, else b[l]. Written as a choice, not a shuffle:
// every vector port blends, one shuffles.
template <class T, int half>
SK_INLINE Vec<T> blend(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  Vec<T> r;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) r[l] = (l & half) ? b[l] : a[l];
  return r;
#else
  typename VectorOf<T>::mask from_b;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) from_b[l] = (l & half) ? -1 : 0;
  return from_b ? b : a;
#endif
}

// Lane l of the result is a[l + half] where bit `half` of l is clear, else b[l - half].
template <class T, int half>
SK_INLINE Vec<T> cross(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  Vec<T> r;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) r[l] = (l & half) ? b[l - half] : a[l + half];
  return r;
#else
  typename VectorOf<T>::mask m;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) m[l] = (l & half) ? kLanes<T> + l - half : l + half;
  return __builtin_shuffle(a, b, m);
#endif
}

// The lanes of even number of a, then of b; odd: the others.
template <class T, int first = 0>
SK_INLINE Vec<T> even(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  Vec<T> r;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) {
    const int from = 2 * l + first;
    r[l] = from < kLanes<T> ? a[from] : b[from - kLanes<T>];
  }
  return r;
#else
  typename VectorOf<T>::mask m;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) m[l] = 2 * l + first;
  return __builtin_shuffle(a, b, m);
#endif
}
template <class T>
SK_INLINE Vec<T> odd(Vec<T> a, Vec<T> b) {
  return even<T, 1>(a, b);
}

// The same of vectors that share a lane: the last of a is the first of b. So no lane behind the last that is
// wanted needs to be there.
template <class T>
SK_INLINE Vec<T> even_of(Vec<T> a, Vec<T> b) {
  constexpr int L = kLanes<T>;
#if defined(__clang__)
  Vec<T> r;
  SK_UNROLL for (int l = 0; l < L; ++l) r[l] = 2 * l < L ? a[2 * l] : b[2 * l - L + 1];
  return r;
#else
  typename VectorOf<T>::mask m;
  SK_UNROLL for (int l = 0; l < L; ++l) m[l] = 2 * l < L ? 2 * l : 2 * l + 1;
  return __builtin_shuffle(a, b, m);
#endif
}

// The inverse: the lanes of a and b in turn, first those of their lower halves.
template <class T, int first = 0>
SK_INLINE Vec<T> zip_low(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  Vec<T> r;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) r[l] = l % 2 == 0 ? a[first + l / 2] : b[first + l / 2];
  return r;
#else
  typename VectorOf<T>::mask m;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) m[l] = first + l / 2 + l % 2 * kLanes<T>;
  return __builtin_shuffle(a, b, m);
#endif
}
template <class T>
SK_INLINE Vec<T> zip_high(Vec<T> a, Vec<T> b) {
  return zip_low<T, kLanes<T> / 2>(a, b);
}

// One stage of the transpose of a kLanes x kLanes square held in rows, and the stages below it.
template <class T, int half>
SK_INLINE void transpose_stages(Vec<T>* r) {
  SK_UNROLL for (int i = 0; i < kLanes<T>; ++i) {
    if (i & half) continue;
    const Vec<T> a = r[i], b = r[i + half];
    // a' takes b's lanes moved up by half; b' takes a's lanes moved down.
    typename VectorOf<T>::mask up, down;
    SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) {
      up[l] = (l & half) ? kLanes<T> + l - half : l;
      down[l] = (l & half) ? kLanes<T> + l : l + half;
    }
#if defined(__clang__)
    Vec<T> x, y;
    SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) {
      x[l] = (l & half) ? b[l - half] : a[l];
      y[l] = (l & half) ? b[l] : a[l + half];
    }
    r[i] = x, r[i + half] = y;
#else
    r[i] = __builtin_shuffle(a, b, up), r[i + half] = __builtin_shuffle(a, b, down);
#endif
  }
  if constexpr (half > 1) transpose_stages<T, half / 2>(r);
}

template <class T>
SK_INLINE void transpose(Vec<T>* rows) {
  transpose_stages<T, kLanes<T> / 2>(rows);
}

// The first n numbers at p over and over: 1, or 2 or 8 floats. By hand where it counts: GCC shuffles what it
// has loaded, though a load can broadcast.
template <class T, int n>
SK_INLINE Vec<T> splat_group(const T* p) {
  if constexpr (n == 1) {
    return splat(*p);
  } else if constexpr (n >= kLanes<T>) {
    return load_loose(p);
  } else {
    struct Group {
      T number[n];
    };
    const Group& group = *reinterpret_cast<const Group*>(p);
    Vec<T> r;
#if defined(__x86_64__) && SK_VECTOR_BYTES == 64
    if constexpr (n == 2)
      asm("vbroadcastsd %1, %0" : "=v"(r) : "m"(group));
    else
      asm("vbroadcastf64x4 %1, %0" : "=v"(r) : "m"(group));
#elif defined(__x86_64__) && SK_VECTOR_BYTES == 32
    asm("vbroadcastsd %1, %0" : "=x"(r) : "m"(group));
#else
    SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) r[l] = group.number[l % n];
#endif
    return r;
  }
}

// Sums of neighbours: lane l of the result is lanes 2 l and 2 l + 1 of a and then b.
template <class T>
SK_INLINE Vec<T> add_neighbours(Vec<T> a, Vec<T> b) {
#if defined(__clang__)
  Vec<T> r;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) {
    const Vec<T> from = 2 * l < kLanes<T> ? a : b;
    r[l] = from[2 * l % kLanes<T>] + from[2 * l % kLanes<T> + 1];
  }
  return r;
#else
  typename VectorOf<T>::mask even, odd;
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) even[l] = 2 * l, odd[l] = 2 * l + 1;
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

// kLanes vectors -> one vector whose lane i is the sum over vector i. Halves the number of vectors at
// each stage: blend + cross + add, in a fixed order of additions.
template <class T, int half>
SK_INLINE Vec<T> reduce_stages(Vec<T>* r) {
  if constexpr (half == 0) return r[0];
  SK_UNROLL for (int i = 0; i < half; ++i) r[i] =
      blend<T, half>(r[i], r[i + half]) + cross<T, half>(r[i], r[i + half]);
  if constexpr (half > 1) return reduce_stages<T, half / 2>(r);
  return r[0];
}

template <class T>
SK_INLINE Vec<T> reduce(Vec<T>* vectors) {
  return reduce_stages<T, kLanes<T> / 2>(vectors);
}

// The same sums, in the same order of additions, from halves in memory: low + i * kLanes / 2 has the lower
// half of vector i, high the upper. Loads replace the shuffles of the first stage.
template <class T>
SK_INLINE Vec<T> reduce_halves(const T* low, const T* high) {
  constexpr int L = kLanes<T>;
  Vec<T> r[L / 2];  // vectors 2 i and 2 i + 1, half a vector each
  SK_UNROLL for (int i = 0; i < L / 2; ++i) r[i] = load(low + i * L) + load(high + i * L);
  const Vec<T> sums = reduce_stages<T, L / 4>(r);
  typename VectorOf<T>::mask order;
  SK_UNROLL for (int l = 0; l < L; ++l) order[l] = l / 2 + (l & 1) * (L / 2);
#if defined(__clang__)
  Vec<T> ordered;
  SK_UNROLL for (int l = 0; l < L; ++l) ordered[l] = sums[order[l]];
  return ordered;
#else
  return __builtin_shuffle(sums, order);
#endif
}

// Stores the two halves of a vector. By hand where it counts: compilers shuffle the upper half down first,
// which takes the one port that shuffles; the store alone does not.
template <class T>
SK_INLINE void store_halves(T* low, T* high, Vec<T> v) {
#if defined(__x86_64__) && SK_VECTOR_BYTES == 64
  typedef T Half __attribute__((vector_size(kVectorBytes / 2), may_alias));
  asm("vextractf64x4 $0, %1, %0" : "=m"(*reinterpret_cast<Half*>(low)) : "v"(v));
  asm("vextractf64x4 $1, %1, %0" : "=m"(*reinterpret_cast<Half*>(high)) : "v"(v));
#elif defined(__x86_64__) && SK_VECTOR_BYTES == 32
  typedef T Half __attribute__((vector_size(kVectorBytes / 2), may_alias));
  asm("vextractf128 $0, %1, %0" : "=m"(*reinterpret_cast<Half*>(low)) : "x"(v));
  asm("vextractf128 $1, %1, %0" : "=m"(*reinterpret_cast<Half*>(high)) : "x"(v));
#else
  constexpr int H = kLanes<T> / 2;
  SK_UNROLL for (int l = 0; l < H; ++l) low[l] = v[l], high[l] = v[H + l];
#endif
}

// Bit l of the result: lane l of a is at least that of b.
template <class T>
SK_INLINE unsigned at_least(Vec<T> a, Vec<T> b) {
#if defined(__x86_64__) && SK_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    uint16_t lanes;
    asm("vcmpps $13, %2, %1, %0" : "=Yk"(lanes) : "v"(a), "v"(b));
    return lanes;
  } else {
    uint8_t lanes;
    asm("vcmppd $13, %2, %1, %0" : "=Yk"(lanes) : "v"(a), "v"(b));
    return lanes;
  }
#else
  const typename VectorOf<T>::mask m = a >= b;
  unsigned lanes = 0;
#if defined(__x86_64__) && SK_VECTOR_BYTES == 32
  if constexpr (sizeof(T) == 4) {
    asm("vmovmskps %1, %0" : "=r"(lanes) : "x"(m));
    return lanes;
  }
#elif defined(__x86_64__)
  if constexpr (sizeof(T) == 4) {
    asm("movmskps %1, %0" : "=r"(lanes) : "x"(m));
    return lanes;
  }
#endif
  SK_UNROLL for (int l = 0; l < kLanes<T>; ++l) lanes |= unsigned(m[l] & 1) << l;
  return lanes;
#endif
}

#if defined(__x86_64__) && SK_VECTOR_BYTES == 64
// The lanes chosen, one after the other; a whole vector is written.
SK_INLINE void append_vector(Vec<float> v, unsigned lanes, float* to) {
  const uint16_t mask = uint16_t(lanes);
  asm("vcompressps %1, %0%{%2%}%{z%}" : "=v"(v) : "v"(v), "Yk"(mask));
  store_loose(to, v);
}
#endif

// Appends the lanes chosen of a vector in memory, and their columns, of which the first lane's is given.
// A whole vector may be written. Returns how many they are.
template <class T>
SK_INLINE int append_lanes(const T* from, int32_t column, unsigned lanes, T* to, int32_t* columns) {
#if defined(__x86_64__) && SK_VECTOR_BYTES == 64
  if constexpr (sizeof(T) == 4) {
    VectorOf<float>::mask each;
    SK_UNROLL for (int l = 0; l < 16; ++l) each[l] = l;
    append_vector(load_loose(from), lanes, to);
    append_vector((Vec<float>)(each + column), lanes, reinterpret_cast<float*>(columns));
    return __builtin_popcount(lanes);
  }
#endif
  int count = 0;
  for (; lanes != 0; lanes &= lanes - 1, ++count) {
    const int lane = __builtin_ctz(lanes);
    to[count] = from[lane], columns[count] = column + lane;
  }
  return count;
}
