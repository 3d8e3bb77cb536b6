// Batch norm of [channels, length]: bound by memory, so one pass over x for the sums and one for the result.
//
// A channel is cut into shares, a block each, whose sums are added up in one order only: the same bits on every run. Of one batch of
// neighbours a thread sums differences from the first of them, in what is computed in; batches are added up in double. So the
// digits of the spread survive a mean of any size. Nobody waits for a kernel that does the adding up: each block of the second pass
// adds the shares of its channel itself, in the same order.
#pragma once

#include "device.h"
#include "launch.h"
#include "norm.h"

namespace grasp_sparse::cuda {

constexpr int kNormThreads = 256;

// How channels are cut: [channel, share] a block.
struct NormCut {
  int shares;
  int tree;  // power of two from shares
  int64_t blocks;
};

inline NormCut cut_channels(int64_t channels, int64_t length, int element_size, int multiprocessors) {
  constexpr int64_t kBlocks = 8, kShareBytes = 16 << 10;  // of a multiprocessor at once; of a share at least
  const int64_t wanted = kBlocks * multiprocessors / channels, most = length * element_size / kShareBytes;
  const int shares = static_cast<int>(std::clamp<int64_t>(std::min(wanted, most), 1, kNormThreads));
  return {shares, power_of_two_from(shares), channels * shares};
}

// Some of the neighbours that a thread works on, V at a time, all loaded before the first is used.
template <class S, int V>
struct Batch {
  static constexpr int count = V == 1 ? 4 : (sizeof(S) == 8 ? 8 : 16) / V;

  int64_t first, end;  // in units of V

  __device__ Batch(int64_t length, int share, int shares) {
    const int64_t units = length / V;
    first = units * share / shares + threadIdx.x, end = units * (share + 1) / shares;
  }
  __device__ bool has(int k) const { return first + k * kNormThreads < end; }
  __device__ int64_t at(int k) const { return (first + k * kNormThreads) * V; }
  __device__ void advance() { first += count * kNormThreads; }

  __device__ void load_from(const S* from, Pack<S, V> (&to)[count]) const {
#pragma unroll
    for (int k = 0; k < count; ++k)
      if (has(k)) to[k] = load<S, V>(from + at(k));
  }
};

struct TwoSums {
  double first, second;
};

// Of the first `threads` threads, a power of two; the same order at every call. Once in a kernel.
__device__ inline TwoSums sum_threads(TwoSums mine, int threads) {
  TwoSums* const sums = reinterpret_cast<TwoSums*>(shared_memory());
  sums[threadIdx.x] = mine;
  for (int half = threads / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) sums[threadIdx.x].first += sums[threadIdx.x + half].first, sums[threadIdx.x].second += sums[threadIdx.x + half].second;
  }
  __syncthreads();
  return sums[0];
}

// Those of the channel's shares.
__device__ inline TwoSums sum_of_shares(const TwoSums* partial, int64_t channel, const NormCut& cut) {
  return sum_threads(threadIdx.x < cut.shares ? partial[channel * cut.shares + threadIdx.x] : TwoSums{0, 0}, cut.tree);
}

// What a pass knows about its channel: worked out by one thread, for square roots and quotients in double are slow.
template <class T>
struct ChannelOf {
  T mean, scale, bias;  // normalised: (x - mean) * scale + bias
  T offset, slope;      // gradient of x: scale * g - offset - slope * (x - mean)
};
constexpr int64_t kNormSharedBytes = kNormThreads * sizeof(TwoSums) + sizeof(ChannelOf<double>);

template <class T, class Find>
__device__ inline ChannelOf<T> by_one_thread(const Find& find) {
  ChannelOf<T>* const shared = reinterpret_cast<ChannelOf<T>*>(shared_memory() + kNormThreads * sizeof(TwoSums));
  if (threadIdx.x == 0) *shared = find();
  __syncthreads();
  return *shared;
}

