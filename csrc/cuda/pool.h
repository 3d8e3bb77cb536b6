// Max pooling of images that lie images innermost, [channels, height, width, batch]: what the operations call. Plain C++.
#pragma once

#include <cstdint>

#include "../cpu/window.h"
#include "passes.h"

namespace grasp_sparse::cuda {

constexpr int kNoTap = 255;

// y, and which tap of its window each came from: the first of the largest, or the last NaN; -inf and kNoTap where all lie in the padding.
template <class S>
void max_pool(const Queue&, const Window&, int64_t channels, int64_t batch, const S* x, S* y, uint8_t* places);
// The gradient of x, each number the sum over the windows that took it.
template <class S>
void max_pool_gradient(const Queue&, const Window&, int64_t channels, int64_t batch, const S* g, const uint8_t* places, S* gx);

}  // namespace grasp_sparse::cuda
