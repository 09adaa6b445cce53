// The best inactive positions found so far, while the scores of a weight pass by (growth.cpp).
//
// Candidates live in memory that the caller keeps between stripes: a header, a histogram of their scores, and
// room for more than 2k of them. The histogram says at any time a score that k of them reach; what is below
// need not be looked at any more. One section of the memory for each thread, with the rows that it scanned.
#pragma once

#include "select.h"

namespace sparse_kernels {

constexpr int64_t kRun = 2048;  // scores offered at a time
constexpr int64_t kSlack = 16;  // a whole vector may be written behind the last candidate

template <class T>
class Candidates {
 public:
  struct Header {
    int64_t count;    // candidates
    int64_t counted;  // those that are in the histogram
    int64_t edge;     // bin of the threshold
    int64_t above;    // candidates in bins from there on
    T threshold;      // of what may still be among the k best
  };

  static int64_t capacity(int64_t k) { return 2 * k + 2 * kRun; }
  // Bytes of a section, which zeros make an empty one.
  static int64_t bytes(int64_t k) {
    const int64_t each = static_cast<int64_t>(sizeof(T) + 2 * sizeof(int32_t));
    return (64 + kBins * 4 + (capacity(k) + kSlack) * each + 63) / 64 * 64;
  }

  Candidates(char* section, int64_t k)
      : k_(k),
        header_(*reinterpret_cast<Header*>(section)),
        bins_(reinterpret_cast<uint32_t*>(section + 64)) {
    scores_ = reinterpret_cast<T*>(bins_ + kBins);
    rows_ = reinterpret_cast<int32_t*>(scores_ + capacity(k) + kSlack);
    cols_ = rows_ + capacity(k) + kSlack;
  }

  int64_t wanted() const { return k_; }
  int64_t count() const { return header_.count; }
  T threshold() const { return header_.threshold; }
  const T* scores() const { return scores_; }
  const int32_t* rows() const { return rows_; }
  const int32_t* cols() const { return cols_; }

  // Up to kRun scores of a row, from a column on, of which `offer` keeps those that reach the threshold.
  // Positions must ascend from call to call.
  template <class Offer>
  void take(const T* score, int64_t n, int32_t row, int32_t col, const Offer& offer) {
    if (k_ == 0) return;
    if (header_.count + n > capacity(k_)) make_room();
    const int64_t count = header_.count;
    header_.count += offer(score, n, header_.threshold, col, scores_ + count, cols_ + count);
    std::fill(rows_ + count, rows_ + header_.count, row);
    raise();
  }

  // Scores below it are not taken from now on. For one who sees later on whether k others were.
  void expect(T threshold) { header_.threshold = threshold; }

  void clear() { std::memset(static_cast<void*>(&header_), 0, 64 + kBins * 4); }

  // Lets go what is out of the running.
  void filter() {
    const T least = Bins<T>::lowest(header_.edge);
    keep([&](T score) { return score >= least; });
    header_.counted = header_.count;
  }

 private:
  void raise() {
    for (int64_t i = header_.counted; i < header_.count; ++i) ++bins_[Bins<T>::of(scores_[i])];
    header_.above += header_.count - header_.counted;
    header_.counted = header_.count;
    if (header_.above - bins_[header_.edge] < k_) return;
    while (header_.above - bins_[header_.edge] >= k_) header_.above -= bins_[header_.edge++];
    header_.threshold = std::max(header_.threshold, Bins<T>::lowest(header_.edge));
  }

  void make_room() {
    filter();
    if (header_.count <= capacity(k_) - kRun) return;
    // Many scores in one bin. Of equal ones the first stay, and later ones have no chance.
    auto [score, ties] = cut<std::greater<T>>(scores_, header_.count, k_);
    keep([&, score = score, ties = ties](T other) mutable {
      return other > score || (other == score && ties-- > 0);
    });
    header_.counted = header_.above = header_.count;
    header_.edge = Bins<T>::of(score);
    std::fill(bins_, bins_ + kBins, 0);
    for (int64_t i = 0; i < header_.count; ++i) ++bins_[Bins<T>::of(scores_[i])];
    header_.threshold = Bins<T>::above(score);
  }

  template <class Stays>
  void keep(Stays stays) {
    int64_t kept = 0;
    for (int64_t i = 0; i < header_.count; ++i) {
      const bool stay = stays(scores_[i]);
      scores_[kept] = scores_[i], rows_[kept] = rows_[i], cols_[kept] = cols_[i];
      kept += stay;
    }
    header_.count = kept;
  }

  int64_t k_;
  Header& header_;
  uint32_t* bins_;
  T* scores_;
  int32_t *rows_, *cols_;
};

}  // namespace sparse_kernels
