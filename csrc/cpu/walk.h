// How the kernels walk the entries of one channel.
#pragma once

#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// The distance of an entry from the first place in use; e.count or more if the walk must end there.
GRASP_SPARSE_INLINE uint32_t place_of(const Entries& e, int32_t entry) {
  return static_cast<uint32_t>(e.place[entry]) - static_cast<uint32_t>(e.first);
}

// Whether blocks before this one had entries of the channel; whether this one has none.
GRASP_SPARSE_INLINE bool is_begun(const Entries& e, int channel) { return e.begin[channel] != e.origin[channel]; }
GRASP_SPARSE_INLINE bool is_idle(const Entries& e, int channel) {
  return e.begin[channel] == e.end[channel] || (!e.checked && place_of(e, e.begin[channel]) >= e.count);
}

// Asks for the entries of a channel that is walked soon. They lie where no hardware prefetcher guesses: a block of channels
// takes a piece of every row.
constexpr int kPrefetchAhead = 2, kPrefetchLines = 8;

template <class T>
GRASP_SPARSE_INLINE void prefetch_walk(const Entries& e, const T* values, int channel, int channels) {
  if (channel >= channels) return;
  constexpr int line = 64 / sizeof(int32_t);
  const int32_t begin = e.begin[channel], left = e.end[channel] - begin;
  for (int32_t i = 0; i < left && i < kPrefetchLines * line; i += line) {
    __builtin_prefetch(e.place + begin + i);
    if (values) __builtin_prefetch(values + begin + i);
  }
}

// Asks for share `i` of `n` of a band that is read later. All the way into L1: asking for L2 was half as fast.
GRASP_SPARSE_INLINE void fetch_share(const Ahead& ahead, int i, int n) {
  if (!ahead.data) return;
  const int end = static_cast<int>(static_cast<int64_t>(i + 1) * ahead.channels / n);
  for (int c = static_cast<int>(static_cast<int64_t>(i) * ahead.channels / n); c < end; ++c)
    for (int r = 0; r < ahead.rows; ++r)
      for (int line = 0; line < ahead.lines; ++line)
        __builtin_prefetch(ahead.data + c * ahead.channel_step + r * ahead.row_step + line * 64, 0, 3);
}

// Notes that the walk of a channel ended at this entry.
GRASP_SPARSE_INLINE void end_walk(const Entries& e, int channel, int32_t entry) {
  if (e.stopped) e.stopped[channel] = entry;
  if (e.complete && entry != e.end[channel]) *e.complete = false;
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
