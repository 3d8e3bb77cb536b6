// From torch tensors to the passes: checks, once, at the edge; memory and streams; and activations in the layout of the kernels.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <utility>

#include "../cpu/layout.h"
#include "passes.h"

namespace grasp_sparse::cuda {

#if defined(GRASP_SPARSE_EMULATED)
constexpr char kDevice[] = "the CPU";
inline bool is_here(const Tensor& t) { return t.is_cpu(); }
#else
constexpr char kDevice[] = "a CUDA device";
inline bool is_here(const Tensor& t) { return t.is_cuda(); }
#endif

inline bool is_beside(const Tensor& t, const Tensor& other) { return is_here(t) && t.get_device() == other.get_device(); }

inline ScalarType computed_type(const Tensor& activations) {
  return activations.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The five index tensors, held contiguous for as long as the view is in use.
class __attribute__((visibility("hidden"))) Indices {
 public:
  Indices(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
          const Tensor& beside)
      : held_{index(crow, "crow_indices", beside), index(col, "col_indices", beside), index(ccol, "ccol_indices", beside),
              index(row, "row_indices", beside), index(permutation, "permutation", beside)} {
    const int64_t nnz = held_[1].numel();
    STD_TORCH_CHECK(held_[0].numel() > 0 && held_[2].numel() > 0, "Expected crow_indices and ccol_indices of at least one entry.");
    STD_TORCH_CHECK(held_[3].numel() == nnz && held_[4].numel() == nnz, "Expected row_indices and permutation of ", nnz,
                    " entries like col_indices, got ", held_[3].numel(), " and ", held_[4].numel(), ".");
    const int64_t places = (held_[0].numel() - 1) * (held_[2].numel() - 1);
    STD_TORCH_CHECK(nnz <= places, "Expected at most ", places, " col_indices, one for each place of the weight, got ", nnz, ".");
    view_ = {static_cast<int>(held_[0].numel() - 1), static_cast<int>(held_[2].numel() - 1), static_cast<int>(nnz),
             data(0), data(1), data(2), data(3), data(4)};
  }
  const CsrView& view() const { return view_; }

 private:
  static Tensor index(const Tensor& t, const char* name, const Tensor& beside) {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Int && t.dim() == 1 && is_beside(t, beside), "Expected ", name,
                    " to be a 1-D int32 tensor on ", kDevice, ", that of the activations.");
    constexpr int64_t kStep = 1024;  // kernels count in 32 bits and by steps of no more than this
    STD_TORCH_CHECK(t.numel() <= INT32_MAX - kStep, "Expected ", name, " of at most ", INT32_MAX - kStep, " entries, got ",
                    t.numel(), ".");
    return t.is_contiguous() ? t : torch::stable::contiguous(t);
  }
  const int32_t* data(int i) const { return static_cast<const int32_t*>(held_[i].const_data_ptr()); }

  Tensor held_[5];
  CsrView view_{};
};

// `t` contiguous, once it is known to hold `count` numbers of what is computed in beside these activations.
inline Tensor checked(const Tensor& t, int64_t count, const Tensor& activations, const char* name) {
  STD_TORCH_CHECK(is_beside(t, activations) && t.scalar_type() == computed_type(activations), "Expected ", name, " on ", kDevice,
                  " in what is computed in beside the activations: float64 for float64, else float32.");
  STD_TORCH_CHECK(t.numel() == count, "Expected ", name, " of ", count, " entries, got ", t.numel(), ".");
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

inline void check_alike(const Tensor& t, const Tensor& other, const char* name) {
  STD_TORCH_CHECK(is_beside(t, other) && t.scalar_type() == other.scalar_type(), "Expected ", name,
                  " on the device and in the dtype of the other activations.");
  STD_TORCH_CHECK(t.size(0) == other.size(0), "Expected ", name, " of the same batch, got ", t.size(0), " and ", other.size(0),
                  ".");
}

// Calls f with a null pointer of the storage type of t.
template <class F>
void for_storage(const Tensor& t, F&& f) {
  const ScalarType type = t.scalar_type();
  if (type == ScalarType::Float) return f(static_cast<float*>(nullptr));
  if (type == ScalarType::BFloat16) return f(static_cast<Bf16*>(nullptr));
  if (type == ScalarType::Half) return f(static_cast<Fp16*>(nullptr));
  STD_TORCH_CHECK(type == ScalarType::Double, "Expected activations in float32, bfloat16, float16 or float64.");
  f(static_cast<double*>(nullptr));
}

inline Tensor empty(const Tensor& like, const Sizes& sizes, const Sizes& strides, int32_t type) {
  AtenTensorHandle handle;
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, device,
                                                  like.get_device(), &handle));
  return Tensor(handle);
}

// `count` sums [1, count] or [count] over activations like these.
inline Tensor empty_sums(const Tensor& like, const Sizes& sizes) {
  const int32_t type = computed_type(like) == ScalarType::Double ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  return empty(like, sizes, sizes.size() == 2 ? Sizes{sizes[1], 1} : Sizes{1}, type);
}

// The device and stream of a call, current for as long as this lives.
class __attribute__((visibility("hidden"))) Call {
 public:
  explicit Call(const Tensor& t)
#if !defined(GRASP_SPARSE_EMULATED)
      : guard_(t.get_device())
#endif
  {
    STD_TORCH_CHECK(is_here(t), "Expected activations on ", kDevice, ".");
    void* stream = nullptr;
#if !defined(GRASP_SPARSE_EMULATED)
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device(), &stream));
#endif
    queue_ = {t.get_device(), stream, [t](int64_t bytes) {
                auto memory = std::make_shared<Tensor>(empty(t, {bytes}, {1}, aoti_torch_dtype_uint8()));
                return std::shared_ptr<void>(memory, memory->mutable_data_ptr());
              }};
  }
  const Queue& queue() const { return queue_; }

 private:
