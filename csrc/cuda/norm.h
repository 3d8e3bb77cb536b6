// Batch norm of images that lie images innermost, so that every channel is one contiguous run: what the operations call. Plain C++.
#pragma once

#include <cstdint>

#include "passes.h"

namespace grasp_sparse::cuda {

// Arrays of [channels, length], and of [channels] where the type is Compute<S>. Null where absent.
template <class S>
struct NormArgs {
  using T = Compute<S>;
  int64_t channels, length;
  const S *x, *g, *residual;
  const S* y;  // gradients: where it is not positive the ReLU stopped the gradient; null: see relu
  S *out, *g_residual;
  const T *weight, *bias;
  T *mean, *var;  // var is that of the batch: over length, not length - 1
  T *g_weight, *g_bias;
  double eps;
  bool relu;  // out = max(…, 0); gradients without y: g counts where the normalised x is positive
};

// Sets mean and var to those of x, then does what normalise does.
template <class S>
void normalise_batch(const Queue&, const NormArgs<S>&);
// out = (x - mean) / sqrt(var + eps) * weight + bias + residual, then max with 0 if relu
template <class S>
void normalise(const Queue&, const NormArgs<S>&);
// Of the loss with respect to x (out), weight, bias and, where there is a y, the residual; mean and var as normalise_batch set them.
template <class S>
void normalise_batch_gradients(const Queue&, const NormArgs<S>&);
// running += share * (now - running); for var with its own share of what is there and of what comes
template <class T>
void follow_statistics(const Queue&, int64_t channels, double momentum, double var_share, const T* mean, const T* var,
                       T* running_mean, T* running_var);

}  // namespace grasp_sparse::cuda
