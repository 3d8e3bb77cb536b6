// dvalues = the sampled product of g and x. The tasks (slice x band) are dealt to a number of groups that depends on
// shapes only; each group sums in its own buffer, in order, and the buffers are added in order: the result is the same,
// bit for bit, for any number of threads.
#include "lists.h"
#include "packed_input.h"
#include "scratch.h"

namespace grasp_sparse {

namespace {
constexpr int64_t kMaxGroups = 16, kSumBytes = 64 << 20;
}

template <class T>
void image_wgrad(const CsrView& csr, const Image<const T>& g, const Image<const T>& x, const Window& window, T* sums) {
  constexpr int64_t L = kLanes<T>;
  if (g.n == 0 || g.h == 0 || g.w == 0 || csr.nnz == 0) return;
  const PackedInput<T> input(x.c, window);
  const int64_t rows = input.rows(), slices = ceil_div(g.n, L), bands = ceil_div(g.h, rows), tasks = slices * bands;
  CallScratch& call = CallScratch::mine();
  int32_t* offsets = call.offsets.template reserve<int32_t>(csr.nnz);
  build_row_list(csr, input.column_places(csr.cols).data(), offsets);

  const int64_t affordable = std::max<int64_t>(1, kSumBytes / (csr.nnz * static_cast<int64_t>(sizeof(T))));
  const int64_t groups = std::min({tasks, kMaxGroups, affordable});
  const int64_t parts = std::clamp<int64_t>(ceil_div(num_threads(), groups), 1, csr.rows);
  const std::vector<int> cut = balanced_rows(csr.crow, csr.rows, parts);
  T* partial = call.sums.template reserve<T>(groups * csr.nnz);
  const int64_t g_channel = spread(rows * g.w * L, L);
  parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    TaskScratch& scratch = TaskScratch::mine();
    T* packed = scratch.packed.template reserve<T>(input.size());
    T* packed_g = scratch.packed_g.template reserve<T>(g.c * g_channel);
    std::vector<int64_t> row_places, col_places(g.w);
    for (int64_t col = 0; col < g.w; ++col) col_places[col] = col * L;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t group = item / parts, part = item % parts;
      T* mine = partial + group * csr.nnz;
      std::fill(mine + csr.crow[cut[part]], mine + csr.crow[cut[part + 1]], T(0));
      for (int64_t task = group * tasks / groups; task < (group + 1) * tasks / groups; ++task) {
        const int64_t slice = task / bands, row = task % bands * rows, count = std::min(rows, g.h - row);
        input.pack(x, slice, row, packed);
        row_places.assign(g.h, -1);
        for (int64_t i = 0; i < count; ++i) row_places[row + i] = i * g.w * L;
        pack_slice(g, slice, row_places, col_places, false, g_channel, packed_g);
        SampledArgs<T> args{};
        args.packed = packed, args.row_step = input.row_step();
        args.g = packed_g, args.g_channel_size = g_channel;
        args.rows = static_cast<int>(count), args.cols = static_cast<int>(g.w);
        args.offsets = offsets, args.row_ptr = csr.crow;
        args.channel_begin = cut[part], args.channel_end = cut[part + 1];
        args.sums = mine;
        kernels<T>().sampled(args);
      }
    }
  });
  parallel_for(0, csr.nnz, 16384, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin; j < end; ++j)
      for (int64_t group = 0; group < groups; ++group) sums[j] += partial[group * csr.nnz + j];
  });
}

template void image_wgrad(const CsrView&, const Image<const float>&, const Image<const float>&, const Window&, float*);
template void image_wgrad(const CsrView&, const Image<const double>&, const Image<const double>&, const Window&, double*);

}  // namespace grasp_sparse
