// The packed image that fprop and wgrad read: channels x used phases x (band + halo) rows x (width + halo) columns x L.
#pragma once

#include "bands.h"

namespace grasp_sparse {

template <class T>
class PackedInput {
 public:
  static constexpr int64_t L = kLanes<T>;

  PackedInput(int64_t channels, const Window& window)
      : channels_(channels), window_(window), row_phases_(window.h.used_phases()), col_phases_(window.w.used_phases()),
        width_(window.w.output + window.w.halo()) {
    set_rows(band_rows(window.h.output, window.h.halo(), row_bytes()));
  }

  // Rows of output a band covers. A second thread is worth smaller bands when there are fewer slices than threads.
  int64_t choose_band(int64_t slices, int64_t threads) {
    const int64_t wanted = ceil_div(threads, slices);  // bands a slice should have
    set_rows(std::min(rows_, std::max<int64_t>(window_.h.halo() ? 4 : 1, ceil_div(window_.h.output, wanted))));
    return rows_;
  }

  // Bands of at most this many rows of output, where something else than x bounds them.
  void limit_band(int64_t rows) { set_rows(std::min(rows_, rows)); }

  int64_t rows() const { return rows_; }
  int64_t row_step() const { return width_ * L; }
  int64_t size() const { return channels_ * channel_size_; }

  // Place, relative to an output pixel, of every column of the weight matrix [out, in * kh * kw]; in a block of channels if
  // only that is packed at a time.
  std::vector<int32_t> column_places(int64_t cols) const {
    std::vector<int32_t> places(cols + 1);  // one more: an index that fails its check reads place 0 of an empty weight
    const int64_t kw = window_.w.kernel, taps = window_.taps();
    for (int64_t col = 0; col < cols; ++col) {
      const int64_t channel = col / taps, r = col % taps / kw, s = col % kw;
      const int64_t row_phase = index_of(row_phases_, window_.h.phase(r)), col_phase = index_of(col_phases_, window_.w.phase(s));
      places[col] = static_cast<int32_t>(channel % channels_ * channel_size_ + (row_phase * phases_w() + col_phase) * phase_size_ +
                                         window_.h.shift(r) * row_step() + window_.w.shift(s) * L);
    }
    return places;
  }

  // Packs what output rows [row, row + rows()) of one slice read.
  template <class S>
  void pack(const Image<const S>& x, int64_t slice, int64_t row, T* dst) const {
    static thread_local std::vector<int64_t> row_places, col_places;
    axis_places(window_.h, row_phases_, phases_w() * phase_size_, row, height_, row_step(), row_places);
    axis_places(window_.w, col_phases_, phase_size_, 0, width_, L, col_places);
    // Without padding and phases every packed place has its source, unless the last band is short.
    const int64_t places = height_ * width_ * static_cast<int64_t>(row_phases_.size()) * phases_w();
    pack_slice(x, slice, row_places, col_places, used(row_places) * used(col_places) < places, channel_size_, dst);
  }

 private:
  int64_t phases_w() const { return static_cast<int64_t>(col_phases_.size()); }
  int64_t row_bytes() const {
    return channels_ * static_cast<int64_t>(row_phases_.size()) * phases_w() * width_ * kSliceBytes;
  }
  void set_rows(int64_t rows) {
    rows_ = rows;
    height_ = rows + window_.h.halo();
    phase_size_ = height_ * row_step();
    channel_size_ = spread(static_cast<int64_t>(row_phases_.size()) * phases_w() * phase_size_, L);
    check_band(size());
  }
  static int64_t index_of(const std::vector<int64_t>& phases, int64_t phase) {
    return std::find(phases.begin(), phases.end(), phase) - phases.begin();
  }

  int64_t channels_;
  Window window_;
  std::vector<int64_t> row_phases_, col_phases_;
  int64_t width_, rows_, height_, phase_size_, channel_size_;
};

}  // namespace grasp_sparse
