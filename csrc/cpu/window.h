// The arithmetic of one axis of a convolution: where taps fall, which stride phases they use, how large packed images are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace grasp_sparse {

// One axis: output o sees padded input o * stride + tap * dilation. A strided image is packed as `stride` interleaved
// images, its phases, so that neighbouring outputs always read neighbouring packed pixels: tap t reads phase
// phase_of_tap(t) at a distance of shift(t).
struct Axis {
  int64_t kernel, stride, dilation, pad_begin, input, output;

  int64_t reach(int64_t tap) const { return tap * dilation; }
  int64_t phase(int64_t tap) const { return reach(tap) % stride; }
  int64_t shift(int64_t tap) const { return reach(tap) / stride; }
  int64_t halo() const { return shift(kernel - 1); }

  // Phases that some tap reads, rising; the others need not be packed.
  std::vector<int64_t> used_phases() const {
    std::vector<int64_t> used;
    for (int64_t tap = 0; tap < kernel; ++tap) used.push_back(phase(tap));
    std::sort(used.begin(), used.end());
    used.erase(std::unique(used.begin(), used.end()), used.end());
    return used;
  }

  // Padded input positions of one phase that are real input: place * stride + phase - pad_begin in [0, input).
  int64_t first_place(int64_t phase) const { return floor_div(pad_begin - phase + stride - 1, stride); }
  int64_t end_place(int64_t phase) const { return floor_div(pad_begin + input - 1 - phase, stride) + 1; }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a < 0) != (b < 0)); }
};

struct Window {
  Axis h, w;
  int64_t taps() const { return h.kernel * w.kernel; }
};

// One tap, every pixel: a product with a matrix, which is its own kind of transposed.
inline bool is_pointwise(const Window& window) {
  const auto plain = [](const Axis& axis) { return axis.kernel == 1 && axis.stride == 1 && axis.input == axis.output && axis.pad_begin == 0; };
  return plain(window.h) && plain(window.w);
}

}  // namespace grasp_sparse
