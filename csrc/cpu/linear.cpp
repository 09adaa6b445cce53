// Linear: y = x W^T + b and its gradients, CSR and BSR. Tiles of tokens are packed into panels
// [feature][cells] whose lanes are tokens; the kernels run on those.
#include "linear_backward.h"

namespace sparse_kernels {
namespace {

template <class T>
void forward(const LinearShape& shape, const T* x, const T* values, const T* bias, const int32_t* index,
             T* y) {
  const Kernels<T>& kernel = kernels_for<T>();
  const IndexView<const int32_t> view(index, shape.index());
  const int64_t cells = tile_cells<T>(shape.tokens, worthwhile_threads(shape.work()));
  const int64_t lanes = cells * kCellSize / static_cast<int64_t>(sizeof(T));
  check_tile_bytes(shape.in * cells * kCellSize);
  const Side<T> side(shape, view, false, values, bias, cells);
  parallel((shape.tokens + lanes - 1) / lanes, shape.work(), [&](int64_t first, int64_t last) {
    const Buffer<T> in(shape.in * lanes), out(shape.out * lanes);
    for (int64_t tile = first; tile < last; ++tile) {
      const int64_t token = tile * lanes, count = std::min(lanes, shape.tokens - token);
      kernel.pack(x + token * shape.in, shape.in, count, shape.in, in.get(), lanes, cells, nullptr);
      side.spmm(kernel, in.get(), out.get());
      kernel.unpack(out.get(), lanes, count, shape.out, y + token * shape.out, shape.out);
    }
  });
}

void check_inputs(const LinearShape& shape, const Tensor& x, const Tensor& values, const Tensor& index) {
  check_cpu(x, "x");
  check_cpu(values, "values");
  check_cpu(index, "index");
  check_dtype(index, ScalarType::Int, "index");
  check_dtype(values, x.scalar_type(), "values");
  check_size(x, 1, shape.in, "x");
  check_size(index, 0, shape.index().size(), "index");
}

}  // namespace

Tensor linear_forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                      const Tensor& index, int64_t rows, int64_t cols) {
  const LinearShape shape = linear_shape(x, values, rows, cols);
  check_inputs(shape, x, values, index);
  if (bias) {
    check_cpu(*bias, "bias");
    check_dtype(*bias, x.scalar_type(), "bias");
    check_size(*bias, 0, shape.out, "bias");
  }
  Tensor y = new_empty(x, {shape.tokens, shape.out}, x.scalar_type());
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    forward<T>(shape, x.const_data_ptr<T>(), values.const_data_ptr<T>(),
               bias ? bias->const_data_ptr<T>() : nullptr, index.const_data_ptr<int32_t>(),
               y.mutable_data_ptr<T>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                   const Tensor& index, int64_t rows, int64_t cols,
                                                   bool need_x, bool need_values, bool need_bias) {
  const LinearShape shape = linear_shape(x, values, rows, cols);
  check_inputs(shape, x, values, index);
  check_cpu(dy, "dy");
  check_dtype(dy, x.scalar_type(), "dy");
  check_size(dy, 0, shape.tokens, "dy");
  check_size(dy, 1, shape.out, "dy");
  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> none{0}, values_size(values.sizes().begin(), values.sizes().end());
  Tensor dx = new_empty(x, need_x ? std::vector<int64_t>{shape.tokens, shape.in} : none, dtype);
  Tensor dw = new_empty(x, need_values ? values_size : none, dtype);
  Tensor db = new_empty(x, need_bias ? std::vector<int64_t>{shape.out} : none, dtype);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    linear_gradients<T>(shape, dy.const_data_ptr<T>(), x.const_data_ptr<T>(), values.const_data_ptr<T>(),
                        index.const_data_ptr<int32_t>(), need_x ? dx.mutable_data_ptr<T>() : nullptr,
                        need_values ? dw.mutable_data_ptr<T>() : nullptr,
                        need_bias ? db.mutable_data_ptr<T>() : nullptr);
  });
  return {dx, dw, db};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&sparse_kernels::linear_forward));
  m.impl("linear_backward", TORCH_BOX(&sparse_kernels::linear_backward));
}
