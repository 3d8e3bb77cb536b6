// csr_conv2d_fprop, _dgrad, _wgrad, _backward: checks, layouts, and the call of the passes.
#include "../cpu/geometry.h"
#include "register.h"
#include "run.h"

namespace grasp_sparse::cuda {

namespace {

Window check_pair_of_images(const CsrView& csr, const Tensor& g, const Tensor& x, const Sizes& kernel_size,
                            const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  check_images(g, csr.rows, "g");
  check_images(x, input_channels(csr.cols, kernel_size), "x");
  check_alike(g, x, "g");
  const Window window = window_of<Window>(x.size(2), x.size(3), kernel_size, stride, padding, dilation);
  check_output(g, window);
  return window;
}

}  // namespace

Tensor csr_conv2d_fprop(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                        const Tensor& permutation, const std::optional<Tensor>& bias, const Tensor& x, Sizes kernel_size,
                        Sizes stride, Sizes padding, Sizes dilation) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const CsrView& csr = indices.view();
  check_images(x, input_channels(csr.cols, kernel_size), "x");
  const Window window = window_of<Window>(x.size(2), x.size(3), kernel_size, stride, padding, dilation);
  return run_fprop(csr, window, values, bias, false, x, {x.size(0), csr.rows, window.h.output, window.w.output}, call);
}

Tensor csr_conv2d_dgrad(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                        const Tensor& permutation, const Tensor& g, Sizes input_size, Sizes kernel_size, Sizes stride,
                        Sizes padding, Sizes dilation) {
  const Call call(g);
  const Indices indices(crow, col, ccol, row, permutation, g);
  const CsrView& csr = indices.view();
  check_images(g, csr.rows, "g");
  check_numbers(input_size, 2, 0, "input_size");
  const int64_t channels = input_channels(csr.cols, kernel_size);
  const Window window = window_of<Window>(input_size[0], input_size[1], kernel_size, stride, padding, dilation);
  check_output(g, window);
  return run_dgrad(csr, window, values, g, {g.size(0), channels, input_size[0], input_size[1]}, call);
}

Tensor csr_conv2d_wgrad(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                        const Tensor& g, const Tensor& x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const Window window = check_pair_of_images(indices.view(), g, x, kernel_size, stride, padding, dilation);
  return run_wgrad(indices.view(), window, g, x, call);
}

Gradients csr_conv2d_backward(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                              const Tensor& permutation, const Tensor& g, const Tensor& x, Sizes kernel_size, Sizes stride,
                              Sizes padding, Sizes dilation) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const Window window = check_pair_of_images(indices.view(), g, x, kernel_size, stride, padding, dilation);
  return run_backward(indices.view(), window, values, g, x, nullptr, true, call);
}

}  // namespace grasp_sparse::cuda

GRASP_SPARSE_KERNELS(m) {
  m.impl("csr_conv2d_fprop", TORCH_BOX(&grasp_sparse::cuda::csr_conv2d_fprop));
  m.impl("csr_conv2d_dgrad", TORCH_BOX(&grasp_sparse::cuda::csr_conv2d_dgrad));
  m.impl("csr_conv2d_wgrad", TORCH_BOX(&grasp_sparse::cuda::csr_conv2d_wgrad));
  m.impl("csr_conv2d_backward", TORCH_BOX(&grasp_sparse::cuda::csr_conv2d_backward));
}
