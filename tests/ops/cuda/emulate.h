// CUDA's words on a CPU: the blocks of a grid run one after another, the threads of a block as fibers that take turns at barriers
// and shuffles. What a GPU would leave undefined ends the launch with an error that says where:
//
//   - threads of a warp, or of a block, that meet at different barriers, or of which some have returned;
//   - writing past the end of shared memory.
//
// And what it would get away with most of the time shows: shared memory holds NaN until it is written, and an asynchronous copy
// arrives when it is waited for, no earlier. Warps, and threads of a warp, run from the first on in one block and from the last on
// in the next, and the other way round in the next launch: who reads what another wrote, without a barrier, is wrong in one of them.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "storage.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

struct Copy {
  void* to;
  const void* from;
  int bytes;
  bool valid;

  void run() const {
    if (valid)
      std::memcpy(to, from, bytes);
    else
      std::memset(to, 0, bytes);
  }
};

struct Fiber {
  enum State { ready, at_warp, at_block, ended };

  State state = ended;
  int line = 0;         // of the barrier where it waits
  unsigned shuffles = 0;
  dim3 thread;
  bool begun = false;
  ucontext_t start;
  jmp_buf context;
  std::unique_ptr<unsigned char[]> stack;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> committed;
};

class Block {
 public:
  dim3 index, threads, grid;

  static Block& running() {
    static Block block;
    return block;
  }

  Fiber& fiber() { return *fibers_[current_]; }
  unsigned char* shared() { return shared_.data(); }
  unsigned lane() const { return current_ % 32; }

  void run(const std::function<void()>& body, size_t shared_bytes, bool backwards) {
    if (threads.x % 32)
      throw std::runtime_error("emulated launch: Expected whole warps, got " + std::to_string(threads.x) + " threads.");
    body_ = &body, backwards_ = backwards;
    constexpr size_t guard = 64;
    shared_.assign(shared_bytes + guard, 0xff);
    slots_.assign(threads.x / 32 * 64, 0);
    while (fibers_.size() < threads.x) fibers_.push_back(make());
    for (unsigned i = 0; i < threads.x; ++i) {
      Fiber& f = *fibers_[i];
      f.state = Fiber::ready, f.shuffles = 0, f.thread = {i, 0, 0};
      f.open.clear(), f.committed.clear();
    }
    try {
      while (step()) {
      }
    } catch (...) {
      fibers_.clear();  // they stand in the middle of a kernel that nobody will finish
      throw;
    }
    for (size_t i = shared_bytes; i < shared_.size(); ++i)
      if (shared_[i] != 0xff) throw std::runtime_error("emulated kernel: wrote past the end of shared memory.");
  }

  // Blocks the calling thread until its whole warp, or block, is there.
  void meet(Fiber::State where, int line) {
    Fiber& f = fiber();
    f.state = where, f.line = line;
    if (!_setjmp(f.context)) _longjmp(scheduler_, 1);
  }

  uint64_t& slot(unsigned parity, unsigned lane) { return slots_[current_ / 32 * 64 + parity * 32 + lane]; }

 private:
  static constexpr size_t kStack = 64 << 10;

  static void enter() {
    for (;;) {
      Block& block = running();
      try {
        (*block.body_)();
      } catch (...) {
        block.error_ = std::current_exception();
      }
      block.fiber().state = Fiber::ended;
      block.fiber().line = 0;
      if (!_setjmp(block.fiber().context)) _longjmp(block.scheduler_, 1);
    }
  }

  std::unique_ptr<Fiber> make() {
    auto f = std::make_unique<Fiber>();
    f->stack.reset(new unsigned char[kStack]);
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack.get(), f->start.uc_stack.ss_size = kStack, f->start.uc_link = nullptr;
    makecontext(&f->start, &Block::enter, 0);
    return f;
  }

  void resume(unsigned i) {
    current_ = i;
    Fiber& f = *fibers_[i];
    if (_setjmp(scheduler_)) {
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      return;
    }
    if (f.begun) _longjmp(f.context, 1);
    f.begun = true;
    setcontext(&f.start);
  }

  // Runs every thread as far as it goes; whether any is left to run.
  bool step() {
    const unsigned warps = threads.x / 32;
    for (unsigned w = 0; w < warps; ++w) {
      const unsigned warp = 32 * (backwards_ ? warps - 1 - w : w);
      do {
        for (unsigned lane = 0; lane < 32; ++lane) {
          const unsigned i = warp + (backwards_ ? 31 - lane : lane);
          if (fibers_[i]->state == Fiber::ready) resume(i);
        }
        expect_one_place(warp, warp + 32);
      } while (fibers_[warp]->state == Fiber::at_warp && release(warp, warp + 32));
    }
    expect_one_place(0, threads.x);
    return fibers_[0]->state == Fiber::at_block && release(0, threads.x);
  }

  bool release(unsigned begin, unsigned end) {
    for (unsigned i = begin; i < end; ++i) fibers_[i]->state = Fiber::ready;
    return true;
  }

