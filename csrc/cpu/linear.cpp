// csr_spmm, csr_spmm_t, csr_sddmm, csr_spmm_backward, and the first three of bsr_*: checks, layouts, and the call of the pass.
#include "panels.h"
#include "tensors.h"

namespace grasp_sparse {

namespace {

Matrix matrix_of(const Tensor& t) { return {t.size(0), t.size(1), t.stride(0), t.stride(1)}; }

// From how many rows on both gradients are made in one walk. What they save grows with the rows, what they cost more, lists and sums
// in the order of columns, with the weights (2048 rows, 1024 -> 1024, 90 to 99 %: 1.15 to 1.25 times the speed of two walks; 512 rows,
// 1024 -> 4096 and 768 -> 3072: 1.0 to 1.4 times, 1024 -> 1024: .95 to 1.0; 256 rows: .77 to 1.3 times; a Zen 4. 128 rows, 1024 -> 1024,
// an Intel Xeon: .90 to .94 times.)
constexpr int64_t kLeastRows = 512;

// Columns of their panels, of which there is nothing to gain from more than a tile has (gradients.h).
int64_t gradient_columns(int64_t outputs) { return panel_columns(outputs, 4, 8, 1 << 20); }

// [N, features] in the layout of `like`: feature-major if that is, row-major otherwise. The rule of ops/layout.py.
Tensor empty_rows(const Tensor& like, int64_t features) {
  const int64_t n = like.size(0), k = like.size(1);
  const bool feature_major = !like.is_contiguous() && (n == 1 || like.stride(0) == 1) && (k == 1 || like.stride(1) == n);
  const Sizes sizes{n, features};
  return empty_strided(like, sizes, feature_major ? Sizes{1, std::max<int64_t>(n, 1)} : row_major(sizes));
}

void check_matrix(const Tensor& t, int64_t features, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(1) == features, "Expected ", name, " of shape [N, ", features, "], got ", t.dim(),
                  " dimensions, the last of ", t.dim() ? t.size(t.dim() - 1) : 0, ".");
}

int64_t features_of(const Tensor& t) { return t.dim() == 2 ? t.size(1) : 0; }

Tensor product(const char* op, const CsrView& csr, const Tensor& values, const std::optional<Tensor>& bias, const Tensor& x,
               int64_t outputs, bool relu) {
  check_values(values, csr, compute_type(x));
  check_bias(bias, outputs, compute_type(x));
  const Tensor v = dense(values), b = bias ? dense(*bias) : v;
  const Tensor y = empty_rows(x, outputs);
  for_storage(x, op, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Matrix in = matrix_of(x), out = matrix_of(y);
    for (const Piece& p : pieces(in.rows, product_columns(csr, in.features), kLanes<T>))
      image_fprop<S>(csr, const_data<T>(v), bias ? const_data<T>(b) : nullptr, image_of(const_data<S>(x), in, p), point(p),
                     image_of(mutable_data<S>(y), out, p), relu);
  });
  return y;
}

Tensor transposed_product(const char* op, const CsrView& csr, const Tensor& values, const Tensor& g, int64_t inputs) {
  check_values(values, csr, compute_type(g));
  const Tensor v = dense(values);
  const Tensor dx = empty_rows(g, inputs);
  for_storage(g, op, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Matrix in = matrix_of(g), out = matrix_of(dx);
    for (const Piece& p : pieces(in.rows, product_columns(csr, in.features), kLanes<T>))
      image_dgrad<S>(csr, const_data<T>(v), image_of(const_data<S>(g), in, p), point(p), image_of(mutable_data<S>(dx), out, p));
  });
  return dx;
}

void check_matrices(const Tensor& g, int64_t outputs, const Tensor& x, int64_t inputs) {
  check_matrix(x, inputs, "x");
  check_matrix(g, outputs, "g");
  check_type(g, x.scalar_type(), "g");
  STD_TORCH_CHECK(g.size(0) == x.size(0), "Expected g and x of one batch, got ", g.size(0), " and ", x.size(0), ".");
}

Tensor sampled_product(const char* op, const CsrView& csr, const Tensor& g, const Tensor& x) {
  const Tensor sums = empty_sums(x, values_size(csr));
  for_storage(x, op, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Matrix mg = matrix_of(g), mx = matrix_of(x);
    for (const Piece& p : pieces(mx.rows, sampled_columns(csr, mx.features), kLanes<T>))
      image_wgrad<S>(csr, image_of(const_data<S>(g), mg, p), image_of(const_data<S>(x), mx, p), point(p), mutable_data<T>(sums),
                     nullptr, p.first > 0);
  });
  return sums;
}

}  // namespace

Tensor csr_spmm(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                const Tensor& permutation, const std::optional<Tensor>& bias, const Tensor& x, bool relu) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  check_matrix(x, csr.cols, "x");
  return product("csr_spmm", csr, values, bias, x, csr.rows, relu);
}

