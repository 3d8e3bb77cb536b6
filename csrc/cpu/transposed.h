// dx = convᵀ(g, W): the product on the transposed lists, over g packed with its halo.
// Padded input position p = place * stride + phase receives, from every tap t of that phase, output place - shift(t):
// so each phase is an unstrided convolution of its own, with its own list, writing every stride-th pixel of dx.
#pragma once

#include "bands.h"
#include "in_place.h"
#include "lists.h"
#include "moving_band.h"
#include "scratch.h"

namespace grasp_sparse {

// One axis of g as the product reads it: places [first, end) of any phase, and the halo before them.
struct GradAxis {
  explicit GradAxis(const Axis& a) : axis(a), first(INT64_MAX), end(INT64_MIN) {
    for (int64_t i = 0; i < std::min(a.input, a.stride); ++i) {  // neighbouring pixels have neighbouring phases
      const int64_t phase = (i + a.pad_begin) % a.stride;
      phases.push_back(phase);
      first = std::min(first, a.first_place(phase));
      end = std::max(end, a.end_place(phase));
    }
  }
  int64_t count() const { return end - first; }
  // Where output `place` lies in a packed band that begins at place `begin`.
  int64_t index(int64_t place, int64_t begin) const { return place - begin + axis.halo(); }
  // Where the outputs go that packed rows [first, end) of a band from place `begin` on hold.
  void places(int64_t begin, int64_t first, int64_t end, int64_t step, const BandRows& rows, std::vector<int64_t>& out) const {
    out.assign(axis.output, -1);
    const int64_t top = begin - axis.halo();
    for (int64_t i = std::max<int64_t>(0, top + first); i < std::min(axis.output, top + end); ++i)
      out[i] = rows.at(i + axis.halo(), index(i, begin)) * step;
  }
  Axis axis;
  std::vector<int64_t> phases;  // those that some input pixel has
  int64_t first, end;
};

// The lists: one group of taps for every pair of phases that has any, and an empty one, the first, for all that have none.
struct TapGroups {
  struct Pair {
    int64_t phase_h, phase_w, group;
  };
  TapGroups(const GradAxis& h, const GradAxis& w) {
    for (int64_t phase_h : h.phases) {
      for (int64_t phase_w : w.phases) {
        const size_t before = taps.size();
        for (int64_t r = 0; r < h.axis.kernel; ++r)
          for (int64_t s = 0; s < w.axis.kernel; ++s)
            if (h.axis.phase(r) == phase_h && w.axis.phase(s) == phase_w) taps.push_back(r * w.axis.kernel + s);
        if (taps.size() > before) ptr.push_back(static_cast<int64_t>(taps.size()));
        pairs.push_back({phase_h, phase_w, taps.size() > before ? count() - 1 : 0});
      }
    }
  }
  int64_t count() const { return static_cast<int64_t>(ptr.size()) - 1; }
  std::vector<Pair> pairs;
  std::vector<int64_t> ptr{0, 0}, taps;
};

constexpr int64_t kStagedBytes = 256 << 10;  // of channels of dx, in run_staged

template <class S>
class TransposedProduct {
 public:
  using T = Compute<S>;
  static constexpr int64_t L = kLanes<T>;

  // dx is not empty.
  TransposedProduct(const Window& window, const Image<S>& dx, int64_t g_channels)
      : window_(window), dx_(dx), h_(window.h), w_(window.w), groups_(h_, w_), g_channels_(g_channels),
        row_step_((w_.count() + window.w.halo()) * L) {
    const int64_t row_bytes = g_channels * row_step_ * static_cast<int64_t>(sizeof(T));
    set_rows(band_rows(h_.count(), window.h.halo(), row_bytes, band_bytes(dx, window), least_rows(window)));
  }

  const GradAxis& h() const { return h_; }
  int64_t rows() const { return rows_; }
  int64_t bands() const { return ceil_div(h_.count(), rows_); }
  int64_t size() const { return in_place_ ? 0 : g_channels_ * channel_size_; }
  int64_t row_step() const { return row_step_; }
  int64_t channel_size() const { return channel_size_; }
  // Element of a packed channel that holds output pixel (row, 0) in the band that begins at place `begin`; in a ring, (ring().first, 0).
  int64_t pixel(int64_t row, int64_t begin) const { return (band_rows_.ring ? 0 : h_.index(row, begin)) * row_step_ + w_.index(0, w_.first) * L; }
  // Where in the ring output row `row` lies, if there is one; after build().
  Ring ring(int64_t row) const { return band_rows_.from(row + window_.h.halo()); }

