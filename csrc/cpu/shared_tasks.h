// Tasks of threads that help each other: each goes through a stretch of its own, in order, as neighbours share what is packed, and
// then takes tasks off the ends of what others have left. A core that is slower, or that another program uses, holds nobody up, nor
// does a thread that wakes late. Free of torch.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

namespace grasp_sparse {

// Of fewer than 2^32 tasks, a multiple of those that are together.
class SharedTasks {
 public:
  // Every `together` tasks share what is packed, and so begin in one stretch. There may be fewer of these than threads; some then
  // have nothing of their own.
  SharedTasks(int64_t count, int64_t threads, int64_t together = 1) : left_(threads) {
    const auto begin_of = [&](int64_t thread) { return count / together * thread / threads * together; };
    for (int64_t t = 0; t < threads; ++t) left_[t].range = pack(begin_of(t), begin_of(t + 1));
  }

  // The next task of the thread, or -1: none is left. Backwards, it begins at the end of its own and the others help from the front.
  template <bool Backwards>
  int64_t take(int64_t thread) {
    const int64_t own = take_from<Backwards>(left_[thread]);
    if (own >= 0) return own;
    const int64_t threads = static_cast<int64_t>(left_.size());
    for (int64_t i = 1; i < threads; ++i) {
      const int64_t other = take_from<!Backwards>(left_[(thread + i) % threads]);
      if (other >= 0) return other;
    }
    return -1;
  }

 private:
  // Begin and end of what is left, together, so that nobody takes what another has.
  struct alignas(64) Left {
    std::atomic<uint64_t> range{0};
  };

  static uint64_t pack(int64_t begin, int64_t end) { return static_cast<uint64_t>(begin) << 32 | static_cast<uint64_t>(end); }

  template <bool FromEnd>
  static int64_t take_from(Left& left) {
    uint64_t range = left.range.load(std::memory_order_relaxed);
    for (;;) {
      const int64_t begin = static_cast<int64_t>(range >> 32), end = static_cast<int64_t>(range & 0xffffffff);
      if (begin >= end) return -1;
      const uint64_t rest = FromEnd ? pack(begin, end - 1) : pack(begin + 1, end);
      if (left.range.compare_exchange_weak(range, rest, std::memory_order_relaxed)) return FromEnd ? end - 1 : begin;
    }
  }

  std::vector<Left> left_;
};

}  // namespace grasp_sparse
