// Optimizer steps: one pass that reads value, gradient and state and writes value and state, of all tensors of a launch. The
// work is bound by memory: neighbouring threads take neighbouring elements, each several that are loaded before the first is used.
#pragma once

#include "device.h"
#include "launch.h"
#include "update.h"

namespace grasp_sparse::cuda {

constexpr int kUpdateThreads = 256, kUpdateUnroll = 4;
constexpr int64_t kUpdateChunk = 16 * kUpdateThreads;  // elements of a block; whole bytes of bits

// Which tensor a block works on: the last that begins at or before it.
__device__ inline int slot_of(const SlotTable& table, int block) {
  int low = 0, high = table.slots - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_block[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Whether the step that is being made is not to be.
__device__ inline bool is_left_out(const SlotTable& table) { return table.left_out && *table.left_out != 0; }

// Calls step(gradient, value, first state, second state) on every element of the block's chunk; it changes all but the gradient.
// A weight whose bit is clear, and its state, become zero whatever the gradient is.
template <class T, int States, class Step>
__device__ inline void update_chunk(const SlotTable& table, int slot, int64_t chunk, const Step& step) {
  T* const value = static_cast<T*>(table.value[slot]);
  const T* const grad = static_cast<const T*>(table.grad[slot]);
  T* const first = States > 0 ? static_cast<T*>(table.state[0][slot]) : nullptr;
  T* const second = States > 1 ? static_cast<T*>(table.state[1][slot]) : nullptr;
  const uint8_t* const bits = table.bits[slot];
  const int64_t begin = chunk * kUpdateChunk, count = table.count[slot];
  for (int64_t base = begin; base < begin + kUpdateChunk; base += kUpdateThreads * kUpdateUnroll) {
    T v[kUpdateUnroll], g[kUpdateUnroll], s[kUpdateUnroll], q[kUpdateUnroll];
    bool kept[kUpdateUnroll];
#pragma unroll
    for (int k = 0; k < kUpdateUnroll; ++k) {
      const int64_t i = base + k * kUpdateThreads + threadIdx.x;
      const bool inside = i < count;
      v[k] = inside ? value[i] : T(0), g[k] = inside ? grad[i] : T(0);
      s[k] = States > 0 && inside ? first[i] : T(0), q[k] = States > 1 && inside ? second[i] : T(0);
      kept[k] = !bits || !inside || (bits[i / 8] >> (7 - i % 8) & 1);
    }
#pragma unroll
    for (int k = 0; k < kUpdateUnroll; ++k) {
      const int64_t i = base + k * kUpdateThreads + threadIdx.x;
      if (i >= count) continue;
      step(kept[k] ? g[k] : T(0), v[k], s[k], q[k]);
      value[i] = kept[k] ? v[k] : T(0);
      if constexpr (States > 0) first[i] = kept[k] ? s[k] : T(0);
      if constexpr (States > 1) second[i] = kept[k] ? q[k] : T(0);
    }
  }
}

template <class T, int States>
__global__ void __launch_bounds__(kUpdateThreads) sgd_update(const SlotTable table, const SgdRule<T> rule) {
  if (is_left_out(table)) return;
  const int slot = slot_of(table, blockIdx.x);
  update_chunk<T, States>(table, slot, blockIdx.x - table.first_block[slot], [&](T grad, T& value, T& buffer, T&) {
    T g = rule.maximize ? -grad : grad;
    if (rule.weight_decay != 0) g += rule.weight_decay * value;
    if (States > 0) {
      buffer = rule.first_step ? g : rule.momentum * buffer + rule.grad_share * g;
      g = rule.nesterov ? g + rule.momentum * buffer : buffer;
    }
    value -= rule.lr * g;
  });
}

__device__ inline double step_number(const SlotTable& table, int slot) {
  return table.wide_steps >> slot & 1 ? *static_cast<const double*>(table.step[slot]) : *static_cast<const float*>(table.step[slot]);
}

// The step has been counted before.
template <class T>
__global__ void __launch_bounds__(kUpdateThreads) adamw_update(const SlotTable table, const AdamwRule rule) {
  if (is_left_out(table)) return;
  T* const shared = reinterpret_cast<T*>(shared_memory());  // step size, share of the root
  const int slot = slot_of(table, blockIdx.x);
  if (threadIdx.x == 0) {
    const double t = step_number(table, slot);
    shared[0] = static_cast<T>(rule.lr / (1 - pow(rule.beta1, t))), shared[1] = static_cast<T>(1 / sqrt(1 - pow(rule.beta2, t)));
  }
  __syncthreads();
  const T step_size = shared[0], root_share = shared[1];
  const T value_share = static_cast<T>(1 - rule.lr * rule.weight_decay), grad_share = static_cast<T>(1 - rule.beta1);
  const T beta2 = static_cast<T>(rule.beta2), square_share = static_cast<T>(1 - rule.beta2), eps = static_cast<T>(rule.eps);
  update_chunk<T, 2>(table, slot, blockIdx.x - table.first_block[slot], [&](T grad, T& value, T& mean, T& square) {
    const T g = rule.maximize ? -grad : grad;
    mean += grad_share * (g - mean);
    square = beta2 * square + square_share * g * g;
    value = value_share * value - step_size * mean / (sqrt(square) * root_share + eps);
  });
}

__global__ void __launch_bounds__(kUpdateThreads) count_steps(const SlotTable table) {
  const int slot = threadIdx.x;
  if (slot >= table.slots || is_left_out(table)) return;
  void* const step = const_cast<void*>(table.step[slot]);
  if (table.wide_steps >> slot & 1)
    *static_cast<double*>(step) += 1;
  else
    *static_cast<float*>(step) += 1;
}

int64_t deal_blocks(SlotTable& table) {
  int64_t blocks = 0;
  for (int i = 0; i < table.slots; ++i) {
    table.first_block[i] = static_cast<int>(blocks);
    blocks += blocks_for(table.count[i], kUpdateChunk);
  }
  if (blocks > INT32_MAX) throw std::runtime_error("grasp_sparse: Expected tensors of at most 2^43 elements in all; split the update.");
  table.first_block[table.slots] = static_cast<int>(blocks);
  return blocks;
}

template <class T>
void sgd(const Queue& queue, const SlotTable& table, int64_t blocks, const SgdRule<T>& rule) {
  const auto kernel = rule.has_buffer ? sgd_update<T, 1> : sgd_update<T, 0>;
  launch(queue.stream, kernel, blocks, kUpdateThreads, 0, table, rule);
}

template <class T>
void adamw(const Queue& queue, const SlotTable& table, int64_t blocks, const AdamwRule& rule) {
  launch(queue.stream, adamw_update<T>, blocks, kUpdateThreads, 2 * sizeof(T), table, rule);
}

void advance_steps(const Queue& queue, const SlotTable& table) {
  static_assert(kMostSlots <= kUpdateThreads && kMostSlots <= 64);
  launch(queue.stream, count_steps, 1, kUpdateThreads, 0, table);
}

template void sgd(const Queue&, const SlotTable&, int64_t, const SgdRule<float>&);
template void sgd(const Queue&, const SlotTable&, int64_t, const SgdRule<double>&);
template void adamw<float>(const Queue&, const SlotTable&, int64_t, const AdamwRule&);
template void adamw<double>(const Queue&, const SlotTable&, int64_t, const AdamwRule&);

}  // namespace grasp_sparse::cuda
