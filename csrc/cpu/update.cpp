// sgd_update_, adamw_update_: optimizer steps of any number of tensors in one call, in place.
//
// Nothing is written before every tensor has been checked. All tensors are one range of elements to the threads, so a
// hundred small ones cost one start of the pool and a large one is shared.
#include <algorithm>
#include <cmath>

#include "isa.h"
#include "parallel.h"
#include "tensors.h"

namespace grasp_sparse {

namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kUnit = 64;              // elements: whole cache lines of every array, whole bytes of bits
constexpr int64_t kGrain = 16384 / kUnit;  // units worth a thread

// What one call does to one parameter: arrays whose elements lie alike. They are the tensors' own memory, or copies.
struct Slot {
  void* value;
  const void* grad;
  void* state[2];
  const uint8_t* bits;  // null: no weight is pruned
  int64_t count;
};

// The arguments of a call, checked when this is built. Errors come from there, before anything is written.
struct __attribute__((visibility("hidden"))) Arguments {
  Arguments(const char* op, const Tensors& values, const Tensors& grads, std::vector<const Tensors*> states,
            const Tensors& bits)
      : values(values), grads(grads), states(std::move(states)), bits(bits) {
    STD_TORCH_CHECK(!values.empty(), op, ": Expected at least one value.");
    bool complete = grads.size() == values.size() && (bits.empty() || bits.size() == values.size());
    for (const Tensors* state : this->states) complete = complete && state->size() == values.size();
    STD_TORCH_CHECK(complete, op, ": Expected ", values.size(),
                    " gradients and states like values, and as many mask_bits or none.");
    const ScalarType type = values[0].scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, op, ": Expected float32 or float64 values.");
    for (size_t i = 0; i < values.size(); ++i) {
      check_like(op, values[i], "values", i, type, true);
      check_like(op, grads[i], "grads", i, type, false);
      for (const Tensors* state : this->states) check_like(op, (*state)[i], "states", i, type, true);
      if (bits.empty() || bits[i].numel() == 0) continue;
      const int64_t bytes = ceil_div(values[i].numel(), 8);
      STD_TORCH_CHECK(bits[i].is_cpu() && bits[i].scalar_type() == ScalarType::Byte && bits[i].is_contiguous() &&
                          bits[i].numel() == bytes,
                      op, ": Expected mask_bits[", i, "] of ", bytes, " contiguous bytes, uint8 on the CPU, or none; got ",
                      bits[i].numel(), ".");
    }
  }

  void check_like(const char* op, const Tensor& t, const char* name, size_t i, ScalarType type, bool written) const {
    const auto sizes = t.sizes(), expected = values[i].sizes(), strides = t.strides();
    const bool same = sizes.size() == expected.size() && std::equal(sizes.begin(), sizes.end(), expected.begin());
    STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == type && same, op, ": Expected ", name, "[", i,
                    "] on the CPU, of the dtype of values[0] and the shape of values[", i, "], which has ", values[i].numel(),
                    " elements; got ", t.numel(), ".");
    for (size_t d = 0; written && d < sizes.size(); ++d)
      STD_TORCH_CHECK(sizes[d] <= 1 || strides[d] != 0, op, ": Expected ", name, "[", i,
                      "] with a place for each element, got an expanded tensor.");
  }

  const Tensors &values, &grads;
  std::vector<const Tensors*> states;
  const Tensors& bits;
};

// Every place between the first and the last element is one element: the order of memory is an order of the weights.
bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.size(d) != 1) dims.emplace_back(t.stride(d), t.size(d));
  std::sort(dims.begin(), dims.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dims) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

bool same_places(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), strides = a.strides(), other = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && strides[d] != other[d]) return false;
  return true;
}

Sizes row_major(const Tensor& t) {
  Sizes strides(t.dim(), 1);
  for (int64_t d = t.dim() - 2; d >= 0; --d) strides[d] = strides[d + 1] * std::max<int64_t>(t.size(d + 1), 1);
  return strides;
}

