// Updates of a topology on the CPU: which positions to drop, which to grow instead of them, and tensors in
// value order brought along. Exact counts; equal scores go by position, the lowest first.
#include "driver.h"
#include "select.h"

namespace sparse_kernels {
namespace {

constexpr double kMoveWork = 8;  // multiply-adds that take as long as moving an entry

// |values| in the order of the positions, and whether all are finite.
template <class T>
bool magnitudes(const T* values, IndexView<const int32_t> index, T* out) {
  const int64_t n = index.shape.n;
  if (!index.shape.blocks()) std::copy_n(values, n, out);
  for (int64_t i = 0; index.shape.blocks() && i < n; ++i) {
    STD_TORCH_CHECK(index.slot[i] >= 0 && index.slot[i] < n, "slot holds ", index.slot[i],
                    ", out of range [0, ", n, ")");
    out[i] = values[index.slot[i]];
  }
  return kernels_for<T>().growth_magnitudes(out, n);
}

template <class T>
std::tuple<Tensor, Tensor> weakest_of(const Tensor& values, IndexView<const int32_t> index, int64_t k) {
  const int64_t n = index.shape.n;
  Buffer<T> scores(n);
  STD_TORCH_CHECK(magnitudes(values.const_data_ptr<T>(), index, scores.get()), "not finite");
  k = std::min(k, n);
  Tensor places = new_empty({k}, ScalarType::Long), positions = new_empty({k}, ScalarType::Long);
  if (k <= 0) return {places, positions};
  int64_t *place = places.mutable_data_ptr<int64_t>(), *position = positions.mutable_data_ptr<int64_t>();
  auto [score, ties] = cut<std::less<T>>(scores.get(), n, k);
  const auto least = Bins<T>::bits(score);
  for (int64_t i = 0, found = 0; found < k; ++i) {
    const auto here = Bins<T>::bits(scores[i]);
    const bool equal = here == least, chosen = (here < least) | (equal & (ties > 0));
    ties -= equal;
    place[found] = i;
    found += chosen;
  }
  for (int64_t i = 0, row = 0; i < k; ++i) {
    const int64_t entry = place[i];
    while (entry >= index.row_ptr[row + 1]) ++row;
    position[i] = row * index.shape.cols + index.col_idx[entry];
    if (index.shape.blocks()) place[i] = index.slot[entry];
  }
  return {places, positions};
}

// Appends what(i) for all i in [0, n) with chosen(i), to memory that has room for one more.
template <class Chosen, class What>
int64_t append_if(int64_t n, const Chosen& chosen, const What& what, int64_t* out) {
  int64_t count = 0;
  for (int64_t i = 0; i < n; ++i) out[count] = what(i), count += chosen(i);
  return count;
}

Tensor tensor_of(const Tensor& like, const int64_t* data, int64_t n) {
  Tensor out = new_empty({n}, ScalarType::Long);
  std::copy_n(data, n, out.mutable_data_ptr<int64_t>());
  return out;
}

// Of k positions dropped and m candidates, both ascending, the k best by score stay or come.
template <class T>
std::tuple<Tensor, Tensor> exchange_of(const Tensor& drop, const Tensor& dropped, const Tensor& active,
                                       const Tensor& positions, const Tensor& scores) {
  const int64_t k = drop.numel(), m = positions.numel(), n = active.numel();
  const int64_t *place = drop.const_data_ptr<int64_t>(), *old = dropped.const_data_ptr<int64_t>();
  const int64_t* fresh = positions.const_data_ptr<int64_t>();
  const T* score_of = active.const_data_ptr<T>();
  Buffer<T> all(k + m);
  for (int64_t i = 0; i < k; ++i) {
    STD_TORCH_CHECK(place[i] >= 0 && place[i] < n, "drop holds ", place[i], ", out of range [0, ", n, ")");
    all[i] = std::max(score_of[place[i]], T(0));  // -inf: no better than the candidates
  }
  std::copy_n(scores.const_data_ptr<T>(), m, all.get() + k);
  if (k == 0 || m == 0) return {tensor_of(drop, place, 0), tensor_of(drop, place, 0)};
  const auto [score, ties] = cut<std::greater<T>>(all.get(), k + m, k);
  const auto least = Bins<T>::bits(score);
  Buffer<int64_t> found(k + m + 1);
  // Of equal scores those at the lowest positions.
  const auto equals = [least](const T* scores) {
    return [scores, least](int64_t i) { return Bins<T>::bits(scores[i]) == least; };
  };
  const auto those = [](const int64_t* of) { return [of](int64_t i) { return of[i]; }; };
  int64_t equal = append_if(k, equals(all.get()), those(old), found.get());
  equal += append_if(m, equals(all.get() + k), those(fresh), found.get() + equal);
  std::nth_element(found.get(), found.get() + (ties - 1), found.get() + equal);
  const int64_t last = found[ties - 1];
  const auto good = [least, last](T score, int64_t position) {
    const auto here = Bins<T>::bits(score);
    return (here > least) | ((here == least) & (position <= last));
  };
  const T *olds = all.get(), *news = olds + k;
  const int64_t leaving =
      append_if(k, [=](int64_t i) { return !good(olds[i], old[i]); }, those(place), found.get());
  Tensor out = tensor_of(drop, found.get(), leaving);
  const int64_t coming =
      append_if(m, [=](int64_t j) { return good(news[j], fresh[j]); }, those(fresh), found.get());
  return {out, tensor_of(drop, found.get(), coming)};
}

// Without a branch on what is new, which no processor could foresee.
template <class Entry>
void gather(const Entry* from, const int64_t* source, int64_t n, Entry* to) {
  parallel(n, kMoveWork * static_cast<double>(n), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t fresh = source[i] >> 63;  // all bits, or none
      to[i] = from[source[i] & ~fresh] & ~static_cast<Entry>(fresh);
    }
  });
}

