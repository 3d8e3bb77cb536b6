// dvalues = the sampled product of g and x, and with it, from the same packed g, the sums of g and dx.
// Threads that share a group of tasks (sum_groups.h) have channels of g, and so weights, of their own.
#include <atomic>

#include "blocks.h"
#include "gradient_passes.h"
#include "packed_input.h"
#include "plain_band.h"
#include "sum_groups.h"

namespace grasp_sparse {

namespace {

// With `product`, bands go over places of dx and output row r is taken up by the band that holds place r + first.
template <class S>
void sampled_passes(const CsrView& csr, const Image<const S>& g, const Image<const S>& x, const ChannelBlocks& blocks,
                    PackedInput<Compute<S>>& input, const TransposedProduct<S>* product, Compute<S>* sums,
                    Compute<S>* bias_sums, bool add) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const PlainBand<S> plain(g, input.rows());
  const int64_t rows = input.rows(), slices = ceil_div(g.n, L);
  const int64_t bands = product ? product->bands() : ceil_div(g.h, rows), tasks = slices * bands;
  const int64_t g_size = product ? product->size() : plain.size;
  CallScratch& call = CallScratch::mine();
  const Entries entries = input.entries(by_row(csr), call.offsets);

  // The sums of a group: the weights, then the channels of g. The first group has the results for its own.
  const int64_t weights = csr.weights(), width = ceil_div(weights + (bias_sums ? csr.rows : 0), L) * L;
  const int64_t groups = sum_groups(tasks, width, x.n * x.c * x.h * x.w);
  const int64_t parts = std::clamp<int64_t>(ceil_div(num_threads(), groups), 1, csr.rows);
  const std::vector<int> cut = balanced_rows(csr.crow, csr.rows, parts);
  const std::vector<int> dx_cut = product ? product->cut(parts) : std::vector<int>();
  T* partial = call.sums.template reserve<T>((groups - 1) * width);
  std::atomic<bool> complete{true};
  share_tasks(groups * parts, [&](auto&& next) {
    bool all = true;
    T* packed = TaskScratch::mine().packed.template reserve<T>(input.size());
    T* packed_g = TaskScratch::mine().packed_g.template reserve<T>(g_size);
    int32_t* stops = TaskScratch::mine().stops.template reserve<int32_t>(blocks.count > 1 ? 2 * csr.rows : 0);
    MovingBand::Held held, held_g;
    for (int64_t item; (item = next()) >= 0;) {
      const int64_t group = item / parts, part = item % parts;
      T* mine = group ? partial + (group - 1) * width : sums;
      T* mine_channels = !bias_sums ? nullptr : group ? mine + weights : bias_sums;
      bool start = group || !add;
      for (int64_t task = group * tasks / groups; task < (group + 1) * tasks / groups; ++task) {
        const int64_t slice = task / bands, row = task % bands * rows, count = std::min(rows, g.h - row);
        SampledArgs<T> args{};
        Ahead ahead_g{};
        if (task + 1 < (group + 1) * tasks / groups) {
          if (input.in_place()) args.ahead = ahead_in_place(x, task + 1, bands, rows);
          if (product ? product->in_place() : plain.in_place) ahead_g = ahead_in_place(g, task + 1, bands, rows);
        }
        if (product) {
          const int64_t place = product->h().first + row;
          const T* band = product->band(g, slice, place, packed_g, held_g);
          product->run(band, slice, place, dx_cut[part], dx_cut[part + 1], ahead_g);
          args.g = band + product->pixel(row, place), args.ring_g = product->ring(row);
          args.g_channel_size = product->channel_size(), args.g_row_step = product->row_step();
        } else {
          const auto channel = [&](int64_t row) { return std::min(row * csr.bh, g.c); };
          args.g = plain.band(g, slice, row, channel(cut[part]), channel(cut[part + 1]), packed_g);
          args.ahead_g = ahead_g, args.g_channel_size = plain.channel_size, args.g_row_step = plain.row_step;
        }
        if (count <= 0) continue;  // dx has more places than g has rows
        args.row_step = input.row_step(), args.ring = input.ring(row);
        args.rows = static_cast<int>(count), args.cols = static_cast<int>(g.w);
        args.channel_begin = cut[part], args.channel_end = cut[part + 1];
        args.sums = mine, args.start = start, args.blocks = input.blocks(by_row(csr), g.c);
        for (int64_t b = 0; b < blocks.count; ++b) {
          args.packed = input.band(blocks.channels(x, b), slice, row, packed, held);
          args.entries = blocks.entries(entries, b, csr.rows, stops, &all);
          args.channel_sums = b == 0 ? mine_channels : nullptr;
          kernels<T>().sampled(args);
        }
        start = false;
      }
      if (!start) continue;  // no band of this group holds a row of g
      std::fill(mine + csr.crow[cut[part]] * csr.bh * csr.bw, mine + csr.crow[cut[part + 1]] * csr.bh * csr.bw, T(0));
      if (bias_sums) std::fill(mine_channels + cut[part], mine_channels + cut[part + 1], T(0));
    }
    if (!all) complete = false;
  });
  if (!complete) corrupt("col_indices");
  if (groups == 1) return;
  parallel_for(0, weights, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t group = 1; group < groups; ++group) {
      const T* from = partial + (group - 1) * width;
      for (int64_t j = begin; j < end; ++j) sums[j] += from[j];
    }
  });
  for (int64_t group = 1; bias_sums && group < groups; ++group)
    for (int64_t row = 0; row < csr.rows; ++row) bias_sums[row] += partial[(group - 1) * width + weights + row];
}

}  // namespace

