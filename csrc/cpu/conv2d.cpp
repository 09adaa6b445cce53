// Conv2d: a direct sparse convolution and its gradients, CSR and BSR. Lanes are pixels: in copies of the
// images for every shift along a row (conv2d_grid.h), a stored weight is one byte offset. Padding takes part
// as zeros: a weight that is not finite gives NaN there.
#include "conv2d_backward.h"
#include "conv2d_forward.h"

namespace sparse_kernels {
namespace {

bool has_layout(const Tensor& t, bool channels_last) {
  if (!channels_last) return t.is_contiguous();
  const int64_t expected[4] = {t.size(1) * t.size(2) * t.size(3), 1, t.size(1) * t.size(3), t.size(1)};
  for (int64_t d = 0; d < 4; ++d)
    if (t.size(d) != 1 && t.stride(d) != expected[d]) return t.numel() == 0;
  return true;
}

// Whether 4-D images are channels_last and not NCHW. One that is both, for having one channel or pixel, is
// what its strides look like: the rule of torch's convolutions, as is_channels_last in _ops.py.
bool is_channels_last(const Tensor& t, const char* name) {
  if (!t.is_contiguous()) {
    STD_TORCH_CHECK(has_layout(t, true), name, " must be contiguous or channels_last");
    return true;
  }
  int64_t least = 0;
  for (int64_t d : {1, 3, 2, 0}) {
    if (t.size(d) == 0 || t.stride(d) < least || (d == 0 && least == t.stride(1))) return false;
    least = t.stride(d) * t.size(d);
  }
  return has_layout(t, true);
}

ConvShape shape_of(const Tensor& x, const Tensor& values, const Tensor& index, int64_t rows, int64_t cols,
                   const std::vector<int64_t>& kernel, const std::vector<int64_t>& stride,
                   const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                   int64_t groups) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "x must be a CPU tensor [n, in, h, w]");
  check_cpu(values, "values");
  check_cpu(index, "index");
  check_dtype(index, ScalarType::Int, "index");
  check_dtype(values, x.scalar_type(), "values");
  const bool csr = values.dim() == 1;
  STD_TORCH_CHECK(csr || values.dim() == 3, "values must be [nnz] or [n_blocks, b_out, b_in]");
  for (const auto* pair : {&kernel, &stride, &padding, &dilation})
    STD_TORCH_CHECK(pair->size() == 2, "kernel, stride, padding and dilation must be pairs");
  const auto axis = [&](int64_t d) {
    const int64_t size = x.size(d + 2), reach = dilation[d] * (kernel[d] - 1) + 1;
    STD_TORCH_CHECK(kernel[d] > 0 && stride[d] > 0 && dilation[d] > 0 && padding[d] >= 0 &&
                        size + 2 * padding[d] >= reach,
                    "kernel, stride, padding or dilation do not fit an image of ", size, " pixels");
    return Axis{size,       (size + 2 * padding[d] - reach) / stride[d] + 1, kernel[d], stride[d], padding[d],
                dilation[d]};
  };
  const int64_t b_out = csr ? 1 : values.size(1), b_in = csr ? 1 : values.size(2);
  STD_TORCH_CHECK(groups > 0 && rows % groups == 0 && cols % (kernel[0] * kernel[1]) == 0,
                  "rows, cols, kernel and groups do not fit");
  const int64_t in = cols / (kernel[0] * kernel[1]) * b_in * groups;
  const bool last = is_channels_last(x, "x");
  const ConvShape shape{x.size(0),      in,     rows * b_out, rows,    cols, b_out, b_in,
                        values.size(0), groups, axis(0),      axis(1), csr,  last};
  check_size(x, 1, in, "x");
  check_size(index, 0, shape.index().size(), "index");
  return shape;
}

// A 1x1 convolution that reads every pixel does not care where rows end: rows that fill cells.
ConvShape flat(ConvShape s) {
  const int64_t pixels = s.y.size * s.x.size;
  if (s.taps() != 1 || s.y.stride * s.x.stride != 1 || s.y.padding + s.x.padding != 0) return s;
  const int64_t cols = pixels % 16 == 0 ? 16 : pixels;
  if (cols * s.in * 16 > second_level_cache()) return s;  // rows are what tiles are cut by
  s.y.size = s.y.out = pixels / std::max<int64_t>(cols, 1), s.x.size = s.x.out = cols;
  return s;
}

