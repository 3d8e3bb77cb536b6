// The operations once their arguments are checked: into the layout of the kernels, the passes, and back. A linear layer is a
// convolution of one tap on images of one pixel; `size` is that of the result.
#pragma once

#include "tensors.h"

namespace grasp_sparse::cuda {

using Gradients = std::tuple<Tensor, Tensor, Tensor>;  // of x, the values and the bias

inline Tensor run_fprop(const CsrView& csr, const Window& window, const Tensor& values, const std::optional<Tensor>& bias, bool relu,
                        const Tensor& x, const Sizes& size, const Call& call) {
  const Tensor v = checked(values, csr.nnz, x, "values"), b = bias ? checked(*bias, csr.rows, x, "bias") : v;
  Tensor y = x;
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Innermost in = Innermost::of<S>(call.queue(), x);
    Result out(x, size);
    fprop<S>(call.queue(), csr, window, x.size(0), const_data<T>(v), bias ? const_data<T>(b) : nullptr, relu, in.data<S>(),
             out.data<S>());
    y = out.finish<S>(call.queue());
  });
  return y;
}

inline Tensor run_dgrad(const CsrView& csr, const Window& window, const Tensor& values, const Tensor& g, const Sizes& size,
                        const Call& call) {
  const Tensor v = checked(values, csr.nnz, g, "values");
  Tensor dx = g;
  for_storage(g, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const Innermost in = Innermost::of<S>(call.queue(), g);
    Result out(g, size);
    dgrad<S>(call.queue(), csr, window, g.size(0), const_data<Compute<S>>(v), in.data<S>(), out.data<S>());
    dx = out.finish<S>(call.queue());
  });
  return dx;
}

inline Tensor run_wgrad(const CsrView& csr, const Window& window, const Tensor& g, const Tensor& x, const Call& call) {
  const Tensor sums = empty_sums(x, {1, csr.nnz});
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const Innermost in_g = Innermost::of<S>(call.queue(), g), in_x = Innermost::of<S>(call.queue(), x);
    wgrad<S>(call.queue(), csr, window, x.size(0), in_g.data<S>(), in_x.data<S>(), mutable_data<Compute<S>>(sums));
  });
  return sums;
}

// With y, g counts where it is positive; where the strides of the two differ, g is taken as contiguous, and dx becomes so. Without
// input_grad the first gradient is empty.
inline Gradients run_backward(const CsrView& csr, const Window& window, const Tensor& values, const Tensor& grad, const Tensor& x,
                              const Tensor* y, bool input_grad, const Call& call) {
  const bool alike = !y || layout::strides_of(*y) == layout::strides_of(grad);
  const Tensor g = alike || grad.is_contiguous() ? grad : torch::stable::contiguous(grad);
  const Tensor v = checked(values, csr.nnz, x, "values");
  const Tensor sums = empty_sums(x, {1, csr.nnz}), bias_sums = empty_sums(x, {csr.rows});
  Tensor dx = empty(g, {0}, {1}, layout::dtype(g));
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Queue& queue = call.queue();
    const Innermost in_g = Innermost::of<S>(queue, g, y), in_x = Innermost::of<S>(queue, x);
    if (input_grad) {
      const auto sizes = x.sizes();
      Result out(g, Sizes(sizes.begin(), sizes.end()));
      dgrad<S>(queue, csr, window, x.size(0), const_data<T>(v), in_g.data<S>(), out.data<S>());
      dx = out.finish<S>(queue);
    }
    wgrad<S>(queue, csr, window, x.size(0), in_g.data<S>(), in_x.data<S>(), mutable_data<T>(sums));
    row_sums<S>(queue, csr.rows, x.size(0) * window.h.output * window.w.output, in_g.data<S>(), mutable_data<T>(bias_sums));
  });
  return {dx, sums, bias_sums};
}

}  // namespace grasp_sparse::cuda
