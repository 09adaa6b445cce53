// Growth by screening, for a Linear whose weights are single: the k best inactive positions of the dense
// gradient dY^T X, without that product in float.
//
// Both factors are rounded to 8 bits, feature by feature. Bytes multiply four times as fast, and how far off
// a rounded product may be is known from the norms (Cauchy and Schwarz): every position has an upper and a
// lower bound of its score. A position whose upper bound is less than k lower bounds is out. Of the rest, a
// few times k, the products are taken in float. The result is that of scoring every position in float.
#include <cmath>
#include <limits>

#include "driver.h"
#include "select.h"

namespace sparse_kernels {
namespace {

constexpr int64_t kGroup = 16, kTileRows = 8, kTileCols = 32;
constexpr int64_t kMostTokens = 4096;     // errors grow with the tokens as norms do, scores by their root
constexpr double kMostCandidates = 0.12;  // of all positions: beyond that the product in float is faster
constexpr int64_t kStripe = int64_t{1} << 18;                   // scores of a stripe of rows, at most
constexpr int32_t kLive = std::numeric_limits<int32_t>::min();  // marks the column of an active position

int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Null where bytes are not multiplied faster than floats.
const Screen* screen() {
#if defined(__x86_64__)
  static const bool bytes = __builtin_cpu_supports("avx512vnni");
  return bytes ? kernels().screen : nullptr;
#else
  return nullptr;
#endif
}

// One factor, [tokens][features]: rounded, with its norms, and transposed.
class Factor {
 public:
  // `norms` are a little too large, so that rounding in float cannot make them too small.
  Factor(const Tensor& source, bool signed_codes)
      : tokens_(source.size(0)),
        features_(source.size(1)),
        steps_(round_up(tokens_, 4) / 4),
        stride_(round_up(tokens_, 64) + kGroup),
        padded_(round_up(features_, kTileCols)),
        signed_(signed_codes),
        source_(source.const_data_ptr<float>()),
        codes_(padded_ * steps_),
        numbers_(6 * padded_),
        transposed_(padded_ * stride_) {}

  // False if a number is not finite, or too far from 1 for bounds in float.
  bool round() {
    const Screen& kernel = *screen();
    const Kernels<float>& packer = kernels_for<float>();
    const int64_t groups = padded_ / kGroup;
    std::vector<uint8_t> good(groups, 1);
    std::fill_n(numbers_.get(), 6 * padded_, 0.0f);
    std::fill_n(codes_.get() + features_ / kGroup * kGroup * steps_,
                (padded_ - features_ / kGroup * kGroup) * steps_, 0);
    parallel(groups, 16.0 * static_cast<double>(tokens_ * features_), [&](int64_t begin, int64_t end) {
      const int64_t f = begin * kGroup, here = std::min(end * kGroup, features_) - f;
      if (here <= 0) return;
      const ScreenGroup out{scale() + f, base() + f, largest() + f, norm() + f, error() + f, sum() + f};
      good[begin] =
          kernel.round(source_ + f, features_, tokens_, here, signed_, codes_.get() + f * steps_, &out);
      for (int64_t i = f; i < f + here && good[begin]; ++i) {
        good[begin] = largest()[i] == 0 || (largest()[i] > 1e-18f && largest()[i] < 1e18f);
        norm()[i] = 1.0001f * largest()[i] * std::sqrt(norm()[i]);
        error()[i] = 1.0001f * scale()[i] * std::sqrt(error()[i]) + 2e-5f * norm()[i];
      }
      for (int64_t t = 0; t < tokens_ && good[begin]; t += 64)
        packer.pack(source_ + t * features_ + f, features_, std::min<int64_t>(64, tokens_ - t), here,
                    transposed_.get() + f * stride_ + t, stride_, 4, nullptr);
    });
    return std::find(good.begin(), good.end(), 0) == good.end();
  }

  int64_t tokens() const { return tokens_; }
  int64_t features() const { return features_; }
  int64_t padded() const { return padded_; }
  int64_t steps() const { return steps_; }
  int64_t stride() const { return stride_; }
  const uint32_t* codes(int64_t feature) const { return codes_.get() + feature * steps_; }
  const float* values(int64_t feature) const { return transposed_.get() + feature * stride_; }
  const float* values() const { return transposed_.get(); }
  float* scale() const { return numbers_.get(); }
  float* base() const { return numbers_.get() + padded_; }
  float* largest() const { return numbers_.get() + 2 * padded_; }
  float* norm() const { return numbers_.get() + 3 * padded_; }
  float* error() const { return numbers_.get() + 4 * padded_; }
  float* sum() const { return numbers_.get() + 5 * padded_; }

