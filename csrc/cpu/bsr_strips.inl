// BSR products whose lanes are features: nothing is transposed but the forward's weights, once a call.
//
// The vector of a product is a cell of a block's outputs (Y), of its inputs (dX, dW). The other operand is
// one number of one token, broadcast by the multiply-add that uses it. Where numbers are broadcast from,
// tokens stand in strips: strip f has features [f * kCell, (f + 1) * kCell) of every token, one cell after
// the other. Rows as they are would do but for their pitch: at 4 KiB all of a tile fall into one set of the
// first cache.

// Tokens times kVectors: the accumulators of a product. Eight hide the latency of a multiply-add; 16 halve
// the loads of weights, and fit the registers of AVX-512.
constexpr int kStripTokens = kVectorBytes == 64 ? 16 : 8 / kVectors;

// src [tokens][stride] -> strips, `pitch` elements apart. Features past the last are zero. With sums: sums
// [groups of kStripGroup tokens][features] = the sum of each group.
template <class T, bool with_sums>
void strip_pack_fixed(const T* src, int64_t stride, int64_t tokens, int64_t features, T* dst, int64_t pitch,
                      T* sums) {
  constexpr int L = kLanes<T>, C = kCell<T>;
  for (int64_t t0 = 0; t0 < tokens; t0 += kStripGroup) {
    const int64_t count = tokens - t0 < kStripGroup ? tokens - t0 : kStripGroup;
    const T* from = src + t0 * stride;
    T *to = dst + t0 * C, *sum = with_sums ? sums + t0 / kStripGroup * features : nullptr;
    int64_t f = 0;
    // A strip at a time: that is as many streams as tokens, which the processor follows, and whole runs of
    // lines written. Row by row takes twice as long.
    for (; f + C <= features; f += C, to += pitch) SK_UNROLL for (int v = 0; v < kVectors; ++v) {
        Vec<T> total{};
        if (count == kStripGroup) {
          SK_UNROLL for (int t = 0; t < kStripGroup; ++t) {
            const Vec<T> a = load_loose(from + t * stride + f + v * L);
            store(to + t * C + v * L, a);
            if (with_sums) total += a;
          }
        } else {
          for (int64_t t = 0; t < count; ++t) {
            const Vec<T> a = load_loose(from + t * stride + f + v * L);
            store(to + t * C + v * L, a);
            if (with_sums) total += a;
          }
        }
        if (with_sums) store_loose(sum + f + v * L, total);
      }
    for (int64_t i = 0; f + i < features; ++i) {
      T total = 0;
      for (int64_t t = 0; t < count; ++t) {
        to[t * C + i] = from[t * stride + f + i];
        total += to[t * C + i];
      }
      if (with_sums) sum[f + i] = total;
    }
  }
}

template <class T>
void strip_pack(const T* src, int64_t stride, int64_t tokens, int64_t features, T* dst, int64_t pitch,
                T* sums) {
  if (sums != nullptr) return strip_pack_fixed<T, true>(src, stride, tokens, features, dst, pitch, sums);
  strip_pack_fixed<T, false>(src, stride, tokens, features, dst, pitch, nullptr);
}

// Blocks [first, last) in the order of `block`, [b_out][b_in] each -> [b_out / kCell][b_in][kCell].
template <class T>
void strip_transpose(const T* values, const int32_t* block, int64_t first, int64_t last, int64_t b_out,
                     int64_t b_in, T* out) {
  constexpr int L = kLanes<T>, C = kCell<T>;
  for (int64_t p = first; p < last; ++p) {
    const T* from = values + block[p] * b_out * b_in;
    T* to = out + p * b_out * b_in;
    for (int64_t o = 0; o < b_out; o += L) {
      T* cell = to + o / C * C * b_in + o % C;
      int64_t i = 0;
      for (; i + L <= b_in; i += L) {
        Vec<T> r[L];
        SK_UNROLL for (int k = 0; k < L; ++k) r[k] = load_loose(from + (o + k) * b_in + i);
        transpose<T>(r);
        SK_UNROLL for (int k = 0; k < L; ++k) store(cell + (i + k) * C, r[k]);
      }
      for (; i < b_in; ++i)
        for (int k = 0; k < L; ++k) cell[i * C + k] = from[(o + k) * b_in + i];
    }
  }
}

