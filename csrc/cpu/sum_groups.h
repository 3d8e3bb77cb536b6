// How sums of weights come out the same, bit for bit, for any number of threads: the tasks (slice x band) are dealt to a number of
// groups that depends on shapes and nnz only, each group sums in its own buffer, in order, and the buffers are added in order. Where
// there are fewer groups than threads, threads share a group.
#pragma once

#include <algorithm>
#include <cstdint>

namespace grasp_sparse {

// What is summed in a fixed order is cut for at most so many threads, and for as many whatever their number is.
constexpr int64_t kOrderedThreads = 16;

// A second group costs another pass over all sums; a second thread in one group reads and packs all of x again (that two threads pack it
// together was slower still, for each then reads from the other's cache: 1024 -> 1024, batch 512, 95 %, a Zen 4, 1.30 times as fast as
// one thread, 1.64 with each for itself). So a group has at least twice as many elements of x as sums. With eight times as many these
// two threads were 1.72 times as fast as one, with this 1.85, and one thread up to 3 % slower. A power of two, to go evenly among
// threads.
inline int64_t sum_groups(int64_t tasks, int64_t sums, int64_t x_elements) {
  const int64_t most = std::min<int64_t>({tasks, kOrderedThreads, x_elements / (2 * std::max<int64_t>(1, sums))});
  int64_t groups = 1;
  while (groups * 2 <= most) groups *= 2;
  return groups;
}

}  // namespace grasp_sparse
