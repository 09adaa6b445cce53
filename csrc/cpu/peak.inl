// The most multiply-adds there can be, from registers alone: what the benchmarks compare the kernels with.

// Does them, and returns how many floating-point operations that was.
double fma_peak(int64_t rounds, float* sink) {
  // Two units of 4 cycles' latency need 8 chains; 16 registers hold 12 with the two constants.
  constexpr int kChains = 12;
  Vec<float> sums[kChains];
  SK_UNROLL for (int i = 0; i < kChains; ++i) sums[i] = splat(float(i));
  Vec<float> a = splat(0.999f), b = splat(0.001f);
  keep(a), keep(b);
  // The chain runs through the factor: a product that no round changes would be moved out of the loop.
  for (int64_t r = 0; r < rounds; ++r) SK_UNROLL for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * a + b;
  SK_UNROLL for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
  store_loose(sink, sums[0]);
  return 2.0 * kChains * kLanes<float> * double(rounds);
}
