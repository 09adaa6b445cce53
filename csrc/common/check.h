// Uniform messages for what an operator's C++ side checks. Users' mistakes are caught earlier, in
// Python, with better words; these keep a wrong internal call from reading out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <vector>

#include "index.h"

namespace sparse_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_cpu(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}

inline void check_dtype(const Tensor& t, ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has dtype ", static_cast<int>(t.scalar_type()),
                  ", expected ", static_cast<int>(dtype));
}

inline void check_size(const Tensor& t, int64_t dim, int64_t size, const char* name) {
  STD_TORCH_CHECK(t.dim() > dim && t.size(dim) == size, name, " must have size ", size, " in dimension ",
                  dim);
}

inline Plans plans_of(int64_t kind) {
  STD_TORCH_CHECK(kind >= 0 && kind <= 3, "plans must be 0, 1, 2 or 3, got ", kind);
  return static_cast<Plans>(kind);
}

// Whether new tensors are filled with NaN, so that tests see what a kernel forgets to write (dispatch.cpp).
inline std::atomic<bool> poisoned{false};

// A new contiguous tensor on the CPU. Not through the dispatcher, which is a third of what a small product
// costs: 1 us a tensor.
inline Tensor new_empty(const std::vector<int64_t>& size, ScalarType dtype) {
  std::vector<int64_t> strides(size.size());
  int64_t step = 1;
  for (size_t d = size.size(); d-- > 0; step *= std::max<int64_t>(size[d], 1)) strides[d] = step;
  AtenTensorHandle made = nullptr;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(size.size()), size.data(),
                                                         strides.data(), code, aoti_torch_device_type_cpu(),
                                                         0, &made));
  Tensor tensor(made);
  if (poisoned.load(std::memory_order_relaxed))
    std::memset(tensor.mutable_data_ptr(), 0xff, tensor.numel() * tensor.element_size());
  return tensor;
}

}  // namespace sparse_kernels
