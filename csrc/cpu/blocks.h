// Blocks of channels, for bands too large for L2: where even one row of pixels, packed, would not stay there, a block of its
// channels does, and the pass walks the weights of one block after the other. Only where there is one tap: there entries of a
// row whose columns rise come block after block.
#pragma once

#include "bands.h"

namespace grasp_sparse {

constexpr int64_t kRowBytes = 1 << 20;  // of a packed row of pixels; smaller ones are not cut

struct ChannelBlocks {
  ChannelBlocks(int64_t channels, const Window& window) {
    const int64_t bytes = channels * window.w.output * kSliceBytes;
    size = window.taps() == 1 && bytes > kRowBytes ? ceil_div(channels, ceil_div(bytes, kBandBytes)) : channels;
    count = channels ? ceil_div(channels, size) : 1;
  }

  template <class T>
  Image<T> channels(Image<T> image, int64_t b) const {
    image.data += b * size * image.sc, image.c = std::min(size, image.c - b * size);
    return image;
  }

  // The entries of block b, after those of the blocks before it were walked. `stops` [2 * rows] is kept between the blocks.
  Entries entries(Entries all, int64_t b, int64_t rows, int32_t* stops, bool* complete) const {
    if (count > 1) {
      all.first = static_cast<int32_t>(b * size);
      if (b > 0) all.begin = stops + (b - 1) % 2 * rows;
      if (b < count - 1) all.stopped = stops + b % 2 * rows;
    }
    if (b == count - 1) all.complete = complete;
    return all;
  }

  int64_t size, count;  // channels of a block, blocks
};

}  // namespace grasp_sparse
