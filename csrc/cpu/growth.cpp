// Growth: keeps the k best inactive positions while the score matrix passes by in stripes of rows.
#include <cmath>

#include "candidates.h"
#include "driver.h"

namespace sparse_kernels {
namespace {

constexpr double kScanWork = 4;     // multiply-adds that take as long as looking at a score
constexpr int64_t kSample = 16384;  // scores, about, that say what the k best are likely to reach

int64_t section_bytes(ScalarType dtype, int64_t k) {
  return dtype == ScalarType::Double ? Candidates<double>::bytes(k) : Candidates<float>::bytes(k);
}

int64_t sections_of(const Tensor& state, ScalarType dtype, int64_t k) {
  check_dtype(state, ScalarType::Byte, "state");
  const int64_t size = section_bytes(dtype, k);
  STD_TORCH_CHECK(state.numel() >= size && state.numel() % size == 0, "state is not one for k = ", k);
  return state.numel() / size;
}

// One row: scores in place of the gradient, those of active positions taken out. False if one is not finite.
template <class T>
bool score_row(T* row, int32_t r, IndexView<const int32_t> index, T* active) {
  if (!kernels_for<T>().growth_magnitudes(row, index.shape.cols)) return false;
  for (int32_t i = index.row_ptr[r]; i < index.row_ptr[r + 1]; ++i) {
    T& score = row[index.col_idx[i]];
    active[index.shape.blocks() ? index.slot[i] : i] = score;
    score = T(-1);  // below every threshold
  }
  return true;
}

template <class T>
void offer_row(const T* row, int32_t r, int64_t cols, Candidates<T>& best) {
  for (int64_t c = 0; c < cols; c += kRun)
    best.take(row + c, std::min(kRun, cols - c), r, static_cast<int32_t>(c), kernels_for<T>().growth_offer);
}

// A score that k of the inactive positions of these rows are likely to reach, from a few columns of each row;
// 0 if it is not worth while.
template <class T>
T likely_threshold(const T* score, int64_t rows, int64_t cols, int64_t inactive, int64_t k) {
  const int64_t each = std::min(kSample / std::max<int64_t>(1, rows) + 1, cols / 8);
  if (k == 0 || each == 0 || inactive < 2 * k || rows * cols < 4 * kSample) return T(0);
  Buffer<T> sample(rows * each + 1);
  int64_t seen = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const T* some = score + r * cols + r * each % (cols - each + 1);
    for (int64_t c = 0; c < each; ++c) sample[seen] = some[c], seen += some[c] >= 0;
  }
  const double share = static_cast<double>(k) * static_cast<double>(seen) / static_cast<double>(inactive);
  const int64_t wanted = static_cast<int64_t>(share + 3 * std::sqrt(share) + 3);
  return wanted < seen ? cut<std::greater<T>>(sample.get(), seen, wanted).score : T(0);
}

// Rows of a section. The first ones have no threshold to go by: a sample gives one. Should less than k reach
// it they are offered again.
template <class T>
bool scan_rows(T* score, int64_t rows, int32_t r, IndexView<const int32_t> index, T* active,
               Candidates<T>& best) {
  const int64_t cols = index.shape.cols;
  const auto offer = [&] {
    for (int64_t i = 0; i < rows; ++i) offer_row(score + i * cols, r + static_cast<int32_t>(i), cols, best);
  };
  const bool first = best.count() == 0;
  for (int64_t i = 0; i < rows; ++i) {
    const int32_t row = r + static_cast<int32_t>(i);
    if (!score_row(score + i * cols, row, index, active)) return false;
    if (!first) offer_row(score + i * cols, row, cols, best);
  }
  if (!first || rows == 0) return true;
  const int64_t inactive = rows * cols - (index.row_ptr[r + rows] - index.row_ptr[r]);
  const T likely = likely_threshold(score, rows, cols, inactive, best.wanted());
  best.expect(likely);
  offer();
  if (likely == 0 || best.count() >= best.wanted()) return true;
  best.clear();
  offer();
  return true;
}

template <class T>
bool scan(Tensor& scores, int64_t row_begin, IndexView<const int32_t> index, Tensor& active, Tensor& state,
          int64_t k, int64_t sections) {
  const int64_t rows = scores.size(0), cols = scores.size(1);
  T* score = scores.mutable_data_ptr<T>();
  T* out = active.mutable_data_ptr<T>();
  char* memory = static_cast<char*>(state.mutable_data_ptr());
  std::vector<char> finite(sections, 1);
  parallel(sections, kScanWork * static_cast<double>(rows * cols), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      Candidates<T> best(memory + s * Candidates<T>::bytes(k), k);
      const int64_t first = rows * s / sections, last = rows * (s + 1) / sections;
      finite[s] = scan_rows(score + first * cols, last - first, static_cast<int32_t>(row_begin + first),
                            index, out, best);
    }
  });
  return std::find(finite.begin(), finite.end(), 0) == finite.end();
}

