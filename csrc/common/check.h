// Uniform messages for what an operator's C++ side checks. Users' mistakes are caught earlier, in
// Python, with better words; these keep a wrong internal call from reading out of bounds.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
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

inline Tensor new_empty(const Tensor& like, const std::vector<int64_t>& size, ScalarType dtype) {
  return torch::stable::new_empty(like, size, dtype);
}

}  // namespace sparse_kernels
