// Both gradients, of weights and of images, in one walk (gradients.h): bands of g are packed, or read in place, once for both. Threads
// that share a group of tasks (sum_groups.h) have channels of x, and so weights, of their own.
#pragma once

#include "plain_band.h"
#include "sum_groups.h"
#include "transposed.h"

namespace grasp_sparse {

// Whether one walk pays: its sums have to be put into the order of the values, which few pixels would not make up for.
template <class S>
bool takes_gradient_passes(const CsrView& csr, const Image<const S>& x, const Window& window) {
  constexpr int64_t kFewestPixels = 256;
  return kernels<S>().gradients && window.h.stride == 1 && window.w.stride == 1 && !csr.has_blocks && x.n * x.h * x.w >= kFewestPixels;
}

// The sums of a group are in the order of the transposed list, then those of the channels of g.
template <class S>
void gradient_passes(const CsrView& csr, const Image<const S>& g, const Image<const S>& x, const TransposedProduct<S>& product,
                     Compute<S>* sums, Compute<S>* bias_sums, bool add) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t rows = product.rows(), bands = product.bands(), tasks = ceil_div(x.n, L) * bands;
  const PlainBand<S> plain(x, rows);
  const int64_t width = ceil_div(csr.nnz + csr.rows, L) * L;
  const int64_t groups = sum_groups(tasks, width, x.n * x.c * x.h * x.w);
  const int64_t parts = std::clamp<int64_t>(ceil_div(num_threads(), groups), 1, x.c);
  const std::vector<int> cut = product.cut(parts);
  CallScratch& call = CallScratch::mine();
  T* const partial = call.sums.template reserve<T>(groups * width);
  int32_t* const no_entries = call.offsets.template reserve<int32_t>(csr.rows + 1);
  std::fill_n(no_entries, csr.rows + 1, 0);
  share_tasks(groups * parts, [&](auto&& next) {
    T* packed = TaskScratch::mine().packed.template reserve<T>(plain.size);
    T* packed_g = TaskScratch::mine().packed_g.template reserve<T>(product.size());
    MovingBand::Held held;
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t group = item / parts, part = item % parts;
      T *const mine = partial + group * width, *const channels = mine + csr.nnz;
      const int first = static_cast<int>(csr.rows * part / parts), last = static_cast<int>(csr.rows * (part + 1) / parts);
      std::fill(channels + first, channels + last, T(0));
      for (int64_t task = group * tasks / groups; task < (group + 1) * tasks / groups; ++task) {
        const int64_t slice = task / bands, row = task % bands * rows, place = product.h().first + row;
        const bool more = task + 1 < (group + 1) * tasks / groups;
        const T* band = product.band(g, slice, place, packed_g, held);
        Companion<T> with{};
        with.x = plain.band(x, slice, row, cut[part], cut[part + 1], packed);
        with.channel_size = plain.channel_size, with.row_step = plain.row_step;
        with.sums = mine, with.start = task == group * tasks / groups;
        if (more && plain.in_place) with.ahead = ahead_in_place(x, task + 1, bands, rows);
        product.run(band, slice, place, cut[part], cut[part + 1],
                    more && product.in_place() ? ahead_in_place(g, task + 1, bands, rows) : Ahead{}, with);
        if (row >= g.h) continue;  // dx has more places than g has rows
        SampledArgs<T> args{};  // of no entries: sums of channels only
        args.g = band + product.pixel(row, place), args.ring_g = product.ring(row);
        args.g_channel_size = product.channel_size(), args.g_row_step = product.row_step();
        args.rows = static_cast<int>(std::min(rows, g.h - row)), args.cols = static_cast<int>(g.w);
        args.entries = checked_entries(nullptr, no_entries), args.entries.end = no_entries;
        args.channel_begin = first, args.channel_end = last, args.channel_sums = channels;
        kernels<T>().sampled(args);
      }
    }
  });
  if (!add) std::fill_n(sums, csr.nnz, T(0));  // a corrupt permutation leaves some out
  parallel_for(0, csr.nnz, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j) {
      T sum = partial[j];
      for (int64_t group = 1; group < groups; ++group) sum += partial[group * width + j];
      T& to = sums[csr.permutation[j]];
      to = add ? to + sum : sum;
    }
  });
  for (int64_t row = 0; row < csr.rows; ++row) {
    if (!add) bias_sums[row] = T(0);
    for (int64_t group = 0; group < groups; ++group) bias_sums[row] += partial[group * width + csr.nnz + row];
  }
}

}  // namespace grasp_sparse
