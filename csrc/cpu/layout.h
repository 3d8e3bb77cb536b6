// Layout in = layout out: the rule of ops/layout.py, for the operations on images.
#pragma once

#include "tensors.h"

namespace grasp_sparse {

// Whether t, with its dimensions in this order (outermost first), is dense. Dimensions of one entry have any stride.
inline bool lies_as(const Tensor& t, const int (&order)[4]) {
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    const int d = order[i];
    if (t.size(d) != 1 && t.stride(d) != expected) return false;
    expected *= t.size(d);
  }
  return true;
}

enum class Layout { nchw, channels_last, chwn };

// Images of one channel lie as NCHW and as channels_last at once. The channel's stride says what was meant, as it does to torch.
inline bool means_channels_last(const Tensor& t) { return t.size(1) == 1 && t.stride(1) == 1 && t.size(2) * t.size(3) > 1; }

// That of a result for `t`: anything else than these three gives NCHW.
inline Layout layout_of(const Tensor& t) {
  if (t.numel() == 0 || (t.is_contiguous() && !means_channels_last(t))) return Layout::nchw;
  if (lies_as(t, {0, 2, 3, 1})) return Layout::channels_last;
  return lies_as(t, {1, 2, 3, 0}) ? Layout::chwn : Layout::nchw;
}

// [N, channels, height, width], N that of `like`, in this layout.
inline Tensor empty_images(const Tensor& like, Layout layout, int64_t channels, int64_t height, int64_t width) {
  const int64_t n = like.size(0);
  const Sizes sizes{n, channels, height, width};
  if (layout == Layout::channels_last)
    return empty_strided(like, sizes, {height * width * channels, 1, width * channels, channels});
  if (layout == Layout::chwn) return empty_strided(like, sizes, {1, height * width * n, width * n, n});
  return empty_strided(like, sizes, row_major(sizes));
}

inline Tensor empty_images(const Tensor& like, int64_t channels, int64_t height, int64_t width) {
  return empty_images(like, layout_of(like), channels, height, width);
}

// t if its elements lie as this layout says (a tensor of one image or one channel lies in several), else a copy that does.
inline Tensor in_layout(const Tensor& t, Layout layout) {
  const bool lies_so = layout == Layout::channels_last ? lies_as(t, {0, 2, 3, 1})
                       : layout == Layout::chwn        ? lies_as(t, {1, 2, 3, 0})
                                                       : t.is_contiguous();
  if (lies_so) return t;
  Tensor copy = empty_images(t, layout, t.size(1), t.size(2), t.size(3));
  return torch::stable::copy_(copy, t);
}

}  // namespace grasp_sparse
