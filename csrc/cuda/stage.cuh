// Staging: the part of some input channels that a tile of outputs sees, copied into shared memory. It lies there as lines of
// `images` neighbouring images each, [channel, line of h, line of w, image]; what lies outside the input is zero. Copies
// are asynchronous, so that the next chunk of channels arrives while this one is worked on.
#pragma once

#include "device.h"
#include "gather.h"

namespace grasp_sparse::cuda {

// A tile of outputs: th * tw places of `images` images (powers of two).
struct Tiling {
  StagedAxis h, w;
  int input_h, input_w;
  int images_log2, tile_w_log2;
  int64_t batch;
  int64_t batch_tiles;
  int origin_step_h, origin_step_w;  // input places from tile to tile
  Divisor plane, lines_w;            // of a chunk's lines: a channel's, and those of one line of h
  int channels, chunk, chunks;
  int copy_bytes;                    // of one asynchronous copy: what alignment and batch allow

  __device__ int images() const { return 1 << images_log2; }
  __device__ int plane_lines() const { return h.lines * w.lines; }
  __device__ int buffer_elements() const { return (chunk * plane_lines()) << images_log2; }
  int64_t tiles() const { return batch_tiles * h.tiles * w.tiles; }
};

// Which tile a block works on; neighbouring blocks have neighbouring places of the same images.
struct TileAt {
  int h, w;
  int64_t image;  // the first

  __device__ TileAt(const Tiling& t, int64_t tile) {
    w = static_cast<int>(tile % t.w.tiles), tile /= t.w.tiles;
    h = static_cast<int>(tile % t.h.tiles), tile /= t.h.tiles;
    image = tile << t.images_log2;
  }
};

// The V outputs that one lane works on: neighbouring images of one place.
struct PlaceAt {
  int h, w;          // output place in the image
  int64_t image;
  int staged;        // where its inputs begin in the staged chunk, in elements
  bool valid;

  // Of output `index` of the tile.
  __device__ PlaceAt(const Tiling& t, const GatherAxis& gh, const GatherAxis& gw, const TileAt& tile, int index) {
    const int n = index & (t.images() - 1), place = index >> t.images_log2;
    const int pw = place & ((1 << t.tile_w_log2) - 1), ph = place >> t.tile_w_log2;
    h = tile.h * t.h.tile + ph, w = tile.w * t.w.tile + pw, image = tile.image + n;
    valid = ph < t.h.tile && h < gh.places && w < gw.places && image < t.batch;
    // A place that is none sees what the first of its tile sees.
    staged = valid ? ((ph * t.h.place_line * t.w.lines + pw * t.w.place_line) << t.images_log2) + n : 0;
  }
};

__device__ inline int staged_input(const StagedAxis& a, int first, int line) {
  return first + (line / a.period) * a.group_step + (line % a.period) * a.line_step;
}

template <class S, int Bytes>
__device__ inline void stage_lines(const Tiling& t, const S* x, const TileAt& tile, int first_channel, S* to) {
  constexpr int kElements = Bytes / static_cast<int>(sizeof(S));
  const int parts_log2 = t.images_log2 - (kElements == 1 ? 0 : kElements == 2 ? 1 : kElements == 4 ? 2 : 3);
  const int first_h = t.h.base + tile.h * t.origin_step_h, first_w = t.w.base + tile.w * t.origin_step_w;
  const int count = (min(t.chunk, t.channels - first_channel) * t.plane_lines()) << parts_log2;
  for (int i = threadIdx.x; i < count; i += blockDim.x) {
    const int line = i >> parts_log2, part = i & ((1 << parts_log2) - 1);
    const int channel = t.plane.divide(line), rest = line - channel * t.plane_lines();
    const int line_h = t.lines_w.divide(rest), line_w = rest - line_h * t.w.lines;
    const int h = t.h.group_step ? staged_input(t.h, first_h, line_h) : first_h + line_h;
    const int w = t.w.group_step ? staged_input(t.w, first_w, line_w) : first_w + line_w;
    const int64_t image = tile.image + part * kElements;
    const bool inside = h >= 0 && h < t.input_h && w >= 0 && w < t.input_w && image < t.batch;
    const int64_t from = ((static_cast<int64_t>(first_channel + channel) * t.input_h + h) * t.input_w + w) * t.batch + image;
    copy_async<Bytes>(to + (line << t.images_log2) + part * kElements, inside ? x + from : x, inside);
  }
}

// By all threads of the block; committed as one group, an empty one past the last chunk.
template <class S>
__device__ inline void stage(const Tiling& t, const S* x, const TileAt& tile, int chunk, S* to) {
  const int first = chunk * t.chunk;
  if (chunk < t.chunks) {
    if (t.copy_bytes == 16)
      stage_lines<S, 16>(t, x, tile, first, to);
    else if (t.copy_bytes == 8)
      stage_lines<S, 8>(t, x, tile, first, to);
    else if (sizeof(S) < 8 && t.copy_bytes == 4)
      stage_lines<S, sizeof(S) < 8 ? 4 : 8>(t, x, tile, first, to);
    else if (sizeof(S) == 2)
      stage_lines<S, sizeof(S) == 2 ? 2 : 8>(t, x, tile, first, to);
  }
  commit_copies();
}

}  // namespace grasp_sparse::cuda
