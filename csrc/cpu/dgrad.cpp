// dx = convᵀ(g, W): the same product on the transposed lists, over g packed with its padding.
// Padded input position p = place * stride + phase receives, from every tap t of that phase, output place - shift(t):
// so each phase is an unstrided convolution of its own, with its own list, writing every stride-th pixel of dx.
#include "bands.h"
#include "lists.h"
#include "scratch.h"

namespace grasp_sparse {

namespace {

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
  // Source places of packed rows [begin - halo, begin + count) of g.
  void places(int64_t begin, int64_t count, int64_t step, std::vector<int64_t>& out) const {
    out.assign(axis.output, -1);
    const int64_t base = begin - axis.halo();
    for (int64_t i = 0; i < axis.output; ++i)
      if (i >= base && i < begin + count) out[i] = (i - base) * step;
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

}  // namespace

template <class T>
void image_dgrad(const CsrView& csr, const T* values, const Image<const T>& g, const Window& window, const Image<T>& dx) {
  constexpr int64_t L = kLanes<T>;
  if (dx.n == 0 || dx.c == 0 || dx.h == 0 || dx.w == 0) return;
  const GradAxis h(window.h), w(window.w);
  const int64_t width = w.end - w.first + window.w.halo(), row_step = width * L;
  const int64_t slices = ceil_div(dx.n, L), places = h.end - h.first;
  int64_t rows = band_rows(places, window.h.halo(), g.c * width * kSliceBytes);
  rows = std::min(rows, std::max<int64_t>(window.h.halo() ? 4 : 1, ceil_div(places, ceil_div(num_threads(), slices))));
  const int64_t bands = ceil_div(places, rows), channel_size = spread((rows + window.h.halo()) * row_step, L);
  check_band(csr.rows * channel_size);

  const TapGroups groups(h, w);
  std::vector<int32_t> row_place(csr.rows + 1), tap_place(window.taps());
  for (int64_t row = 0; row < csr.rows; ++row) row_place[row] = static_cast<int32_t>(row * channel_size);
  for (int64_t r = 0; r < window.h.kernel; ++r)
    for (int64_t s = 0; s < window.w.kernel; ++s)
      tap_place[r * window.w.kernel + s] = static_cast<int32_t>((window.h.halo() - window.h.shift(r)) * row_step +
                                                                (window.w.halo() - window.w.shift(s)) * L);
  CallScratch& call = CallScratch::mine();
  const TransposedLists<T> lists{call.values.template reserve<T>(csr.nnz), call.offsets.template reserve<int32_t>(csr.nnz),
                                 call.row_ptr.template reserve<int32_t>(groups.count() * (dx.c + 1))};
  build_transposed_lists(csr, values, window.taps(), groups.count(), groups.ptr.data(), groups.taps.data(), row_place.data(),
                         tap_place.data(), lists);

  const int64_t parts = std::clamp<int64_t>(ceil_div(num_threads(), slices * bands), 1, dx.c);
  const std::vector<int> cut = balanced_rows(lists.row_ptr + (groups.count() > 1) * (dx.c + 1), dx.c, parts);
  parallel_for(0, slices * bands * parts, 1, [&](int64_t begin, int64_t end) {
    T* packed = TaskScratch::mine().packed.template reserve<T>(g.c * channel_size);
    std::vector<int64_t> row_places, col_places;
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, band = task / parts, slice = band / bands;
      const int64_t row = h.first + band % bands * rows, row_end = std::min(row + rows, h.end);
      if (band != held) {
        h.places(row, rows, row_step, row_places);
        w.places(w.first, w.end - w.first, L, col_places);
        pack_slice(g, slice, row_places, col_places, true, channel_size, packed);
      }
      held = band;
      for (const auto& [phase_h, phase_w, group] : groups.pairs) {
        const int64_t top = std::max(row, window.h.first_place(phase_h)), bottom = std::min(row_end, window.h.end_place(phase_h));
        const int64_t left = window.w.first_place(phase_w), right = window.w.end_place(phase_w);
        if (top >= bottom || left >= right) continue;
        ProductArgs<T> args{};
        args.packed = packed + (top - row) * row_step + (left - w.first) * L, args.row_step = row_step;
        args.rows = static_cast<int>(bottom - top), args.cols = static_cast<int>(right - left);
        args.values = lists.values, args.offsets = lists.offsets, args.row_ptr = lists.row_ptr + group * (dx.c + 1);
        args.channel_begin = cut[part], args.channel_end = cut[part + 1];
        const int64_t y0 = top * window.h.stride + phase_h - window.h.pad_begin;
        const int64_t x0 = left * window.w.stride + phase_w - window.w.pad_begin;
        args.out = dx.data + slice * L * dx.sn + y0 * dx.sh + x0 * dx.sw;
        args.on = dx.sn, args.oc = dx.sc, args.oh = window.h.stride * dx.sh, args.ow = window.w.stride * dx.sw;
        args.lanes = static_cast<int>(std::min(L, dx.n - slice * L)), args.stream = streams(dx);
        kernels<T>().product(args);
      }
    }
  });
}

template void image_dgrad(const CsrView&, const float*, const Image<const float>&, const Window&, const Image<float>&);
template void image_dgrad(const CsrView&, const double*, const Image<const double>&, const Window&, const Image<double>&);

}  // namespace grasp_sparse
