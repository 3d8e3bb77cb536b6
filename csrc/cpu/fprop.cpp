// y = conv(x, W) + b: pack a band of x, walk the weight list of every output channel over it.
#include "bands.h"
#include "lists.h"
#include "packed_input.h"
#include "scratch.h"

namespace grasp_sparse {

template <class T>
void image_fprop(const CsrView& csr, const T* values, const T* bias, const Image<const T>& x, const Window& window, const Image<T>& y) {
  constexpr int64_t L = kLanes<T>;
  if (y.n == 0 || y.c == 0 || y.h == 0 || y.w == 0) return;
  PackedInput<T> input(x.c, window);
  const int64_t slices = ceil_div(y.n, L);
  const int64_t rows = input.choose_band(slices, num_threads());
  const int64_t bands = ceil_div(y.h, rows);
  int32_t* offsets = CallScratch::mine().offsets.template reserve<int32_t>(csr.nnz);
  build_row_list(csr, input.column_places(csr.cols).data(), offsets);

  const int64_t parts = std::clamp<int64_t>(ceil_div(num_threads(), slices * bands), 1, y.c);
  const std::vector<int> cut = balanced_rows(csr.crow, csr.rows, parts);
  parallel_for(0, slices * bands * parts, 1, [&](int64_t begin, int64_t end) {
    T* packed = TaskScratch::mine().packed.template reserve<T>(input.size());
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task % parts, band = task / parts, slice = band / bands, row = band % bands * rows;
      if (band != held) input.pack(x, slice, row, packed);
      held = band;
      ProductArgs<T> args{};
      args.packed = packed, args.row_step = input.row_step();
      args.rows = static_cast<int>(std::min(rows, y.h - row)), args.cols = static_cast<int>(y.w);
      args.values = values, args.offsets = offsets, args.row_ptr = csr.crow, args.bias = bias;
      args.channel_begin = cut[part], args.channel_end = cut[part + 1];
      args.out = y.data + slice * L * y.sn + row * y.sh;
      args.on = y.sn, args.oc = y.sc, args.oh = y.sh, args.ow = y.sw;
      args.lanes = static_cast<int>(std::min(L, y.n - slice * L)), args.stream = streams(y);
      kernels<T>().product(args);
    }
  });
}

template void image_fprop(const CsrView&, const float*, const float*, const Image<const float>&, const Window&, const Image<float>&);
template void image_fprop(const CsrView&, const double*, const double*, const Image<const double>&, const Window&, const Image<double>&);

}  // namespace grasp_sparse
