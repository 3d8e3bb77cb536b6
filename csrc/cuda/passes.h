// The passes over activations that lie images innermost, [channels, height, width, batch]: what the operations call. Plain C++.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "gather.h"
#include "storage.h"

namespace grasp_sparse::cuda {

// Where work is queued, and memory that may be dropped as soon as everything that uses it is queued.
struct Queue {
  int device;
  void* stream;
  std::function<std::shared_ptr<void>(int64_t bytes)> allocate;
};

// y = conv(x, W) + bias, then max with 0 if `relu`. bias may be null.
template <class S>
void fprop(const Queue&, const CsrView&, const Window&, int64_t batch, const Compute<S>* values, const Compute<S>* bias, bool relu,
           const S* x, S* y);
// dx = convᵀ(g, W)
template <class S>
void dgrad(const Queue&, const CsrView&, const Window&, int64_t batch, const Compute<S>* values, const S* g, S* dx);
// dvalues [nnz] of conv(x, W), given the gradient g of its result
template <class S>
void wgrad(const Queue&, const CsrView&, const Window&, int64_t batch, const S* g, const S* x, Compute<S>* dvalues);
// to [rows]: sums of rows of `length` numbers
template <class S>
void row_sums(const Queue&, int rows, int64_t length, const S* from, Compute<S>* to);

// `count` matrices [rows, cols] to [cols, rows]; their distances, and those of rows, in elements.
struct Transposition {
  int64_t count, rows, cols;
  int64_t from_matrix, from_row;
  int64_t to_matrix, to_row;
};
// With a gate, in the strides of `from`: zero where it is not positive.
template <class S>
void transpose(const Queue&, const Transposition&, const S* from, const S* gate, S* to);
template <class S>
void pass_gate(const Queue&, int64_t count, const S* from, const S* gate, S* to);

}  // namespace grasp_sparse::cuda