// acc [tokens][kVectors] += a run of `inputs` of a block times x. The run that comes next, of other tokens'
// numbers and weights at some other place, is fetched meanwhile: a line of each for every input. Runs of
// groups are too short for that.
template <class T, int tokens, int group>
SK_INLINE void strip_run(Vec<T> (*acc)[kVectors], int64_t inputs, const T* value, int64_t step, const T* x,
                         const T* next_value, const T* next_x) {
#pragma GCC unroll 2
  for (int64_t i = 0; i < inputs; i += group, value += step, next_value += step) {
    if constexpr (group == 1) {
      __builtin_prefetch(next_x + i * kCell<T>);
      __builtin_prefetch(next_value);
    }
    Vec<T> weight[kVectors];
    SK_UNROLL for (int v = 0; v < kVectors; ++v) weight[v] = load_loose(value + v * kLanes<T>);
    SK_UNROLL for (int t = 0; t < tokens; ++t) {
      const Vec<T> in = splat_group<T, group>(x + t * kCell<T> + i);
      SK_UNROLL for (int v = 0; v < kVectors; ++v) acc[t][v] += weight[v] * in;
    }
  }
}

// Rows of outputs, each the sum of `group` neighbouring lanes, to y [tokens][stride].
template <class T, int tokens, int group>
SK_INLINE void strip_store(const Vec<T> (*acc)[kVectors], T* y, int64_t stride) {
  constexpr int L = kLanes<T>, width = kCell<T> / group, n = tokens * kVectors;
  if constexpr (group == 1) {
    SK_UNROLL for (int t = 0; t < tokens; ++t) SK_UNROLL for (int v = 0; v < kVectors; ++v)
        store_loose(y + t * stride + v * L, acc[t][v]);
  } else {
    alignas(64) T rows[(n + 1) / 2 * L];
    SK_UNROLL for (int i = 0; i < n; i += 2) {
      const int next = i + 1 < n ? i + 1 : i;  // a single one: its sums twice
      store(rows + i / 2 * L,
            add_neighbours<T>(acc[i / kVectors][i % kVectors], acc[next / kVectors][next % kVectors]));
    }
    SK_UNROLL for (int t = 0; t < tokens; ++t)
        __builtin_memcpy(y + t * stride, rows + t * width, width * sizeof(T));
  }
}

// `tokens` rows of one cell of outputs: y [tokens][stride] = start + the blocks [begin, end) times x.
// `whole`: blocks have whole cells of inputs, else less than one.
template <class T, int tokens, int group, bool whole>
SK_INLINE void strip_tile(const StripWeights<T>& w, int64_t begin, int64_t end, const T* values, const T* x,
                          int64_t pitch, const Vec<T>* start, T* y, int64_t stride) {
  constexpr int C = kCell<T>;
  Vec<T> acc[tokens][kVectors];
  SK_UNROLL for (int t = 0; t < tokens; ++t) SK_UNROLL for (int v = 0; v < kVectors; ++v) acc[t][v] =
      start[v];
  const int64_t step = group == 1 ? w.step : C, inputs = group == 1 ? w.inputs : C / group;
  const auto value_of = [&](int64_t p) {
    if constexpr (group > 1) return values + p * (C / group * (C / group));
    return values + (w.block != nullptr ? w.block[p] : p) * w.numel;
  };
  const auto input_of = [&](int64_t p) {
    const int64_t feature = w.idx[p] * inputs;
    return x + static_cast<uint64_t>(feature) / C * pitch + (whole ? 0 : feature & (C - 1));
  };
  for (int64_t p = begin; p < end; ++p) {
    const T *value = value_of(p), *in = input_of(p);
    const int64_t next = p + 1 < w.n ? p + 1 : p;
    const T *next_value = value_of(next), *next_in = input_of(next);
    if (!whole) {
      strip_run<T, tokens, group>(acc, inputs, value, step, in, next_value, next_in);
      continue;
    }
    for (int64_t i = C; i < inputs; i += C, value += C / group * step, in += pitch)
      strip_run<T, tokens, group>(acc, C, value, step, in, value + C / group * step, in + pitch);
    strip_run<T, tokens, group>(acc, C, value, step, in, next_value, next_in);
  }
  strip_store<T, tokens, group>(acc, y, stride);
}

