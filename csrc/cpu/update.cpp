// sgd_update_, adamw_update_: optimizer steps of any number of tensors in one call, in place.
//
// Nothing is written before every tensor has been checked. All tensors are one range of elements to the threads, so a
// hundred small ones cost one start of the pool and a large one is shared.
#include <cmath>

#include "isa.h"
#include "parallel.h"
#include "slots.h"

namespace grasp_sparse {

namespace {

constexpr int64_t kUnit = 64;              // elements: whole cache lines of every array, whole bytes of bits
constexpr int64_t kGrain = 16384 / kUnit;  // units worth a thread

constexpr Place kHere{"the CPU", [](const Tensor& t, const Tensor&) { return t.is_cpu(); }};

// run(slot, first element, count, index) for stretches that together are every element once.
template <class F>
void for_stretches(const std::vector<Slot>& slots, const F& run) {
  Sizes start(slots.size() + 1, 0);  // of each parameter, in units
  for (size_t i = 0; i < slots.size(); ++i) start[i + 1] = start[i] + ceil_div(slots[i].count, kUnit);
  parallel_for(0, start.back(), kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
    for (; begin < end; begin = start[++i]) {
      const int64_t first = (begin - start[i]) * kUnit, last = (std::min(end, start[i + 1]) - start[i]) * kUnit;
      run(slots[i], first, std::min(last, slots[i].count) - first, i);
    }
  });
}

template <class T, class Pointer>
T* at(Pointer* array, int64_t element) {
  return array ? static_cast<T*>(array) + element : nullptr;
}

// Adds one to a step counter and returns the number of the step that is being taken.
double advance(const Tensor& step) {
  if (step.scalar_type() == ScalarType::Float) return *mutable_data<float>(step) += 1;
  return *mutable_data<double>(step) += 1;
}

}  // namespace

void sgd_update_(const Tensors& values, const Tensors& grads, const Tensors& momentum_buffers, const Tensors& mask_bits,
                 double lr, double momentum, double dampening, double weight_decay, bool nesterov, bool maximize,
                 bool first_step, const std::optional<Tensor>& found_inf) {
  std::vector<const Tensors*> states;
  if (!momentum_buffers.empty()) states.push_back(&momentum_buffers);
  const Arguments arguments("sgd_update_", values, grads, states, mask_bits, kHere);
  if (const float* left_out = arguments.left_out("sgd_update_", found_inf); left_out && *left_out != 0) return;
  Slots slots(arguments);
  for_type(values[0], "sgd_update_", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_stretches(slots.slots(), [&](const Slot& slot, int64_t first, int64_t count, size_t) {
      SgdArgs<T> args{};
      args.value = at<T>(slot.value, first), args.grad = at<const T>(slot.grad, first);
      args.momentum_buffer = at<T>(slot.state[0], first), args.bits = at<const uint8_t>(slot.bits, first / 8), args.count = count;
      args.lr = lr, args.momentum = momentum, args.grad_share = 1 - dampening, args.weight_decay = weight_decay;
      args.nesterov = nesterov, args.maximize = maximize, args.first_step = first_step;
      kernels<T>().sgd(args);
    });
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
    STD_TORCH_CHECK(step.is_cpu() && step.numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double),
                    "adamw_update_: Expected steps to be one float32 or float64 number each, on the CPU.");
  }
  if (const float* left_out = arguments.left_out("adamw_update_", found_inf); left_out && *left_out != 0) return;
  std::vector<std::pair<double, double>> shares;  // of every parameter: step_size, root_share
  for (const Tensor& step : steps) {
    const double t = advance(step);
    shares.push_back({lr / (1 - std::pow(beta1, t)), 1 / std::sqrt(1 - std::pow(beta2, t))});
  }
  Slots slots(arguments);
  for_type(values[0], "adamw_update_", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for_stretches(slots.slots(), [&](const Slot& slot, int64_t first, int64_t count, size_t i) {
      AdamwArgs<T> args{};
      args.value = at<T>(slot.value, first), args.grad = at<const T>(slot.grad, first);
      args.exp_avg = at<T>(slot.state[0], first), args.exp_avg_sq = at<T>(slot.state[1], first);
      args.bits = at<const uint8_t>(slot.bits, first / 8), args.count = count;
      args.value_share = 1 - lr * weight_decay, args.grad_share = 1 - beta1;
      args.beta2 = beta2, args.square_share = 1 - beta2;
      args.step_size = shares[i].first, args.root_share = shares[i].second, args.eps = eps, args.maximize = maximize;
      kernels<T>().adamw(args);
    });
  });
  slots.put_back();
}

}  // namespace grasp_sparse

STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CPU, m) {
  m.impl("sgd_update_", TORCH_BOX(&grasp_sparse::sgd_update_));
  m.impl("adamw_update_", TORCH_BOX(&grasp_sparse::adamw_update_));
}