template <class S>
void image_wgrad(const CsrView& csr, const Image<const S>& g, const Image<const S>& x, const Window& window, Compute<S>* sums,
                 Compute<S>* bias_sums, bool add) {
  if (g.n == 0 || g.c == 0 || g.h == 0 || g.w == 0 || (csr.nnz == 0 && !bias_sums)) {
    if (!add) std::fill_n(sums, csr.weights(), Compute<S>(0));
    if (!add && bias_sums) std::fill_n(bias_sums, csr.rows, Compute<S>(0));
    return;
  }
  const ChannelBlocks blocks(x.c, window, by_row(csr));
  PackedInput<Compute<S>> input(x, blocks.size, window);
  input.read_in_place(x);
  sampled_passes<S>(csr, g, x, blocks, input, nullptr, sums, bias_sums, add);
}

template <class S>
void image_backward(const CsrView& csr, const Compute<S>* values, const Image<const S>& g, const Image<const S>& x,
                    const Window& window, const Image<S>& dx, Compute<S>* sums, Compute<S>* bias_sums, bool add) {
  const bool empty = g.n == 0 || g.c == 0 || g.h == 0 || g.w == 0 || dx.c == 0 || dx.h == 0 || dx.w == 0;
  // A band of places of dx holds the pixels of g that are sampled with it: true for any usual padding.
  const auto holds = [](const Axis& axis) {
    const GradAxis places(axis);
    return places.first >= 0 && places.first <= axis.halo() && places.count() >= axis.output && places.end >= axis.output;
  };
  if (empty || !holds(window.h) || !holds(window.w)) {
    image_dgrad<S>(csr, values, g, window, dx);
    return image_wgrad<S>(csr, g, x, window, sums, bias_sums, add);
  }
  TransposedProduct<S> product(window, dx, g.c);
  if (takes_gradient_passes(csr, x, window)) {
    product.read_in_place(g);
    product.limit_band(lies_packed(x) ? rows_in_place(x) : band_rows(x.h, 0, x.c * x.w * kSliceBytes, kBandBytes, least_rows(window)));
    product.build(csr, values);
    check_indices(by_row(csr));
    return gradient_passes<S>(csr, g, x, product, sums, bias_sums, add);
  }
  const ChannelBlocks blocks(x.c, window, by_row(csr));
  PackedInput<Compute<S>> input(x, blocks.size, window);
  input.read_in_place(x);
  product.read_in_place(g);
  product.limit_band(input.rows());
  input.limit_band(product.rows());
  product.build(csr, values);
  sampled_passes<S>(csr, g, x, blocks, input, &product, sums, bias_sums, add);
}

#define GRASP_SPARSE_FOR_STORAGE(S)                                                                                             \
  template void image_wgrad<S>(const CsrView&, const Image<const S>&, const Image<const S>&, const Window&, Compute<S>*,       \
                               Compute<S>*, bool);                                                                              \
  template void image_backward<S>(const CsrView&, const Compute<S>*, const Image<const S>&, const Image<const S>&,             \
                                  const Window&, const Image<S>&, Compute<S>*, Compute<S>*, bool);
GRASP_SPARSE_FOR_STORAGE(float)
GRASP_SPARSE_FOR_STORAGE(double)
GRASP_SPARSE_FOR_STORAGE(Bf16)

}  // namespace grasp_sparse
