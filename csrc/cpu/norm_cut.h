// A batch of images as the sheets that the loops of norm.h run on.
#pragma once

#include <algorithm>

#include "layout.h"

namespace grasp_sparse {

constexpr int64_t kWideBytes = 512;  // columns the loops like: eight AVX-512 vectors
constexpr int64_t kMostColumns = 512;

struct Sheet {
  int64_t offset, rows, cols, stride;
};

// How the elements of a batch of images become sheets.
struct Cut {
  int64_t channels, per_channel;
  bool together;  // channels lie side by side (channels_last)
  // Otherwise a channel is `runs` contiguous runs; short runs of a group of channels side by side make one row of a sheet.
  int64_t runs, run_length, run_stride, channel_stride, group = 1;
  int64_t cols;   // of a sheet, at most
  int64_t width;  // columns of one channel within a sheet
  int64_t element_bytes;

  Cut(const Tensor& x, Layout layout)
      : channels(x.size(1)), per_channel(x.size(0) * x.size(2) * x.size(3)), together(layout == Layout::channels_last),
        element_bytes(static_cast<int64_t>(x.element_size())) {
    const int64_t plane = x.size(2) * x.size(3);
    const bool nchw = layout == Layout::nchw;
    runs = nchw ? x.size(0) : 1;
    run_length = nchw ? plane : per_channel;
    run_stride = nchw ? channels * plane : per_channel;
    channel_stride = nchw ? plane : per_channel;
    const int64_t wide = kWideBytes / element_bytes;
    if (together) {
      width = fold(wide), cols = channels * width;
    } else if (run_length > kMostColumns / 2) {
      width = cols = wide;
    } else {
      width = run_length, group = std::clamp<int64_t>(kMostColumns / width, 1, channels), cols = group * width;
    }
  }

  // channels_last: how many pixels make up a row of a sheet.
  int64_t fold(int64_t wide) const {
    for (int64_t pixels = 1; pixels * channels <= kMostColumns; ++pixels)
      if (pixels * channels % wide == 0) return pixels;
    return std::max<int64_t>(1, kMostColumns / 4 / channels);
  }

  int64_t rows() const { return per_channel * channels / cols; }  // of all channels together

  // Rows [begin, end) of all channels together; the pixels that fill no row come after the last.
  template <class F>
  void rows_together(int64_t begin, int64_t end, const F& f) const {
    f(Sheet{begin * cols, end - begin, cols, cols});
    const int64_t rest = per_channel * channels - rows() * cols;
    if (end == rows() && rest) f(Sheet{rows() * cols, 1, rest, rest});
  }

  // `count` channels, one or those of a group, from this one on.
  template <class F>
  void channels_apart(int64_t first, int64_t count, const F& f) const {
    const int64_t at = first * channel_stride;
    if (width == run_length) return f(Sheet{at, runs, count * width, run_stride});
    const int64_t rows = run_length / cols, rest = run_length % cols;
    for (int64_t run = 0; run < runs; ++run) {
      f(Sheet{at + run * run_stride, rows, cols, cols});
      if (rest) f(Sheet{at + run * run_stride + rows * cols, 1, rest, rest});
    }
  }
};

}  // namespace grasp_sparse
