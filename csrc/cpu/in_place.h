// An image whose lanes lie side by side, as packed ones do, is read where it is: 1x1 convolutions over pixels (pixel_lanes.h),
// feature-major matrices.
#pragma once

#include <algorithm>
#include <type_traits>

#include "image.h"

namespace grasp_sparse {

// In whole lines, and its channels not so far apart that they meet in few sets of the caches. A pass that pads nothing and skips
// nothing cannot tell such an image from a packed one.
template <class S>
bool lies_packed(const Image<const S>& x) {
  constexpr int64_t L = kLanes<Compute<S>>;
  const auto lines = [](int64_t elements) { return elements % L == 0; };
  return std::is_same_v<S, Compute<S>> && !x.gate && !x.norm.x && x.sn == 1 && x.n % L == 0 && (x.w == 1 || x.sw == L) && lines(x.sc) &&
         lines(x.sh) && lines(x.ss) && x.sc / L % 32 != 0 && x.c * x.sc < INT32_MAX && reinterpret_cast<uintptr_t>(x.data) % kSliceBytes == 0;
}

// Rows of a band: those of one tile, for nothing is gained by taking more; fewer where this band and the next, fetched ahead,
// would not both stay in L2 (512 -> 128 channels at 28x28, 99 %: 5.9 -> 4.1 ms).
template <class S>
int64_t rows_in_place(const Image<const S>& x) {
  constexpr int64_t kTile = 16, kBytes = 256 << 10;
  const int64_t width = std::max<int64_t>(1, x.w), fitting = kBytes / (kSliceBytes * width * std::max<int64_t>(1, x.c));
  return std::clamp<int64_t>(std::min(fitting, kTile / width), 1, std::max<int64_t>(1, x.h));
}

// The first pixel of a band. Of an image that is not computed with as it is stored there is none, and nobody asks.
template <class S>
const Compute<S>* band_in_place(const Image<const S>& x, int64_t slice, int64_t row) {
  if constexpr (std::is_same_v<S, Compute<S>>)
    return x.slice(slice) + row * x.sh;
  else
    return nullptr;
}

// The band `index` of the image, to be read later; bands of a slice follow one another.
template <class S>
Ahead ahead_in_place(const Image<const S>& x, int64_t index, int64_t bands, int64_t rows) {
  const int64_t row = index % bands * rows, size = sizeof(S);
  return {reinterpret_cast<const char*>(x.slice(index / bands) + row * x.sh), size * x.sc, size * x.sh, static_cast<int>(x.c),
          static_cast<int>(std::min(rows, x.h - row)), static_cast<int>(x.w)};
}

}  // namespace grasp_sparse
