// csr_conv2d_norm_train, _backward: a convolution and the batch norm behind it, by the statistics of the batch. The gradient of what
// lies between the two is not written and read again: packing makes it of what it is made of, where channels lie side by side.
#include "batch_norm.h"
#include "channel_moments.h"
#include "conv2d.h"
#include "isa.h"
#include "layout.h"
#include "pixel_lanes.h"

namespace grasp_sparse {

namespace {

template <class S>
NormGradient<S> read_through(const NormGradients& norm, bool relu) {
  using T = Compute<S>;
  const int64_t channels = norm.input.size(1);
  const T* of = static_cast<const T*>(norm.coefficients);
  return {const_data<S>(norm.input), of, of + channels, of + 2 * channels, of + 3 * channels, of + 4 * channels, relu};
}

// Whether the channels of images that lie like this one lie side by side, and fill a vector; `statistics` are one number for each.
bool lies_by_channels(const Tensor& like, const Tensor& statistics) {
  return layout_of(like) == Layout::channels_last && statistics.numel() * static_cast<int64_t>(statistics.element_size()) >= kSliceBytes;
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
  const Tensor mean = empty_sums(x, {csr.rows}), var = empty_sums(x, {csr.rows});
  // What is stored as bfloat16 is not what was computed: its moments are taken of what is stored.
  if (!lies_by_channels(x, mean) || x.scalar_type() != compute_type(x) || x.numel() == 0) {
    const Tensor z = csr_conv2d_fprop(values, crow, col, ccol, row, permutation, bias, x, kernel_size, stride, padding, dilation);
    const auto [y, mean, var] = batch_norm_train(z, residual, norm_weight, norm_bias, eps, relu);
    return {y, z, mean, var};
  }
  check_values(values, csr, compute_type(x));
  check_bias(bias, csr.rows, compute_type(x));
  const Tensor v = dense(values), b = bias ? dense(*bias) : v;
  const Tensor z = empty_images(x, csr.rows, window.h.output, window.w.output);
  for_storage(x, "csr_conv2d_norm_train", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    ChannelMoments moments(csr.rows);
    const T* biases = bias ? const_data<T>(b) : nullptr;
    in_pieces(window, [&](const Window& window, bool, const Image<const S>& x, const Image<S>& z) {
      image_fprop<S>(csr, const_data<T>(v), biases, x, window, z, false, &moments);
    }, image_of(const_data<S>(x), x), image_of(mutable_data<S>(z), z));
    T *const means = mutable_data<T>(mean), *const vars = mutable_data<T>(var);
    for (int64_t c = 0; c < csr.rows; ++c)
      means[c] = static_cast<T>(moments.mean(c)), vars[c] = static_cast<T>(moments.var(c));
  });
  return {norm_by(z, residual, norm_weight, norm_bias, mean, var, eps, relu), z, mean, var};
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
  const bool packs = lies_by_channels(z, mean);
  const NormGradients norm = norm_gradients(g, z, y, norm_weight, norm_bias, mean, var, eps, relu, !packs);
  const Tensor gz = packs ? norm.g : norm.x, v = dense(values);
  const Tensor dx = input_grad ? empty_images(gz, x.size(1), x.size(2), x.size(3)) : empty_strided(x, {0}, {1});
  const Tensor sums = empty_sums(x, {1, csr.nnz}), bias_sums = empty_sums(x, {csr.rows});
  for_storage(x, "csr_conv2d_norm_backward", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    Image<const S> image = image_of(const_data<S>(gz), gz);
    if (packs) image.norm = read_through<S>(norm, relu && !y);
    const Image<const S> input = image_of(const_data<S>(x), x);
    T *const weights = mutable_data<T>(sums), *const biases = mutable_data<T>(bias_sums);
    if (!input_grad)
      return in_pieces(window, [&](const Window& window, bool add, const Image<const S>& g, const Image<const S>& x) {
        image_wgrad<S>(csr, g, x, window, weights, biases, add);
      }, image, input);
    in_pieces(window, [&](const Window& window, bool add, const Image<const S>& g, const Image<const S>& x, const Image<S>& dx) {
      image_backward<S>(csr, const_data<T>(v), g, x, window, dx, weights, biases, add);
    }, image, input, image_of(mutable_data<S>(dx), dx));
  });
  return {dx, sums, bias_sums, norm.residual, norm.weight, norm.bias};
}

}  // namespace grasp_sparse

STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CPU, m) {
  m.impl("csr_conv2d_norm_train", TORCH_BOX(&grasp_sparse::csr_conv2d_norm_train));
  m.impl("csr_conv2d_norm_backward", TORCH_BOX(&grasp_sparse::csr_conv2d_norm_backward));
}
