// How a task goes from one band of a slice to the next.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bands.h"

namespace grasp_sparse {

// The longest lists of places for which rows lie in a ring, all beginnings together: beside them a band has to stay in L2, and with
// so many weights moving its rows is a small part of the work.
constexpr int64_t kRingBytes = 512 << 10;
constexpr int64_t kRingColumns = 8;

// The rows of bands, in a ring or one after the other.
struct BandRows {
  BandRows() = default;
  // Of bands of `rows` of `all` rows of output, `cols` wide, and `height` rows of input. Narrow images are worked on in tiles of several
  // rows, which have to lie one after the other.
  BandRows(int64_t rows, int64_t all, int64_t height, int64_t cols, int64_t nnz) : nnz(nnz) {
    const bool moves = height > rows && rows < all;
    if (moves && cols > kRingColumns && height * nnz * static_cast<int64_t>(sizeof(int32_t)) <= kRingBytes) ring = height;
  }

  // Lists of places: one for every beginning.
  int64_t lists() const { return std::max<int64_t>(1, ring); }
  // Where row `row` of the image lies, of which `in_band` have gone before in the band.
  int64_t at(int64_t row, int64_t in_band) const { return ring ? row % ring : in_band; }
  Ring from(int64_t row) const { return ring ? Ring{static_cast<int>(ring), static_cast<int>(row % ring), nnz} : Ring{}; }

  int64_t ring = 0;  // rows of it; 0: none
  int64_t nnz = 0;
};

// A packed band, [channels][phases][height rows] of row_step elements, and what a task leaves in its buffer between two of them:
// rows that both read stay where they are in a ring, or are moved, not packed again, and only the rows where padding takes the place
// of pixels are zeroed.
class MovingBand {
 public:
  struct Shape {
    int64_t channels, channel_size, row_phases, col_phases, phase_size, height, row_step;
    BandRows rows;
  };
  // The band in the buffer: rows from `row` on of a slice, or nothing yet.
  struct Held {
    int64_t slice = -1, row = 0;
    bool nothing() const { return slice < 0; }
  };

  // Moves what the band `rows` rows on shares with the one that is held, if need be. Returns the first row left to pack.
  template <class T>
  static int64_t advance(const Shape& s, Held& held, int64_t slice, int64_t row, int64_t rows, T* packed) {
    const int64_t shared = held.slice == slice && held.row + rows == row ? s.height - rows : 0;
    held = {slice, row};
    for (int64_t c = 0; shared > 0 && !s.rows.ring && c < s.channels; ++c)
      for (int64_t phase = 0; phase < s.row_phases * s.col_phases; ++phase) {
        T* to = packed + c * s.channel_size + phase * s.phase_size;
        std::memmove(to, to + rows * s.row_step, shared * s.row_step * sizeof(T));
      }
    return shared;
  }

  // Zeroes the rows of the held band from `first` on that are nobody's place. Columns without a source were zeroed with the first
  // band, and stay so.
  template <class T>
  static void zero_rows(const Shape& s, const Held& held, int64_t first, const std::vector<int64_t>& row_places, T* packed) {
    static thread_local std::vector<char> has_source;
    has_source.assign(s.row_phases * s.height, 0);
    const int64_t row_phase_size = s.col_phases * s.phase_size;
    for (int64_t place : row_places)
      if (place >= 0) has_source[place / row_phase_size * s.height + place % row_phase_size / s.row_step] = 1;
    for (int64_t phase = 0; phase < s.row_phases; ++phase)
      for (int64_t i = first; i < s.height; ++i) {
        const int64_t row = s.rows.at(held.row + i, i);
        if (has_source[phase * s.height + row]) continue;
        for (int64_t c = 0; c < s.channels; ++c) {
          T* const at = packed + c * s.channel_size + phase * row_phase_size + row * s.row_step;
          for (int64_t col = 0; col < s.col_phases; ++col) std::fill_n(at + col * s.phase_size, s.row_step, T(0));
        }
      }
  }
};

// Packs what a band lacks: all of a `fresh` one, else its rows from `first` on.
template <class S>
void pack_rest(const Image<const S>& x, int64_t slice, const MovingBand::Shape& shape, const MovingBand::Held& held, bool fresh,
               int64_t first, const std::vector<int64_t>& row_places, const std::vector<int64_t>& col_places, Compute<S>* packed) {
  // Without padding and phases every packed place has its source, unless the last band is short.
  const int64_t places = shape.row_phases * shape.col_phases * shape.height * shape.row_step / kLanes<Compute<S>>;
  const bool zero = fresh && used(row_places) * used(col_places) < places;
  if (!fresh) MovingBand::zero_rows(shape, held, first, row_places, packed);
  pack_slice(x, slice, row_places, col_places, zero, shape.channel_size, packed);
}

}  // namespace grasp_sparse
