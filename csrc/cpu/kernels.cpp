// Compiled once for each instruction set and element type, so that many cores compile it at once, with GRASP_SPARSE_ISA naming the
// namespace and GRASP_SPARSE_TYPE the type (setup.py has the flags).
// Cuts an image into tiles of R x C pixels, R*C <= kMaxTile, and calls the loop compiled for exactly that tile.
#include <type_traits>

#include "block_product.h"
#include "block_sampled.h"
#include "gradients.h"
#include "isa.h"
#include "norm.h"
#include "pack.h"
#include "pool.h"
#include "product.h"
#include "sampled.h"
#include "update.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

template <class T, template <class, int, int> class Strip, class Args, int R, int C>
GRASP_SPARSE_INLINE void run_cols(const Args& p, int row, int col, int cols) {
  if constexpr (C > 0) {
    if (cols == C) return Strip<T, R, C>::run(p, row, col);
    run_cols<T, Strip, Args, R, C - 1>(p, row, col, cols);
  }
}

template <class T, template <class, int, int> class Strip, class Args, int R>
void run_rows(const Args& p, int row, int width) {
  // Strips of nearly equal width: 29 columns are 15 + 14, not 16 + 13.
  for (int col = 0; col < p.cols;) {
    const int cols = p.cols - col < width ? p.cols - col : width;
    run_cols<T, Strip, Args, R, kMaxTile / R>(p, row, col, cols);
    col += cols;
  }
}

// One row of pixels of a band in a ring.
template <class S>
ProductArgs<S> row_of_ring(const ProductArgs<S>& p, int row) {
  ProductArgs<S> one = p;
  one.entries.place += (p.ring.first + row) % p.ring.rows * p.ring.list_step;
  one.out += row * p.oh, one.rows = 1, one.ring = Ring{};
  one.with.x += row * p.with.row_step, one.with.start = p.with.start && row == 0;
  one.moments.start = p.moments.start && row == 0;
  return one;
}
template <class T>
SampledArgs<T> row_of_ring(const SampledArgs<T>& p, int row) {
  SampledArgs<T> one = p;
  if (p.ring.rows)
    one.entries.place += (p.ring.first + row) % p.ring.rows * p.ring.list_step;
  else
    one.packed += row * p.row_step;
  one.g += (p.ring_g.rows ? (p.ring_g.first + row) % p.ring_g.rows : row) * p.g_row_step;
  one.start = p.start && row == 0, one.rows = 1, one.ring = one.ring_g = Ring{};
  return one;
}

template <class T>
GRASP_SPARSE_INLINE bool in_ring(const ProductArgs<T>& p) { return p.ring.rows; }
template <class T>
GRASP_SPARSE_INLINE bool in_ring(const SampledArgs<T>& p) { return p.ring.rows || p.ring_g.rows; }

template <class T, template <class, int, int> class Strip, class Args>
void run_tiles(const Args& p) {
  const int strips = (p.cols + kMaxTile - 1) / kMaxTile;
  const int width = strips ? (p.cols + strips - 1) / strips : 1;
  if (in_ring(p)) {
    for (int row = 0; row < p.rows; ++row) run_rows<T, Strip, Args, 1>(row_of_ring(p, row), 0, width);
    return;
  }
  for (int row = 0; row < p.rows;) {
    const int left = p.rows - row;
    if (left >= 4 && width * 4 <= kMaxTile) {
      run_rows<T, Strip, Args, 4>(p, row, width);
      row += 4;
    } else if (left >= 2 && width * 2 <= kMaxTile) {
      run_rows<T, Strip, Args, 2>(p, row, width);
      row += 2;
    } else {
      run_rows<T, Strip, Args, 1>(p, row, width);
      row += 1;
    }
  }
}

template <class T, int R, int C>
struct ProductStrip {
  static GRASP_SPARSE_INLINE void run(const ProductArgs<T>& p, int row, int col) { product_strip<T, false, R, C>(p, row, col); }
};
template <class T, int R, int C>
struct GradientStrip {
  static GRASP_SPARSE_INLINE void run(const ProductArgs<T>& p, int row, int col) { product_strip<T, true, R, C>(p, row, col); }
};
template <class T, int R, int C>
struct SampledStrip {
  static GRASP_SPARSE_INLINE void run(const SampledArgs<T>& p, int row, int col) { sampled_strip<T, R, C>(p, row, col); }
};

template <class T>
void product(const ProductArgs<T>& p) {
  if (p.blocks.outputs) return block_product(p);
  run_tiles<T, ProductStrip>(p);
}
template <class T>
void gradients(const ProductArgs<T>& p) {
  run_tiles<T, GradientStrip>(p);
}
template <class T>
constexpr auto kGradients = kMaxGradientTile > 1 ? &gradients<T> : nullptr;
template <class T>
void sampled(const SampledArgs<T>& p) {
  if (p.blocks.outputs) return block_sampled(p);
  run_tiles<T, SampledStrip>(p);
}

template <class S>
const Kernels<S>& table() {
  if constexpr (std::is_same_v<S, Bf16>) {
    static constexpr Kernels<S> all = {&pack<S>,     &unpack<S>,        &product<S>,     kGradients<S>,
                                       &max_pool<S>, &max_pool_grad<S>, kNormKernels<S>};
    return all;
  } else {
    static constexpr Kernels<S> all = {&pack<S>,     &unpack<S>,        &product<S>, kGradients<S>, &sampled<S>,
                                       &max_pool<S>, &max_pool_grad<S>, &sgd<S>,     &adamw<S>,     kNormKernels<S>};
    return all;
  }
}
template const Kernels<GRASP_SPARSE_TYPE>& table<GRASP_SPARSE_TYPE>();

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
