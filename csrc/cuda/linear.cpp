// csr_spmm, csr_spmm_t, csr_sddmm, csr_spmm_backward: a matrix [N, features] is N images of one pixel.
#include "register.h"
#include "run.h"

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
  return run_fprop(csr, kPoint, values, bias, relu, x, {x.size(0), csr.rows}, call);
}

Tensor csr_spmm_t(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                  const Tensor& permutation, const Tensor& g) {
  const Call call(g);
  const Indices indices(crow, col, ccol, row, permutation, g);
  const CsrView& csr = indices.view();
  check_matrix(g, csr.rows, "g");
  return run_dgrad(csr, kPoint, values, g, {g.size(0), csr.cols}, call);
}

Tensor csr_sddmm(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                 const Tensor& g, const Tensor& x) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  check_matrices(indices.view(), g, x);
  return run_wgrad(indices.view(), kPoint, g, x, call);
}

Gradients csr_spmm_backward(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                            const Tensor& permutation, const Tensor& g, const Tensor& x, const std::optional<Tensor>& y,
                            bool input_grad) {
  const Call call(x);
  const Indices indices(crow, col, ccol, row, permutation, x);
  const CsrView& csr = indices.view();
  check_matrices(csr, g, x);
  if (y) {
    check_matrix(*y, csr.rows, "y");
    check_alike(*y, x, "y");
  }
  return run_backward(csr, kPoint, values, g, x, y ? &*y : nullptr, input_grad, call);
}

}  // namespace grasp_sparse::cuda

GRASP_SPARSE_KERNELS(m) {
  m.impl("csr_spmm", TORCH_BOX(&grasp_sparse::cuda::csr_spmm));
  m.impl("csr_spmm_t", TORCH_BOX(&grasp_sparse::cuda::csr_spmm_t));
  m.impl("csr_sddmm", TORCH_BOX(&grasp_sparse::cuda::csr_sddmm));
  m.impl("csr_spmm_backward", TORCH_BOX(&grasp_sparse::cuda::csr_spmm_backward));
}
