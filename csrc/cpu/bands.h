// How an image is cut into tasks: slices of L images x bands of rows x ranges of channels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "image.h"
#include "isa.h"
#include "parallel.h"

namespace grasp_sparse {

// A packed band should stay in L2, from which it is read; two of them where gradients of both kinds are made in one walk. Twice as
// much was slower where L2 has 2 MiB too (64 channels at 32x32, 99 %, channels_last, an Intel Xeon: 13 -> 17 ms).
constexpr int64_t kBandBytes = 512 << 10;

// With a halo, of images whose pixels lie side by side: a band reads few pixels of each channel, and the fewer at a time, the
// longer memory takes (64 channels at 32x32, 99 %: 21 ms at 512 KiB, 15 ms at this; channels_last 13 and 14 ms).
constexpr int64_t kPixelRunBytes = 1 << 20;

// What a band of this image may take.
template <class S>
int64_t band_bytes(const Image<S>& image, const Window& window) {
  return window.h.halo() && image.sw == 1 && image.sn != 1 ? kPixelRunBytes : kBandBytes;
}

// Fewer rows would not fill the runs of pixels that packing transposes.
inline int64_t least_rows(const Window& window) {
  return window.h.halo() ? std::max(window.h.halo(), ceil_div(32, std::max<int64_t>(1, window.w.output))) : 1;
}

// Rows of a band such that (rows + halo) * row_bytes fits into `budget`, but `least` all the same.
inline int64_t band_rows(int64_t rows, int64_t halo, int64_t row_bytes, int64_t budget, int64_t least) {
  const int64_t fitting = budget / std::max<int64_t>(1, row_bytes) - halo;
  const int64_t all = std::max<int64_t>(1, rows), most = std::clamp(fitting, std::min(least, all), all);
  return ceil_div(rows, std::max<int64_t>(1, ceil_div(rows, most)));  // equal bands: 16 rows by at most 5 are 4 x 4
}

template <class S>
bool streams(const Image<S>& out) {
  return out.n * out.c * out.h * out.w * static_cast<int64_t>(sizeof(S)) > kStreamBytes;
}

// The distance of two packed channels: an odd number of lines. Channels a power of two apart would meet in the same few sets
// of the first-level cache, when one pixel of many channels is packed (channels_last) as when a weight list walks them.
inline int64_t spread(int64_t elements, int64_t lanes) { return elements + (elements / lanes % 2 == 0 ? lanes : 0); }

// Places in a packed band are 32-bit. Its sizes, of which paddings and dilations can make anything, come one by one: their
// product may be more than 64 bits hold.
inline void check_band(std::initializer_list<int64_t> sizes) {
  double elements = 1;
  for (int64_t size : sizes) elements *= static_cast<double>(size);
  if (elements >= INT32_MAX)
    throw std::runtime_error("grasp_sparse: one band of this image needs " +
                             std::to_string(static_cast<int64_t>(std::min(elements, 9e18))) +
                             " packed elements, more than 32-bit offsets reach; use narrower images or fewer channels.");
}

// [0, rows) cut into `parts` ranges of about equal weight count.
inline std::vector<int> balanced_rows(const int32_t* row_ptr, int64_t rows, int64_t parts) {
  std::vector<int> cut(parts + 1, static_cast<int>(rows));
  cut[0] = 0;
  // Every row costs its weights and, for its tile, about as much as eight more.
  auto cost = [&](int64_t row) { return static_cast<int64_t>(row_ptr[row] - row_ptr[0]) + 8 * row; };
  for (int64_t part = 1, row = 0; part < parts; ++part) {
    while (row < rows && cost(row) * parts < cost(rows) * part) ++row;
    cut[part] = static_cast<int>(row);
  }
  return cut;
}

// Where each source row (or column) goes within a packed channel, in elements; -1 where it is not used. Packed are places
// [first + begin, first + end), at a distance of `step` from `first` on, or in a ring of so many; 0: in none.
inline void axis_places(const Axis& axis, const std::vector<int64_t>& phases, int64_t phase_size, int64_t first, int64_t begin,
                        int64_t end, int64_t step, int64_t ring, std::vector<int64_t>& places) {
  places.assign(axis.input, -1);
  for (int64_t i = 0; i < axis.input; ++i) {
    const int64_t padded = i + axis.pad_begin, at = padded / axis.stride - first;
    const auto phase = std::find(phases.begin(), phases.end(), padded % axis.stride);
    if (phase != phases.end() && at >= begin && at < end)
      places[i] = (phase - phases.begin()) * phase_size + (ring ? (first + at) % ring : at) * step;
  }
}

inline int64_t used(const std::vector<int64_t>& places) {
  return std::count_if(places.begin(), places.end(), [](int64_t place) { return place >= 0; });
}

// Packs rows of one slice of x by these places.
template <class S>
void pack_slice(const Image<const S>& x, int64_t slice, const std::vector<int64_t>& row_places,
                const std::vector<int64_t>& col_places, bool zero_first, int64_t channel_size, Compute<S>* dst) {
  constexpr int64_t L = kLanes<Compute<S>>;
  const auto has_place = [](int64_t place) { return place >= 0; };
  const int64_t begin = std::find_if(row_places.begin(), row_places.end(), has_place) - row_places.begin();
  const int64_t end = row_places.rend() - std::find_if(row_places.rbegin(), row_places.rend(), has_place);
  PackArgs<S> args{};
  args.src = x.slice(slice);
  args.sn = x.sn, args.sc = x.sc, args.sh = x.sh, args.sw = x.sw;
  args.lanes = static_cast<int>(std::min<int64_t>(L, x.n - slice * L));
  args.channels = static_cast<int>(x.c);
  args.row_begin = static_cast<int>(std::min(begin, end)), args.row_end = static_cast<int>(end);
  args.width = static_cast<int>(x.w);
  args.row_place = row_places.data() + args.row_begin, args.col_place = col_places.data();
  args.gate = x.gate ? x.gate + slice * x.ss : nullptr, args.norm = x.norm.from(slice * x.ss, 0);
  args.dst = dst, args.channel_size = channel_size, args.zero_first = zero_first;
  kernels<S>().pack(args);
}

}  // namespace grasp_sparse
