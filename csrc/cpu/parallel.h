// Threads: torch's own pool, so torch.set_num_threads is respected and nothing is oversubscribed.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

#include "shared_tasks.h"

namespace grasp_sparse {

// Torch's, with what is thrown inside thrown again behind it: older versions make another error of it, without its words.
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  std::mutex first;
  std::exception_ptr failed;
  torch::stable::parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    try {
      f(from, to);
    } catch (...) {
      const std::lock_guard<std::mutex> only(first);
      if (!failed) failed = std::current_exception();
    }
  });
  if (failed) std::rethrow_exception(failed);
}

inline int64_t num_threads() { return torch::stable::get_num_threads(); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls run(next) on every thread, where next() gives a task of [0, count) that nobody else has, until it gives -1.
template <bool Backwards = false, class Run>
void share_tasks(int64_t count, const Run& run, int64_t together = 1) {
  const int64_t threads = std::clamp<int64_t>(num_threads(), 1, std::max<int64_t>(1, count));
  SharedTasks tasks(count, threads, together);
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) run([&tasks, thread] { return tasks.take<Backwards>(thread); });
  });
}

}  // namespace grasp_sparse
