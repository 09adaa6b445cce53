// Growth by screening: products of factors rounded to 8 bits, and how far off they may be; exact products of
// the few pairs for which that is not enough. For processors that multiply bytes four times as fast as
// floats.

// 16 features from tokens on, zero past the last feature.
SK_INLINE Vec<float> load_features(const float* src, int64_t features) {
  if (features >= 16) return load_loose(src);
  Vec<float> v{};
  SK_UNROLL for (int l = 0; l < 16; ++l) if (l < features) v[l] = src[l];
  return v;
}

// Rounds the features of [tokens][stride] to value = base + scale * code: codes of 0 to 255, or -127 to 127
// with base 0 (signed_codes), four tokens to a word: codes [features / 16][tokens / 4][16], zero past the
// last token. False if a number is not finite. Goes through memory in its order: features apart lie in the
// same cache sets.
bool screen_round(const float* src, int64_t stride, int64_t tokens, int64_t features, bool signed_codes,
                  uint32_t* codes, const ScreenGroup* out) {
  typedef VectorOf<float>::mask Ints;
  typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
  const int64_t steps = (tokens + 3) / 4;
  float *low = out->base, *high = out->scale, *unit = out->sum, *up = out->error;
  for (int64_t f = 0; f < features; f += 16) {
    store_loose(low + f, Vec<float>{}), store_loose(high + f, Vec<float>{});
    store_loose(out->largest + f, Vec<float>{});
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t f = 0; f < features; f += 16) {
      const Vec<float> v = load_features(src + t * stride + f, features - f);
      const Vec<float> least = load_loose(low + f), greatest = load_loose(high + f);
      const Magnitude<float> most = (Magnitude<float>)load_loose(out->largest + f),
                             bits = magnitude<float>(v);
      store_loose(out->largest + f, (Vec<float>)(most > bits ? most : bits));
      store_loose(low + f, v < least ? v : least), store_loose(high + f, v > greatest ? v : greatest);
    }
  const Vec<float> one = splat(1.0f), codes_up = splat(signed_codes ? 127.0f : 255.0f);
  bool finite = true;
  for (int64_t f = 0; f < features; f += 16) {
    const Vec<float> largest = load_loose(out->largest + f);
    finite &= are_finite<float>((Magnitude<float>)largest, nullptr, 0);
    const Vec<float> range = signed_codes ? largest : load_loose(high + f) - load_loose(low + f);
    const Ints any = range > 0;
    if (signed_codes) store_loose(out->base + f, Vec<float>{});
    store_loose(out->scale + f, range / codes_up);
    store_loose(up + f, any ? codes_up / (any ? range : one) : Vec<float>{});
    store_loose(unit + f, any ? one / (any ? largest : one) : Vec<float>{});
    store_loose(out->norm + f, Vec<float>{});
  }
  if (!finite) return false;
  // Sums over the tokens of a group of features, 64 at a time.
  const Vec<float> magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  for (int64_t first = 0; first < features; first += 64) {
    Vec<float> norm[4] = {}, error[4] = {}, sum[4] = {};
    for (int64_t t = 0; t < tokens; t += 4)
      for (int64_t g = 0; g < 4 && first + g * 16 < features; ++g) {
        const int64_t f = first + g * 16;
        const Vec<float> base = load_loose(out->base + f), factor = load_loose(up + f),
                         size_of = load_loose(unit + f);
        Words word{};
        SK_UNROLL for (int64_t i = 0; i < 4; ++i) {
          if (t + i >= tokens) break;
          const Vec<float> v = load_features(src + (t + i) * stride + f, features - f);
          const Vec<float> exact = (v - base) * factor, rounded = (exact + magic) - magic;
          const Vec<float> off = exact - rounded, size = v * size_of;
          norm[g] += size * size, error[g] += off * off, sum[g] += rounded;
          word |= (Words)(__builtin_convertvector(rounded, Ints) & 255) << uint32_t(8 * i);
        }
        *reinterpret_cast<Words*>(codes + f * steps + t * 4) = word;
      }
    for (int64_t g = 0; g < 4 && first + g * 16 < features; ++g) {
      const int64_t f = first + g * 16;
      store_loose(out->norm + f, norm[g]), store_loose(out->error + f, error[g]),
          store_loose(out->sum + f, sum[g]);
    }
  }
  return true;
}

// sum + the products of four unsigned and four signed bytes in each lane.
SK_INLINE VectorOf<float>::mask add_byte_products(VectorOf<float>::mask sum, VectorOf<float>::mask codes,
                                                  VectorOf<float>::mask signed_codes) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(signed_codes));
  return sum;
}

