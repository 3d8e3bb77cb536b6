// Threads: torch's own pool, so torch.set_num_threads is respected and nothing is oversubscribed.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>

namespace grasp_sparse {

using torch::stable::parallel_for;

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace grasp_sparse