template <class S>
__device__ inline ChannelOf<Compute<S>> normalised_by(const NormArgs<S>& a, int64_t channel, double mean, double var) {
  using T = Compute<S>;
  const double scale = (a.weight ? a.weight[channel] : 1) / sqrt(var + a.eps);
  return {static_cast<T>(mean), static_cast<T>(scale), a.bias ? a.bias[channel] : T(0), 0, 0};
}

// The same arithmetic in both directions, or the backward would see other places where the ReLU was open.
template <class T>
__device__ inline T normalised(const ChannelOf<T>& c, T difference) {
  return difference * c.scale + c.bias;
}
template <class T>
__device__ inline T positive(T gate, T value) {  // a NaN lets everything through, as in torch
  return gate <= 0 ? T(0) : value;
}

template <class S, int V>
__global__ void __launch_bounds__(kNormThreads) norm_moments(const NormArgs<S> a, const NormCut cut, TwoSums* partial) {
  using T = Compute<S>;
  using B = Batch<S, V>;
  const int64_t channel = blockIdx.x / cut.shares;
  const S* const x = a.x + channel * a.length;
  const double pivot = widened(*x);
  TwoSums sums{0, 0};
  for (B batch(a.length, blockIdx.x % cut.shares, cut.shares); batch.has(0); batch.advance()) {
    Pack<S, V> pack[B::count];
    batch.load_from(x, pack);
    const T about = widened(pack[0].at[0]);
    T first = 0, second = 0;
    int count = 0;
#pragma unroll
    for (int k = 0; k < B::count; ++k) {
      if (!batch.has(k)) continue;
      count += V;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T difference = widened(pack[k].at[v]) - about;
        first += difference, second += difference * difference;
      }
    }
    const double shift = static_cast<double>(about) - pivot, sum = first;
    sums.first += sum + count * shift;
    sums.second += second + shift * (2 * sum + count * shift);
  }
  sums = sum_threads(sums, kNormThreads);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

// With sums of shares by the statistics of the batch, which go to mean and var; else by those that are there.
template <class S, int V>
__global__ void __launch_bounds__(kNormThreads) norm_apply(const NormArgs<S> a, const NormCut cut, const TwoSums* partial) {
  using T = Compute<S>;
  using B = Batch<S, V>;
  const int64_t channel = blockIdx.x / cut.shares;
  const int share = blockIdx.x % cut.shares;
  const int64_t begin = channel * a.length;
  const TwoSums sums = partial ? sum_of_shares(partial, channel, cut) : TwoSums{0, 0};
  const ChannelOf<T> c = by_one_thread<T>([&] {
    T mean, var;
    if (partial) {
      const double shift = sums.first / a.length, spread = sums.second / a.length - shift * shift;
      mean = static_cast<T>(widened(a.x[begin]) + shift), var = static_cast<T>(spread < 0 ? 0 : spread);
      if (share == 0) a.mean[channel] = mean, a.var[channel] = var;
    } else {
      mean = a.mean[channel], var = a.var[channel];
    }
    return normalised_by(a, channel, mean, var);
  });
  for (B batch(a.length, share, cut.shares); batch.has(0); batch.advance()) {
    Pack<S, V> x[B::count], residual[B::count];
    batch.load_from(a.x + begin, x);
    if (a.residual) batch.load_from(a.residual + begin, residual);
#pragma unroll
    for (int k = 0; k < B::count; ++k) {
      if (!batch.has(k)) continue;
      Pack<S, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        T y = normalised(c, widened(x[k].at[v]) - c.mean);
        if (a.residual) y += widened(residual[k].at[v]);
        narrowed(a.relu ? positive(y, y) : y, result.at[v]);
      }
      *reinterpret_cast<Pack<S, V>*>(a.out + begin + batch.at(k)) = result;
    }
  }
}

