// Blocks of channels, for bands too large for L2: where even one row of pixels, packed, would not stay there, a block of its
// channels does, and the pass walks the weights of one block after the other.
#pragma once

#include "bands.h"
#include "lists.h"
#include "scratch.h"

namespace grasp_sparse {

constexpr int64_t kRowBytes = 1 << 20;  // of a packed row of pixels; smaller ones are not cut

class ChannelBlocks {
 public:
  // Cuts the walk, in the scratch of the calling thread. `channels` are its columns / taps.
  ChannelBlocks(const Walk& walk, int64_t channels, const Window& window) : walk_(walk) {
    const int64_t bytes = channels * (window.w.output + window.w.halo()) * kSliceBytes;
    if (!window.h.halo() && bytes > kRowBytes && columns_rise(walk)) size = ceil_div(channels, ceil_div(bytes, kBandBytes));
    else size = channels;
    count = channels ? ceil_div(channels, size) : 1;
    if (count == 1) return;
    cuts_ = CallScratch::mine().cuts.reserve<int32_t>((count + 1) * walk.rows);
    build_cuts(walk, size * window.taps(), count, cuts_);
  }

  // The entries of every row that belong to block b.
  const int32_t* row_begin(int64_t b) const { return cuts_ ? cuts_ + b * walk_.rows : walk_.ptr; }
  const int32_t* row_end(int64_t b) const { return cuts_ ? cuts_ + (b + 1) * walk_.rows : walk_.ptr + 1; }

  template <class T>
  Image<T> channels(Image<T> image, int64_t b) const {
    image.data += b * size * image.sc, image.c = std::min(size, image.c - b * size);
    return image;
  }

  int64_t size, count;  // channels of a block, blocks

 private:
  Walk walk_;
  int32_t* cuts_ = nullptr;
};

}  // namespace grasp_sparse