Tensor csr_spmm_t(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                  const Tensor& permutation, const Tensor& g) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  check_matrix(g, csr.rows, "g");
  return transposed_product("csr_spmm_t", csr, values, g, csr.cols);
}

Tensor csr_sddmm(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                 const Tensor& g, const Tensor& x) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  check_matrices(g, csr.rows, x, csr.cols);
  return sampled_product("csr_sddmm", csr, g, x);
}

Tensor bsr_spmm(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                const Tensor& permutation, const std::optional<Tensor>& bias, const Tensor& x, int64_t out_features, bool relu) {
  check_matrix(x, features_of(x), "x");
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView csr = indices.view_of_blocks(block_size_of(values), out_features, x.size(1), 1);
  return product("bsr_spmm", csr, values, bias, x, out_features, relu);
}

Tensor bsr_spmm_t(const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row,
                  const Tensor& permutation, const Tensor& g, int64_t in_features) {
  check_matrix(g, features_of(g), "g");
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView csr = indices.view_of_blocks(block_size_of(values), g.size(1), in_features, 1);
  return transposed_product("bsr_spmm_t", csr, values, g, in_features);
}

Tensor bsr_sddmm(const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                 const Tensor& g, const Tensor& x, Sizes block_size) {
  check_matrices(g, features_of(g), x, features_of(x));
  const Indices indices(crow, col, ccol, row, permutation);
  return sampled_product("bsr_sddmm", indices.view_of_blocks(block_size, g.size(1), x.size(1), 1), g, x);
}

std::tuple<Tensor, Tensor, Tensor> csr_spmm_backward(const Tensor& values, const Tensor& crow, const Tensor& col,
                                                     const Tensor& ccol, const Tensor& row, const Tensor& permutation,
                                                     const Tensor& grad, const Tensor& x, const std::optional<Tensor>& y,
                                                     bool input_grad) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  check_matrices(grad, csr.rows, x, csr.cols);
  check_values(values, csr, compute_type(x));
  if (y) {
    check_matrix(*y, csr.rows, "y");
    check_type(*y, x.scalar_type(), "y");
    STD_TORCH_CHECK(y->size(0) == x.size(0), "Expected y and x of one batch, got ", y->size(0), " and ", x.size(0), ".");
  }
  const bool alike = !y || (y->stride(0) == grad.stride(0) && y->stride(1) == grad.stride(1));
  const Tensor g = alike ? grad : dense(grad), gate = !y ? g : alike ? *y : dense(*y);
  const Tensor v = dense(values), dx = input_grad ? empty_rows(g, csr.cols) : empty_strided(g, {0}, {1});
  const Tensor sums = empty_sums(x, {1, csr.nnz}), bias_sums = empty_sums(x, {csr.rows});
  for_storage(x, "csr_spmm_backward", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Matrix mg = matrix_of(g), mx = matrix_of(x);
    const auto gradient = [&](const Piece& p) {
      Image<const S> image = image_of(const_data<S>(g), mg, p);
      if (y) image.gate = const_data<S>(gate) + p.first * mg.row_stride;
      return image;
    };
    if (input_grad && kernels<S>().gradients && mx.rows >= kLeastRows) {
      for (const Piece& p : pieces(mx.rows, gradient_columns(mg.features), kLanes<T>))
        image_backward<S>(csr, const_data<T>(v), gradient(p), image_of(const_data<S>(x), mx, p), point(p),
                          image_of(mutable_data<S>(dx), matrix_of(dx), p), mutable_data<T>(sums), mutable_data<T>(bias_sums), p.first > 0);
      return;
    }
    if (input_grad)
      for (const Piece& p : pieces(mx.rows, product_columns(csr, mg.features), kLanes<T>))
        image_dgrad<S>(csr, const_data<T>(v), gradient(p), point(p), image_of(mutable_data<S>(dx), matrix_of(dx), p));
    for (const Piece& p : pieces(mx.rows, sampled_columns(csr, mx.features), kLanes<T>))
      image_wgrad<S>(csr, gradient(p), image_of(const_data<S>(x), mx, p), point(p), mutable_data<T>(sums),
                     mutable_data<T>(bias_sums), p.first > 0);
  });
  return {dx, sums, bias_sums};
}

}  // namespace grasp_sparse

STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CPU, m) {
  m.impl("csr_spmm", TORCH_BOX(&grasp_sparse::csr_spmm));
  m.impl("csr_spmm_t", TORCH_BOX(&grasp_sparse::csr_spmm_t));
  m.impl("csr_sddmm", TORCH_BOX(&grasp_sparse::csr_sddmm));
  m.impl("csr_spmm_backward", TORCH_BOX(&grasp_sparse::csr_spmm_backward));
  m.impl("bsr_spmm", TORCH_BOX(&grasp_sparse::bsr_spmm));
  m.impl("bsr_spmm_t", TORCH_BOX(&grasp_sparse::bsr_spmm_t));
  m.impl("bsr_sddmm", TORCH_BOX(&grasp_sparse::bsr_sddmm));
}
