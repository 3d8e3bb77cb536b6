// A product with a matrix does not care what a lane is. Where the pixels of a channel lie one after the other (NCHW), L
// neighbouring ones are a slice vector as they are: a 1x1 convolution then transposes nothing, and mostly copies nothing.
#pragma once

#include <algorithm>
#include <vector>

#include "image.h"

namespace grasp_sparse {

template <class T>
bool has_pixel_runs(const Image<T>& image) {
  return (image.w == 1 || image.sw == 1) && (image.h == 1 || image.sh == image.w);
}

// Fewer whole vectors than this in an image: too few accumulators, the batch makes the better lanes.
constexpr int64_t kFewestVectors = 3;

constexpr int64_t kFewestInRow = 6;

// Vectors of an image that are taken together: as many as a tile has, or somewhat fewer where that leaves less over.
inline int64_t vectors_in_row(int64_t vectors) {
  int64_t best = std::min<int64_t>(vectors, 16);
  for (int64_t width = best; width >= kFewestInRow; --width)
    if (vectors % width < vectors % best) best = width;
  return best;
}

// The image in pieces whose lanes are pixels, and one with the pixels left over, whose lanes are images. Images of equal sizes
// come in equal pieces.
template <class T>
std::vector<Image<T>> pixel_pieces(const Image<T>& i) {
  constexpr int64_t L = kLanes<Compute<std::remove_const_t<T>>>;
  const int64_t pixels = i.h * i.w, vectors = pixels / L, rest = pixels % L, width = vectors_in_row(vectors);
  std::vector<Image<T>> pieces;
  if (vectors < kFewestInRow) {  // few enough for several images in one tile
    pieces.push_back({i.data, L, i.c, i.n, vectors, 1, i.sc, i.sn, L, 0});
  } else {
    pieces.push_back({i.data, L * i.n, i.c, vectors / width, width, 1, i.sc, width * L, L, i.sn});
    if (const int64_t left = vectors % width)
      pieces.push_back({i.data + (vectors - left) * L, L * i.n, i.c, 1, left, 1, i.sc, left * L, L, i.sn});
  }
  if (rest) pieces.push_back({i.data + vectors * L, i.n, i.c, 1, rest, i.sn, i.sc, rest, 1, L * i.sn});
  return pieces;
}

template <class... I>
bool takes_pixel_lanes(const Window& window, const I&... images) {
  const auto fits = [](const auto& i) {
    constexpr int64_t L = kLanes<Compute<std::remove_cv_t<std::remove_pointer_t<decltype(i.data)>>>>;
    return i.h * i.w >= kFewestVectors * L && has_pixel_runs(i);
  };
  return is_pointwise(window) && (fits(images) && ...);
}

// Calls pass(window, add, images …) for each piece of images of equal sizes, or once for all there is where pixels are no lanes.
// `add`: results of pieces before this one are to be kept.
template <class Pass, class First, class... I>
void in_pieces(const Window& window, const Pass& pass, const First& first, const I&... images) {
  if (!takes_pixel_lanes(window, first, images...)) return pass(window, false, first, images...);
  const size_t count = pixel_pieces(first).size();
  for (size_t p = 0; p < count; ++p) {
    const auto piece = pixel_pieces(first)[p];
    pass(Window{{1, 1, 1, 0, piece.h, piece.h}, {1, 1, 1, 0, piece.w, piece.w}}, p > 0, piece, pixel_pieces(images)[p]...);
  }
}

}  // namespace grasp_sparse