void gather_blocks(const char* from, const int64_t* source, int64_t n, int64_t size, char* to) {
  for (int64_t i = 0; i < n; ++i, to += size) {
    if (source[i] < 0)
      std::memset(to, 0, size);
    else
      std::memcpy(to, from + source[i] * size, size);
  }
}

}  // namespace

std::tuple<Tensor, Tensor> weakest(const Tensor& values, const Tensor& index, int64_t n, int64_t rows,
                                   int64_t cols, int64_t groups, int64_t plans, int64_t k) {
  check_cpu(values, "values");
  check_cpu(index, "index");
  const IndexShape shape{rows, cols, groups, n, plans_of(plans)};
  check_size(index, 0, shape.size(), "index");
  check_size(values, 0, n, "values");
  const IndexView<const int32_t> view(index.const_data_ptr<int32_t>(), shape);
  std::tuple<Tensor, Tensor> found;
  for_dtype(values, [&](auto type) { found = weakest_of<decltype(type)>(values, view, k); });
  return found;
}

std::tuple<Tensor, Tensor> exchange(const Tensor& drop, const Tensor& dropped, const Tensor& active,
                                    const Tensor& positions, const Tensor& scores) {
  for (const Tensor* t : {&drop, &dropped, &active, &positions, &scores}) check_cpu(*t, "exchange's tensors");
  for (const Tensor* t : {&drop, &dropped, &positions}) check_dtype(*t, ScalarType::Long, "positions");
  check_size(dropped, 0, drop.numel(), "dropped");
  check_size(scores, 0, positions.numel(), "scores");
  check_dtype(scores, active.scalar_type(), "scores");
  std::tuple<Tensor, Tensor> found;
  for_dtype(active, [&](auto type) {
    found = exchange_of<decltype(type)>(drop, dropped, active, positions, scores);
  });
  return found;
}

Tensor reordered(const Tensor& tensor, const Tensor& source) {
  check_cpu(tensor, "tensor");
  check_cpu(source, "source");
  check_dtype(source, ScalarType::Long, "source");
  const int64_t n = source.numel();
  check_size(tensor, 0, n, "tensor");
  Tensor moved = torch::stable::empty_like(tensor);
  if (n == 0) return moved;
  const int64_t* order = source.const_data_ptr<int64_t>();
  uint64_t outside = 0;  // the sign bit
  for (int64_t i = 0; i < n; ++i) outside |= static_cast<uint64_t>(n - 1) - static_cast<uint64_t>(order[i]);
  for (int64_t i = 0; outside >> 63 && i < n; ++i)
    STD_TORCH_CHECK(order[i] < n, "source holds ", order[i], ", out of range [-1, ", n, ")");
  const int64_t size = tensor.numel() / n * static_cast<int64_t>(tensor.element_size());
  const void* from = tensor.const_data_ptr();
  void* to = moved.mutable_data_ptr();
  if (size == 4)
    gather(static_cast<const uint32_t*>(from), order, n, static_cast<uint32_t*>(to));
  else if (size == 8)
    gather(static_cast<const uint64_t*>(from), order, n, static_cast<uint64_t*>(to));
  else
    gather_blocks(static_cast<const char*>(from), order, n, size, static_cast<char*>(to));
  return moved;
}

bool all_finite(const Tensor& tensor) {
  check_cpu(tensor, "tensor");
  bool finite = true;
  for_dtype(tensor, [&](auto type) {
    using T = decltype(type);
    finite = kernels_for<T>().all_finite(tensor.const_data_ptr<T>(), tensor.numel());
  });
  return finite;
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("weakest", TORCH_BOX(&sparse_kernels::weakest));
  m.impl("exchange", TORCH_BOX(&sparse_kernels::exchange));
  m.impl("reordered", TORCH_BOX(&sparse_kernels::reordered));
  m.impl("all_finite", TORCH_BOX(&sparse_kernels::all_finite));
}
