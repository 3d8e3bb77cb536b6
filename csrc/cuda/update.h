// Optimizer steps of many tensors in one launch: what the operations call. Plain C++.
#pragma once

#include <cstdint>

#include "passes.h"

namespace grasp_sparse::cuda {

constexpr int kMostSlots = 40;  // tensors of one launch: their pointers are its arguments, of which a kernel takes 4 KB

// The arrays of some tensors; every tensor is worked on by blocks [first_block[i], first_block[i + 1]).
struct SlotTable {
  int slots;
  int first_block[kMostSlots + 1];
  int64_t count[kMostSlots];
  void* value[kMostSlots];
  const void* grad[kMostSlots];
  void* state[2][kMostSlots];
  const uint8_t* bits[kMostSlots];  // null: no weight is pruned
  const void* step[kMostSlots];     // adamw: on the device, float32, or float64 where the bit is set
  uint64_t wide_steps;
  const float* left_out;  // on the device: unless it is zero nothing is changed; or null
};

template <class T>
struct SgdRule {
  T lr, momentum, grad_share, weight_decay;  // grad_share = 1 - dampening
  bool has_buffer, nesterov, maximize, first_step;
};

struct AdamwRule {
  double lr, beta1, beta2, eps, weight_decay;
  bool maximize;
};

// Sets first_block from count; returns the number of blocks.
int64_t deal_blocks(SlotTable& table);

template <class T>
void sgd(const Queue&, const SlotTable&, int64_t blocks, const SgdRule<T>&);
template <class T>
void adamw(const Queue&, const SlotTable&, int64_t blocks, const AdamwRule&);
// Adds one to every step of the table.
void advance_steps(const Queue&, const SlotTable&);

}  // namespace grasp_sparse::cuda
