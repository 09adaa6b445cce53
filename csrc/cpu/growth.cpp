// Growth: keeps the k best inactive positions while the score matrix passes by in stripes of rows.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <type_traits>
#include <vector>

#include "../common/check.h"
#include "../common/index.h"

namespace sparse_kernels {
namespace {

// Candidates found so far, by position: arrays with room for more than 2k, cut back to the k best
// (score descending, then position ascending) whenever they are full, and between stripes.
template <class T>
struct Candidates {
  T* scores;
  int64_t* positions;
  int64_t k, capacity, count;
  T threshold;  // a score at or below it, at a later position, cannot be among the k best

  void keep_best() {
    if (count <= k || k == 0) return;
    std::vector<T> order(scores, scores + count);
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<T>());
    threshold = order[k - 1];
    // Of equal scores the first ones stay, for positions ascend.
    int64_t tied = k - std::count_if(scores, scores + count, [&](T s) { return s > threshold; });
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
      if (scores[i] < threshold || (scores[i] == threshold && tied-- <= 0)) continue;
      scores[kept] = scores[i], positions[kept++] = positions[i];
    }
    count = k;
  }

  void offer(T score, int64_t position) {
    if (count == capacity) {
      keep_best();
      if (score <= threshold) return;
    }
    scores[count] = score, positions[count++] = position;
  }

  // n scores at consecutive positions. Most runs hold nothing that is good enough.
  void offer_run(const T* score, int64_t n, int64_t position) {
    constexpr int64_t kRun = 16;
    for (int64_t i = 0; i < n; i += kRun) {
      const int64_t end = std::min(i + kRun, n);
      int better = 0;
      for (int64_t j = i; j < end; ++j) better |= score[j] > threshold;
      if (better == 0) continue;
      for (int64_t j = i; j < end; ++j)
        if (score[j] > threshold) offer(score[j], position + j);
    }
  }
};

// By the bits of the exponent, which compilers turn into vector code, as they must not a sum of floats.
template <class T>
bool all_finite(const T* x, int64_t n) {
  using Bits = std::conditional_t<sizeof(T) == 8, uint64_t, uint32_t>;
  const T infinity = INFINITY;
  Bits exponent, found = 0;
  std::memcpy(&exponent, &infinity, sizeof(T));
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    std::memcpy(&bits, x + i, sizeof(T));
    found |= (bits & exponent) == exponent;
  }
  return found == 0;
}

template <class T>
int64_t scan(const Tensor& scores, int64_t row_begin, IndexView<const int32_t> index, Tensor& active,
             Tensor& best_scores, Tensor& best_positions, int64_t k, int64_t found) {
  const int64_t rows = scores.size(0), cols = scores.size(1);
  const T* score = scores.const_data_ptr<T>();
  T* out = active.mutable_data_ptr<T>();
  Candidates<T> best{best_scores.mutable_data_ptr<T>(),
                     best_positions.mutable_data_ptr<int64_t>(),
                     k,
                     best_scores.numel(),
                     found,
                     k > 0 ? T(-1) : T(INFINITY)};
  if (k > 0 && found >= k) best.threshold = *std::min_element(best.scores, best.scores + found);
  for (int64_t r = 0; r < rows; ++r, score += cols) {
    const int64_t row = row_begin + r, first = row * cols;
    if (!all_finite(score, cols)) return -1;
    int64_t c = 0;
    for (int32_t i = index.row_ptr[row]; i < index.row_ptr[row + 1]; ++i) {
      const int64_t at = index.col_idx[i];
      best.offer_run(score + c, at - c, first + c);
      out[index.shape.blocks() ? index.slot[i] : i] = score[at];
      c = at + 1;
    }
    best.offer_run(score + c, cols - c, first + c);
  }
  best.keep_best();
  return best.count;
}

}  // namespace

int64_t growth_scan(const Tensor& scores, int64_t row_begin, const Tensor& index, int64_t n, int64_t rows,
                    int64_t cols, int64_t groups, int64_t plans, Tensor active, Tensor best_scores,
                    Tensor best_positions, int64_t k, int64_t found) {
  for (const Tensor* t :
       {&scores, &index, static_cast<const Tensor*>(&active), static_cast<const Tensor*>(&best_scores),
        static_cast<const Tensor*>(&best_positions)})
    check_cpu(*t, "growth_scan's tensors");
  const IndexShape shape{rows, cols, groups, n, plans_of(plans)};
  check_size(index, 0, shape.size(), "index");
  check_size(active, 0, n, "active");
  check_size(scores, 1, cols, "scores");
  check_size(best_positions, 0, best_scores.numel(), "best_positions");
  STD_TORCH_CHECK(row_begin >= 0 && row_begin + scores.size(0) <= rows, "stripe outside the weight");
  STD_TORCH_CHECK(best_scores.numel() > k && found <= best_scores.numel(), "too little room for k = ", k);
  for (const Tensor* t : {static_cast<const Tensor*>(&active), static_cast<const Tensor*>(&best_scores)})
    check_dtype(*t, scores.scalar_type(), "growth_scan's scores");
  const IndexView<const int32_t> view(index.const_data_ptr<int32_t>(), shape);
  if (scores.scalar_type() == ScalarType::Double)
    return scan<double>(scores, row_begin, view, active, best_scores, best_positions, k, found);
  check_dtype(scores, ScalarType::Float, "scores");
  return scan<float>(scores, row_begin, view, active, best_scores, best_positions, k, found);
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("growth_scan", TORCH_BOX(&sparse_kernels::growth_scan));
}
