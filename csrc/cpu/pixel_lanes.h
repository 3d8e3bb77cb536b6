// A product with a matrix does not care what a lane is. Where the pixels of a channel lie one after the other (NCHW), L
// neighbouring ones are a slice vector as they are: a 1x1 convolution then transposes nothing, and mostly copies nothing. Where the
// channels of a pixel do (channels_last), the batch is a matrix of pixels by channels, and packing a panel of it reads one piece
// of memory instead of L.
#pragma once

#include <algorithm>
#include <vector>

#include "panels.h"

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

// The image in pieces whose lanes are pixels, and one with the pixels left over, whose lanes are images. Images of equal sizes come
// in equal pieces. Gate and norm stay behind: no image that lies so has one.
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

template <class T>
bool takes_pixel_runs(const Image<T>& i) {
  return i.h * i.w >= kFewestVectors * kLanes<Compute<std::remove_const_t<T>>> && has_pixel_runs(i);
}

// Small images in whole slices are better lanes than their pixels: the pieces of memory are small anyhow, and panels leave some over
// (512 -> 2048 channels at 7x7, batch 16, 95 %: 3.4 and 3.8 ms).
constexpr int64_t kSmallImage = 64;

// Whether the pixels of all images lie at equal distances, and are worth being lanes.
template <class T>
bool takes_pixel_rows(const Image<T>& i) {
  const bool alike = i.sc == 1 && i.w > 1 && (i.h == 1 || i.sh == i.w * i.sw) && (i.n == 1 || i.sn == i.h * i.w * i.sw);
  return alike && (i.n % kLanes<Compute<std::remove_const_t<T>>> != 0 || i.h * i.w > kSmallImage);
}

template <class T>
std::vector<Image<T>> panels_of_pixels(const Image<T>& i, int64_t most) {
  const Matrix matrix{i.n * i.h * i.w, i.c, i.sw, i.sc};
  std::vector<Image<T>> panels;
  for (const Piece& p : pieces(matrix.rows, most, kLanes<Compute<std::remove_const_t<T>>>)) {
    panels.push_back(image_of(i.data, matrix, p));
    panels.back().norm = i.norm.from(panels.back().data - i.data, 0);
  }
  return panels;
}

// Calls pass(window, add, images …) for each piece of images of equal sizes, or once for all there is where pixels are no lanes.
// `add`: results of pieces before this one are to be kept.
template <class Pass, class First, class... I>
void in_pieces(const Window& window, const Pass& pass, const First& first, const I&... images) {
  const auto run = [&](const auto& pieces_of) {
    const size_t count = pieces_of(first).size();
    for (size_t p = 0; p < count; ++p) {
      const auto piece = pieces_of(first)[p];
      pass(Window{{1, 1, 1, 0, piece.h, piece.h}, {1, 1, 1, 0, piece.w, piece.w}}, p > 0, piece, pieces_of(images)[p]...);
    }
  };
  if (is_pointwise(window) && takes_pixel_runs(first) && (takes_pixel_runs(images) && ...))
    return run([](const auto& image) { return pixel_pieces(image); });
  if (is_pointwise(window) && takes_pixel_rows(first) && (takes_pixel_rows(images) && ...)) {
    const auto packed_channels = []<class T>(const Image<T>& image) { return std::is_const_v<T> ? image.c : 0; };
    const int64_t columns = panel_columns(std::max({packed_channels(first), packed_channels(images)...}), kLeastColumns);
    return run([&](const auto& image) { return panels_of_pixels(image, columns); });
  }
  pass(window, false, first, images...);
}

}  // namespace grasp_sparse
