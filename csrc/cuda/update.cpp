// sgd_update_, adamw_update_ on a device: every tensor is checked before anything is written, then up to kMostSlots of them go into
// one launch. Nothing waits for the device; the learning rate is that of the call, so a recorded graph keeps it.
#include "../cpu/slots.h"
#include "register.h"
#include "tensors.h"
#include "update.h"

namespace grasp_sparse::cuda {

namespace {

constexpr Place kHere{kDevice, is_beside};

// Calls run(table, blocks, first slot) for one table after the other.
template <class Run>
void for_tables(const std::vector<Slot>& slots, const Tensors* steps, const float* left_out, const Run& run) {
  for (size_t begin = 0; begin < slots.size(); begin += kMostSlots) {
    SlotTable table{};
    table.left_out = left_out;
    table.slots = static_cast<int>(std::min<size_t>(kMostSlots, slots.size() - begin));
    for (int i = 0; i < table.slots; ++i) {
      const Slot& slot = slots[begin + i];
      table.count[i] = slot.count, table.value[i] = slot.value, table.grad[i] = slot.grad;
      table.state[0][i] = slot.state[0], table.state[1][i] = slot.state[1], table.bits[i] = slot.bits;
      if (!steps) continue;
      const Tensor& step = (*steps)[begin + i];
      table.step[i] = step.mutable_data_ptr();
      if (step.scalar_type() == ScalarType::Double) table.wide_steps |= uint64_t{1} << i;
    }
    run(table, deal_blocks(table));
  }
}

}  // namespace

void sgd_update_(const Tensors& values, const Tensors& grads, const Tensors& momentum_buffers, const Tensors& mask_bits,
                 double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                 bool first_step, const std::optional<Tensor>& found_inf) {
  std::vector<const Tensors*> states;
  if (!momentum_buffers.empty()) states.push_back(&momentum_buffers);
  const Arguments arguments("sgd_update_", values, grads, states, mask_bits, kHere);
  const float* const left_out = arguments.left_out("sgd_update_", found_inf);
  const Call call(values[0]);
  Slots slots(arguments);
  for_type(values[0], "sgd_update_", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const SgdRule<T> rule{static_cast<T>(lr), static_cast<T>(momentum), static_cast<T>(1 - dampening), static_cast<T>(weight_decay),
                          !momentum_buffers.empty(), nesterov, maximize, first_step};
    for_tables(slots.slots(), nullptr, left_out,
               [&](const SlotTable& table, int64_t blocks) { sgd<T>(call.queue(), table, blocks, rule); });
  });
  slots.put_back();
}

void adamw_update_(const Tensors& values, const Tensors& grads, const Tensors& exp_avgs, const Tensors& exp_avg_sqs,
                   const Tensors& steps, const Tensors& mask_bits, double lr, double beta1, double beta2, double eps,
                   double weight_decay, bool maximize, const std::optional<Tensor>& found_inf) {
  const Arguments arguments("adamw_update_", values, grads, {&exp_avgs, &exp_avg_sqs}, mask_bits, kHere);
  STD_TORCH_CHECK(steps.size() == values.size(), "adamw_update_: Expected ", values.size(), " steps like values, got ",
                  steps.size(), ".");
  for (const Tensor& step : steps) {
    const ScalarType type = step.scalar_type();
    STD_TORCH_CHECK(is_beside(step, values[0]) && step.numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double),
                    "adamw_update_: Expected steps to be one float32 or float64 number each, on ", kDevice,
                    ", that of the values: there they count in a recorded graph too.");
  }
  const float* const left_out = arguments.left_out("adamw_update_", found_inf);
  const Call call(values[0]);
  Slots slots(arguments);
  const AdamwRule rule{lr, beta1, beta2, eps, weight_decay, maximize};
  for_type(values[0], "adamw_update_", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_tables(slots.slots(), &steps, left_out, [&](const SlotTable& table, int64_t blocks) {
      advance_steps(call.queue(), table);
      adamw<T>(call.queue(), table, blocks, rule);
    });
  });
  slots.put_back();
}

}  // namespace grasp_sparse::cuda

GRASP_SPARSE_KERNELS(m) {
  m.impl("sgd_update_", TORCH_BOX(&grasp_sparse::cuda::sgd_update_));
  m.impl("adamw_update_", TORCH_BOX(&grasp_sparse::cuda::adamw_update_));
}
