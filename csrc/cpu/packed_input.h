// The packed image that fprop and wgrad read: channels x used phases x (band + halo) rows x (width + halo) columns x L.
#pragma once

#include "bands.h"
#include "in_place.h"
#include "lists.h"
#include "moving_band.h"
#include "scratch.h"

namespace grasp_sparse {

template <class T>
class PackedInput {
 public:
  static constexpr int64_t L = kLanes<T>;

  // `channels` of x at a time.
  template <class S>
  PackedInput(const Image<const S>& x, int64_t channels, const Window& window)
      : channels_(channels), window_(window), row_phases_(window.h.used_phases()), col_phases_(window.w.used_phases()),
        width_(window.w.output + window.w.halo()) {
    set_rows(band_rows(window.h.output, window.h.halo(), row_bytes(), band_bytes(x, window), least_rows(window)));
  }

  // No packing where x lies as a packed image does. First of all: bands are then small.
  template <class S>
  void read_in_place(const Image<const S>& x) {
    in_place_ = is_pointwise(window_) && lies_packed(x);
    if (!in_place_) return;
    rows_ = std::min(rows_, rows_in_place(x)), row_step_ = x.sh, channel_size_ = x.sc;
  }
  bool in_place() const { return in_place_; }

  // Rows of output a band covers. A second thread is worth smaller bands when there are fewer slices than threads.
  int64_t choose_band(int64_t slices, int64_t threads) {
    const int64_t wanted = ceil_div(threads, slices);  // bands a slice should have
    set_rows(std::min(rows_, std::max<int64_t>(window_.h.halo() ? 4 : 1, ceil_div(window_.h.output, wanted))));
    return rows_;
  }

  // Bands of at most this many rows of output, where something else than x bounds them.
  void limit_band(int64_t rows) { set_rows(std::min(rows_, rows)); }

  int64_t rows() const { return rows_; }
  int64_t row_step() const { return row_step_; }
  int64_t size() const { return in_place_ ? 0 : channels_ * channel_size_; }

  // What a pass over the packed channels walks: the columns themselves where there is one tap, else their places, looked up
  // in `list`. Throws std::runtime_error on corrupt indices, of a single tap on corrupt pointers only. Bands are cut before.
  Entries entries(const Walk& walk, AlignedBuffer& list) {
    if (window_.taps() == 1 && !walk.has_blocks) {
      check_pointers(walk);
      return {walk.col, walk.ptr, walk.ptr + 1, walk.ptr, false, 0, static_cast<uint32_t>(channels_), channel_size_, nullptr, nullptr};
    }
    if (!walk.has_blocks) band_rows_ = BandRows(rows_, window_.h.output, height_, window_.w.output, walk.nnz);
    const int64_t lists = band_rows_.lists();
    int32_t* places = list.reserve<int32_t>(lists * walk.nnz);
    build_row_lists(walk, walk.has_blocks ? chunk_places(walk.block.inputs) : column_places(lists), lists, places);
    return checked_entries(places, walk.ptr);
  }

  // How the band of output rows from `row` on lies; after entries().
  Ring ring(int64_t row) const { return band_rows_.from(row); }

  // Of a walk over blocks whose outputs number `outputs`; of one over single weights, none.
  Blocks blocks(const Walk& walk, int64_t outputs) const {
    return walk.has_blocks ? blocks_of(walk.block, outputs, channels_, channel_size_, walk.permutation) : Blocks{};
  }

  // What output rows [row, row + rows()) of one slice read, packed into `buffer`, which holds `held`, if need be.
  template <class S>
  const T* band(const Image<const S>& x, int64_t slice, int64_t row, T* buffer, MovingBand::Held& held) const {
    if (in_place_) return band_in_place(x, slice, row);
    pack(x, slice, row, buffer, held);
    return buffer;
  }

 private:
  template <class S>
  void pack(const Image<const S>& x, int64_t slice, int64_t row, T* dst, MovingBand::Held& held) const {
    static thread_local std::vector<int64_t> row_places, col_places;
    const MovingBand::Shape shape{x.c, channel_size_, phases_h(), phases_w(), phase_size_, height_, row_step(), band_rows_};
    const bool fresh = held.nothing();
    const int64_t first = MovingBand::advance(shape, held, slice, row, rows_, dst);
    axis_places(window_.h, row_phases_, phases_w() * phase_size_, row, first, height_, row_step(), band_rows_.ring, row_places);
    axis_places(window_.w, col_phases_, phase_size_, 0, 0, width_, L, 0, col_places);
    pack_rest(x, slice, shape, held, fresh, first, row_places, col_places, dst);
  }

  // Place of every tap within a packed channel, relative to an output pixel; in a ring, to the first of a row that begins there.
  std::vector<int64_t> tap_places(int64_t begin = 0) const {
    std::vector<int64_t> places;
    for (int64_t r = 0; r < window_.h.kernel; ++r)
      for (int64_t s = 0; s < window_.w.kernel; ++s) {
        const int64_t phase = index_of(row_phases_, window_.h.phase(r)) * phases_w() + index_of(col_phases_, window_.w.phase(s));
        const int64_t row = begin + window_.h.shift(r);
        places.push_back(phase * phase_size_ + band_rows_.at(row, row) * row_step() + window_.w.shift(s) * L);
      }
    return places;
  }
  // Of every column of the weight matrix [out, in * kh * kw], for rows that begin at 0, at 1, ….
  const int32_t* column_places(int64_t beginnings) const {
    int32_t *const places = reserve_places(beginnings * channels_), *to = places;
    for (int64_t begin = 0; begin < beginnings; ++begin) {
      const std::vector<int64_t> taps = tap_places(begin);
      for (int64_t channel = 0; channel < channels_; ++channel)
        for (int64_t tap : taps) *to++ = static_cast<int32_t>(channel * channel_size_ + tap);
    }
    *to = 0;  // an index that fails its check reads place 0 of an empty weight
    return places;
  }
  // Of the first channel of every chunk of `inputs` channels, tap after tap.
  const int32_t* chunk_places(int64_t inputs) const {
    int32_t *const places = reserve_places(ceil_div(channels_, inputs)), *to = places;
    for (int64_t tap : tap_places())
      for (int64_t channel = 0; channel < channels_; channel += inputs) *to++ = static_cast<int32_t>(channel * channel_size_ + tap);
    *to = 0;
    return places;
  }
  int32_t* reserve_places(int64_t chunks) const {
    return CallScratch::mine().places.reserve<int32_t>(chunks * window_.taps() + 1);
  }
  int64_t phases_h() const { return static_cast<int64_t>(row_phases_.size()); }
  int64_t phases_w() const { return static_cast<int64_t>(col_phases_.size()); }
  int64_t row_bytes() const { return channels_ * phases_h() * phases_w() * width_ * kSliceBytes; }
  void set_rows(int64_t rows) {
    rows_ = rows;
    if (in_place_) return;
    height_ = rows + window_.h.halo();
    check_band({channels_, phases_h(), phases_w(), height_, width_, L});
    row_step_ = width_ * L, phase_size_ = height_ * row_step_;
    channel_size_ = spread(phases_h() * phases_w() * phase_size_, L);
    check_band({size()});
  }
  static int64_t index_of(const std::vector<int64_t>& phases, int64_t phase) {
    return std::find(phases.begin(), phases.end(), phase) - phases.begin();
  }

  int64_t channels_;
  Window window_;
  std::vector<int64_t> row_phases_, col_phases_;
  int64_t width_, rows_, height_, row_step_, phase_size_, channel_size_;
  bool in_place_ = false;
  BandRows band_rows_;
};

}  // namespace grasp_sparse
