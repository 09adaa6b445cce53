// Linear: y = x W^T + b and its gradients, CSR and BSR. Tiles of tokens are packed into panels
// [feature][cells] whose lanes are tokens; the kernels run on those.
#include "linear_backward.h"

namespace sparse_kernels {
namespace {

template <class T, class S>
void forward(const LinearShape& shape, const S* x, const S* values, const S* bias, const int32_t* index,
             S* y) {
  const Kernels<T>& kernel = kernels_for<T>();
  const Stored<T, S>& stored = stored_for<T, S>();
  const IndexView<const int32_t> view(index, shape.index());
  if constexpr (std::is_same_v<T, S>)
    if (!shape.csr && strip_group<T>(shape, shape.b_out, shape.b_in) != 0)
      return strip_forward<T>(shape, view, x, values, bias, y);
  const int64_t cells = tile_cells<T>(shape.tokens, worthwhile_threads(shape.work()));
  const int64_t lanes = cells * kCellSize / static_cast<int64_t>(sizeof(T));
  check_tile_bytes(shape.in * cells * kCellSize);
  const Side<T, S> side(shape, view, false, values, bias, cells);
  parallel((shape.tokens + lanes - 1) / lanes, shape.work(), [&](int64_t first, int64_t last) {
    const Buffer<T> in(shape.in * lanes), out(shape.out * lanes);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t token = tile * lanes, count = std::min(lanes, shape.tokens - token);
      stored.pack(x + token * shape.in, shape.in, count, shape.in, in.get(), lanes, cells, nullptr);
      side.spmm(kernel, in.get(), out.get());
      stored.unpack(out.get(), lanes, count, shape.out, y + token * shape.out, shape.out);
    }
  });
}

// f(T, S) with the types to compute and to store in, after a tensor's dtype.
template <class F>
void for_stored(const LinearShape& shape, ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Double) return f(double{}, double{});
  if (dtype == ScalarType::Float) return f(float{}, float{});
  STD_TORCH_CHECK(shape.csr && (dtype == ScalarType::BFloat16 || dtype == ScalarType::Half),
                  "x must be float32 or float64, or bfloat16 or float16 with single weights");
  if (dtype == ScalarType::BFloat16) return f(float{}, BFloat16{});
  f(float{}, Half{});
}

template <class S>
const S* read(const Tensor& t) {
  return static_cast<const S*>(t.const_data_ptr());
}
template <class S>
const S* read(const std::optional<Tensor>& t) {
  return t ? read<S>(*t) : nullptr;
}
template <class S>
S* write(const Tensor& t, bool wanted = true) {
  return wanted ? static_cast<S*>(t.mutable_data_ptr()) : nullptr;
}

void check_index(const LinearShape& shape, const Tensor& index) {
  check_cpu(index, "index");
  check_dtype(index, ScalarType::Int, "index");
  check_size(index, 0, shape.index().size(), "index");
}

void check_operand(const Tensor& t, ScalarType dtype, const std::vector<int64_t>& size, const char* name) {
  check_cpu(t, name);
  check_dtype(t, dtype, name);
  STD_TORCH_CHECK(t.dim() == static_cast<int64_t>(size.size()), name, " must have ", size.size(),
                  " dimensions");
  for (size_t d = 0; d < size.size(); ++d) check_size(t, d, size[d], name);
}

}  // namespace

Tensor linear_forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                      const Tensor& index, int64_t rows, int64_t cols) {
  const std::vector<int64_t> values_size(values.sizes().begin(), values.sizes().end());
  STD_TORCH_CHECK(x.dim() == 2, "x must be [tokens, in]");
  const LinearShape shape = linear_shape(x.size(0), values_size, rows, cols);
  check_index(shape, index);
  check_operand(x, x.scalar_type(), {shape.tokens, shape.in}, "x");
  check_operand(values, x.scalar_type(), values_size, "values");
  if (bias) check_operand(*bias, x.scalar_type(), {shape.out}, "bias");
  Tensor y = new_empty({shape.tokens, shape.out}, x.scalar_type());
  for_stored(shape, x.scalar_type(), [&](auto t, auto s) {
    using S = decltype(s);
    forward<decltype(t)>(shape, read<S>(x), read<S>(values), read<S>(bias), read<int32_t>(index),
                         write<S>(y));
  });
  return y;
}

// dX if the values are given, dW if x is, db if asked for; empty tensors for the others.
std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const std::optional<Tensor>& x,
                                                   const std::optional<Tensor>& values, const Tensor& index,
                                                   int64_t rows, int64_t cols,
                                                   const std::vector<int64_t>& values_size, bool need_bias) {
  STD_TORCH_CHECK(dy.dim() == 2, "dy must be [tokens, out]");
  const LinearShape shape = linear_shape(dy.size(0), values_size, rows, cols);
  const ScalarType dtype = dy.scalar_type();
  const std::vector<int64_t> none{0}, x_size{shape.tokens, shape.in};
  check_index(shape, index);
  check_operand(dy, dtype, {shape.tokens, shape.out}, "dy");
  if (x) check_operand(*x, dtype, x_size, "x");
  if (values) check_operand(*values, dtype, values_size, "values");
  Tensor dx = new_empty(values ? x_size : none, dtype);
  Tensor dw = new_empty(x ? values_size : none, dtype);
  Tensor db = new_empty(need_bias ? std::vector<int64_t>{shape.out} : none, dtype);
  for_stored(shape, dtype, [&](auto t, auto s) {
    using S = decltype(s);
    linear_gradients<decltype(t)>(shape, read<S>(dy), read<S>(x), read<S>(values), read<int32_t>(index),
                                  write<S>(dx, values.has_value()), write<S>(dw, x.has_value()),
                                  write<S>(db, need_bias));
  });
  return {dx, dw, db};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("linear", TORCH_BOX(&sparse_kernels::linear_forward));
  m.impl("linear_forward", TORCH_BOX(&sparse_kernels::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&sparse_kernels::linear_backward));
}
