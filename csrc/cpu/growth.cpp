// Growth: keeps the k best inactive positions while the score matrix passes by in stripes of rows.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "../common/check.h"
#include "../common/index.h"

namespace sparse_kernels {
namespace {

// Candidates found so far, unordered: arrays with room for more than 2k, cut back to the k best
// (score descending, then position ascending) whenever they are full.
template <class T>
struct Candidates {
  T* scores;
  int64_t* positions;
  int64_t k, capacity, count;
  T threshold;  // a score at or below it, at a later position, cannot be among the k best

  void keep_best() {
    if (count <= k) return;
    std::vector<std::pair<T, int64_t>> all(count);
    for (int64_t i = 0; i < count; ++i) all[i] = {scores[i], positions[i]};
    auto better = [](const auto& a, const auto& b) {
      return a.first > b.first || (a.first == b.first && a.second < b.second);
    };
    std::nth_element(all.begin(), all.begin() + k, all.end(), better);
    T lowest = k > 0 ? all[0].first : INFINITY;
    for (int64_t i = 0; i < k; ++i) {
      scores[i] = all[i].first, positions[i] = all[i].second;
      lowest = std::min(lowest, all[i].first);
    }
    count = k, threshold = lowest;
  }

  void offer(T score, int64_t position) {
    if (score <= threshold) return;
    if (count == capacity) {
      keep_best();
      if (score <= threshold) return;
    }
    scores[count] = score, positions[count++] = position;
  }
};

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
  best.keep_best();
  for (int64_t r = 0; r < rows; ++r, score += cols) {
    const int64_t row = row_begin + r, first = row * cols;
    T sum = 0;  // of score * 0: NaN as soon as one score is not finite
    for (int64_t c = 0; c < cols; ++c) sum += score[c] * T(0);
    if (!(sum == 0)) return -1;
    int64_t c = 0;
    for (int32_t i = index.row_ptr[row]; i < index.row_ptr[row + 1]; ++i) {
      const int64_t at = index.col_idx[i];
      for (; c < at; ++c) best.offer(score[c], first + c);
      out[i] = score[c++];
    }
    for (; c < cols; ++c) best.offer(score[c], first + c);
  }
  return best.count;
}

}  // namespace

int64_t growth_scan(const Tensor& scores, int64_t row_begin, const Tensor& index, int64_t n, int64_t rows,
                    int64_t cols, int64_t groups, bool planned, Tensor active, Tensor best_scores,
                    Tensor best_positions, int64_t k, int64_t found) {
  for (const Tensor* t :
       {&scores, &index, static_cast<const Tensor*>(&active), static_cast<const Tensor*>(&best_scores),
        static_cast<const Tensor*>(&best_positions)})
    check_cpu(*t, "growth_scan's tensors");
  const IndexShape shape{rows, cols, groups, n, planned};
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