// Shapes and strides as the fakes in _ops.py.
Tensor empty_images(const Tensor& like, int64_t c, int64_t h, int64_t w, bool channels_last) {
  const std::vector<int64_t> size{like.size(0), c, h, w};
  if (!channels_last) return new_empty(size, like.scalar_type());
  // Not a permuted NHWC tensor: that would be a view, which forbids in-place operations on the output.
  return torch::stable::empty(size, like.scalar_type(), std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace

Tensor conv2d_forward(const Tensor& x, const Tensor& values, const std::optional<Tensor>& bias,
                      const Tensor& index, int64_t rows, int64_t cols, const std::vector<int64_t>& kernel,
                      const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                      const std::vector<int64_t>& dilation, int64_t groups) {
  const ConvShape s = shape_of(x, values, index, rows, cols, kernel, stride, padding, dilation, groups);
  if (bias) {
    check_cpu(*bias, "bias");
    check_dtype(*bias, x.scalar_type(), "bias");
    check_size(*bias, 0, s.out, "bias");
  }
  Tensor y = empty_images(x, s.out, s.y.out, s.x.out, s.channels_last);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    conv_forward<T>(flat(s), x.const_data_ptr<T>(), values.const_data_ptr<T>(),
                    bias ? bias->const_data_ptr<T>() : nullptr, index.const_data_ptr<int32_t>(),
                    y.mutable_data_ptr<T>());
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_backward(const Tensor& dy, const Tensor& x, const Tensor& values,
                                                   const Tensor& index, int64_t rows, int64_t cols,
                                                   const std::vector<int64_t>& kernel,
                                                   const std::vector<int64_t>& stride,
                                                   const std::vector<int64_t>& padding,
                                                   const std::vector<int64_t>& dilation, int64_t groups,
                                                   bool need_x, bool need_values, bool need_bias) {
  const ConvShape s = shape_of(x, values, index, rows, cols, kernel, stride, padding, dilation, groups);
  STD_TORCH_CHECK(dy.is_cpu() && dy.dim() == 4, "dy must be a CPU tensor [n, out, oh, ow]");
  check_dtype(dy, x.scalar_type(), "dy");
  const int64_t sizes[4] = {s.n, s.out, s.y.out, s.x.out};
  for (int64_t d = 0; d < 4; ++d) check_size(dy, d, sizes[d], "dy");
  STD_TORCH_CHECK(has_layout(dy, s.channels_last), "dy must have the memory format of x");

  const ScalarType dtype = x.scalar_type();
  const std::vector<int64_t> none{0}, values_size(values.sizes().begin(), values.sizes().end());
  Tensor dx = need_x ? empty_images(x, s.in, s.y.size, s.x.size, s.channels_last) : new_empty(none, dtype);
  Tensor dw = new_empty(need_values ? values_size : none, dtype);
  Tensor db = new_empty(need_bias ? std::vector<int64_t>{s.out} : none, dtype);
  for_dtype(x, [&](auto zero) {
    using T = decltype(zero);
    ConvBackward<T>(flat(s), dy.const_data_ptr<T>(), x.const_data_ptr<T>(), values.const_data_ptr<T>(),
                    index.const_data_ptr<int32_t>(), need_x ? dx.mutable_data_ptr<T>() : nullptr,
                    need_values ? dw.mutable_data_ptr<T>() : nullptr,
                    need_bias ? db.mutable_data_ptr<T>() : nullptr)
        .run();
  });
  return {dx, dw, db};
}

}  // namespace sparse_kernels

STABLE_TORCH_LIBRARY_IMPL(sparse_kernels, CPU, m) {
  m.impl("conv2d", TORCH_BOX(&sparse_kernels::conv2d_forward));
  m.impl("conv2d_forward", TORCH_BOX(&sparse_kernels::conv2d_forward));
  m.impl("conv2d_backward", TORCH_BOX(&sparse_kernels::conv2d_backward));
}