  // No packing where g lies as a packed image does. First of all: bands are then small.
  void read_in_place(const Image<const S>& g) {
    in_place_ = is_pointwise(window_) && lies_packed(g);
    if (!in_place_) return;
    rows_ = std::min(rows_, rows_in_place(g)), row_step_ = g.sh, channel_size_ = g.sc;
  }
  bool in_place() const { return in_place_; }

  void limit_band(int64_t rows) { set_rows(std::min(rows_, rows)); }

  // Builds the lists, in the scratch of the calling thread; checks every index.
  void build(const CsrView& csr, const T* values) {
    CallScratch& call = CallScratch::mine();
    if (!csr.has_blocks) band_rows_ = BandRows(rows_, h_.count(), rows_ + window_.h.halo(), w_.count(), csr.nnz);
    const int64_t lists = band_rows_.lists();
    int32_t* const row_place = call.places.template reserve<int32_t>(csr.rows + 1 + lists * window_.taps());
    int32_t* const tap_place = row_place + csr.rows + 1;
    for (int64_t row = 0; row < csr.rows; ++row) row_place[row] = static_cast<int32_t>(row * csr.bh * channel_size_);
    row_place[csr.rows] = 0;
    for (int64_t begin = 0; begin < lists; ++begin)
      for (int64_t r = 0; r < window_.h.kernel; ++r)
        for (int64_t s = 0; s < window_.w.kernel; ++s) {
          const int64_t row = begin + window_.h.halo() - window_.h.shift(r);
          tap_place[begin * window_.taps() + r * window_.w.kernel + s] =
              static_cast<int32_t>(band_rows_.at(row, row) * row_step_ + (window_.w.halo() - window_.w.shift(s)) * L);
        }
    width_ = csr.bw, lists_rows_ = csr.cols / window_.taps();
    offsets_ = call.transposed_offsets.template reserve<int32_t>(lists * csr.nnz);
    row_ptr_ = call.transposed_row_ptr.template reserve<int32_t>(groups_.count() * (lists_rows_ + 1));
    const auto build = [&](auto* from, auto* to) {
      build_transposed_lists(csr, from, window_.taps(), groups_.count(), groups_.ptr.data(), groups_.taps.data(), row_place, tap_place,
                             lists, {to, offsets_, row_ptr_});
    };
    if (csr.has_blocks) {
      int32_t* index = call.transposed_values.template reserve<int32_t>(csr.nnz);
      build(static_cast<const int32_t*>(nullptr), index);
      values_ = values, blocks_ = blocks_of(by_column(csr).block, dx_.c, g_channels_, channel_size_, index);
    } else {
      T* walked = call.transposed_values.template reserve<T>(csr.nnz);
      build(values, walked);
      values_ = walked;
    }
  }

  // Rows of the lists, channels of dx or chunks of them, in `parts` ranges of about equal work; after build().
  std::vector<int> cut(int64_t parts) const {
    return balanced_rows(row_ptr_ + (groups_.count() > 1) * (lists_rows_ + 1), lists_rows_, parts);
  }

  // What places [begin, begin + rows()) of one slice read, packed into `buffer`, which holds `held`, if need be.
  const T* band(const Image<const S>& g, int64_t slice, int64_t begin, T* buffer, MovingBand::Held& held) const {
    if (in_place_) return band_in_place(g, slice, begin);
    pack(g, slice, begin, buffer, held);
    return buffer;
  }

  // Writes rows [row_begin, row_end) of the lists, of the pixels of dx that these places are; `ahead` is read after that. A companion
  // is taken along where strides are 1.
  void run(const T* packed, int64_t slice, int64_t begin, int row_begin, int row_end, const Ahead& ahead,
           const Companion<T>& with = {}) const {
    const int lanes = static_cast<int>(std::min(L, dx_.n - slice * L));
    if (window_.w.stride == 1 || dx_.sw != 1 || dx_.sn == 1)
      run_phases<S>(packed, begin, row_begin, row_end, dx_.slice(slice), dx_, lanes, ahead, with);
    else
      run_staged(packed, slice, begin, row_begin, row_end, lanes);
  }