#if !defined(GRASP_SPARSE_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Queue queue_;
};

// Activations [N, features] or [N, C, H, W] with their images innermost: themselves where they lie so, else a copy.
// With a gate of the same shape, zero where that is not positive.
class __attribute__((visibility("hidden"))) Innermost {
 public:
  template <class S>
  static Innermost of(const Queue& queue, const Tensor& t, const Tensor* gate = nullptr);

  template <class S>
  const S* data() const {
    return const_data<S>(held_);
  }

 private:
  explicit Innermost(Tensor held) : held_(std::move(held)) {}
  Tensor held_;
};

// A result in the layout of `like`; kernels write it images innermost, `finish` turns it where that is another layout.
class __attribute__((visibility("hidden"))) Result {
 public:
  Result(const Tensor& like, const Sizes& sizes);
  template <class S>
  S* data() {
    return mutable_data<S>(innermost_);
  }
  template <class S>
  Tensor finish(const Queue& queue);

 private:
  Tensor result_, innermost_;
};

namespace layout {

// Channels of an image, and pixels; a matrix is an image of one.
inline int64_t pixels(const Sizes& sizes) { return sizes.size() == 4 ? sizes[2] * sizes[3] : 1; }

inline Sizes sizes_of(const Tensor& t) {
  Sizes sizes;
  for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
  return sizes;
}

inline Sizes strides_of(const Tensor& t) {
  Sizes strides;
  for (int64_t d = 0; d < t.dim(); ++d) strides.push_back(t.stride(d));
  return strides;
}

inline Layout of(const Tensor& t) {
  if (t.dim() == 4) return layout_of(t);
  const int64_t n = t.size(0), features = t.size(1);
  const bool feature_major = !t.is_contiguous() && (n == 1 || t.stride(0) == 1) && (features == 1 || t.stride(1) == n);
  return feature_major ? Layout::chwn : Layout::nchw;
}

inline Sizes strides(const Sizes& s, Layout layout) {
  const int64_t n = s[0], c = s[1];
  if (s.size() == 2) return layout == Layout::chwn ? Sizes{1, n} : Sizes{c, 1};
  const int64_t h = s[2], w = s[3];
  if (layout == Layout::chwn) return {1, h * w * n, w * n, n};
  return layout == Layout::channels_last ? Sizes{h * w * c, 1, w * c, c} : Sizes{c * h * w, h * w, w, 1};
}

// Whether the elements lie images innermost, also where they lie in other layouts as well.
inline bool is_innermost(const Tensor& t) {
  if (t.dim() == 4) return lies_as(t, {1, 2, 3, 0});
  return (t.size(0) <= 1 || t.stride(0) == 1) && (t.size(1) <= 1 || t.stride(1) == t.size(0));
}

// From images outermost, in NCHW or channels_last, to images innermost.
inline Transposition inwards(const Sizes& s, Layout layout) {
  const int64_t n = s[0], c = s[1], p = pixels(s);
  if (layout == Layout::channels_last) return {p, n, c, c, p * c, n, p * n};
  return {1, n, c * p, 0, c * p, 0, n};
}

// And back.
inline Transposition outwards(const Sizes& s, Layout layout) {
  const int64_t n = s[0], c = s[1], p = pixels(s);
  if (layout == Layout::channels_last) return {p, c, n, n, p * n, c, p * c};
  return {1, c * p, n, 0, n, 0, c * p};
}

inline int32_t dtype(const Tensor& t) {
  int32_t type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return type;
}

}  // namespace layout

template <class S>
Innermost Innermost::of(const Queue& queue, const Tensor& t, const Tensor* gate) {
  if (layout::is_innermost(t) && !gate) return Innermost(t);
  Layout from = layout::of(t);
  const auto lies_so = [&](const Tensor& u) { return from == Layout::nchw ? u.is_contiguous() : layout::of(u) == from; };
  if (!lies_so(t) || (gate && !lies_so(*gate))) from = Layout::nchw;
  const auto in_place = [&](const Tensor& u) { return lies_so(u) ? u : torch::stable::contiguous(u); };
  const Tensor source = in_place(t), opening = gate ? in_place(*gate) : source;
  const S* const gates = gate ? const_data<S>(opening) : nullptr;
  const Sizes sizes = layout::sizes_of(t);
  const Tensor to = empty(t, sizes, layout::strides(sizes, Layout::chwn), layout::dtype(t));
  if (from == Layout::chwn)
    pass_gate<S>(queue, t.numel(), const_data<S>(source), gates, mutable_data<S>(to));
  else
    transpose<S>(queue, layout::inwards(sizes, from), const_data<S>(source), gates, mutable_data<S>(to));
  return Innermost(to);
}

inline Result::Result(const Tensor& like, const Sizes& sizes)
    : result_(empty(like, sizes, layout::strides(sizes, layout::of(like)), layout::dtype(like))), innermost_(result_) {
  if (!layout::is_innermost(result_)) innermost_ = empty(like, sizes, layout::strides(sizes, Layout::chwn), layout::dtype(like));
}

template <class S>
Tensor Result::finish(const Queue& queue) {
  if (innermost_.get() != result_.get()) {
    const Sizes sizes = layout::sizes_of(result_);
    const Transposition back = layout::outwards(sizes, layout::of(result_));
    transpose<S>(queue, back, const_data<S>(innermost_), static_cast<const S*>(nullptr), mutable_data<S>(result_));
  }
  return result_;
}

}  // namespace grasp_sparse::cuda