// All tokens of one cell of outputs: as many tiles of `tokens` as there are, then smaller ones.
template <class T, int tokens, int group, bool whole>
SK_INLINE void strip_tiles(const StripWeights<T>& w, int64_t begin, int64_t end, const T* values,
                           int64_t count, const T* x, int64_t pitch, const Vec<T>* start, T* y,
                           int64_t stride) {
  for (; count >= tokens; count -= tokens, x += tokens * kCell<T>, y += tokens * stride)
    strip_tile<T, tokens, group, whole>(w, begin, end, values, x, pitch, start, y, stride);
  if constexpr (tokens > 1)
    if (count > 0)
      strip_tiles<T, tokens / 2, group, whole>(w, begin, end, values, count, x, pitch, start, y, stride);
}

template <class T, int group, bool whole>
SK_INLINE void strip_rows(const StripWeights<T>& w, int64_t first, int64_t last, int64_t tokens, const T* x,
                          int64_t pitch, const T* bias, T* y, int64_t stride) {
  constexpr int L = kLanes<T>, width = kCell<T> / group;
  for (int64_t r = first; r < last; ++r)
    for (int64_t cell = 0; cell < w.cells; ++cell) {
      const int64_t feature = (r * w.cells + cell) * width;
      Vec<T> start[kVectors] = {};
      if (bias != nullptr) SK_UNROLL for (int v = 0; v < kVectors; ++v) {
          if constexpr (group == 1)
            start[v] = load_loose(bias + feature + v * L);
          else
            SK_UNROLL for (int l = 0; l < L; l += group) start[v][l] = bias[feature + (v * L + l) / group];
        }
      strip_tiles<T, kStripTokens, group, whole>(w, w.ptr[r], w.ptr[r + 1], w.values + cell * w.cell_step,
                                                 tokens, x, pitch, start, y + feature, stride);
    }
}

// y [tokens][stride] = bias (or zero) + W x for the block rows [first, last); x in strips.
template <class T>
void strip_spmm(const StripWeights<T>* weights, int64_t first, int64_t last, int64_t tokens, const T* x,
                int64_t pitch, const T* bias, T* y, int64_t stride) {
  const StripWeights<T> w = *weights;
  if constexpr (sizeof(T) == 4) {
    if (w.group == 2) return strip_rows<T, 2, false>(w, first, last, tokens, x, pitch, bias, y, stride);
  }
  if (w.inputs % kCell<T> == 0)
    return strip_rows<T, 1, true>(w, first, last, tokens, x, pitch, bias, y, stride);
  strip_rows<T, 1, false>(w, first, last, tokens, x, pitch, bias, y, stride);
}

// dw [outs][w_row], one cell wide, += (fresh: =) dY^T X: d at `outs` lanes of a strip, x [tokens][x_row].
template <class T, int outs>
SK_INLINE void strip_sddmm_tile(int64_t tokens, const T* d, const T* x, int64_t x_row, bool fresh, T* dw,
                                int64_t w_row) {
  constexpr int L = kLanes<T>, C = kCell<T>;
  // Few outputs: every turn-th token has sums of its own, or each addition would wait for the last.
  constexpr int turns = outs * kVectors < 8 ? 8 / (outs * kVectors) : 1;
  Vec<T> acc[turns][outs][kVectors] = {};
  SK_UNROLL for (int o = 0; o < outs; ++o) __builtin_prefetch(dw + o * w_row, 1);
  int64_t t = 0;
#pragma GCC unroll 2
  for (; t + turns <= tokens; t += turns)
    SK_UNROLL for (int turn = 0; turn < turns; ++turn) SK_UNROLL for (int v = 0; v < kVectors; ++v) {
      const Vec<T> in = load_loose(x + (t + turn) * x_row + v * L);
      SK_UNROLL for (int o = 0; o < outs; ++o) acc[turn][o][v] += in * splat(d[(t + turn) * C + o]);
    }
  if constexpr (turns > 1)
    for (; t < tokens; ++t) SK_UNROLL for (int v = 0; v < kVectors; ++v) {
        const Vec<T> in = load_loose(x + t * x_row + v * L);
        SK_UNROLL for (int o = 0; o < outs; ++o) acc[0][o][v] += in * splat(d[t * C + o]);
      }
  SK_UNROLL for (int o = 0; o < outs; ++o) SK_UNROLL for (int v = 0; v < kVectors; ++v) {
    Vec<T> total = acc[0][o][v];
    SK_UNROLL for (int turn = 1; turn < turns; ++turn) total += acc[turn][o][v];
    T* out = dw + o * w_row + v * L;
    store_loose(out, fresh ? total : load_loose(out) + total);
  }
}

