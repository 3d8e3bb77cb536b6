// y = conv(x, W) + b: pack a band of x, walk the weight list of every output channel over it.
#include <atomic>

#include "blocks.h"
#include "channel_moments.h"
#include "packed_input.h"
#include "scratch.h"
#include "sum_groups.h"

namespace grasp_sparse {

template <class S>
void image_product(const Walk& walk, const Compute<S>* values, const Compute<S>* bias, const Image<const S>& x, const Window& window,
                   const Image<S>& y, bool relu, ChannelMoments* moments) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  if (y.n == 0 || y.c == 0 || y.h == 0 || y.w == 0) return;
  const ChannelBlocks blocks(x.c, window, walk);
  PackedInput<T> input(x, blocks.size, window);
  const int64_t slices = ceil_div(y.n, L);
  input.read_in_place(x);
  const int64_t rows = input.choose_band(slices, moments ? kOrderedThreads : num_threads()), bands = ceil_div(y.h, rows);
  CallScratch& call = CallScratch::mine();
  const Entries entries = input.entries(walk, call.offsets);
  if (!walk.has_blocks)
    values = walked_values(walk, values, call.values.template reserve<T>(walk.nnz));
  else if (walk.permutation)
    check_permutation(walk);

  const int64_t parts = std::clamp<int64_t>(ceil_div(num_threads(), slices * bands), 1, walk.rows);
  const std::vector<int> cut = balanced_rows(walk.ptr, walk.rows, parts);
  std::atomic<bool> complete{true};
  const int64_t tasks = slices * bands * parts;
  if (moments) moments->expect(slices * bands);
  share_tasks(tasks, [&](auto&& next) {
    T* packed = TaskScratch::mine().packed.template reserve<T>(input.size());
    T* partial = blocks.count > 1 ? TaskScratch::mine().partial.template reserve<T>(walk.rows * rows * y.w * L) : nullptr;
    int32_t* stops = TaskScratch::mine().stops.template reserve<int32_t>(blocks.count > 1 ? 2 * walk.rows : 0);
    const T* at = nullptr;
    int64_t band_held = -1;
    MovingBand::Held held;
    bool all = true;
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t part = task % parts, band = task / parts, slice = band / bands, row = band % bands * rows;
      ProductArgs<S> args{};
      args.row_step = input.row_step(), args.ring = input.ring(row);
      if (input.in_place() && band != band_held && task + parts < tasks) args.ahead = ahead_in_place(x, band + 1, bands, rows);
      args.rows = static_cast<int>(std::min(rows, y.h - row)), args.cols = static_cast<int>(y.w);
      args.values = values, args.bias = bias, args.blocks = input.blocks(walk, y.c);
      args.channel_begin = cut[part], args.channel_end = cut[part + 1];
      args.out = y.slice(slice) + row * y.sh;
      args.on = y.sn, args.oc = y.sc, args.oh = y.sh, args.ow = y.sw;
      args.lanes = static_cast<int>(std::min(L, y.n - slice * L)), args.stream = streams(y);
      args.partial = partial;
      if (moments) args.moments = moments->of(band);
      for (int64_t b = 0; b < blocks.count; ++b) {
        if (blocks.count > 1 || band != band_held) at = input.band(blocks.channels(x, b), slice, row, packed, held);
        args.packed = at;
        args.entries = blocks.entries(entries, b, walk.rows, stops, &all);
        args.last = b == blocks.count - 1, args.relu = relu && args.last;
        kernels<S>().product(args);
      }
      band_held = band;
    }
    if (!all) complete = false;
  }, parts);
  if (!complete) corrupt("col_indices or row_indices");
  for (int64_t band = 0; moments && band < slices * bands; ++band)
    moments->add(band, std::min(rows, y.h - band % bands * rows) * y.w * std::min(L, y.n - band / bands * L));
}

template <class S>
void image_fprop(const CsrView& csr, const Compute<S>* values, const Compute<S>* bias, const Image<const S>& x, const Window& window,
                 const Image<S>& y, bool relu, ChannelMoments* moments) {
  image_product<S>(by_row(csr), values, bias, x, window, y, relu, moments);
}

#define GRASP_SPARSE_FOR_STORAGE(S)                                                                                             \
  template void image_product<S>(const Walk&, const Compute<S>*, const Compute<S>*, const Image<const S>&, const Window&,      \
                                 const Image<S>&, bool, ChannelMoments*);                                                       \
  template void image_fprop<S>(const CsrView&, const Compute<S>*, const Compute<S>*, const Image<const S>&, const Window&,     \
                               const Image<S>&, bool, ChannelMoments*);
GRASP_SPARSE_FOR_STORAGE(float)
GRASP_SPARSE_FOR_STORAGE(double)
GRASP_SPARSE_FOR_STORAGE(Bf16)

}  // namespace grasp_sparse
