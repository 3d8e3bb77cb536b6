// batch_norm_train, _eval, _backward, _follow_: checks, layouts, and the call of the passes of norm.h.
#include "norm.h"
#include "register.h"
#include "tensors.h"

namespace grasp_sparse::cuda {

namespace {

using MaybeTensor = std::optional<Tensor>;

void check_batch(const Tensor& x) {
  STD_TORCH_CHECK(x.dim() == 4, "Expected x of shape [N, C, H, W], got ", x.dim(), " dimensions.");
  STD_TORCH_CHECK(x.numel() > 0, "Expected x with at least one element per channel.");
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  bool same = t.dim() == 4;
  for (int d = 0; same && d < 4; ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "Expected ", name, " of the shape of x.");
  check_alike(t, x, name);
}

MaybeTensor per_channel(const MaybeTensor& t, const Tensor& x, const char* name) {
  return t ? std::make_optional(checked(*t, x.size(1), x, name)) : std::nullopt;
}

template <class T>
const T* pointer(const MaybeTensor& t) {
  return t ? const_data<T>(*t) : nullptr;
}

template <class S>
std::optional<Innermost> innermost(const Queue& queue, const MaybeTensor& t) {
  return t ? std::make_optional(Innermost::of<S>(queue, *t)) : std::nullopt;
}

template <class S>
NormArgs<S> args_of(const Tensor& x, const Innermost& in, const MaybeTensor& weight, const MaybeTensor& bias, const Tensor& mean,
                    const Tensor& var, double eps, bool relu) {
  using T = Compute<S>;
  NormArgs<S> args{};
  args.channels = x.size(1), args.length = x.numel() / x.size(1);
  args.x = in.data<S>(), args.weight = pointer<T>(weight), args.bias = pointer<T>(bias);
  args.mean = mutable_data<T>(mean), args.var = mutable_data<T>(var);
  args.eps = eps, args.relu = relu;
  return args;
}

// Training where `given` is false: mean and var are set.
Tensor normalise_images(const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                        const Tensor& mean, const Tensor& var, bool given, double eps, bool relu, const Call& call) {
  const MaybeTensor w = per_channel(weight, x, "weight"), b = per_channel(bias, x, "bias");
  Tensor y = x;
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    const Queue& queue = call.queue();
    const Innermost in = Innermost::of<S>(queue, x);
    const std::optional<Innermost> added = innermost<S>(queue, residual);
    Result out(x, layout::sizes_of(x));
    NormArgs<S> args = args_of<S>(x, in, w, b, mean, var, eps, relu);
    args.residual = added ? added->template data<S>() : nullptr, args.out = out.data<S>();
    given ? normalise<S>(queue, args) : normalise_batch<S>(queue, args);
    y = out.finish<S>(queue);
  });
  return y;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight,
                                                    const MaybeTensor& bias, double eps, bool relu) {
  const Call call(x);
  check_batch(x);
  if (residual) check_like(*residual, x, "residual");
  const Tensor mean = empty_sums(x, {x.size(1)}), var = empty_sums(x, {x.size(1)});
  return {normalise_images(x, residual, weight, bias, mean, var, false, eps, relu, call), mean, var};
}

Tensor batch_norm_eval(const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
                       const Tensor& mean, const Tensor& var, double eps, bool relu) {
  const Call call(x);
  check_batch(x);
  if (residual) check_like(*residual, x, "residual");
  const Tensor m = checked(mean, x.size(1), x, "mean"), v = checked(var, x.size(1), x, "var");
  return normalise_images(x, residual, weight, bias, m, v, true, eps, relu, call);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& g, const Tensor& x, const MaybeTensor& y,
                                                               const MaybeTensor& weight, const MaybeTensor& bias,
                                                               const Tensor& mean, const Tensor& var, double eps, bool relu) {
  const Call call(x);
  check_batch(x);
  check_like(g, x, "g");
  STD_TORCH_CHECK(!y || relu, "Expected y only where relu is true.");
  if (y) check_like(*y, x, "y");
  const MaybeTensor w = per_channel(weight, x, "weight"), b = per_channel(bias, x, "bias");
  const Tensor m = checked(mean, x.size(1), x, "mean"), v = checked(var, x.size(1), x, "var");
  const Tensor g_weight = empty_sums(x, {x.size(1)}), g_bias = empty_sums(x, {x.size(1)});
  Tensor gx = x, g_residual = empty(x, {0}, {1}, layout::dtype(x));
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    const Queue& queue = call.queue();
    const Innermost in = Innermost::of<S>(queue, x), gradient = Innermost::of<S>(queue, g);
    const std::optional<Innermost> output = innermost<S>(queue, y);
    Result out(x, layout::sizes_of(x));
    std::optional<Result> passed;
    if (y) passed.emplace(x, layout::sizes_of(x));
    NormArgs<S> args = args_of<S>(x, in, w, b, m, v, eps, relu);
    args.g = gradient.data<S>(), args.y = output ? output->template data<S>() : nullptr;
    args.out = out.data<S>(), args.g_residual = passed ? passed->template data<S>() : nullptr;
    args.g_weight = mutable_data<T>(g_weight), args.g_bias = mutable_data<T>(g_bias);
    normalise_batch_gradients<S>(queue, args);
    gx = out.finish<S>(queue);
    if (passed) g_residual = passed->template finish<S>(queue);
  });
  return {gx, g_residual, g_weight, g_bias};
}

void batch_norm_follow_(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
                        double momentum, int64_t count) {
  const Call call(mean);
  const ScalarType type = mean.scalar_type();
  for (const Tensor* t : {&running_mean, &running_var, &mean, &var})
    STD_TORCH_CHECK(is_beside(*t, mean) && t->scalar_type() == type && t->dim() == 1 && t->size(0) == mean.size(0) && t->is_contiguous(),
                    "Expected running_mean, running_var, mean and var as contiguous vectors of one size, dtype and device.");
  STD_TORCH_CHECK(count > 1, "Expected more than one value per channel, got ", count, ".");
  const double var_share = momentum * static_cast<double>(count) / static_cast<double>(count - 1);
  for_type(mean, "batch_norm_follow_", [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    follow_statistics<T>(call.queue(), mean.size(0), momentum, var_share, const_data<T>(mean), const_data<T>(var),
                         mutable_data<T>(running_mean), mutable_data<T>(running_var));
  });
}

}  // namespace grasp_sparse::cuda

GRASP_SPARSE_KERNELS(m) {
  m.impl("batch_norm_train", TORCH_BOX(&grasp_sparse::cuda::batch_norm_train));
  m.impl("batch_norm_eval", TORCH_BOX(&grasp_sparse::cuda::batch_norm_eval));
  m.impl("batch_norm_backward", TORCH_BOX(&grasp_sparse::cuda::batch_norm_backward));
  m.impl("batch_norm_follow_", TORCH_BOX(&grasp_sparse::cuda::batch_norm_follow_));
}
