// Every operator's schema, one per line, grouped by what it serves, and the module's entry point.
// Implementations register themselves beside their kernels (csrc/cpu, csrc/cuda); shapes for the
// compiler ("fakes") are in sparse_kernels/_ops.py.
#include <Python.h>
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(sparse_kernels, m) {
  // clang-format off
  // Topology. `index` is the buffer of csrc/common/index.h, `rows x cols` its grid of blocks.
  m.def("index_build(Tensor positions, int rows, int cols, int groups, int plans) -> Tensor");
  m.def("index_update(Tensor index, int n, int rows, int cols, int groups, int plans, Tensor drop, Tensor grow) -> (Tensor, Tensor)");

  // Linear: x [tokens, in], dy [tokens, out], values [nnz] (CSR) or [n_blocks, b_out, b_in] (BSR).
  // `linear` (and `conv2d`) is the forward once more, with derivatives of its own: what torch.export records.
  m.def("linear(Tensor x, Tensor values, Tensor? bias, Tensor index, int rows, int cols) -> Tensor");
  m.def("linear_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int rows, int cols) -> Tensor");
  m.def("linear_backward(Tensor dy, Tensor? x, Tensor? values, Tensor index, int rows, int cols, int[] values_size, bool need_bias) -> (Tensor, Tensor, Tensor)");

  // Conv2d: x [n, in, h, w], dy [n, out, oh, ow], both NCHW or channels_last.
  m.def("conv2d(Tensor x, Tensor values, Tensor? bias, Tensor index, int rows, int cols, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  m.def("conv2d_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int rows, int cols, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  m.def("conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor index, int rows, int cols, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool need_x, bool need_values, bool need_bias) -> (Tensor, Tensor, Tensor)");

  // The same through the dense library, on a scratch for the weight (sparse_kernels/dense.py).
  m.def("dense_linear_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int rows, int cols) -> Tensor");
  m.def("dense_linear_backward(Tensor dy, Tensor? x, Tensor? values, Tensor index, int rows, int cols, int[] values_size, bool need_bias) -> (Tensor, Tensor, Tensor)");
  m.def("dense_conv2d_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int rows, int cols, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups) -> Tensor");
  m.def("dense_conv2d_backward(Tensor dy, Tensor x, Tensor values, Tensor index, int rows, int cols, int[] kernel, int[] stride, int[] padding, int[] dilation, int groups, bool need_x, bool need_values, bool need_bias) -> (Tensor, Tensor, Tensor)");

  // Its scatter of values into a stripe, rows of blocks from `begin` on, and the way back.
  m.def("dense_scatter(Tensor values, Tensor index, int rows, int cols, int groups, int taps, int begin, Tensor(a!) stripe) -> ()");
  m.def("dense_sample(Tensor stripe, Tensor index, int rows, int cols, int groups, int taps, int begin, Tensor(a!) values) -> ()");

  // The same by Triton kernels (sparse_kernels/triton/operators.py); on CUDA tensors also what `linear*` does.
  m.def("triton_linear_forward(Tensor x, Tensor values, Tensor? bias, Tensor index, int rows, int cols) -> Tensor");
  m.def("triton_linear_backward(Tensor dy, Tensor? x, Tensor? values, Tensor index, int rows, int cols, int[] values_size, bool need_bias) -> (Tensor, Tensor, Tensor)");

  // Growth: two factors of the weight gradient, for the scorer that the ticket names (sparse_kernels/growth.py).
  m.def("observe(Tensor(a!) ticket, Tensor x, Tensor dy, int[] conf, bool exact) -> ()");
  // Norms ("l1", "l2") of the blocks of the dense weight gradient dY^T X, [out / b_out, in / b_in] float32.
  m.def("growth_norms(Tensor x, Tensor dy, int b_out, int b_in, str score) -> Tensor");
  // Stripes of a dense gradient, which becomes its magnitude, against the candidates found so far in `state`; then
  // the k best of them, ascending by position (growth.cpp).
  m.def("growth_state(Tensor scores, int k) -> Tensor");
  m.def("growth_scan(Tensor(a!) scores, int row_begin, Tensor index, int n, int rows, int cols, int groups, int plans, Tensor(b!) active, Tensor(c!) state, int k) -> bool");
  m.def("growth_best(Tensor scores, Tensor(a!) state, int rows, int cols, int k) -> (Tensor, Tensor)");

  // All this in one for the dense gradient dY^T X, without that product in float (growth_screen.cpp).
  m.def("growth_screen(Tensor x, Tensor dy, Tensor index, int n, int rows, int cols, int groups, int plans, int k) -> (Tensor, Tensor, Tensor)");

  // Updates on the CPU (rewiring.cpp): what to drop, what to grow instead, and tensors in value order brought along.
  m.def("weakest(Tensor values, Tensor index, int n, int rows, int cols, int groups, int plans, int k) -> (Tensor, Tensor)");
  m.def("exchange(Tensor drop, Tensor dropped, Tensor active, Tensor positions, Tensor scores) -> (Tensor, Tensor)");
  m.def("reordered(Tensor tensor, Tensor source) -> Tensor");
  m.def("all_finite(Tensor tensor) -> bool");

  m.def("poison_outputs(bool on) -> Tensor");  // new tensors of CPU operators are NaN first (sparse_kernels/testing.py)
  m.def("cpu_isa() -> str");  // instruction set of the CPU kernels
  m.def("cpu_fma_peak(float seconds) -> float");  // float32 FLOP/s of its multiply-adds, on one thread
  // clang-format on
}

PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
