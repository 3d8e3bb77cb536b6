// A band of an image without a halo: the tiles that a walk goes over once, where it gathers from another band.
#pragma once

#include "bands.h"
#include "in_place.h"

namespace grasp_sparse {

template <class S>
struct PlainBand {
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;
  PlainBand(const Image<const S>& image, int64_t rows)
      : rows(rows), in_place(lies_packed(image)), row_step(in_place ? image.sh : image.w * L),
        channel_size(in_place ? image.sc : spread(rows * row_step, L)), size(in_place ? 0 : image.c * channel_size) {}

  // Rows [row, row + rows) of one slice, of these channels; packed into `buffer` if need be.
  const T* band(const Image<const S>& image, int64_t slice, int64_t row, int64_t channel_begin, int64_t channel_end, T* buffer) const {
    if (in_place) return band_in_place(image, slice, row);
    pack(image, slice, row, channel_begin, channel_end, buffer);
    return buffer;
  }

  int64_t rows;
  bool in_place;
  int64_t row_step, channel_size, size;

 private:
  void pack(const Image<const S>& image, int64_t slice, int64_t row, int64_t channel_begin, int64_t channel_end, T* packed) const {
    static thread_local std::vector<int64_t> row_places, col_places;
    row_places.assign(image.h, -1), col_places.resize(image.w);
    for (int64_t i = 0; i < std::min(rows, image.h - row); ++i) row_places[row + i] = i * row_step;
    for (int64_t col = 0; col < image.w; ++col) col_places[col] = col * L;
    const Image<const S> part = image.some_channels(channel_begin, channel_end - channel_begin);
    pack_slice(part, slice, row_places, col_places, false, channel_size, packed + channel_begin * channel_size);
  }
};

}  // namespace grasp_sparse
