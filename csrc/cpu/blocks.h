// Blocks of channels, for bands too large for L2: where even one row of pixels, packed, would not stay there, a block of its
// channels does, and the pass walks the weights of one block after the other. Only where there is one tap: there entries of a
// row whose columns rise come block after block.
#pragma once

#include "bands.h"

namespace grasp_sparse {

constexpr int64_t kRowBytes = 1 << 20;  // of a packed row of pixels; smaller ones are not cut

// Entries that a row has in a block, on average, at least: a sum that waits for the next block costs a tile's stores and loads.
// Rows of 15 of 4096 features, batch 256, in one block rather than in four: 0.52 -> 0.40 ms.
constexpr int64_t kFewestEntries = 16;
constexpr int64_t kMostBytes = 4 << 20;  // of a block all the same

struct ChannelBlocks {
  // Entries that are blocks of weights take all channels at once: they load a pixel once for several outputs, and gain little here.
  ChannelBlocks(int64_t channels, const Window& window, const Walk& walk) : all_channels(channels) {
    const int64_t bytes = channels * window.w.output * kSliceBytes;
    const int64_t worth = walk.nnz / std::max<int64_t>(1, kFewestEntries * walk.rows);
    const int64_t blocks = std::clamp(worth, ceil_div(bytes, kMostBytes), ceil_div(bytes, kBandBytes));
    size = window.taps() == 1 && bytes > kRowBytes && !walk.has_blocks ? ceil_div(channels, blocks) : channels;
    count = channels ? ceil_div(channels, size) : 1;
  }

  template <class T>
  Image<T> channels(const Image<T>& image, int64_t b) const {
    return image.some_channels(b * size, std::min(size, image.c - b * size));
  }

  // The entries of block b, after those of the blocks before it were walked. `stops` [2 * rows] is kept between the blocks.
  Entries entries(Entries all, int64_t b, int64_t rows, int32_t* stops, bool* complete) const {
    if (count > 1) {
      all.first = static_cast<int32_t>(b * size);
      all.count = static_cast<uint32_t>(std::min(size, all_channels - b * size));  // the last block may be a smaller one
      if (b > 0) all.begin = stops + (b - 1) % 2 * rows;
      if (b < count - 1) all.stopped = stops + b % 2 * rows;
    }
    if (b == count - 1) all.complete = complete;
    return all;
  }

  int64_t all_channels, size, count;  // channels, those of a block, blocks
};

}  // namespace grasp_sparse
