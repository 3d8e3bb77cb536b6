// From torch tensors to the plain views the passes work on; every shape and type is checked here, once, at the edge.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "image.h"

namespace grasp_sparse {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// The five index tensors, held contiguous for as long as the view is in use.
class __attribute__((visibility("hidden"))) Indices {  // as torch's own Tensor is
 public:
  Indices(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation)
      : held_{index(crow, "crow_indices"), index(col, "col_indices"), index(ccol, "ccol_indices"),
              index(row, "row_indices"), index(permutation, "permutation")} {
    view_.rows = held_[0].numel() - 1, view_.cols = held_[2].numel() - 1, view_.nnz = held_[1].numel();
    STD_TORCH_CHECK(view_.rows >= 0 && view_.cols >= 0, "Expected crow_indices and ccol_indices of at least one entry.");
    STD_TORCH_CHECK(held_[3].numel() == view_.nnz && held_[4].numel() == view_.nnz, "Expected row_indices and permutation of ",
                    view_.nnz, " entries like col_indices, got ", held_[3].numel(), " and ", held_[4].numel(), ".");
    view_.crow = data(0), view_.col = data(1), view_.ccol = data(2), view_.row = data(3), view_.permutation = data(4);
  }
  const CsrView& view() const { return view_; }

  // As indices of blocks of a weight [outputs, inputs, taps].
  CsrView view_of_blocks(const Sizes& block_size, int64_t outputs, int64_t inputs, int64_t taps) const {
    STD_TORCH_CHECK(block_size.size() == 2, "Expected block_size of 2 numbers, got ", block_size.size(), ".");
    STD_TORCH_CHECK(outputs >= 0 && outputs <= INT32_MAX && inputs >= 0 && inputs <= INT32_MAX, "Expected a weight of 0 to ",
                    INT32_MAX, " outputs and inputs, got ", outputs, " x ", inputs, ".");
    CsrView view = view_;
    view.has_blocks = true, view.bh = block_size[0], view.bw = block_size[1];
    for (int64_t size : block_size)
      STD_TORCH_CHECK(size >= 1 && size <= INT32_MAX, "Expected block_size between 1 and ", INT32_MAX, ", got ", size, ".");
    const int64_t rows = (outputs + view.bh - 1) / view.bh, cols = (inputs + view.bw - 1) / view.bw * taps;
    STD_TORCH_CHECK(view.rows == rows && view.cols == cols, "Expected indices of ", rows, " x ", cols, " blocks, got ", view.rows,
                    " x ", view.cols, ".");
    return view;
  }

 private:
  static Tensor index(const Tensor& t, const char* name) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 && t.is_cpu(), "Expected ", name,
                    " to be a 1-D int32 tensor on the CPU.");
    return t.is_contiguous() ? t : torch::stable::clone(t);
  }
  const int32_t* data(int i) const { return static_cast<const int32_t*>(held_[i].const_data_ptr()); }

  Tensor held_[5];
  CsrView view_{};
};

inline void check_type(const Tensor& t, ScalarType type, const char* name) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type, "Expected ", name, " on the CPU in the dtype of the activations.");
}

inline void check_values(const Tensor& values, const CsrView& csr, ScalarType type) {
  check_type(values, type, "values");
  STD_TORCH_CHECK(values.numel() == csr.weights(), "Expected values of ", csr.weights(), " entries, got ", values.numel(), ".");
}

// [bh, bw] of values [nblocks, bh, bw].
inline Sizes block_size_of(const Tensor& values) {
  STD_TORCH_CHECK(values.dim() == 3, "Expected values [nblocks, bh, bw], got ", values.dim(), " dimensions.");
  return {values.size(1), values.size(2)};
}

// Of weights or of whole blocks, like values.
inline Sizes values_size(const CsrView& csr) {
  return csr.has_blocks ? Sizes{csr.nnz, csr.bh, csr.bw} : Sizes{1, csr.nnz};
}

inline void check_bias(const std::optional<Tensor>& bias, int64_t outputs, ScalarType type) {
  if (!bias) return;
  check_type(*bias, type, "bias");
  STD_TORCH_CHECK(bias->numel() == outputs, "Expected bias of ", outputs, " entries, got ", bias->numel(), ".");
}

inline Tensor dense(const Tensor& t) {
  if (t.is_contiguous()) return t;
  return torch::stable::contiguous(t);
}

// What values, bias and their gradients are beside activations of this type.
inline ScalarType compute_type(const Tensor& activations) {
  return activations.scalar_type() == ScalarType::BFloat16 ? ScalarType::Float : activations.scalar_type();
}

inline Tensor empty_strided(const Tensor& like, const Sizes& sizes, const Sizes& strides, bool compute = false) {
  AtenTensorHandle handle;
  int32_t type, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  if (compute && compute_type(like) != like.scalar_type()) type = aoti_torch_dtype_float32();
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, device,
                                                  like.get_device(), &handle));
  return Tensor(handle);
}

// Calls f with a null pointer of the element type of t.
template <class F>
auto for_type(const Tensor& t, const char* op, F&& f) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op,
                  ": Expected float32 or float64; convert, or call the layer, which does.");
  return type == ScalarType::Float ? f(static_cast<float*>(nullptr)) : f(static_cast<double*>(nullptr));
}

// The same for activations, which may be bfloat16.
template <class F>
auto for_storage(const Tensor& t, const char* op, F&& f) {
  return t.scalar_type() == ScalarType::BFloat16 ? f(static_cast<Bf16*>(nullptr)) : for_type(t, op, f);
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The strides that torch gives contiguous tensors, empty ones too.
inline Sizes row_major(const Sizes& sizes) {
  Sizes strides(sizes.size(), 1);
  for (size_t d = sizes.size(); d-- > 1;) strides[d - 1] = strides[d] * std::max<int64_t>(sizes[d], 1);
  return strides;
}

// Contiguous, of the type that sums beside activations `like` have.
inline Tensor empty_sums(const Tensor& like, const Sizes& sizes) { return empty_strided(like, sizes, row_major(sizes), true); }

}  // namespace grasp_sparse
