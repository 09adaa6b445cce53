// Tensors of a storage type S as vectors of T: the same type, or float from and to 16 bits. By integer
// arithmetic, with the same results on every instruction set: exact one way, to nearest even the other; NaN
// stays NaN.

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));
typedef int32_t Integers __attribute__((vector_size(kVectorBytes)));
typedef uint16_t Shorts __attribute__((vector_size(kVectorBytes / 2), aligned(2), may_alias));

// Where a lane of `choice` is -1 that of a, where it is 0 that of b.
SK_INLINE Words either(Integers choice, Words a, Words b) {
  return (Words(choice) & a) | (~Words(choice) & b);
}

SK_INLINE Words words_of(const uint16_t* p) {
  return __builtin_convertvector(*reinterpret_cast<const Shorts*>(p), Words);
}

template <class T>
SK_INLINE Vec<T> load_stored(const T* p) {
  return load_loose(p);
}
SK_INLINE Vec<float> load_stored(const BFloat16* p) { return (Vec<float>)(words_of(&p->bits) << 16); }
SK_INLINE Vec<float> load_stored(const Half* p) {
  const Words half = words_of(&p->bits), size = (half & 0x7fff) << 13;
  // The exponents' biases differ by 112; a product, because that is right for subnormal numbers too.
  const Words finite = (Words)((Vec<float>)size * 0x1p112f);
  return (Vec<float>)(either((Integers)size >= 0x0f800000, size | 0x7f800000, finite) | (half & 0x8000)
                                                                                            << 16);
}

template <class T>
SK_INLINE void store_stored(T* p, Vec<T> v) {
  store_loose(p, v);
}
SK_INLINE void store_stored(BFloat16* p, Vec<float> v) {
  const Words word = (Words)v, even = (word >> 16) & 1;
  const Integers nan = (Integers)(word & 0x7fffffff) > 0x7f800000;
  const Words result = either(nan, (word >> 16) | 0x40, (word + 0x7fff + even) >> 16);
  *reinterpret_cast<Shorts*>(&p->bits) = __builtin_convertvector(result, Shorts);
}
SK_INLINE void store_stored(Half* p, Vec<float> v) {
  const Words word = (Words)v, size = word & 0x7fffffff, even = (size >> 13) & 1;
  const Words normal = (size - (112u << 23) + 0xfff + even) >> 13;
  // Below 2^-14 half precision has steps of 2^-24, as float has from 0.5 on: the sum rounds to them.
  const Words tiny = (Words)((Vec<float>)size + 0.5f) - 0x3f000000;
  Words result = either((Integers)size < 0x38800000, tiny, normal);
  result = either((Integers)size >= 0x477ff000, Words{} + 0x7c00, result);
  result = either((Integers)size > 0x7f800000, ((size >> 13) & 0x3ff) | 0x7e00, result);
  *reinterpret_cast<Shorts*>(&p->bits) = __builtin_convertvector(result | ((word >> 16) & 0x8000), Shorts);
}

template <class T, class S>
void widen(const S* from, int64_t n, T* to) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_loose(to + i, load_stored(from + i));
  S rest[L] = {};
  alignas(64) T wide[L];
  for (int64_t j = i; j < n; ++j) rest[j - i] = from[j];
  store(wide, load_stored(rest));
  for (int64_t j = i; j < n; ++j) to[j] = wide[j - i];
}

template <class T, class S>
void narrow(const T* from, int64_t n, S* to) {
  constexpr int L = kLanes<T>;
  int64_t i = 0;
  for (; i + L <= n; i += L) store_stored(to + i, load_loose(from + i));
  alignas(64) T rest[L] = {};
  S few[L];
  for (int64_t j = i; j < n; ++j) rest[j - i] = from[j];
  store_stored(few, load(rest));
  for (int64_t j = i; j < n; ++j) to[j] = few[j - i];
}
