// The device that the emulator pretends to be, launches that must fail, and kernels that tests call without the operations.
#include <cstdlib>

#include "launch.h"
#include "lists.cuh"
#include "passes.h"

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

__global__ void read_others_without_waiting(int* to) {
  int* const staged = reinterpret_cast<int*>(shared_memory());
  const int i = threadIdx.x, from = i ? i - 1 : 63;
  staged[i] = i;
  to[64 * blockIdx.x + i] = staged[from];
}

}  // namespace

DeviceLimits limits_of(int) { return limits; }

}  // namespace grasp_sparse::cuda

using namespace grasp_sparse::cuda;

#pragma GCC visibility push(default)
extern "C" {

// And begins anew with the order of threads, which changes with each launch: it must not depend on the tests that ran before.
void set_limits(int multiprocessors, int shared_bytes) {
  limits = {multiprocessors, shared_bytes};
  emulator::launches = multiprocessors;
}

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

// dealt [tiles, slots]: the row of each slot, or -1, of a matrix with these row pointers.
void deal_rows(const int* pointers, int rows, int tiles, int slots, int* dealt) {
  Lists lists{};
  lists.ptr = pointers, lists.rows = rows, lists.nnz = pointers[rows], lists.taps = 1;
  std::vector<int> by_count(rows);
  launch(nullptr, rank_rows, blocks_for(rows, kWarp), kRankThreads, kRankThreads * sizeof(int), lists, by_count.data());
  for (int i = 0; i < tiles * slots; ++i) dealt[i] = dealt_row(by_count.data(), rows, tiles, i / slots, i % slots);
}

// The sampled product of a linear layer, g [rows, batch] and x [cols, batch], into memory that may hold anything.
void sample_into(int rows, int cols, int nnz, const int* crow, const int* col, int64_t batch, const float* g, const float* x,
                 float* sums) {
  const Queue queue{0, nullptr, [](int64_t bytes) { return std::shared_ptr<void>(std::malloc(bytes), std::free); }};
  const grasp_sparse::Window point{{1, 1, 1, 0, 1, 1}, {1, 1, 1, 0, 1, 1}};
  wgrad<float>(queue, {rows, cols, nnz, crow, col, nullptr, nullptr, nullptr}, point, batch, g, x, sums);
}

int64_t count_launches() { return emulator::launches; }

// to [2, 64]: what 64 threads of two blocks each found that the thread before them had written.
void read_others(int* to) { launch(nullptr, read_others_without_waiting, 2, 64, 64 * sizeof(int), to); }

void read_early(const int* from, int* to) { launch(nullptr, read_before_waiting, 1, 32, 32 * sizeof(int), from, to); }
}
#pragma GCC visibility pop
