// What batch norms give to operations that do a norm on the way (conv2d_norm.cpp).
#pragma once

#include "norm_args.h"
#include "tensors.h"

namespace grasp_sparse {

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                    double eps, bool relu);

// y by a mean and a variance that are known.
Tensor norm_by(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool relu);

struct __attribute__((visibility("hidden"))) NormGradients {  // as torch's own Tensor is
  Tensor x, residual, weight, bias;  // that of the residual is empty without y
  // Instead of that of x, which is empty then, what it is made of: the masked g and x in one layout, and mean, scale, bias, offset and
  // slope of NormGradient, [5][channels] in scratch memory of this thread.
  Tensor g, input;
  const void* coefficients;
};

// As batch_norm_backward; without `input_grad`, whoever reads g may make the gradient of x of it, with relu if there is no y.
NormGradients norm_gradients(const Tensor& g, const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool relu,
                             bool input_grad);

}  // namespace grasp_sparse