// Sums of g and of g * (x - mean), g where the ReLU was open; that g is the gradient of the residual.
template <class S, int V>
__global__ void __launch_bounds__(kNormThreads) norm_gradient_sums(const NormArgs<S> a, const NormCut cut, TwoSums* partial) {
  using T = Compute<S>;
  using B = Batch<S, V>;
  const int64_t channel = blockIdx.x / cut.shares, begin = channel * a.length;
  const bool gate_from_x = a.relu && !a.y;
  const ChannelOf<T> c = by_one_thread<T>([&] { return normalised_by(a, channel, a.mean[channel], a.var[channel]); });
  TwoSums sums{0, 0};
  for (B batch(a.length, blockIdx.x % cut.shares, cut.shares); batch.has(0); batch.advance()) {
    Pack<S, V> x[B::count], g[B::count], y[B::count];
    batch.load_from(a.x + begin, x);
    batch.load_from(a.g + begin, g);
    if (a.y) batch.load_from(a.y + begin, y);
    T first = 0, second = 0;
#pragma unroll
    for (int k = 0; k < B::count; ++k) {
      if (!batch.has(k)) continue;
      Pack<S, V> passed;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T difference = widened(x[k].at[v]) - c.mean;
        T gradient = widened(g[k].at[v]);
        if (gate_from_x) gradient = positive(normalised(c, difference), gradient);
        if (a.y) gradient = positive(widened(y[k].at[v]), gradient);
        first += gradient, second += gradient * difference;
        narrowed(gradient, passed.at[v]);
      }
      if (a.y) *reinterpret_cast<Pack<S, V>*>(a.g_residual + begin + batch.at(k)) = passed;
    }
    sums.first += first, sums.second += second;
  }
  sums = sum_threads(sums, kNormThreads);
  if (threadIdx.x == 0) partial[blockIdx.x] = sums;
}

