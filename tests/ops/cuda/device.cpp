// The device that the emulator pretends to be, and launches that must fail.
#include "launch.h"

namespace grasp_sparse::cuda {

namespace {

DeviceLimits limits{4, 64 << 10};

__global__ void return_before_others(int early) {
  if (static_cast<int>(threadIdx.x) == early) return;
  __syncthreads();
}

__global__ void meet_elsewhere(int apart) {
  if (static_cast<int>(threadIdx.x) < apart)
    __syncwarp();
  else
    __syncwarp();
}

__global__ void write_past_the_end(int bytes) { shared_memory()[bytes] = 0; }

__global__ void read_before_waiting(const int* from, int* to) {
  int* const staged = reinterpret_cast<int*>(shared_memory());
  copy_async<4>(staged + threadIdx.x, from + threadIdx.x, true);
  commit_copies();
  to[threadIdx.x] = staged[threadIdx.x];
  wait_for_copies<0>();
  to[32 + threadIdx.x] = staged[threadIdx.x];
}

}  // namespace

DeviceLimits limits_of(int) { return limits; }

}  // namespace grasp_sparse::cuda

using namespace grasp_sparse::cuda;

#pragma GCC visibility push(default)
extern "C" {

void set_limits(int multiprocessors, int shared_bytes) { limits = {multiprocessors, shared_bytes}; }

// The message of the error that the launch ends with, or nothing.
const char* launch_faulty(int which) {
  static std::string message;
  message.clear();
  try {
    if (which == 0) launch(nullptr, return_before_others, 1, 64, 0, 40);
    if (which == 1) launch(nullptr, meet_elsewhere, 1, 32, 0, 5);
    if (which == 2) launch(nullptr, write_past_the_end, 1, 32, 16, 16);
    if (which == 3) launch(nullptr, read_before_waiting, 1, 48, 0, nullptr, nullptr);  // no whole warps
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

void read_early(const int* from, int* to) { launch(nullptr, read_before_waiting, 1, 32, 32 * sizeof(int), from, to); }
}
#pragma GCC visibility pop