constexpr int kStripOuts = kVectorBytes == 64 ? 16 : 8 / kVectors;

template <class T, int outs>
SK_INLINE void strip_sddmm_tiles(int64_t count, int64_t tokens, const T* d, const T* x, int64_t x_row,
                                 bool fresh, T* dw, int64_t w_row) {
  for (; count >= outs; count -= outs, d += outs, dw += outs * w_row)
    strip_sddmm_tile<T, outs>(tokens, d, x, x_row, fresh, dw, w_row);
  if constexpr (outs > 1)
    if (count > 0) strip_sddmm_tiles<T, outs / 2>(count, tokens, d, x, x_row, fresh, dw, w_row);
}

// Gradients of the block columns [first, last) over some tokens; `weights` are column-wise, d = dY in strips,
// x, dx [tokens][row]. dw += (fresh: =) dY^T X at the blocks; dx, if not null, = dY W.
template <class T>
void strip_backward(const StripWeights<T>* weights, int64_t first, int64_t last, int64_t tokens, const T* d,
                    int64_t pitch, const T* x, int64_t row, bool fresh, T* dw, T* dx) {
  constexpr int C = kCell<T>;
  const StripWeights<T> w = *weights;
  const int64_t run = w.inputs < C ? w.inputs : C;
  for (int64_t c = first; c < last; ++c) {
    for (int64_t cell = 0; cell < w.cells; ++cell)
      for (int64_t p = w.ptr[c]; p < w.ptr[c + 1]; ++p) {
        T* out = dw + w.block[p] * w.numel + cell * w.cell_step;
        const int64_t feature = w.idx[p] * w.inputs;
        const T* from = d + feature / C * pitch + feature % C;
        for (int64_t o = 0; o < w.inputs; o += run, from += pitch, out += run * w.step)
          strip_sddmm_tiles<T, kStripOuts>(run, tokens, from, x + (c * w.cells + cell) * C, row, fresh, out,
                                           w.step);
      }
    // Straight after: the column's strips of dY are in the first cache now.
    if (dx != nullptr)
      strip_spmm(weights, c, c + 1, tokens, d, pitch, static_cast<const T*>(nullptr), dx, row);
  }
}

// Square blocks of half a cell, [first, last) in the order of `block` -> for the product with the block or
// its transpose whose lanes are outputs times pairs of inputs: [inputs / 2][outputs][2].
template <class T>
void pair_interleave(const T* values, const int32_t* block, int64_t first, int64_t last, bool transposed,
                     T* out) {
  constexpr int side = kCell<T> / 2;
  for (int64_t p = first; p < last; ++p) {
    const T* from = values + block[p] * (side * side);
    T* to = out + p * (side * side);
    SK_UNROLL for (int i = 0; i < side; i += 2) SK_UNROLL for (int o = 0; o < side; ++o)
        SK_UNROLL for (int k = 0; k < 2; ++k)* to++ =
            transposed ? from[(i + k) * side + o] : from[o * side + i + k];
  }
}

