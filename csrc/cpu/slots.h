// The arguments of an optimizer step of many tensors, checked before anything is written, and the memory they lie in as plain
// arrays: what sgd_update_ and adamw_update_ share on every device.
#pragma once

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "tensors.h"

namespace grasp_sparse {

using Tensors = std::vector<Tensor>;

// Where all tensors of a call have to be.
struct Place {
  const char* name;
  bool (*holds)(const Tensor& t, const Tensor& beside);
};

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
            const Tensors& bits, Place place)
      : values(values), grads(grads), states(std::move(states)), bits(bits), place(place) {
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
      const int64_t bytes = (values[i].numel() + 7) / 8;
      STD_TORCH_CHECK(place.holds(bits[i], values[0]) && bits[i].scalar_type() == ScalarType::Byte && bits[i].is_contiguous() &&
                          bits[i].numel() == bytes,
                      op, ": Expected mask_bits[", i, "] of ", bytes, " contiguous bytes, uint8 on ", place.name,
                      ", or none; got ", bits[i].numel(), ".");
    }
  }

  void check_like(const char* op, const Tensor& t, const char* name, size_t i, ScalarType type, bool written) const {
    const auto sizes = t.sizes(), expected = values[i].sizes(), strides = t.strides();
    const bool same = sizes.size() == expected.size() && std::equal(sizes.begin(), sizes.end(), expected.begin());
    STD_TORCH_CHECK(place.holds(t, values[0]) && t.scalar_type() == type && same, op, ": Expected ", name, "[", i, "] on ",
                    place.name, ", of the dtype of values[0] and the shape of values[", i, "], which has ", values[i].numel(),
                    " elements; got ", t.numel(), ".");
    for (size_t d = 0; written && t.numel() > 0 && d < sizes.size(); ++d)  // of an empty tensor strides mean nothing
      STD_TORCH_CHECK(sizes[d] <= 1 || strides[d] != 0, op, ": Expected ", name, "[", i,
                      "] with a place for each element, got an expanded tensor.");
  }

  // The number that says whether the step is left out, if there is one.
  const float* left_out(const char* op, const std::optional<Tensor>& found_inf) const {
    if (!found_inf) return nullptr;
    STD_TORCH_CHECK(place.holds(*found_inf, values[0]) && found_inf->numel() == 1 && found_inf->scalar_type() == ScalarType::Float, op,
                    ": Expected found_inf of one float32 number on ", place.name, ", where the values are.");
    return const_data<float>(*found_inf);
  }

  const Tensors &values, &grads;
  std::vector<const Tensors*> states;
  const Tensors& bits;
  Place place;
};

// Every place between the first and the last element is one element: the order of memory is an order of the weights.
inline bool is_dense(const Tensor& t) {
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

inline bool same_places(const Tensor& a, const Tensor& b) {
  const auto sizes = a.sizes(), strides = a.strides(), other = b.strides();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && strides[d] != other[d]) return false;
  return true;
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

  const std::vector<Slot>& slots() const { return slots_; }

  void put_back() {
    for (auto& [original, copied] : moved_) torch::stable::copy_(original, copied);
  }

 private:
  void* copy(const Tensor& t, const Tensor& value, bool dense, bool written) {
    const auto sizes = t.sizes(), strides = value.strides();
    const Sizes own(sizes.begin(), sizes.end());
    Tensor copied = empty_strided(t, own, dense ? Sizes(strides.begin(), strides.end()) : row_major(own));
    torch::stable::copy_(copied, t);
    (written ? moved_ : held_).push_back({t, copied});
    return copied.mutable_data_ptr();
  }

  std::vector<Slot> slots_;
  std::vector<std::pair<Tensor, Tensor>> moved_, held_;  // original, the copy that is worked on
};

}  // namespace grasp_sparse
