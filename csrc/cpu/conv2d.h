// What the operations on images share: conv2d.cpp, and conv2d_norm.cpp, whose convolutions stand before a norm.
#pragma once

#include "batch_norm.h"
#include "geometry.h"

namespace grasp_sparse {

template <class T>
Image<T> image_of(T* data, const Tensor& t) {
  constexpr int64_t L = kLanes<Compute<std::remove_const_t<T>>>;
  return {data,        t.size(0),   t.size(1),   t.size(2),   t.size(3),
          t.stride(0), t.stride(1), t.stride(2), t.stride(3), L * t.stride(0)};
}

inline Window check_pair_of_images(const Tensor& g, int64_t outputs, const Tensor& x, int64_t inputs, const Sizes& kernel_size,
                                   const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  check_images(g, outputs, "g");
  check_images(x, inputs, "x");
  check_type(g, x.scalar_type(), "g");
  STD_TORCH_CHECK(g.size(0) == x.size(0), "Expected g and x of one batch, got ", g.size(0), " and ", x.size(0), ".");
  const Window window = window_of<Window>(x.size(2), x.size(3), kernel_size, stride, padding, dilation);
  check_output(g, window);
  return window;
}

// max(y, 0) with `relu`; `moments`, if asked for, of y (image.h).
Tensor conv2d_fprop(const char* op, const CsrView& csr, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& x,
                    int64_t outputs, const Window& window, bool relu, ChannelMoments* moments = nullptr);

// Of x (empty without `input_grad`), of values, which the caller has checked, and of the bias. With `norm`, g is read through it.
std::tuple<Tensor, Tensor, Tensor> conv2d_gradients(const char* op, const CsrView& csr, const Tensor& values, const Tensor& g,
                                                    const Tensor& x, const Window& window, bool input_grad,
                                                    const NormGradients* norm = nullptr);

}  // namespace grasp_sparse