// The arrays of every parameter in one order: the value's own in memory, or row-major where the value has gaps. Tensors
// that lie otherwise are copied, and the copies of those that are written go back when this is told to.
class __attribute__((visibility("hidden"))) Slots {
 public:
  explicit Slots(const Arguments& a) {
    slots_.reserve(a.values.size());
    for (size_t i = 0; i < a.values.size(); ++i) {
      const Tensor& value = a.values[i];
      const bool dense = is_dense(value);
      Slot slot{};
      slot.count = value.numel();
      slot.value = dense ? value.mutable_data_ptr() : copy(value, value, false, true);
      slot.grad = dense && same_places(a.grads[i], value) ? a.grads[i].const_data_ptr() : copy(a.grads[i], value, dense, false);
      for (size_t k = 0; k < a.states.size(); ++k) {
        const Tensor& state = (*a.states[k])[i];
        slot.state[k] = dense && same_places(state, value) ? state.mutable_data_ptr() : copy(state, value, dense, true);
      }
      slot.bits = a.bits.empty() || a.bits[i].numel() == 0 ? nullptr : const_data<uint8_t>(a.bits[i]);
      slots_.push_back(slot);
    }
  }

  // run(slot, first element, count, index) for stretches that together are every element once.
  template <class F>
  void for_stretches(const F& run) const {
    Sizes start(slots_.size() + 1, 0);  // of each parameter, in units
    for (size_t i = 0; i < slots_.size(); ++i) start[i + 1] = start[i] + ceil_div(slots_[i].count, kUnit);
    parallel_for(0, start.back(), kGrain, [&](int64_t begin, int64_t end) {
      size_t i = std::upper_bound(start.begin(), start.end(), begin) - start.begin() - 1;
      for (; begin < end; begin = start[++i]) {
        const int64_t first = (begin - start[i]) * kUnit, last = (std::min(end, start[i + 1]) - start[i]) * kUnit;
        run(slots_[i], first, std::min(last, slots_[i].count) - first, i);
      }
    });
  }

  void put_back() {
    for (auto& [original, copied] : moved_) torch::stable::copy_(original, copied);
  }

 private:
  void* copy(const Tensor& t, const Tensor& value, bool dense, bool written) {
    const auto sizes = t.sizes(), strides = value.strides();
    const Sizes order = dense ? Sizes(strides.begin(), strides.end()) : row_major(value);
    Tensor copied = empty_strided(t, Sizes(sizes.begin(), sizes.end()), order);
    torch::stable::copy_(copied, t);
    (written ? moved_ : held_).push_back({t, copied});
    return copied.mutable_data_ptr();
  }

  std::vector<Slot> slots_;
  std::vector<std::pair<Tensor, Tensor>> moved_, held_;  // original, the copy that is worked on
};

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
                 bool first_step) {
  std::vector<const Tensors*> states;
  if (!momentum_buffers.empty()) states.push_back(&momentum_buffers);
  const Arguments arguments("sgd_update_", values, grads, states, mask_bits);
  Slots slots(arguments);
  for_type(values[0], "sgd_update_", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    slots.for_stretches([&](const Slot& slot, int64_t first, int64_t count, size_t) {
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
                   double weight_decay, bool maximize) {
  const Arguments arguments("adamw_update_", values, grads, {&exp_avgs, &exp_avg_sqs}, mask_bits);
  STD_TORCH_CHECK(steps.size() == values.size(), "adamw_update_: Expected ", values.size(), " steps like values, got ",
                  steps.size(), ".");
  for (const Tensor& step : steps) {
    const ScalarType type = step.scalar_type();
    STD_TORCH_CHECK(step.is_cpu() && step.numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double),
                    "adamw_update_: Expected steps to be one float32 or float64 number each, on the CPU.");
  }
  std::vector<std::pair<double, double>> shares;  // of every parameter: step_size, root_share
  for (const Tensor& step : steps) {
    const double t = advance(step);
    shares.push_back({lr / (1 - std::pow(beta1, t)), 1 / std::sqrt(1 - std::pow(beta2, t))});
  }
  Slots slots(arguments);
  for_type(values[0], "adamw_update_", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    slots.for_stretches([&](const Slot& slot, int64_t first, int64_t count, size_t i) {
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