// 8 rows x 32 columns. Appends those that may reach `least`: an upper bound of their magnitude, their
// columns, active ones with the sign bit set, and the number of their row. Returns how many.
int64_t screen_tile(const uint32_t* x, const uint32_t* d, int64_t steps, const float* scale,
                    const float* base, const float* norm, const float* error, const ScreenRow* rows,
                    float least, uint32_t valid, const uint32_t* active, int64_t active_stride,
                    int32_t column, float* upper, int32_t* columns, int32_t* numbers) {
  typedef VectorOf<float>::mask Ints;
  typedef int32_t LooseInts __attribute__((vector_size(64), aligned(4), may_alias));
  constexpr int R = 8, V = 2;
  Ints acc[R][V] = {};
  const uint32_t* second = x + steps * 16;
  for (int64_t s = 0; s < steps; ++s) {
    Ints a = *reinterpret_cast<const LooseInts*>(x + s * 16),
         b = *reinterpret_cast<const LooseInts*>(second + s * 16);
    SK_UNROLL for (int r = 0; r < R; ++r) {
      const Ints each = Ints{} + int32_t(d[s * 16 + r]);
      acc[r][0] = add_byte_products(acc[r][0], a, each);
      acc[r][1] = add_byte_products(acc[r][1], b, each);
    }
  }
  // In memory from here on, or the compiler would have the sums there in the loop above, too.
  Ints sums[R][V];
  SK_UNROLL for (int r = 0; r < R; ++r) SK_UNROLL for (int v = 0; v < V; ++v) sums[r][v] = acc[r][v];
  // First what is good, then its place: no branch but on whether a row of the tile has any.
  Vec<float> high[R][V];
  unsigned hits[R];
  for (int r = 0; r < R; ++r) {
    const ScreenRow row = rows[r];
    hits[r] = 0;
    SK_UNROLL for (int v = 0; v < V; ++v) {
      const Vec<float> product =
          __builtin_convertvector(sums[r][v], Vec<float>) * load_loose(scale + v * 16) +
          load_loose(base + v * 16) * row.sum;
      const Vec<float> off =
          load_loose(error + v * 16) * row.norm + load_loose(norm + v * 16) * row.error + row.least;
      high[r][v] = (Vec<float>)magnitude<float>(product * row.scale) + off;
      hits[r] |= at_least<float>(high[r][v], splat(least)) << (v * 16);
    }
    hits[r] &= valid;
  }
  Ints each, bit;
  SK_UNROLL for (int l = 0; l < 16; ++l) each[l] = l + column, bit[l] = 1 << l;
  int64_t count = 0;
  for (int r = 0; r < R; ++r) {
    if (hits[r] == 0) continue;
    SK_UNROLL for (int v = 0; v < V; ++v) {
      const unsigned here = (hits[r] >> (v * 16)) & 0xffff;
      const Ints live = (bit & int32_t(active[r * active_stride] >> (v * 16))) != 0;
      const Ints where = (each + v * 16) | (live & INT32_MIN);
      append_vector(high[r][v], here, upper + count);
      append_vector((Vec<float>)where, here, reinterpret_cast<float*>(columns) + count);
      *reinterpret_cast<LooseInts*>(numbers + count) = Ints{} + rows[r].number;
      count += __builtin_popcount(here);
    }
  }
  return count;
}

// out[i] = |dot product of a row and feature columns[i]|, over cells of 16 tokens, features `stride` apart.
void screen_dots(const float* row, const float* features, int64_t stride, int64_t cells,
                 const int32_t* columns, int64_t n, float* out) {
  constexpr int L = 16;
  for (int64_t i = 0; i < n; i += L) {
    Vec<float> sums[L] = {};
    SK_UNROLL for (int half = 0; half < L; half += 8) {
      const float* feature[8];
      for (int l = 0; l < 8; ++l) {
        const int64_t at = i + half + l < n ? i + half + l : n - 1;
        feature[l] = features + (columns[at] & INT32_MAX) * stride;
      }
      for (int64_t c = 0; c < cells; ++c) {
        const Vec<float> d = load(row + c * L);
        SK_UNROLL for (int l = 0; l < 8; ++l) sums[half + l] += d * load(feature[l] + c * L);
      }
    }
    const Vec<float> found = (Vec<float>)magnitude<float>(reduce<float>(sums));
    if (n - i >= L)
      store_loose(out + i, found);
    else
      for (int64_t l = 0; l < n - i; ++l) out[i + l] = found[l];
  }
}

constexpr Screen screen = {&screen_round, &screen_tile, &screen_dots};
