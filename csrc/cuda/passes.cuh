// The passes of passes.h: what is launched, in which order, for one storage type.
#pragma once

#include "launch.h"
#include "layout.cuh"
#include "passes.h"
#include "product.cuh"
#include "sampled.cuh"

namespace grasp_sparse::cuda {

// Pieces of one allocation, each aligned as the widest load wants it. Twice over: first to count, then to cut.
class Pieces {
 public:
  explicit Pieces(unsigned char* base = nullptr) : base_(base) {}
  template <class T>
  T* take(int64_t count) {
    const int64_t at = size_;
    size_ += (std::max<int64_t>(count, 1) * static_cast<int64_t>(sizeof(T)) + 255) / 256 * 256;
    return reinterpret_cast<T*>(base_ + at);
  }
  int64_t size() const { return size_; }

 private:
  unsigned char* base_;
  int64_t size_ = 0;
};

// Blocks of the product, those for large problems first: what registers hold (R * V accumulators a lane), then ever smaller ones
// so that a small problem still reaches every multiprocessor.
template <class S>
struct Shapes {
  static constexpr int R = sizeof(S) == 4 ? 32 : sizeof(S) == 2 ? 16 : 8, V = sizeof(S) == 2 ? 4 : 2;
  static constexpr int small_R = 8, small_V = 2;
  static constexpr ProductShape all[] = {{R, V, 16, 1}, {R, V, 8, 2}, {small_R, small_V, 8, 2}, {small_R, small_V, 4, 4}};
};
template <class S>
constexpr int kSampledVector = sizeof(S) == 8 ? 2 : 4;

inline Lists lists_of(const CsrView& csr, const Window& window, bool by_column, const Gathered& x, const Tiling& t) {
  Lists lists{};
  lists.taps = static_cast<int>(window.taps()), lists.kernel_w = static_cast<int>(window.w.kernel), lists.nnz = csr.nnz;
  lists.by_column = by_column;
  lists.ptr = by_column ? csr.ccol : csr.crow, lists.index = by_column ? csr.row : csr.col;
  lists.permutation = by_column ? csr.permutation : nullptr;
  lists.rows = by_column ? csr.cols / lists.taps : csr.rows;
  lists.channels = x.channels, lists.chunk = t.chunk, lists.chunks = t.chunks;
  lists.h = {x.h.tap_first, x.h.tap_every, x.h.taps, t.h.tap_line_first, t.h.tap_line_step};
  lists.w = {x.w.tap_first, x.w.tap_every, x.w.taps, t.w.tap_line_first, t.w.tap_line_step};
  lists.lines_h = t.h.lines, lists.lines_w = t.w.lines;
  return lists;
}

// rank_rows and find_bounds: what both kernels read of the lists.
inline void index_lists(const Queue& queue, const Lists& lists, int* by_count, int* bounds) {
  launch(queue.stream, rank_rows, blocks_for(lists.rows, kWarp), kRankThreads, kRankThreads * sizeof(int), lists, by_count);
  const int64_t count = static_cast<int64_t>(lists.rows) * (lists.by_column ? lists.taps : 1) * (lists.chunks + 1);
  launch(queue.stream, find_bounds, blocks_for(count, kBoundThreads), kBoundThreads, 0, lists, count, bounds);
}

template <class S, int R, int V>
void launch_product(const Queue& queue, const Lists& lists, const ProductPlan& plan, const Gathered& gathered,
                    const Compute<S>* values, ProductArgs<S> args) {
  using T = Compute<S>;
  const int64_t segments = static_cast<int64_t>(plan.tiles) * lists.chunks * R;
  const int64_t bounds_count = static_cast<int64_t>(lists.rows) * (lists.by_column ? lists.taps : 1) * (lists.chunks + 1);
  const int64_t capacity = lists.nnz / kGroup + std::min<int64_t>(segments, lists.nnz) + 1;
  int *by_count, *bounds, *starts, *totals;
  uint16_t* sizes;
  int64_t* begins;
  Group<T>* groups;
  const auto cut = [&](Pieces pieces) {
    by_count = pieces.take<int>(lists.rows), bounds = pieces.take<int>(bounds_count);
    sizes = pieces.take<uint16_t>(segments), starts = pieces.take<int>(segments);
    totals = pieces.take<int>(plan.tiles), begins = pieces.take<int64_t>(plan.tiles);
    groups = pieces.take<Group<T>>(capacity);
    return pieces.size();
  };
  const std::shared_ptr<void> memory = queue.allocate(cut(Pieces()));
  cut(Pieces(static_cast<unsigned char*>(memory.get())));

  index_lists(queue, lists, by_count, bounds);
  if (lists.chunks) {
    const Bounds found{bounds, lists.chunks};
    launch(queue.stream, count_groups<R>, plan.tiles, kWarp, 0, lists, found, by_count, plan.tiles, sizes, starts, totals);
    launch(queue.stream, fill_groups<T, R>, plan.tiles, R * kWarp, sizeof(int), lists, found, by_count, plan.tiles, sizes, starts,
           totals, values, capacity, begins, groups);
  }
  args.tiling = plan.tiling, args.h = gathered.h, args.w = gathered.w;
  args.rows = lists.rows, args.tiles = plan.tiles, args.row_blocks = plan.row_blocks, args.warp_rows_log2 = log2_of(plan.warp_rows);
  args.by_count = by_count, args.sizes = sizes, args.totals = totals, args.begins = begins, args.groups = groups;
  launch(queue.stream, product<S, R, V>, plan.blocks, plan.shape.warps * kWarp, plan.shared_bytes, args);
}

template <class S>
void run_product(const Queue& queue, const CsrView& csr, const Window& window, bool by_column, Gathered gathered,
                 const Compute<S>* values, ProductArgs<S> args) {
  using K = Shapes<S>;
  const int rows = by_column ? csr.cols / static_cast<int>(window.taps()) : csr.rows;
  if (gathered.is_empty() || rows == 0) return;
  gathered.element_size = sizeof(S), gathered.address = reinterpret_cast<uintptr_t>(args.x);
  const ProductPlan plan = plan_product(gathered, rows, K::all, sizeof(Ring<Compute<S>>), limits_of(queue.device));
  const Lists lists = lists_of(csr, window, by_column, gathered, plan.tiling);
  if (plan.shape.rows == K::R && plan.shape.vector == K::V)
    launch_product<S, K::R, K::V>(queue, lists, plan, gathered, values, args);
  else
    launch_product<S, K::small_R, K::small_V>(queue, lists, plan, gathered, values, args);
}

template <class S>
void fprop(const Queue& queue, const CsrView& csr, const Window& window, int64_t batch, const Compute<S>* values,
           const Compute<S>* bias, bool relu, const S* x, S* y) {
  ProductArgs<S> args{};
  args.x = x, args.y = y, args.bias = bias, args.relu = relu;
  const Gathered gathered{fprop_axis(window.h), fprop_axis(window.w), batch, csr.cols / static_cast<int>(window.taps()), 0, 0};
  run_product(queue, csr, window, false, gathered, values, args);
}

template <class S>
void dgrad(const Queue& queue, const CsrView& csr, const Window& window, int64_t batch, const Compute<S>* values, const S* g,
           S* dx) {
  ProductArgs<S> args{};
  args.x = g, args.y = dx;
  for (const int64_t phase_h : dgrad_phases(window.h))
    for (const int64_t phase_w : dgrad_phases(window.w)) {
      const Gathered gathered{dgrad_axis(window.h, phase_h), dgrad_axis(window.w, phase_w), batch, csr.rows, 0, 0};
      run_product(queue, csr, window, true, gathered, values, args);
    }
}

template <class T>
void add_shares(const Queue& queue, const T* from, int64_t count, int shares, T* to) {
  launch(queue.stream, sum_shares<T>, blocks_for(count, kSumThreads), kSumThreads, 0, from, count, shares, to);
}

template <class S>
void wgrad(const Queue& queue, const CsrView& csr, const Window& window, int64_t batch, const S* g, const S* x,
           Compute<S>* dvalues) {
  using T = Compute<S>;
  const Gathered gathered{fprop_axis(window.h), fprop_axis(window.w), batch, csr.cols / static_cast<int>(window.taps()), sizeof(S),
                          reinterpret_cast<uintptr_t>(x)};
  if (csr.nnz == 0) return;
  if (gathered.is_empty()) return add_shares<T>(queue, nullptr, csr.nnz, 0, dvalues);
  const SampledPlan plan = plan_sampled(gathered, csr.rows, csr.nnz, sizeof(T), kSampledVector<S>, limits_of(queue.device));

  SampledArgs<S> args{};
  args.g = g, args.x = x, args.tiling = plan.tiling, args.h = gathered.h, args.w = gathered.w;
  args.lists = lists_of(csr, window, false, gathered, plan.tiling);
  args.tiles = plan.tiling.tiles(), args.shares = plan.shares, args.row_blocks = plan.row_blocks, args.block_rows = plan.block_rows;
  int *by_count, *bounds;
  uint32_t* places;
  T* sums;
  const auto cut = [&](Pieces pieces) {
    by_count = pieces.take<int>(csr.rows), bounds = pieces.take<int>(static_cast<int64_t>(csr.rows) * (args.lists.chunks + 1));
    places = pieces.take<uint32_t>(csr.nnz);
    sums = pieces.take<T>(plan.shares > 1 ? static_cast<int64_t>(plan.shares) * csr.nnz : 0);
    return pieces.size();
  };
  const std::shared_ptr<void> memory = queue.allocate(cut(Pieces()));
  cut(Pieces(static_cast<unsigned char*>(memory.get())));

  index_lists(queue, args.lists, by_count, bounds);
  launch(queue.stream, find_places, blocks_for(csr.nnz, kPlaceThreads), kPlaceThreads, 0, args.lists, places);
  args.by_count = by_count, args.places = places, args.bounds = {bounds, args.lists.chunks}, args.sums = plan.shares > 1 ? sums : dvalues;
  launch(queue.stream, sampled<S, kSampledVector<S>>, plan.blocks, plan.warps * kWarp, plan.shared_bytes, args);
  if (plan.shares > 1) add_shares<T>(queue, sums, csr.nnz, plan.shares, dvalues);
}

template <class S>
void row_sums(const Queue& queue, int rows, int64_t length, const S* from, Compute<S>* to) {
  using T = Compute<S>;
  if (rows == 0) return;
  constexpr int64_t kLeast = 64 * kSumThreads;  // numbers of a share
  const int64_t wanted = blocks_for(4 * limits_of(queue.device).multiprocessors, rows);
  const int shares = static_cast<int>(std::clamp<int64_t>(length / kLeast, 1, wanted));
  const std::shared_ptr<void> memory = shares > 1 ? queue.allocate(shares * static_cast<int64_t>(rows) * sizeof(T)) : nullptr;
  T* const sums = shares > 1 ? static_cast<T*>(memory.get()) : to;
  const int64_t blocks = static_cast<int64_t>(rows) * shares;
  launch(queue.stream, sum_rows<S>, blocks, kSumThreads, kSumThreads * sizeof(T), from, rows, length, shares, sums);
  if (shares > 1) add_shares<T>(queue, sums, rows, shares, to);
}

template <class S>
void transpose(const Queue& queue, const Transposition& m, const S* from, const S* gate, S* to) {
  const int64_t blocks = m.count * blocks_for(m.rows, kTile) * blocks_for(m.cols, kTile);
  launch(queue.stream, transpose_tiles<S>, blocks, kTransposeThreads, kTile * (kTile + 1) * sizeof(S), m, from, gate, to);
}

template <class S>
void pass_gate(const Queue& queue, int64_t count, const S* from, const S* gate, S* to) {
  const int64_t blocks = std::min<int64_t>(blocks_for(count, kTransposeThreads), 8 * limits_of(queue.device).multiprocessors);
  launch(queue.stream, gate_elements<S>, blocks, kTransposeThreads, 0, count, from, gate, to);
}

#define GRASP_SPARSE_PASSES(S)                                                                                              \
  template void fprop(const Queue&, const CsrView&, const Window&, int64_t, const Compute<S>*, const Compute<S>*, bool,     \
                      const S*, S*);                                                                                        \
  template void dgrad(const Queue&, const CsrView&, const Window&, int64_t, const Compute<S>*, const S*, S*);               \
  template void wgrad(const Queue&, const CsrView&, const Window&, int64_t, const S*, const S*, Compute<S>*);               \
  template void row_sums(const Queue&, int, int64_t, const S*, Compute<S>*);                                                \
  template void transpose(const Queue&, const Transposition&, const S*, const S*, S*);                                      \
  template void pass_gate(const Queue&, int64_t, const S*, const S*, S*);

}  // namespace grasp_sparse::cuda