// The k best of all sections, ascending. A row is in one section, and ascends there.
template <class T>
std::tuple<Tensor, Tensor> best_of(Tensor& state, int64_t sections, int64_t rows, int64_t cols, int64_t k,
                                   ScalarType dtype) {
  char* memory = static_cast<char*>(state.mutable_data_ptr());
  std::vector<Candidates<T>> parts;
  int64_t count = 0;
  for (int64_t s = 0; s < sections; ++s) {
    parts.emplace_back(memory + s * Candidates<T>::bytes(k), k);
    parts[s].filter();
    count += parts[s].count();
  }
  std::vector<T> joined;
  const T* all = parts[0].scores();
  if (sections > 1) {
    joined.reserve(count);
    for (const auto& part : parts) joined.insert(joined.end(), part.scores(), part.scores() + part.count());
    all = joined.data();
  }
  k = std::min(k, count);
  const Cut<T> least = k > 0 ? cut<std::greater<T>>(all, count, k) : Cut<T>{T(0), 0};

  Tensor positions = new_empty({k}, ScalarType::Long), scores = new_empty({k}, dtype);
  int64_t* position = positions.mutable_data_ptr<int64_t>();
  T* score = scores.mutable_data_ptr<T>();
  if (k == 0) return {positions, scores};
  if (sections == 1) {
    int64_t ties = least.ties;
    for (int64_t i = 0, found = 0; found < k; ++i) {
      const bool equal = all[i] == least.score;
      position[found] = parts[0].rows()[i] * cols + parts[0].cols()[i], score[found] = all[i];
      found += (all[i] > least.score) | (equal & (ties > 0));
      ties -= equal;
    }
    return {positions, scores};
  }
  std::vector<int64_t> start(rows + 1), equal(rows + 1);  // of each row: better ones, and equal ones
  for (const auto& part : parts)
    for (int64_t i = 0; i < part.count(); ++i) {
      start[part.rows()[i] + 1] += part.scores()[i] > least.score;
      equal[part.rows()[i]] += part.scores()[i] == least.score;
    }
  int64_t ties = least.ties;
  for (int64_t r = 0; r < rows; ++r) {
    equal[r] = std::min(equal[r], ties);
    ties -= equal[r];
    start[r + 1] += start[r] + equal[r];
  }
  for (const auto& part : parts)
    for (int64_t i = 0; i < part.count(); ++i) {
      const int64_t r = part.rows()[i];
      const T found = part.scores()[i];
      if (found < least.score || (found == least.score && equal[r]-- <= 0)) continue;
      position[start[r]] = r * cols + part.cols()[i];
      score[start[r]++] = found;
    }
  return {positions, scores};
}

}  // namespace

// Empty candidates for stripes of a score matrix.
Tensor growth_state(const Tensor& scores, int64_t k) {
  const int64_t sections = forked() ? 1 : thread_count();
  Tensor state = new_empty({sections * section_bytes(scores.scalar_type(), k)}, ScalarType::Byte);
  char* memory = static_cast<char*>(state.mutable_data_ptr());
  for (int64_t s = 0; s < sections; ++s)
    std::memset(memory + s * section_bytes(scores.scalar_type(), k), 0, 64 + kBins * 4);
  return state;
}

bool growth_scan(Tensor scores, int64_t row_begin, const Tensor& index, int64_t n, int64_t rows, int64_t cols,
                 int64_t groups, int64_t plans, Tensor active, Tensor state, int64_t k) {
  for (const Tensor* t : {static_cast<const Tensor*>(&scores), &index, static_cast<const Tensor*>(&active),
                          static_cast<const Tensor*>(&state)})
    check_cpu(*t, "growth_scan's tensors");
  const IndexShape shape{rows, cols, groups, n, plans_of(plans)};
  check_size(index, 0, shape.size(), "index");
  check_size(active, 0, n, "active");
  check_size(scores, 1, cols, "scores");
  STD_TORCH_CHECK(row_begin >= 0 && row_begin + scores.size(0) <= rows, "stripe outside the weight");
  check_dtype(active, scores.scalar_type(), "active");
  const int64_t sections = sections_of(state, scores.scalar_type(), k);
  const IndexView<const int32_t> view(index.const_data_ptr<int32_t>(), shape);
  bool finite = false;
  for_dtype(scores, [&](auto type) {
    finite = scan<decltype(type)>(scores, row_begin, view, active, state, k, sections);
  });
  return finite;
}

std::tuple<Tensor, Tensor> growth_best(const Tensor& scores, Tensor state, int64_t rows, int64_t cols,
                                       int64_t k) {
  check_cpu(state, "state");
  const ScalarType dtype = scores.scalar_type();
  const int64_t sections = sections_of(state, dtype, k);
  std::tuple<Tensor, Tensor> best;
  for_dtype(scores,
            [&](auto type) { best = best_of<decltype(type)>(state, sections, rows, cols, k, dtype); });
  return best;
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("growth_state", TORCH_BOX(&sparse_kernels::growth_state));
  m.impl("growth_scan", TORCH_BOX(&sparse_kernels::growth_scan));
  m.impl("growth_best", TORCH_BOX(&sparse_kernels::growth_best));
}