 private:
  int64_t tokens_, features_, steps_, stride_, padded_;
  bool signed_;
  const float* source_;
  Buffer<uint32_t> codes_;
  Buffer<float> numbers_, transposed_;
};

// Positions of a stripe of rows that may be among the best: those of a row with columns ascending.
struct Stripe {
  std::vector<float> upper;
  std::vector<int32_t> rows, cols;
};

// Room for all positions of a stripe.
struct Scratch {
  explicit Scratch(int64_t n) : upper(n + kGroup), rows(n + kGroup), cols(n + kGroup) {}
  Buffer<float> upper;
  Buffer<int32_t> rows, cols;
};

class Screening {
 public:
  Screening(const Factor& x, const Factor& dy, IndexView<const int32_t> index, int64_t k)
      : x_(x), dy_(dy), index_(index), k_(k), rows_(index.shape.rows), cols_(index.shape.cols) {
    // What rounding in float can add, to an exact score and to a bound of it.
    const float slack = (2.0f * static_cast<float>(x.tokens()) + 64.0f) * 1.2e-7f;
    for (int64_t r = 0; r < dy.padded(); ++r)
      row_.push_back({dy.scale()[r], dy.sum()[r], dy.norm()[r], dy.error()[r] + slack * dy.norm()[r], 1e-35f,
                      static_cast<int32_t>(r)});
    for (int64_t c = 0; c < x.padded(); ++c) norm_.push_back(x.norm()[c] + x.error()[c]);
  }

  // A score that k inactive positions are likely to reach, from every n-th tile of rows. Negative: too many
  // would.
  float guess() const {
    const int64_t tiles = (rows_ + kTileRows - 1) / kTileRows;
    const int64_t every = std::max<int64_t>(1, std::min<int64_t>(32, tiles / 4));
    std::vector<float> lower, upper;
    int64_t seen = 0;
    Scratch scratch(kTileRows * x_.padded());
    for (int64_t tile = every / 2; tile < tiles; tile += every) {
      const int64_t begin = tile * kTileRows, end = std::min(begin + kTileRows, rows_);
      const Stripe stripe = scan(begin, end, 0, scratch);
      append_lower(stripe, lower);
      upper.insert(upper.end(), stripe.upper.begin(), stripe.upper.end());
      seen += end - begin;
    }
    const double share = static_cast<double>(k_) * static_cast<double>(seen) / static_cast<double>(rows_);
    const int64_t wanted = static_cast<int64_t>(1.2 * share + 4 * std::sqrt(share) + 4);
    // Everything is a candidate: no more memory than a stripe's for that.
    if (wanted >= static_cast<int64_t>(lower.size())) return rows_ * cols_ <= kStripe ? 0 : -1;
    const float least =
        cut<std::greater<float>>(lower.data(), static_cast<int64_t>(lower.size()), wanted).score;
    const auto candidates = std::count_if(upper.begin(), upper.end(), [&](float u) { return u >= least; });
    return static_cast<double>(candidates) > kMostCandidates * static_cast<double>(seen * cols_) ? -1 : least;
  }

  // All stripes; positions whose upper bound is less than `least` are left out.
  void scan_all(float least) {
    const int64_t each = std::max(kTileRows, kStripe / std::max<int64_t>(1, cols_) / kTileRows * kTileRows);
    const int64_t rows_each = std::min<int64_t>(each, 64);
    stripes_.resize((rows_ + rows_each - 1) / rows_each);
    rows_each_ = rows_each;
    const double work = static_cast<double>(rows_ * cols_) * static_cast<double>(x_.tokens()) / 4;
    parallel(static_cast<int64_t>(stripes_.size()), work, [&](int64_t begin, int64_t end) {
      Scratch scratch(rows_each * x_.padded());
      for (int64_t s = begin; s < end; ++s)
        stripes_[s] = scan(s * rows_each, std::min((s + 1) * rows_each, rows_), least, scratch);
    });
  }

  // The k-th largest lower bound of an inactive position; -1 if there are fewer.
  float kth_lower() const {
    std::vector<float> lower;
    for (const Stripe& stripe : stripes_) append_lower(stripe, lower);
    if (static_cast<int64_t>(lower.size()) < k_) return -1;
    return cut<std::greater<float>>(lower.data(), static_cast<int64_t>(lower.size()), k_).score;
  }

