// What a convolution is told besides its tensors, checked; for every device. Window is that of its kernels: two axes, each of
// kernel, stride, dilation, padding before, input and output.
#pragma once

#include "tensors.h"

namespace grasp_sparse {

inline void check_numbers(const Sizes& sizes, size_t count, int64_t least, const char* name) {
  STD_TORCH_CHECK(sizes.size() == count, "Expected ", name, " of ", count, " numbers, got ", sizes.size(), ".");
  for (int64_t size : sizes)  // the upper bound keeps every product of two of them within 64 bits
    STD_TORCH_CHECK(size >= least && size <= INT32_MAX, "Expected ", name, " between ", least, " and ", INT32_MAX, ", got ", size, ".");
}

template <class Window>
Window window_of(int64_t height, int64_t width, const Sizes& kernel, const Sizes& stride, const Sizes& padding, const Sizes& dilation) {
  check_numbers(kernel, 2, 1, "kernel_size");
  check_numbers(stride, 2, 1, "stride");
  check_numbers(padding, 4, 0, "padding");
  check_numbers(dilation, 2, 1, "dilation");
  const auto axis = [&](int i, int64_t input) {
    const int64_t room = input + padding[2 * i] + padding[2 * i + 1] - dilation[i] * (kernel[i] - 1) - 1;
    STD_TORCH_CHECK(room >= 0, "Expected a padded image that holds the window, it is ", -room, " too small.");
    return decltype(Window::h){kernel[i], stride[i], dilation[i], padding[2 * i], input, room / stride[i] + 1};
  };
  return {axis(0, height), axis(1, width)};
}

inline void check_images(const Tensor& t, int64_t channels, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(1) == channels, "Expected ", name, " of shape [N, ", channels, ", H, W], got ", t.dim(),
                  " dimensions and ", t.dim() > 1 ? t.size(1) : 0, " channels.");
}

template <class Window>
void check_output(const Tensor& g, const Window& window) {
  STD_TORCH_CHECK(g.size(2) == window.h.output && g.size(3) == window.w.output, "Expected g of ", window.h.output, " x ",
                  window.w.output, " pixels, got ", g.size(2), " x ", g.size(3), ".");
}

inline int64_t taps_of(const Sizes& kernel) {
  check_numbers(kernel, 2, 1, "kernel_size");
  return kernel[0] * kernel[1];
}

// Of a matrix with so many columns.
inline int64_t input_channels(int64_t cols, const Sizes& kernel) {
  const int64_t taps = taps_of(kernel);
  STD_TORCH_CHECK(cols % taps == 0, "Expected columns in multiples of ", taps, " (kernel_size), got ", cols, ".");
  return cols / taps;
}

}  // namespace grasp_sparse
