// Exact selection by score: a histogram over the leading bits of the scores, then a choice inside one bin.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

namespace sparse_kernels {

constexpr int kBinBits = 13;
constexpr int64_t kBins = int64_t{1} << kBinBits;

// Bins of scores >= 0. Bits of such numbers ascend with them: 32 bins to a power of two in float.
template <class T>
struct Bins {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  static constexpr int kShift = static_cast<int>(sizeof(T)) * 8 - 1 - kBinBits;

  // Compares as the score does, without a thought of NaN.
  static Bits bits(T score) {
    Bits bits;
    std::memcpy(&bits, &score, sizeof(T));
    return bits;
  }
  static int64_t of(T score) { return static_cast<int64_t>(bits(score) >> kShift); }
  // The smallest score of a bin.
  static T lowest(int64_t bin) {
    const Bits bits = static_cast<Bits>(bin) << kShift;
    T score;
    std::memcpy(&score, &bits, sizeof(T));
    return score;
  }
  // The next score up.
  static T above(T score) {
    Bits bits;
    std::memcpy(&bits, &score, sizeof(T));
    ++bits;
    std::memcpy(&score, &bits, sizeof(T));
    return score;
  }
};

// k scores out of many: those that are better than `score`, and the first `ties` of those that equal it.
template <class T>
struct Cut {
  T score;
  int64_t ties;
};

// The cut behind the k best of n scores >= 0, 1 <= k <= n. `Better` is std::greater or std::less.
template <class Better, class T>
Cut<T> cut(const T* scores, int64_t n, int64_t k) {
  constexpr bool kLargest = std::is_same_v<Better, std::greater<T>>;
  std::vector<uint32_t> bins(2 * kBins);  // two histograms: equal scores in a row would wait for each other
  uint32_t *even = bins.data(), *odd = even + kBins;
  int64_t i = 0;
  for (; i + 1 < n; i += 2) ++even[Bins<T>::of(scores[i])], ++odd[Bins<T>::of(scores[i + 1])];
  if (i < n) ++even[Bins<T>::of(scores[i])];
  int64_t bin = kLargest ? kBins - 1 : 0, left = k;
  while (left > int64_t{even[bin]} + odd[bin]) {
    left -= int64_t{even[bin]} + odd[bin];
    bin += kLargest ? -1 : 1;
  }
  const int64_t size = int64_t{even[bin]} + odd[bin];
  std::vector<T> inside(size + 1);
  for (int64_t at = i = 0; at < size; ++i) inside[at] = scores[i], at += Bins<T>::of(scores[i]) == bin;
  inside.pop_back();
  std::nth_element(inside.begin(), inside.begin() + (left - 1), inside.end(), Better());
  const T score = inside[left - 1];
  const int64_t better =
      std::count_if(inside.begin(), inside.end(), [&](T other) { return Better()(other, score); });
  return {score, left - better};
}

}  // namespace sparse_kernels
