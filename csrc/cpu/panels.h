// A matrix [rows, features] is an image: L rows are the lanes, groups of L rows lie side by side as columns (one panel), panels
// lie below one another. So the three passes over images are the only loops.
#pragma once

#include <algorithm>
#include <vector>

#include "image.h"
#include "parallel.h"

namespace grasp_sparse {

struct Matrix {
  int64_t rows, features, row_stride, feature_stride;
};

// Columns of a panel: what keeps its packed features (64 bytes each) in L2, at least 8, so that a weight's own loads are
// shared by several multiply-adds; the passes take more features than then fit in blocks. The product of blocks shares loads
// among outputs as well, and their sampled product would fold sums of fewer pixels too often.
constexpr int64_t kLeastColumns = 8, kLeastColumnsOfBlocks = 4, kMostColumns = 16;

inline int64_t panel_columns(int64_t features, int64_t least, int64_t most = kMostColumns, int64_t bytes = 512 << 10) {
  return std::clamp<int64_t>(bytes / (kSliceBytes * std::max<int64_t>(features, 1)), least, most);
}

inline int64_t product_columns(const CsrView& csr, int64_t features) {
  return panel_columns(features, csr.has_blocks ? kLeastColumnsOfBlocks : kLeastColumns);
}

inline int64_t sampled_columns(const CsrView& csr, int64_t features) {
  return panel_columns(features, csr.has_blocks ? kMostColumns : kLeastColumns);
}

// One rectangular piece of a matrix: rows [first, first + panels * columns * lanes).
struct Piece {
  int64_t first, panels, columns, lanes;
};

// Columns of the panels of a batch: as many as `most`, or somewhat fewer where that leaves less over. Of a small batch two
// narrow panels rather than one: threads that share a panel pack it twice. It must not depend on the number of threads, sums
// would; two is what is assumed.
inline int64_t panel_width(int64_t groups, int64_t most) {
  most = std::clamp<int64_t>(ceil_div(groups, 2), 4, most);
  const auto cost = [&](int64_t width) { return ceil_div(groups / width, 2) * width + groups % width; };
  int64_t best = most;
  for (int64_t width = most; width * 4 >= most * 3; --width)
    if (cost(width) < cost(best)) best = width;
  return best;
}

// Whole panels, the columns left over, the rows left over; of no rows, one empty piece.
inline std::vector<Piece> pieces(int64_t rows, int64_t most, int64_t L) {
  const int64_t groups = rows / L, columns = panel_width(groups, most);
  const int64_t panels = groups / columns, rest = groups % columns;
  std::vector<Piece> out;
  if (panels) out.push_back({0, panels, columns, L});
  if (rest) out.push_back({panels * columns * L, 1, rest, L});
  if (rows % L || rows == 0) out.push_back({groups * L, 1, 1, rows % L});
  return out;
}

template <class T>
Image<T> image_of(T* data, const Matrix& m, const Piece& p) {
  constexpr int64_t L = kLanes<Compute<std::remove_const_t<T>>>;
  return {data + p.first * m.row_stride, p.lanes, m.features, p.panels, p.columns,
          m.row_stride, m.feature_stride, p.columns * L * m.row_stride, L * m.row_stride, L * m.row_stride};
}

inline Window point(const Piece& p) {
  return {{1, 1, 1, 0, p.panels, p.panels}, {1, 1, 1, 0, p.columns, p.columns}};
}

}  // namespace grasp_sparse