 private:
  // Pixels of dx that lie side by side belong to different phases, each of which would write every stride-th of them, element by
  // element. So some channels are staged, and written when they are whole.
  void run_staged(const T* packed, int64_t slice, int64_t begin, int row_begin, int row_end, int lanes) const {
    const int64_t end = std::min(begin + rows_, h_.end), stride = window_.h.stride;
    const int64_t top = std::max<int64_t>(0, begin * stride - window_.h.pad_begin);
    const int64_t bottom = std::min(dx_.h, end * stride - window_.h.pad_begin);
    if (top >= bottom) return;
    const int64_t channel_size = (bottom - top) * dx_.w * L;
    const int64_t row_bytes = width_ * channel_size * static_cast<int64_t>(sizeof(T));
    const int step = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(kStagedBytes / row_bytes, row_end - row_begin)));
    T* staged = TaskScratch::mine().staged.template reserve<T>(std::min(step * width_, dx_.c) * channel_size);
    for (int row = row_begin; row < row_end; row += step) {
      const int rows = std::min(step, row_end - row);
      const int64_t channel = row * width_, count = std::min(rows * width_, dx_.c - channel);
      const Image<T> stage{nullptr, L, count, bottom - top, dx_.w, 1, channel_size, dx_.w * L, L, 0};
      T* const origin = staged - channel * channel_size - top * stage.sh;
      run_phases<T>(packed, begin, row, row + rows, origin, stage, static_cast<int>(L), Ahead{}, {});
      kernels<S>().unpack({staged, channel_size, static_cast<int>(bottom - top), static_cast<int>(dx_.w), static_cast<int>(count),
                           dx_.slice(slice) + channel * dx_.sc + top * dx_.sh, dx_.sn, dx_.sc, dx_.sh, lanes});
    }
  }

  // `out` is where pixel (0, 0) of channel 0 would be, of an image that lies like `like`.
  template <class Out>
  void run_phases(const T* packed, int64_t begin, int row_begin, int row_end, Out* out, const Image<Out>& like, int lanes,
                  const Ahead& ahead, const Companion<T>& with) const {
    const int64_t end = std::min(begin + rows_, h_.end);
    for (const auto& [phase_h, phase_w, group] : groups_.pairs) {
      const int64_t top = std::max(begin, window_.h.first_place(phase_h)), bottom = std::min(end, window_.h.end_place(phase_h));
      const int64_t left = window_.w.first_place(phase_w), right = window_.w.end_place(phase_w);
      if (top >= bottom || left >= right) continue;
      ProductArgs<Out> args{};
      args.packed = packed + (band_rows_.ring ? 0 : top - begin) * row_step_ + (left - w_.first) * L, args.row_step = row_step_;
      args.ring = band_rows_.from(top);
      args.rows = static_cast<int>(bottom - top), args.cols = static_cast<int>(right - left);
      const int32_t* row_ptr = row_ptr_ + group * (lists_rows_ + 1);
      args.values = values_, args.entries = checked_entries(offsets_, row_ptr), args.blocks = blocks_;
      args.last = true, args.ahead = ahead;
      args.channel_begin = row_begin, args.channel_end = row_end;
      const int64_t y0 = top * window_.h.stride + phase_h - window_.h.pad_begin;
      const int64_t x0 = left * window_.w.stride + phase_w - window_.w.pad_begin;
      args.out = out + y0 * like.sh + x0 * like.sw;
      args.on = like.sn, args.oc = like.sc, args.oh = window_.h.stride * like.sh, args.ow = window_.w.stride * like.sw;
      args.lanes = lanes, args.stream = streams(like);
      args.with = with;
      with.x ? kernels<Out>().gradients(args) : kernels<Out>().product(args);
    }
  }

  void pack(const Image<const S>& g, int64_t slice, int64_t begin, T* packed, MovingBand::Held& held) const {
    static thread_local std::vector<int64_t> row_places, col_places;
    const int64_t height = rows_ + window_.h.halo();
    const MovingBand::Shape shape{g.c, channel_size_, 1, 1, channel_size_, height, row_step_, band_rows_};
    const bool fresh = held.nothing();
    const int64_t first = MovingBand::advance(shape, held, slice, begin, rows_, packed);
    h_.places(begin, first, height, row_step_, band_rows_, row_places);
    w_.places(w_.first, 0, w_.count() + window_.w.halo(), L, BandRows(), col_places);
    pack_rest(g, slice, shape, held, fresh, first, row_places, col_places, packed);
  }

  void set_rows(int64_t rows) {
    rows_ = rows;
    if (in_place_) return;
    check_band({g_channels_, rows + window_.h.halo(), row_step_});
    channel_size_ = spread((rows + window_.h.halo()) * row_step_, L);
    check_band({size()});
  }

  Window window_;
  Image<S> dx_;
  GradAxis h_, w_;
  TapGroups groups_;
  int64_t g_channels_, row_step_, rows_, channel_size_;
  bool in_place_ = false;
  BandRows band_rows_;
  int64_t width_ = 1, lists_rows_ = 0;
  const T* values_ = nullptr;
  int32_t *offsets_ = nullptr, *row_ptr_ = nullptr;
  Blocks blocks_{};
};

}  // namespace grasp_sparse
