// Working memory that outlives a call: each thread keeps the most it ever needed, so a steady training step allocates
// nothing here and page-faults nothing.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace grasp_sparse {

class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  AlignedBuffer(const AlignedBuffer&) = delete;
  AlignedBuffer& operator=(const AlignedBuffer&) = delete;
  ~AlignedBuffer() { std::free(data_); }

  // At least `count` elements of T, aligned to 64 bytes, contents undefined; the pointer holds until the next call.
  template <class T>
  T* reserve(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64 + 64;
    if (bytes > bytes_) {
      std::free(data_);
      bytes_ = 0;
      data_ = std::aligned_alloc(64, bytes);
      if (data_ == nullptr) throw std::bad_alloc();
      bytes_ = bytes;
    }
    guard(static_cast<size_t>(count) * sizeof(T));
    return static_cast<T*>(data_);
  }

 private:
  // In a sanitized build a step past what was asked for is found, not only one past what is held; and what an earlier call
  // left behind is NaN, so that reading it shows in the result.
  void guard([[maybe_unused]] size_t used) {
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(data_, bytes_);
    std::memset(data_, 0xff, bytes_);
    ASAN_POISON_MEMORY_REGION(static_cast<char*>(data_) + used, bytes_ - used);
#endif
  }

  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Of a worker, while it runs one task.
struct TaskScratch {
  AlignedBuffer packed, packed_g, partial, stops, staged;
  static TaskScratch& mine() {
    static thread_local TaskScratch scratch;
    return scratch;
  }
};

// Of the thread that called the operation, for as long as the operation runs.
struct CallScratch {
  AlignedBuffer offsets, values;
  AlignedBuffer transposed_offsets, transposed_values, transposed_row_ptr;
  AlignedBuffer places;  // what a column, a row or a tap of the weight matrix is an offset of; needed while lists are built
  AlignedBuffer sums, moments;
  static CallScratch& mine() {
    static thread_local CallScratch scratch;
    return scratch;
  }
};

}  // namespace grasp_sparse
