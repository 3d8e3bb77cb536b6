// Queues a kernel: on a device, or in the emulator.
#pragma once

#include <stdexcept>
#include <string>

#include "device.h"
#include "tiling.h"

namespace grasp_sparse::cuda {

inline int64_t blocks_for(int64_t count, int64_t each) { return (count + each - 1) / each; }

#if defined(__CUDACC__)

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  const char* const advice = error == cudaErrorNoKernelImageForDevice
                                 ? "; the kernels were compiled for other GPUs, build them on this one or name it in TORCH_CUDA_ARCH_LIST"
                                 : "";
  throw std::runtime_error(std::string("grasp_sparse: CUDA: ") + cudaGetErrorString(error) + advice);
}

inline DeviceLimits limits_of(int device) {
  DeviceLimits limits{};
  check(cudaDeviceGetAttribute(&limits.multiprocessors, cudaDevAttrMultiProcessorCount, device));
  check(cudaDeviceGetAttribute(&limits.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return limits;
}

template <class... Params, class... Args>
void launch(void* stream, void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, const Args&... args) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("grasp_sparse: Expected work for at most 2^31 - 1 blocks; split the batch.");
  constexpr int64_t kWithoutAsking = 48 << 10;
  if (shared_bytes > kWithoutAsking) {  // for the most there is: what one thread allows for its launch also holds for another's
    int device = 0;
    check(cudaGetDevice(&device));
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limits_of(device).shared_bytes));
  }
  kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(args...);
  check(cudaGetLastError());
}

#else

DeviceLimits limits_of(int device);  // as the tests set them

template <class... Params, class... Args>
void launch(void*, void (*kernel)(Params...), int64_t blocks, int threads, int64_t shared_bytes, const Args&... args) {
  constexpr int kMostThreads = 1024;
  if (blocks > INT32_MAX || threads > kMostThreads || shared_bytes > limits_of(0).shared_bytes)
    throw std::runtime_error("emulated launch: more blocks, threads or shared memory than the device has.");
  emulator::launch(kernel, blocks, threads, shared_bytes, args...);
}

#endif

}  // namespace grasp_sparse::cuda