// Weight gradients of `blocks` blocks of one row, outputs [kCell / group] by inputs [kCell / group]: the
// lanes of a cell are `group` outputs times the inputs. dY's lanes are spread once for all the blocks.
template <class T, int blocks>
SK_INLINE void pair_sddmm_tile(int64_t tokens, const T* d, const T* x, int64_t x_row, const int32_t* idx,
                               const int32_t* block, bool fresh, T* dw) {
  constexpr int L = kLanes<T>, C = kCell<T>, side = C / 2, cells = side / 2;
  constexpr int turns = blocks * cells * kVectors < 8 ? 8 / (blocks * cells * kVectors) : 1;
  const T* in[blocks];
  SK_UNROLL for (int b = 0; b < blocks; ++b) in[b] = x + idx[b] * side;
  Vec<T> acc[turns][blocks][cells][kVectors] = {};
  const auto token = [&](int64_t t, int turn) __attribute__((always_inline)) {
    SK_UNROLL for (int v = 0; v < kVectors; ++v) {
      Vec<T> spread[cells];
      SK_UNROLL for (int c = 0; c < cells; ++c) {
        const T* at = d + t * C + c * 2;
        if constexpr (L <= side) {
          spread[c] = splat(at[v * L / side]);
        } else {
#if defined(__clang__)
          SK_UNROLL for (int l = 0; l < L; ++l) spread[c][l] = at[(v * L + l) / side];
#else
          typename VectorOf<T>::mask from;
          SK_UNROLL for (int l = 0; l < L; ++l) from[l] = c * 2 + (v * L + l) / side;
          spread[c] = __builtin_shuffle(load_loose(d + t * C), from);
#endif
        }
      }
      SK_UNROLL for (int b = 0; b < blocks; ++b) {
        const Vec<T> value = splat_group<T, side>(in[b] + t * x_row + (L < side ? v * L % side : 0));
        SK_UNROLL for (int c = 0; c < cells; ++c) acc[turn][b][c][v] += spread[c] * value;
      }
    }
  };
  int64_t t = 0;
  for (; t + turns <= tokens; t += turns)
    SK_UNROLL for (int turn = 0; turn < turns; ++turn) token(t + turn, turn);
  if constexpr (turns > 1)
    for (; t < tokens; ++t) token(t, 0);
  SK_UNROLL for (int b = 0; b < blocks; ++b) {
    T* out = dw + block[b] * (side * side);
    SK_UNROLL for (int c = 0; c < cells; ++c) SK_UNROLL for (int v = 0; v < kVectors; ++v) {
      Vec<T> total = acc[0][b][c][v];
      SK_UNROLL for (int turn = 1; turn < turns; ++turn) total += acc[turn][b][c][v];
      T* at = out + c * C + v * L;
      store_loose(at, fresh ? total : load_loose(at) + total);
    }
  }
}

template <class T, int blocks>
SK_INLINE void pair_sddmm_tiles(int64_t count, int64_t tokens, const T* d, const T* x, int64_t x_row,
                                const int32_t* idx, const int32_t* block, bool fresh, T* dw) {
  for (; count >= blocks; count -= blocks, idx += blocks, block += blocks)
    pair_sddmm_tile<T, blocks>(tokens, d, x, x_row, idx, block, fresh, dw);
  if constexpr (blocks > 1)
    if (count > 0) pair_sddmm_tiles<T, blocks / 2>(count, tokens, d, x, x_row, idx, block, fresh, dw);
}

// dw += (fresh: =) dY^T X at the blocks of the rows [first, last), squares of half a cell; `weights`
// are row-wise, with `block`, d = dY in strips, x [tokens][row].
template <class T>
void pair_sddmm(const StripWeights<T>* weights, int64_t first, int64_t last, int64_t tokens, const T* d,
                int64_t pitch, const T* x, int64_t row, bool fresh, T* dw) {
  if constexpr (sizeof(T) == 4) {
    constexpr int C = kCell<T>;
    const StripWeights<T> w = *weights;
    for (int64_t r = first; r < last; ++r) {
      const int64_t begin = w.ptr[r], feature = r * (C / 2);
      pair_sddmm_tiles<T, kVectorBytes == 64 ? 4 : 1>(w.ptr[r + 1] - begin, tokens,
                                                      d + feature / C * pitch + feature % C, x, row,
                                                      w.idx + begin, w.block + begin, fresh, dw);
    }
  }
}