template <class S, int V>
__global__ void __launch_bounds__(kNormThreads) norm_input_gradient(const NormArgs<S> a, const NormCut cut, const TwoSums* partial) {
  using T = Compute<S>;
  using B = Batch<S, V>;
  const int64_t channel = blockIdx.x / cut.shares, begin = channel * a.length;
  const int share = blockIdx.x % cut.shares;
  const bool gate_from_x = a.relu && !a.y;
  const S* const gradients = (a.y ? a.g_residual : a.g) + begin;
  const TwoSums sums = sum_of_shares(partial, channel, cut);
  const ChannelOf<T> c = by_one_thread<T>([&] {
    ChannelOf<T> found = normalised_by(a, channel, a.mean[channel], a.var[channel]);
    const double inverse = 1 / sqrt(static_cast<double>(a.var[channel]) + a.eps), scale = found.scale;
    found.offset = static_cast<T>(scale * sums.first / a.length);
    found.slope = static_cast<T>(scale * sums.second * inverse * inverse / a.length);
    if (share == 0) a.g_bias[channel] = static_cast<T>(sums.first), a.g_weight[channel] = static_cast<T>(sums.second * inverse);
    return found;
  });
  for (B batch(a.length, share, cut.shares); batch.has(0); batch.advance()) {
    Pack<S, V> x[B::count], g[B::count];
    batch.load_from(a.x + begin, x);
    batch.load_from(gradients, g);
#pragma unroll
    for (int k = 0; k < B::count; ++k) {
      if (!batch.has(k)) continue;
      Pack<S, V> result;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const T difference = widened(x[k].at[v]) - c.mean;
        T gradient = widened(g[k].at[v]);
        if (gate_from_x) gradient = positive(normalised(c, difference), gradient);
        narrowed(gradient * c.scale - c.offset - difference * c.slope, result.at[v]);
      }
      *reinterpret_cast<Pack<S, V>*>(a.out + begin + batch.at(k)) = result;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kNormThreads)
    norm_follow(int64_t channels, T momentum, T var_share, const T* mean, const T* var, T* running_mean, T* running_var) {
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kNormThreads + threadIdx.x;
  if (c >= channels) return;
  running_mean[c] = (1 - momentum) * running_mean[c] + momentum * mean[c];
  running_var[c] = (1 - momentum) * running_var[c] + var_share * var[c];
}

// Whether all arrays can be read and written 16 bytes at a time, in every channel.
template <class S>
bool lies_in_vectors(const NormArgs<S>& a) {
  constexpr int64_t kBytes = 16;
  const S* const arrays[] = {a.x, a.g, a.residual, a.y, a.out, a.g_residual};
  uintptr_t places = static_cast<uintptr_t>(a.length) * sizeof(S);
  for (const S* array : arrays) places |= reinterpret_cast<uintptr_t>(array);
  return places % kBytes == 0;
}

template <class S>
constexpr int kNormVector = 16 / sizeof(S);

template <class S>
NormCut cut_of(const Queue& queue, const NormArgs<S>& a) {
  return cut_channels(a.channels, a.length, sizeof(S), limits_of(queue.device).multiprocessors);
}

template <class S>
void launch_apply(const Queue& queue, const NormArgs<S>& a, const NormCut& cut, const TwoSums* partial) {
  const auto kernel = lies_in_vectors(a) ? norm_apply<S, kNormVector<S>> : norm_apply<S, 1>;
  launch(queue.stream, kernel, cut.blocks, kNormThreads, kNormSharedBytes, a, cut, partial);
}

template <class S>
void normalise_batch(const Queue& queue, const NormArgs<S>& a) {
  const NormCut cut = cut_of(queue, a);
  const std::shared_ptr<void> memory = queue.allocate(cut.blocks * sizeof(TwoSums));
  TwoSums* const partial = static_cast<TwoSums*>(memory.get());
  const auto moments = lies_in_vectors(a) ? norm_moments<S, kNormVector<S>> : norm_moments<S, 1>;
  launch(queue.stream, moments, cut.blocks, kNormThreads, kNormSharedBytes, a, cut, partial);
  launch_apply<S>(queue, a, cut, partial);
}

template <class S>
void normalise(const Queue& queue, const NormArgs<S>& a) {
  launch_apply<S>(queue, a, cut_of(queue, a), nullptr);
}

template <class S>
void normalise_batch_gradients(const Queue& queue, const NormArgs<S>& a) {
  const NormCut cut = cut_of(queue, a);
  const std::shared_ptr<void> memory = queue.allocate(cut.blocks * sizeof(TwoSums));
  TwoSums* const partial = static_cast<TwoSums*>(memory.get());
  const bool wide = lies_in_vectors(a);
  const auto sums = wide ? norm_gradient_sums<S, kNormVector<S>> : norm_gradient_sums<S, 1>;
  const auto input_gradient = wide ? norm_input_gradient<S, kNormVector<S>> : norm_input_gradient<S, 1>;
  launch(queue.stream, sums, cut.blocks, kNormThreads, kNormSharedBytes, a, cut, partial);
  launch(queue.stream, input_gradient, cut.blocks, kNormThreads, kNormSharedBytes, a, cut, partial);
}

template <class T>
void follow_statistics(const Queue& queue, int64_t channels, double momentum, double var_share, const T* mean, const T* var,
                       T* running_mean, T* running_var) {
  launch(queue.stream, norm_follow<T>, blocks_for(channels, kNormThreads), kNormThreads, 0, channels, static_cast<T>(momentum),
         static_cast<T>(var_share), mean, var, running_mean, running_var);
}

#define GRASP_SPARSE_NORM(S)                                              \
  template void normalise_batch(const Queue&, const NormArgs<S>&);        \
  template void normalise(const Queue&, const NormArgs<S>&);              \
  template void normalise_batch_gradients(const Queue&, const NormArgs<S>&);

GRASP_SPARSE_NORM(float)
GRASP_SPARSE_NORM(double)
GRASP_SPARSE_NORM(Bf16)
GRASP_SPARSE_NORM(Fp16)
template void follow_statistics(const Queue&, int64_t, double, double, const float*, const float*, float*, float*);
template void follow_statistics(const Queue&, int64_t, double, double, const double*, const double*, double*, double*);

}  // namespace grasp_sparse::cuda