  // Exact scores of what may reach `least`: of active positions into `active`, of the others the k best.
  std::tuple<Tensor, Tensor> finish(float least, float* active, const Tensor& like) {
    const int64_t count = static_cast<int64_t>(stripes_.size());
    std::vector<std::vector<float>> scores(count);
    std::vector<std::vector<int64_t>> positions(count);
    double left = 0;
    for (const Stripe& stripe : stripes_) left += static_cast<double>(stripe.cols.size());
    parallel(count, left * static_cast<double>(x_.tokens()), [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) exact(s, least, active, scores[s], positions[s]);
    });
    std::vector<float> all;
    for (const auto& some : scores) all.insert(all.end(), some.begin(), some.end());
    const auto [score, ties] = cut<std::greater<float>>(all.data(), static_cast<int64_t>(all.size()), k_);
    Tensor best = new_empty({k_}, ScalarType::Long), best_scores = new_empty({k_}, ScalarType::Float);
    int64_t* position = best.mutable_data_ptr<int64_t>();
    float* best_score = best_scores.mutable_data_ptr<float>();
    int64_t found = 0, equal_left = ties;
    for (int64_t s = 0; s < count; ++s)
      for (size_t i = 0; i < scores[s].size() && found < k_; ++i) {
        const float here = scores[s][i];
        const bool equal = here == score;
        position[found] = positions[s][i], best_score[found] = here;
        found += (here > score) | (equal & (equal_left > 0));
        equal_left -= equal;
      }
    return {best, best_scores};
  }

 private:
  // Appends the lower bounds of the inactive positions, twice the error below the upper ones.
  void append_lower(const Stripe& stripe, std::vector<float>& lower) const {
    const size_t before = lower.size();
    lower.resize(before + stripe.cols.size());
    float* out = lower.data() + before;
    int64_t kept = 0;
    for (size_t i = 0; i < stripe.cols.size(); ++i) {
      const int32_t col = stripe.cols[i] & ~kLive;
      const ScreenRow& row = row_[stripe.rows[i]];
      const float off = x_.error()[col] * row.norm + norm_[col] * row.error + row.least;
      out[kept] = std::max(stripe.upper[i] - 2.0001f * off, 0.0f);
      kept += stripe.cols[i] >= 0;
    }
    lower.resize(before + kept);
  }

  Stripe scan(int64_t begin, int64_t end, float least, const Scratch& scratch) const {
    const Screen& kernel = *screen();
    const int64_t words = x_.padded() / kTileCols, rows = round_up(end - begin, kTileRows);
    std::vector<uint32_t> live(rows * words);
    for (int64_t row = begin; row < end; ++row)
      for (int32_t i = index_.row_ptr[row]; i < index_.row_ptr[row + 1]; ++i)
        live[(row - begin) * words + index_.col_idx[i] / kTileCols] |= uint32_t{1}
                                                                       << index_.col_idx[i] % kTileCols;
    int64_t found = 0;
    for (int64_t word = 0; word < words; ++word) {
      const int64_t c = word * kTileCols;
      const uint32_t valid = cols_ - c >= kTileCols ? ~uint32_t{0} : (uint32_t{1} << (cols_ - c)) - 1;
      for (int64_t r = 0; r < rows; r += kTileRows) {
        const int64_t group = (begin + r) / kGroup * kGroup;
        found +=
            kernel.tile(x_.codes(c), dy_.codes(group) + (begin + r - group), x_.steps(), x_.scale() + c,
                        x_.base() + c, norm_.data() + c, x_.error() + c, row_.data() + begin + r, least,
                        valid, live.data() + r * words + word, words, static_cast<int32_t>(c),
                        scratch.upper.get() + found, scratch.cols.get() + found, scratch.rows.get() + found);
      }
    }
    // Rows that are not there have scores of 0: they come only where everything does.
    const auto copy = [&](const auto& from) { return std::vector(from.get(), from.get() + found); };
    Stripe out{copy(scratch.upper), copy(scratch.rows), copy(scratch.cols)};
    if (end - begin < rows && least < 1e-30f) drop_rows(out, end);
    return out;
  }

  static void drop_rows(Stripe& stripe, int64_t end) {
    size_t kept = 0;
    for (size_t i = 0; i < stripe.rows.size(); ++i) {
      stripe.upper[kept] = stripe.upper[i];
      stripe.rows[kept] = stripe.rows[i], stripe.cols[kept] = stripe.cols[i];
      kept += stripe.rows[i] < end;
    }
    stripe.upper.resize(kept), stripe.rows.resize(kept), stripe.cols.resize(kept);
  }

