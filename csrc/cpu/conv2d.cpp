// csr_conv2d_fprop, _dgrad, _wgrad, _backward, and the first three of bsr_conv2d_*: checks, layouts, and the call of the pass.
#include "conv2d.h"
#include "isa.h"
#include "layout.h"
#include "pixel_lanes.h"

namespace grasp_sparse {

Tensor conv2d_fprop(const char* op, const CsrView& csr, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& x,
                    int64_t outputs, const Window& window, bool relu, ChannelMoments* moments) {
  check_values(values, csr, compute_type(x));
  check_bias(bias, outputs, compute_type(x));
  const Tensor v = dense(values), b = bias ? dense(*bias) : v;
  const Tensor y = empty_images(x, outputs, window.h.output, window.w.output);
  for_storage(x, op, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const T* biases = bias ? const_data<T>(b) : nullptr;
    const auto pass = [&](const Window& window, bool, const Image<const S>& x, const Image<S>& y) {
      image_fprop<S>(csr, const_data<T>(v), biases, x, window, y, relu, moments);
    };
    in_pieces(window, pass, image_of(const_data<S>(x), x), image_of(mutable_data<S>(y), y));
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> conv2d_gradients(const char* op, const CsrView& csr, const Tensor& values, const Tensor& g,
                                                    const Tensor& x, const Window& window, bool input_grad,
                                                    const NormGradients* norm) {
  const Tensor v = dense(values), dx = input_grad ? empty_images(g, x.size(1), x.size(2), x.size(3)) : empty_strided(x, {0}, {1});
  const Tensor sums = empty_sums(x, {1, csr.nnz}), bias_sums = empty_sums(x, {csr.rows});
  for_storage(x, op, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    Image<const S> gradient = image_of(const_data<S>(g), g);
    if (norm) {
      const auto coefficients = NormCoefficients<const T>::in(static_cast<const T*>(norm->coefficients), csr.rows);
      gradient.norm = {const_data<S>(norm->input), coefficients, norm->relu};
    }
    const Image<const S> image = image_of(const_data<S>(x), x);
    T *const weights = mutable_data<T>(sums), *const biases = mutable_data<T>(bias_sums);
    const auto without_dx = [&](const Window& window, bool add, const Image<const S>& g, const Image<const S>& x) {
      image_wgrad<S>(csr, g, x, window, weights, biases, add);
    };
    const auto with_dx = [&](const Window& window, bool add, const Image<const S>& g, const Image<const S>& x, const Image<S>& dx) {
      image_backward<S>(csr, const_data<T>(v), g, x, window, dx, weights, biases, add);
    };
    if (input_grad) return in_pieces(window, with_dx, gradient, image, image_of(mutable_data<S>(dx), dx));
    in_pieces(window, without_dx, gradient, image);
  });
  return {dx, sums, bias_sums};
}

namespace {

int64_t channels_of(const Tensor& t) { return t.dim() == 4 ? t.size(1) : 0; }

Tensor dgrad(const char* op, const CsrView& csr, const Tensor& values, const Tensor& g, int64_t inputs, const Window& window) {
  check_values(values, csr, compute_type(g));
  check_output(g, window);
  const Tensor v = dense(values);
  const Tensor dx = empty_images(g, inputs, window.h.input, window.w.input);
  for_storage(g, op, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const auto pass = [&](const Window& window, bool, const Image<const S>& g, const Image<S>& dx) {
      image_dgrad<S>(csr, const_data<T>(v), g, window, dx);
    };
    in_pieces(window, pass, image_of(const_data<S>(g), g), image_of(mutable_data<S>(dx), dx));
  });
  return dx;
}

Window window_of_gradient(const Sizes& input_size, const Sizes& kernel, const Sizes& stride, const Sizes& padding,
                          const Sizes& dilation) {
  check_numbers(input_size, 2, 0, "input_size");
  return window_of<Window>(input_size[0], input_size[1], kernel, stride, padding, dilation);
}

Tensor wgrad(const char* op, const CsrView& csr, const Tensor& g, const Tensor& x, const Window& window) {
  const Tensor sums = empty_sums(x, values_size(csr));
  for_storage(x, op, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const auto pass = [&](const Window& window, bool add, const Image<const S>& g, const Image<const S>& x) {
      image_wgrad<S>(csr, g, x, window, mutable_data<T>(sums), nullptr, add);
    };
    in_pieces(window, pass, image_of(const_data<S>(g), g), image_of(const_data<S>(x), x));
  });
  return sums;
}

}  // namespace

