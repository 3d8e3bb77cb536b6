// What a max pooling is told besides its tensors, checked; and the bytes that say which place of a window won. For every device.
#pragma once

#include "layout.h"
#include "window.h"

namespace grasp_sparse {

constexpr int64_t kMostTaps = 255;  // also the byte of a window whose every place lies in the padding

inline Window pool_window(const Sizes& image, const Sizes& kernel, const Sizes& stride, const Sizes& padding, const Sizes& dilation,
                          bool ceil_mode) {
  for (const Sizes* pair : {&kernel, &stride, &padding, &dilation}) {
    STD_TORCH_CHECK(pair->size() == 2, "Expected kernel_size, stride, padding and dilation of two numbers, got ", pair->size(), ".");
    for (int64_t size : *pair)
      STD_TORCH_CHECK(size >= (pair == &padding ? 0 : 1) && size <= INT32_MAX, "Expected a window of positive sizes, got ", size, ".");
  }
  STD_TORCH_CHECK(kernel[0] * kernel[1] <= kMostTaps, "Expected a window of at most ", kMostTaps, " places, got ", kernel[0] * kernel[1],
                  "; use torch.nn.functional.max_pool2d.");
  const auto axis = [&](int i) {
    const int64_t reach = dilation[i] * (kernel[i] - 1) + 1;
    STD_TORCH_CHECK(2 * padding[i] <= reach, "Expected padding of at most half the window, got ", padding[i], ".");
    const int64_t room = image[i] + 2 * padding[i] - reach;
    STD_TORCH_CHECK(room >= 0, "Expected a padded image that holds the window, it is ", -room, " too small.");
    int64_t output = (ceil_mode ? (room + stride[i] - 1) / stride[i] : room / stride[i]) + 1;
    if (ceil_mode && (output - 1) * stride[i] >= image[i] + padding[i]) --output;  // a window that begins in the padding
    return Axis{kernel[i], stride[i], dilation[i], padding[i], image[i], output};
  };
  return {axis(0), axis(1)};
}

// The window of a backward pass whose g and places fit it.
inline Window pool_window(const Tensor& g, const Tensor& places, const Sizes& input_size, const Sizes& kernel, const Sizes& stride,
                          const Sizes& padding, const Sizes& dilation, bool ceil_mode) {
  STD_TORCH_CHECK(input_size.size() == 2 && input_size[0] >= 0 && input_size[1] >= 0, "Expected input_size of height and width.");
  STD_TORCH_CHECK(g.dim() == 4 && places.dim() == 4 && places.scalar_type() == ScalarType::Byte,
                  "Expected g and places of shape [N, C, H', W'], places uint8.");
  const Window window = pool_window(input_size, kernel, stride, padding, dilation, ceil_mode);
  STD_TORCH_CHECK(g.size(2) == window.h.output && g.size(3) == window.w.output, "Expected g of ", window.h.output, " x ",
                  window.w.output, " pixels, got ", g.size(2), " x ", g.size(3), ".");
  for (int d = 0; d < 4; ++d) STD_TORCH_CHECK(places.size(d) == g.size(d), "Expected places of the shape of g.");
  return window;
}

// Bytes that lie as `like` does.
inline Tensor empty_bytes(const Tensor& like) {
  AtenTensorHandle handle;
  int32_t device;
  const auto sizes = like.sizes(), strides = like.strides();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(4, sizes.data(), strides.data(), aoti_torch_dtype_uint8(), device,
                                                  like.get_device(), &handle));
  return Tensor(handle);
}

}  // namespace grasp_sparse
