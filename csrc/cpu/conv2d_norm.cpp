// csr_conv2d_norm_train, _backward: a convolution and the batch norm behind it, by the statistics of the batch. The gradient of what
// lies between the two is not written and read again: packing makes it of what it is made of, where channels lie side by side.
#include "channel_moments.h"
#include "conv2d.h"
#include "layout.h"

namespace grasp_sparse {

namespace {

// Whether the channels of images that lie like this one, so many of them, lie side by side and fill a vector.
bool lies_by_channels(const Tensor& like, int64_t channels) {
  const int64_t lanes = compute_type(like) == ScalarType::Double ? kLanes<double> : kLanes<float>;
  return layout_of(like) == Layout::channels_last && channels >= lanes;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> csr_conv2d_norm_train(
    const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
    const std::optional<Tensor>& bias, const Tensor& x, const std::optional<Tensor>& residual,
    const std::optional<Tensor>& norm_weight, const std::optional<Tensor>& norm_bias, double eps, bool relu, Sizes kernel_size,
    Sizes stride, Sizes padding, Sizes dilation) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  check_images(x, input_channels(csr.cols, kernel_size), "x");
  const Window window = window_of<Window>(x.size(2), x.size(3), kernel_size, stride, padding, dilation);
  const auto fprop = [&](ChannelMoments* moments) {
    return conv2d_fprop("csr_conv2d_norm_train", csr, values, bias, x, csr.rows, window, false, moments);
  };
  // What is stored as bfloat16 is not what was computed: its moments are taken of what is stored.
  if (!lies_by_channels(x, csr.rows) || x.scalar_type() != compute_type(x)) {
    const Tensor z = fprop(nullptr);
    const auto [y, mean, var] = batch_norm_train(z, residual, norm_weight, norm_bias, eps, relu);
    return {y, z, mean, var};
  }
  ChannelMoments moments(csr.rows);
  const Tensor z = fprop(&moments), mean = empty_sums(x, {csr.rows}), var = empty_sums(x, {csr.rows});
  for_storage(x, "csr_conv2d_norm_train", [&](auto* type) {
    using T = Compute<std::remove_pointer_t<decltype(type)>>;
    T *const means = mutable_data<T>(mean), *const vars = mutable_data<T>(var);
    for (int64_t c = 0; c < csr.rows; ++c)
      means[c] = static_cast<T>(moments.mean(c)), vars[c] = static_cast<T>(moments.var(c));
  });
  return {normalise_given(z, residual, norm_weight, norm_bias, mean, var, eps, relu), z, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> csr_conv2d_norm_backward(
    const Tensor& values, const Tensor& crow, const Tensor& col, const Tensor& ccol, const Tensor& row, const Tensor& permutation,
    const Tensor& g, const Tensor& x, const Tensor& z, const std::optional<Tensor>& y, const std::optional<Tensor>& norm_weight,
    const std::optional<Tensor>& norm_bias, const Tensor& mean, const Tensor& var, double eps, bool relu, Sizes kernel_size,
    Sizes stride, Sizes padding, Sizes dilation, bool input_grad) {
  const Indices indices(crow, col, ccol, row, permutation);
  const CsrView& csr = indices.view();
  const int64_t inputs = input_channels(csr.cols, kernel_size);
  const Window window = check_pair_of_images(g, csr.rows, x, inputs, kernel_size, stride, padding, dilation);
  check_values(values, csr, compute_type(x));
  const bool through = lies_by_channels(z, csr.rows);
  const NormGradients norm = norm_gradients(g, z, y, norm_weight, norm_bias, mean, var, eps, relu, !through);
  const auto [dx, dvalues, dbias] = conv2d_gradients("csr_conv2d_norm_backward", csr, values, through ? norm.g : norm.x, x, window,
                                                     input_grad, through ? &norm : nullptr);
  return {dx, dvalues, dbias, norm.residual, norm.weight, norm.bias};
}

}  // namespace grasp_sparse

STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CPU, m) {
  m.impl("csr_conv2d_norm_train", TORCH_BOX(&grasp_sparse::csr_conv2d_norm_train));
  m.impl("csr_conv2d_norm_backward", TORCH_BOX(&grasp_sparse::csr_conv2d_norm_backward));
}
