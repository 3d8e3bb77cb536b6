// What batch norms give to operations that do a norm on the way (conv2d_norm.cpp).
#pragma once

#include "norm_args.h"
#include "tensors.h"

namespace grasp_sparse {

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                    double eps, bool relu);

// y by a mean and a variance that are known.
Tensor normalise_given(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool relu);

struct __attribute__((visibility("hidden"))) NormGradients {  // as torch's own Tensor is
  Tensor x, residual, weight, bias;  // that of the residual is empty without y
  // Instead of that of x, which is empty then, what it is made of (NormGradient): g and x in one layout, NormCoefficients in scratch
  // memory of this thread, and whether g is still to be masked.
  Tensor g, input;
  const void* coefficients;
  bool relu;
};

// As batch_norm_backward; without `input_grad`, whoever reads g makes the gradient of x of it.
NormGradients norm_gradients(const Tensor& g, const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool relu,
                             bool input_grad);

}  // namespace grasp_sparse