  void expect_one_place(unsigned begin, unsigned end) {
    for (unsigned i = begin + 1; i < end; ++i)
      if (fibers_[i]->state != fibers_[begin]->state || fibers_[i]->line != fibers_[begin]->line)
        throw std::runtime_error("emulated kernel: threads diverge at a barrier: thread " + std::to_string(begin) + " " +
                                 place(begin) + ", thread " + std::to_string(i) + " " + place(i) + ".");
  }

  std::string place(unsigned i) const {
    const Fiber& f = *fibers_[i];
    if (f.state == Fiber::ended) return "has returned";
    const char* const whose = f.state == Fiber::at_warp ? "warp" : "block";
    return std::string("is at the ") + whose + " barrier of line " + std::to_string(f.line);
  }

  const std::function<void()>* body_ = nullptr;
  std::exception_ptr error_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<unsigned char> shared_;
  std::vector<uint64_t> slots_;
  unsigned current_ = 0;
  bool backwards_ = false;
  jmp_buf scheduler_;
};

template <class T>
T exchange(T value, unsigned from, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  Block& block = Block::running();
  const unsigned parity = block.fiber().shuffles++ & 1;  // what is read now is written again only behind the next barrier
  std::memcpy(&block.slot(parity, block.lane()), &value, sizeof(T));
  block.meet(Fiber::at_warp, line);
  std::memcpy(&value, &block.slot(parity, from % 32), sizeof(T));
  return value;
}

inline int64_t launches = 0;  // of all kernels so far

template <class Kernel, class... Args>
void launch(Kernel kernel, int64_t blocks, int threads, size_t shared_bytes, const Args&... args) {
  const std::function<void()> body = [&] { kernel(args...); };
  ++launches;
  Block& block = Block::running();
  block.threads = {static_cast<unsigned>(threads), 1, 1};
  block.grid = {static_cast<unsigned>(blocks), 1, 1};
  for (int64_t i = 0; i < blocks; ++i) {
    block.index = {static_cast<unsigned>(i), 0, 0};
    block.run(body, shared_bytes, (launches + i) % 2);
  }
}

}  // namespace emulator

#define threadIdx (::emulator::Block::running().fiber().thread)
#define blockIdx (::emulator::Block::running().index)
#define blockDim (::emulator::Block::running().threads)
#define gridDim (::emulator::Block::running().grid)

inline void __syncthreads(int line = __builtin_LINE()) { emulator::Block::running().meet(emulator::Fiber::at_block, line); }
inline void __syncwarp(unsigned = 0xffffffffu, int line = __builtin_LINE()) {
  emulator::Block::running().meet(emulator::Fiber::at_warp, line);
}
template <class T>
T __shfl_sync(unsigned, T value, int from, int line = __builtin_LINE()) {
  return emulator::exchange(value, from, line);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned delta, int line = __builtin_LINE()) {
  const unsigned lane = emulator::Block::running().lane();
  return emulator::exchange(value, lane < delta ? lane : lane - delta, line);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned mask, int line = __builtin_LINE()) {
  return emulator::exchange(value, emulator::Block::running().lane() ^ mask, line);
}
template <class T>
T __ldg(const T* from) {
  return *from;
}

namespace grasp_sparse::cuda {

using std::max;
using std::min;

inline unsigned char* shared_memory() { return emulator::Block::running().shared(); }

template <int Bytes>
void copy_async(void* to, const void* from, bool valid) {
  if (reinterpret_cast<uintptr_t>(to) % Bytes || (valid && reinterpret_cast<uintptr_t>(from) % Bytes))
    throw std::runtime_error("emulated kernel: a copy is not aligned to its size.");
  emulator::Block::running().fiber().open.push_back({to, from, Bytes, valid});
}
inline void commit_copies() {
  emulator::Fiber& f = emulator::Block::running().fiber();
  f.committed.push_back(std::move(f.open));
  f.open.clear();
}
template <int Groups>
void wait_for_copies() {
  for (auto& committed = emulator::Block::running().fiber().committed; committed.size() > Groups; committed.pop_front())
    for (const emulator::Copy& copy : committed.front()) copy.run();
}

inline unsigned high_product(unsigned a, unsigned b) { return static_cast<unsigned>((uint64_t{a} * b) >> 32); }

inline float widened(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline void narrowed(float x, Bf16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  to.bits = std::isnan(x) ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float widened(Fp16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, sizeof(half));
  return static_cast<float>(half);
}
inline void narrowed(float x, Fp16& to) {
  const _Float16 half = static_cast<_Float16>(x);
  std::memcpy(&to.bits, &half, sizeof(half));
}
template <class S>
void widened_pair(unsigned word, S, float& low, float& high) {
  low = widened(S{static_cast<uint16_t>(word)}), high = widened(S{static_cast<uint16_t>(word >> 16)});
}

}  // namespace grasp_sparse::cuda
