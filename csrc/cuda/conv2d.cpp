// csr_conv2d_fprop, _dgrad, _wgrad, _backward: checks, layouts, and the call of the passes.
#include "register.h"
#include "tensors.h"

namespace grasp_sparse::cuda {

namespace {

void check_numbers(const Sizes& sizes, size_t count, int64_t least, const char* name) {
  STD_TORCH_CHECK(sizes.size() == count, "Expected ", name, " of ", count, " numbers, got ", sizes.size(), ".");
  for (int64_t size : sizes)  // the upper bound keeps every product of two of them within 64 bits
    STD_TORCH_CHECK(size >= least && size <= INT32_MAX, "Expected ", name, " between ", least, " and ", INT32_MAX, ", got ", size,
                    ".");
}

// What a convolution is told besides its tensors.
struct Geometry {
  const Sizes &kernel_size, &stride, &padding, &dilation;

  Window window(int64_t height, int64_t width) const {
    check_numbers(kernel_size, 2, 1, "kernel_size");
    check_numbers(stride, 2, 1, "stride");
    check_numbers(padding, 4, 0, "padding");
    check_numbers(dilation, 2, 1, "dilation");
    const auto axis = [&](int i, int64_t input) {
      const int64_t room = input + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel_size[i] - 1) - 1;
      STD_TORCH_CHECK(room >= 0, "Expected a padded image that holds the window, it is ", -room, " too small.");
      return Axis{kernel_size[i], stride[i], dilation[i], padding[2 * i], input, room / stride[i] + 1};
    };
    return {axis(0, height), axis(1, width)};
  }

  int64_t input_channels(const CsrView& csr) const {
    check_numbers(kernel_size, 2, 1, "kernel_size");
    const int64_t taps = kernel_size[0] * kernel_size[1];
    STD_TORCH_CHECK(csr.cols % taps == 0, "Expected columns in multiples of ", taps, " (kernel_size), got ", csr.cols, ".");
    return csr.cols / taps;
  }
};

void check_images(const Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(1) == channels, "Expected ", name, " of shape [N, ", channels, ", H, W], got ", t.dim(),
                  " dimensions and ", t.dim() > 1 ? t.size(1) : 0, " channels.");
}

void check_output(const Tensor& g, const Window& window) {
  STD_TORCH_CHECK(g.size(2) == window.h.output && g.size(3) == window.w.output, "Expected g of ", window.h.output, " x ",
                  window.w.output, " pixels, got ", g.size(2), " x ", g.size(3), ".");
}

Window check_pair_of_images(const CsrView& csr, const Tensor& g, const Tensor& x, const Geometry& geometry) {
  check_images(g, csr.rows, "g");
  check_images(x, geometry.input_channels(csr), "x");
  check_alike(g, x, "g");
  const Window window = geometry.window(x.size(2), x.size(3));
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
  const Geometry geometry{kernel_size, stride, padding, dilation};
  check_images(x, geometry.input_channels(csr), "x");
  const Window window = geometry.window(x.size(2), x.size(3));
  const Tensor v = checked(values, csr.nnz, x, "values"), b = bias ? checked(*bias, csr.rows, x, "bias") : v;
  Tensor y = x;
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Innermost in = Innermost::of<S>(call.queue(), x);
    Result out(x, {x.size(0), csr.rows, window.h.output, window.w.output});
    fprop<S>(call.queue(), csr, window, x.size(0), const_data<T>(v), bias ? const_data<T>(b) : nullptr, false, in.data<S>(),
             out.data<S>());
    y = out.finish<S>(call.queue());
  });
  return y;
}

Tensor csr_conv2d_dgrad(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                        const Tensor& permutation, const Tensor& g, Sizes input_size, Sizes kernel_size, Sizes stride,
                        Sizes padding, Sizes dilation) {
  const Call call(g);
  const Indices indices(crow, col, ccol, row, permutation, g);
  const CsrView& csr = indices.view();
  const Geometry geometry{kernel_size, stride, padding, dilation};
  check_images(g, csr.rows, "g");
  check_numbers(input_size, 2, 0, "input_size");
  const int64_t channels = geometry.input_channels(csr);
  const Window window = geometry.window(input_size[0], input_size[1]);
  check_output(g, window);
  const Tensor v = checked(values, csr.nnz, g, "values");
  Tensor dx = g;
  for_storage(g, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const Innermost in = Innermost::of<S>(call.queue(), g);
    Result out(g, {g.size(0), channels, input_size[0], input_size[1]});
    dgrad<S>(call.queue(), csr, window, g.size(0), const_data<Compute<S>>(v), in.data<S>(), out.data<S>());
    dx = out.finish<S>(call.queue());
  });
  return dx;
}

Tensor csr_conv2d_wgrad(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                        const Tensor& g, const Tensor& x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const CsrView& csr = indices.view();
  const Window window = check_pair_of_images(csr, g, x, {kernel_size, stride, padding, dilation});
  const Tensor sums = empty_sums(x, {1, csr.nnz});
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const Innermost in_g = Innermost::of<S>(call.queue(), g), in_x = Innermost::of<S>(call.queue(), x);
    wgrad<S>(call.queue(), csr, window, x.size(0), in_g.data<S>(), in_x.data<S>(), mutable_data<Compute<S>>(sums));
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> csr_conv2d_backward(const Tensor& values, const Tensor& crow, const Tensor& col,
                                                       const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                                                       const Tensor& g, const Tensor& x, Sizes kernel_size, Sizes stride,
                                                       Sizes padding, Sizes dilation) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const CsrView& csr = indices.view();
  const Window window = check_pair_of_images(csr, g, x, {kernel_size, stride, padding, dilation});
  const Tensor v = checked(values, csr.nnz, x, "values");
  const Tensor sums = empty_sums(x, {1, csr.nnz}), bias_sums = empty_sums(x, {csr.rows});
  Tensor dx = g;
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Queue& queue = call.queue();
    const Innermost in_g = Innermost::of<S>(queue, g), in_x = Innermost::of<S>(queue, x);
    Result out(g, {x.size(0), x.size(1), x.size(2), x.size(3)});
    dgrad<S>(queue, csr, window, x.size(0), const_data<T>(v), in_g.data<S>(), out.data<S>());
    dx = out.finish<S>(queue);
    wgrad<S>(queue, csr, window, x.size(0), in_g.data<S>(), in_x.data<S>(), mutable_data<T>(sums));
    row_sums<S>(queue, csr.rows, x.size(0) * window.h.output * window.w.output, in_g.data<S>(), mutable_data<T>(bias_sums));
  });
  return {dx, sums, bias_sums};
}

}  // namespace grasp_sparse::cuda

GRASP_SPARSE_KERNELS(m) {
  m.impl("csr_conv2d_fprop", TORCH_BOX(&grasp_sparse::cuda::csr_conv2d_fprop));
  m.impl("csr_conv2d_dgrad", TORCH_BOX(&grasp_sparse::cuda::csr_conv2d_dgrad));
  m.impl("csr_conv2d_wgrad", TORCH_BOX(&grasp_sparse::cuda::csr_conv2d_wgrad));
  m.impl("csr_conv2d_backward", TORCH_BOX(&grasp_sparse::cuda::csr_conv2d_backward));
}
