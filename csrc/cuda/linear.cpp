// csr_spmm, csr_spmm_t, csr_sddmm, csr_spmm_backward: a matrix [N, features] is N images of one pixel.
#include "register.h"
#include "tensors.h"

namespace grasp_sparse::cuda {

namespace {

constexpr Window kPoint{{1, 1, 1, 0, 1, 1}, {1, 1, 1, 0, 1, 1}};

void check_matrix(const Tensor& t, int64_t features, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == features, "Expected ", name, " of shape [N, ", features, "], got ", t.dim(),
                  " dimensions, the last of ", t.dim() ? t.size(t.dim() - 1) : 0, ".");
}

void check_matrices(const CsrView& csr, const Tensor& g, const Tensor& x) {
  check_matrix(x, csr.cols, "x");
  check_matrix(g, csr.rows, "g");
  check_alike(g, x, "g");
}

}  // namespace

Tensor csr_spmm(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                const Tensor& permutation, const std::optional<Tensor>& bias, const Tensor& x, bool relu) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const CsrView& csr = indices.view();
  check_matrix(x, csr.cols, "x");
  const Tensor v = checked(values, csr.nnz, x, "values"), b = bias ? checked(*bias, csr.rows, x, "bias") : v;
  Tensor y = x;
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Innermost in = Innermost::of<S>(call.queue(), x);
    Result out(x, {x.size(0), csr.rows});
    fprop<S>(call.queue(), csr, kPoint, x.size(0), const_data<T>(v), bias ? const_data<T>(b) : nullptr, relu, in.data<S>(),
             out.data<S>());
    y = out.finish<S>(call.queue());
  });
  return y;
}

Tensor csr_spmm_t(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                  const Tensor& permutation, const Tensor& g) {
  const Call call(g);
  const Indices indices(crow, col, ccol, row, permutation, g);
  const CsrView& csr = indices.view();
  check_matrix(g, csr.rows, "g");
  const Tensor v = checked(values, csr.nnz, g, "values");
  Tensor dx = g;
  for_storage(g, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const Innermost in = Innermost::of<S>(call.queue(), g);
    Result out(g, {g.size(0), csr.cols});
    dgrad<S>(call.queue(), csr, kPoint, g.size(0), const_data<Compute<S>>(v), in.data<S>(), out.data<S>());
    dx = out.finish<S>(call.queue());
  });
  return dx;
}

Tensor csr_sddmm(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                 const Tensor& g, const Tensor& x) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const CsrView& csr = indices.view();
  check_matrices(csr, g, x);
  const Tensor sums = empty_sums(x, {1, csr.nnz});
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const Innermost in_g = Innermost::of<S>(call.queue(), g), in_x = Innermost::of<S>(call.queue(), x);
    wgrad<S>(call.queue(), csr, kPoint, x.size(0), in_g.data<S>(), in_x.data<S>(), mutable_data<Compute<S>>(sums));
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor> csr_spmm_backward(const Tensor& values, const Tensor& crow, const Tensor& col,
                                                     const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                                                     const Tensor& g, const Tensor& x, const std::optional<Tensor>& y,
                                                     bool input_grad) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const CsrView& csr = indices.view();
  check_matrices(csr, g, x);
  if (y) {
    check_matrix(*y, csr.rows, "y");
    check_alike(*y, x, "y");
  }
  const Tensor v = checked(values, csr.nnz, x, "values");
  const Tensor sums = empty_sums(x, {1, csr.nnz}), bias_sums = empty_sums(x, {csr.rows});
  Tensor dx = empty(g, {0}, {1}, layout::dtype(g));
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Queue& queue = call.queue();
    const Innermost in_g = Innermost::of<S>(queue, g, y ? &*y : nullptr), in_x = Innermost::of<S>(queue, x);
    if (input_grad) {
      Result out(g, {x.size(0), csr.cols});
      dgrad<S>(queue, csr, kPoint, x.size(0), const_data<T>(v), in_g.data<S>(), out.data<S>());
      dx = out.finish<S>(queue);
    }
    wgrad<S>(queue, csr, kPoint, x.size(0), in_g.data<S>(), in_x.data<S>(), mutable_data<T>(sums));
    row_sums<S>(queue, csr.rows, x.size(0), in_g.data<S>(), mutable_data<T>(bias_sums));
  });
  return {dx, sums, bias_sums};
}

}  // namespace grasp_sparse::cuda

GRASP_SPARSE_KERNELS(m) {
  m.impl("csr_spmm", TORCH_BOX(&grasp_sparse::cuda::csr_spmm));
  m.impl("csr_spmm_t", TORCH_BOX(&grasp_sparse::cuda::csr_spmm_t));
  m.impl("csr_sddmm", TORCH_BOX(&grasp_sparse::cuda::csr_sddmm));
  m.impl("csr_spmm_backward", TORCH_BOX(&grasp_sparse::cuda::csr_spmm_backward));
}
