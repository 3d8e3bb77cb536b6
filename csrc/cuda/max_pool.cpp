// max_pool2d, max_pool2d_backward: checks, and the call of the passes of pool.h. Other layouts than images innermost are copied
// there and back by torch: the layers leave them to its own pooling.
#include "../cpu/pool_window.h"
#include "pool.h"
#include "register.h"
#include "tensors.h"

namespace grasp_sparse::cuda {

namespace {

// Where a kernel writes a result: itself where it lies images innermost, else memory that `settle` copies from.
Tensor innermost_for(const Tensor& result) {
  if (layout::is_innermost(result)) return result;
  return empty_images(result, Layout::chwn, result.size(1), result.size(2), result.size(3));
}

void settle(Tensor result, const Tensor& written) {
  if (written.get() != result.get()) torch::stable::copy_(result, written);
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation, bool ceil_mode) {
  const Call call(x);
  STD_TORCH_CHECK(x.dim() == 4, "Expected x of shape [N, C, H, W], got ", x.dim(), " dimensions.");
  const Window window = pool_window(Sizes{x.size(2), x.size(3)}, kernel_size, stride, padding, dilation, ceil_mode);
  const Tensor y = empty_images(x, layout_of(x), x.size(1), window.h.output, window.w.output), places = empty_bytes(y);
  if (y.numel() == 0) return {y, places};
  const Tensor in = in_layout(x, Layout::chwn), best = innermost_for(y), taken = innermost_for(places);
  for_storage(x, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    max_pool<S>(call.queue(), window, x.size(1), x.size(0), const_data<S>(in), mutable_data<S>(best), mutable_data<uint8_t>(taken));
  });
  settle(y, best), settle(places, taken);
  return {y, places};
}

Tensor max_pool2d_backward(const Tensor& g, const Tensor& places, Sizes input_size, Sizes kernel_size, Sizes stride, Sizes padding,
                           Sizes dilation, bool ceil_mode) {
  const Call call(g);
  STD_TORCH_CHECK(is_beside(places, g), "Expected places on ", kDevice, ", that of g.");
  const Window window = pool_window(g, places, input_size, kernel_size, stride, padding, dilation, ceil_mode);
  const Tensor gx = empty_images(g, layout_of(places), g.size(1), input_size[0], input_size[1]);
  if (gx.numel() == 0) return gx;
  const Tensor gradient = in_layout(g, Layout::chwn), taken = in_layout(places, Layout::chwn), sums = innermost_for(gx);
  for_storage(g, [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    max_pool_gradient<S>(call.queue(), window, g.size(1), g.size(0), const_data<S>(gradient), const_data<uint8_t>(taken),
                         mutable_data<S>(sums));
  });
  settle(gx, sums);
  return gx;
}

}  // namespace grasp_sparse::cuda

GRASP_SPARSE_KERNELS(m) {
  m.impl("max_pool2d", TORCH_BOX(&grasp_sparse::cuda::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&grasp_sparse::cuda::max_pool2d_backward));
}
