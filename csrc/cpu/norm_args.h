// The border between batch_norm.cpp (layouts, threads, statistics of a channel) and norm.h (loops, one per instruction set).
#pragma once

#include <cstdint>

#include "storage.h"

namespace grasp_sparse {

// What a norm knows of each channel, or of the column of a sheet; in one buffer as [5][channels].
template <class T>
struct NormCoefficients {
  static constexpr int64_t kCount = 5;
  T *mean, *scale, *bias;  // normalised: (x - mean) * scale + bias
  T *offset, *slope;       // gradient of x: scale * g - offset - slope * (x - mean)

  static NormCoefficients in(T* buffer, int64_t channels) {
    return {buffer, buffer + channels, buffer + 2 * channels, buffer + 3 * channels, buffer + 4 * channels};
  }
  NormCoefficients from(int64_t channel) const {
    return {mean + channel, scale + channel, bias + channel, offset + channel, slope + channel};
  }
  NormCoefficients<const T> read() const { return {mean, scale, bias, offset, slope}; }
  void put(const NormCoefficients& one) const {
    *mean = *one.mean, *scale = *one.scale, *bias = *one.bias, *offset = *one.offset, *slope = *one.slope;
  }
  template <class F>
  void each(const F& f) const {
    for (T* of : {mean, scale, bias, offset, slope}) f(of);
  }
};

// A sheet: rows x cols elements in which every column belongs to one channel. Columns lie side by side, rows `stride`
// apart, and all tensors of a call lie alike. What is per channel is given per column. S: how elements are stored.
template <class S>
struct NormArgs : NormCoefficients<const Compute<S>> {
  int64_t rows, cols, stride;
  const S* x;
  const S* g;         // gradient of the result; where a ReLU follows and g is already masked, relu is false
  const S* residual;  // apply: added before the ReLU; or null
  const S* y;         // sums: where it is not positive the ReLU stopped the gradient; null: see relu
  S* out;             // apply: y; input_grad: gradient of x; sums with y: the masked g
  double *first, *second;        // [cols] each, added to
  bool relu;                     // apply: y = max(…, 0); otherwise: mask g where the normalised x is not positive
  bool stream;                   // write past the cache; out, and every row of it, must start on a line
};

// A norm through which an image of gradients is read: g there stands for the gradient of x, as above, which nobody writes down.
template <class S>
struct NormGradient {
  const S* x;  // in the strides of g; null: there is no norm
  NormCoefficients<const Compute<S>> channels;
  bool relu;  // mask g where the normalised x is not positive

  NormGradient from(int64_t element, int64_t channel) const {
    if (!x) return {};
    return {x + element, channels.from(channel), relu};
  }
};

// Adds to the sums of values about one number, and of their squares, those of `count` more, which are about another, `shift` above it.
inline void add_about(double shift, double count, double sum, double squares, double& first, double& second) {
  first += sum + count * shift;
  second += squares + shift * (2 * sum + count * shift);
}

template <class S>
struct NormKernels {
  void (*moments)(const NormArgs<S>&);     // first, second += sum (x - mean), (x - mean)^2, for any mean near the values
  void (*apply)(const NormArgs<S>&);       // out = relu(normalised + residual)
  void (*sums)(const NormArgs<S>&);        // first, second += sum g, g * (x - mean)
  void (*input_grad)(const NormArgs<S>&);  // out = gradient of x
};

}  // namespace grasp_sparse