Tensor csr_conv2d_fprop(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                        const Tensor& permutation, const std::optional<Tensor>& bias, const Tensor& x, Sizes kernel_size,
                        Sizes stride, Sizes padding, Sizes dilation) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  check_images(x, input_channels(csr.cols, kernel_size), "x");
  const Window window = window_of<Window>(x.size(2), x.size(3), kernel_size, stride, padding, dilation);
  return conv2d_fprop("csr_conv2d_fprop", csr, values, bias, x, csr.rows, window, false);
}

Tensor csr_conv2d_dgrad(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                        const Tensor& permutation, const Tensor& g, Sizes input_size, Sizes kernel_size, Sizes stride,
                        Sizes padding, Sizes dilation) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  check_images(g, csr.rows, "g");
  const int64_t inputs = input_channels(csr.cols, kernel_size);
  const Window window = window_of_gradient(input_size, kernel_size, stride, padding, dilation);
  return dgrad("csr_conv2d_dgrad", csr, values, g, inputs, window);
}

Tensor csr_conv2d_wgrad(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                        const Tensor& g, const Tensor& x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  const int64_t inputs = input_channels(csr.cols, kernel_size);
  const Window window = check_pair_of_images(g, csr.rows, x, inputs, kernel_size, stride, padding, dilation);
  return wgrad("csr_conv2d_wgrad", csr, g, x, window);
}

Tensor bsr_conv2d_fprop(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                        const Tensor& permutation, const std::optional<Tensor>& bias, const Tensor& x, int64_t out_channels,
                        Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation, bool relu) {
  check_images(x, channels_of(x), "x");
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView csr = indices.view_of_blocks(block_size_of(values), out_channels, x.size(1), taps_of(kernel_size));
  const Window window = window_of<Window>(x.size(2), x.size(3), kernel_size, stride, padding, dilation);
  return conv2d_fprop("bsr_conv2d_fprop", csr, values, bias, x, out_channels, window, relu);
}

Tensor bsr_conv2d_dgrad(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                        const Tensor& permutation, const Tensor& g, int64_t in_channels, Sizes input_size, Sizes kernel_size,
                        Sizes stride, Sizes padding, Sizes dilation) {
  check_images(g, channels_of(g), "g");
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView csr = indices.view_of_blocks(block_size_of(values), g.size(1), in_channels, taps_of(kernel_size));
  const Window window = window_of_gradient(input_size, kernel_size, stride, padding, dilation);
  return dgrad("bsr_conv2d_dgrad", csr, values, g, in_channels, window);
}

Tensor bsr_conv2d_wgrad(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                        const Tensor& g, const Tensor& x, Sizes block_size, Sizes kernel_size, Sizes stride, Sizes padding,
                        Sizes dilation) {
  const Window window = check_pair_of_images(g, channels_of(g), x, channels_of(x), kernel_size, stride, padding, dilation);
  const Indices indices(crow, col, ccol, row, permutation);
  return wgrad("bsr_conv2d_wgrad", indices.view_of_blocks(block_size, g.size(1), x.size(1), taps_of(kernel_size)), g, x, window);
}

std::tuple<Tensor, Tensor, Tensor> csr_conv2d_backward(const Tensor& values, const Tensor& crow, const Tensor& col,
                                                       const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                                                       const Tensor& g, const Tensor& x, Sizes kernel_size, Sizes stride,
                                                       Sizes padding, Sizes dilation) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  const int64_t inputs = input_channels(csr.cols, kernel_size);
  const Window window = check_pair_of_images(g, csr.rows, x, inputs, kernel_size, stride, padding, dilation);
  check_values(values, csr, compute_type(x));
  return conv2d_gradients("csr_conv2d_backward", csr, values, g, x, window, true);
}

}  // namespace grasp_sparse

STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CPU, m) {
  m.impl("csr_conv2d_fprop", TORCH_BOX(&grasp_sparse::csr_conv2d_fprop));
  m.impl("csr_conv2d_dgrad", TORCH_BOX(&grasp_sparse::csr_conv2d_dgrad));
  m.impl("csr_conv2d_wgrad", TORCH_BOX(&grasp_sparse::csr_conv2d_wgrad));
  m.impl("csr_conv2d_backward", TORCH_BOX(&grasp_sparse::csr_conv2d_backward));
  m.impl("bsr_conv2d_fprop", TORCH_BOX(&grasp_sparse::bsr_conv2d_fprop));
  m.impl("bsr_conv2d_dgrad", TORCH_BOX(&grasp_sparse::bsr_conv2d_dgrad));
  m.impl("bsr_conv2d_wgrad", TORCH_BOX(&grasp_sparse::bsr_conv2d_wgrad));
}