  void exact(int64_t s, float least, float* active, std::vector<float>& scores,
             std::vector<int64_t>& positions) const {
    const Screen& kernel = *screen();
    const Stripe& stripe = stripes_[s];
    const int64_t begin = s * rows_each_, end = std::min(begin + rows_each_, rows_);
    const size_t all = stripe.cols.size();
    std::vector<int64_t> start(end - begin + 1);
    for (size_t i = 0; i < all; ++i) start[stripe.rows[i] - begin + 1] += stripe.upper[i] >= least;
    for (int64_t r = 0; r < end - begin; ++r) start[r + 1] += start[r];
    std::vector<int32_t> cols(start[end - begin] + 1);
    std::vector<int64_t> next(start.begin(), start.end());
    for (size_t i = 0; i < all; ++i) {
      int64_t& at = next[stripe.rows[i] - begin];
      if (stripe.upper[i] >= least) cols[at++] = stripe.cols[i];
    }
    std::vector<float> found(cols.size());
    scores.resize(cols.size()), positions.resize(cols.size());
    int64_t kept = 0;
    for (int64_t row = begin; row < end; ++row) {
      const int64_t first = start[row - begin], last = start[row - begin + 1];
      kernel.dots(dy_.values(row), x_.values(), x_.stride(), (x_.tokens() + kGroup - 1) / kGroup,
                  cols.data() + first, last - first, found.data() + first);
      int32_t entry = index_.row_ptr[row];
      for (int64_t j = first; j < last; ++j) {
        const int32_t col = cols[j] & ~kLive;
        scores[kept] = found[j], positions[kept] = row * cols_ + col;
        if (cols[j] >= 0) {
          ++kept;
          continue;
        }
        while (index_.col_idx[entry] < col) ++entry;
        active[entry] = found[j];
      }
    }
    scores.resize(kept), positions.resize(kept);
  }

  const Factor &x_, &dy_;
  IndexView<const int32_t> index_;
  int64_t k_, rows_, cols_, rows_each_ = 0;
  std::vector<ScreenRow> row_;
  std::vector<float> norm_;
  std::vector<Stripe> stripes_;
};

}  // namespace

// Scores of the active positions (-inf where k inactive ones are better), the k best inactive positions,
// ascending, and their scores. Nothing of all this (an empty `active`) where another way is better or needed.
std::tuple<Tensor, Tensor, Tensor> growth_screen(const Tensor& x, const Tensor& dy, const Tensor& index,
                                                 int64_t n, int64_t rows, int64_t cols, int64_t groups,
                                                 int64_t plans, int64_t k) {
  for (const Tensor* t : {&x, &dy, &index}) check_cpu(*t, "growth_screen's tensors");
  const IndexShape shape{rows, cols, groups, n, plans_of(plans)};
  check_size(index, 0, shape.size(), "index");
  check_size(x, 1, cols, "x");
  check_size(dy, 1, rows, "dy");
  check_size(dy, 0, x.size(0), "dy");
  const auto nothing = [&](ScalarType dtype) { return new_empty({0}, dtype); };
  const auto none = [&] {
    return std::make_tuple(nothing(ScalarType::Float), nothing(ScalarType::Long), nothing(ScalarType::Float));
  };
  const int64_t tokens = x.size(0);
  if (screen() == nullptr || x.scalar_type() != ScalarType::Float || dy.scalar_type() != ScalarType::Float ||
      shape.blocks() || n == 0 || k <= 0 || k > rows * cols - n || tokens == 0 || tokens > kMostTokens)
    return none();
  Factor input(x, false), output(dy, true);
  if (!input.round() || !output.round()) return none();
  Screening screening(input, output, {index.const_data_ptr<int32_t>(), shape}, k);
  float least = screening.guess();
  if (least < 0) return none();
  screening.scan_all(least);
  float kth = screening.kth_lower();
  if (kth < 0) return none();  // the sample was no good
  if (kth < least) {
    screening.scan_all(kth);
    kth = screening.kth_lower();
  }
  Tensor active = new_empty({n}, ScalarType::Float);
  std::fill_n(active.mutable_data_ptr<float>(), n, -std::numeric_limits<float>::infinity());
  const auto [positions, scores] = screening.finish(kth, active.mutable_data_ptr<float>(), x);
  return {active, positions, scores};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("growth_screen", TORCH_BOX(&sparse_kernels::growth_screen));
}
