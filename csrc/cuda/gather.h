// Where the outputs of a pass find their inputs: one description for linear layers, convolutions, and each phase of a strided
// transposed convolution. Plain C++: built on the host, read by kernels.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "../cpu/window.h"

namespace grasp_sparse::cuda {

// One axis. Output place p sees, through tap m, input  origin + p * step + reach(m);  it is output  first + p * every.
struct GatherAxis {
  int places, first, every;
  int input, output;  // sizes of the two images
  int origin, step;
  int taps, tap_first, tap_every;  // tap m is place tap_first + m * tap_every of the kernel
  int reach_first, reach_step;     // reach(m) = reach_first + m * reach_step, never negative

  int span() const { return taps ? std::max(reach_first, reach_first + (taps - 1) * reach_step) : 0; }
};

inline int narrow(int64_t value) {
  if (value < -INT32_MAX || value > INT32_MAX)
    throw std::runtime_error("grasp_sparse: Expected padded images and windows that 31 bits can measure; use smaller ones.");
  return static_cast<int>(value);
}

inline GatherAxis fprop_axis(const Axis& a) {
  narrow(a.input + a.pad_begin + a.reach(a.kernel - 1) + a.output * a.stride);
  return {narrow(a.output),     0, 1, narrow(a.input), narrow(a.output),   narrow(-a.pad_begin), narrow(a.stride),
          narrow(a.kernel), 0, 1, 0,               narrow(a.dilation)};
}

// The inputs of a convolution that lie `phase` past a multiple of the stride, in its padded image: what g gives them comes
// through the taps of that phase alone, and of those from neighbouring g.
inline GatherAxis dgrad_axis(const Axis& a, int64_t phase) {
  narrow(a.input + a.pad_begin + a.reach(a.kernel - 1) + a.output * a.stride);
  const int64_t common = std::gcd(a.dilation, a.stride), every = a.stride / common, reach_step = a.dilation / common;
  int64_t first_tap = 0;
  while (first_tap < std::min(every, a.kernel) && a.phase(first_tap) != phase) ++first_tap;
  const bool seen = first_tap < std::min(every, a.kernel);
  const int64_t taps = seen ? (a.kernel - first_tap + every - 1) / every : 0;
  const int64_t last_shift = seen ? a.shift(first_tap + (taps - 1) * every) : 0;
  const int64_t first = a.first_place(phase), places = std::max<int64_t>(a.end_place(phase) - first, 0);
  return {narrow(places), narrow(first * a.stride + phase - a.pad_begin), narrow(a.stride), narrow(a.output), narrow(a.input),
          narrow(first - last_shift), 1, narrow(taps), narrow(first_tap), narrow(every),
          narrow(seen ? last_shift - a.shift(first_tap) : 0), narrow(-reach_step)};
}

// The phases of an axis that hold inputs.
inline std::vector<int64_t> dgrad_phases(const Axis& a) {
  std::vector<int64_t> phases;
  for (int64_t i = 0; i < std::min(a.stride, a.input); ++i) phases.push_back((a.pad_begin + i) % a.stride);
  return phases;
}

// One axis of the part of the input that a tile of outputs sees, staged in shared memory as lines. Where taps lie far apart
// their lines are staged apart, one group a tap; otherwise once, in one piece that taps share.
struct StagedAxis {
  int tile;          // output places of a tile
  int tiles;
  int lines;
  int period;        // lines of one group
  int group_step;    // input places from group to group
  int line_step;     // and from line to line
  int base;          // input of line 0 of tile 0; tile t begins t * tile * step later
  int tap_line_first, tap_line_step;  // of tap m
  int place_line;    // lines from output place to output place
};

inline StagedAxis staged_axis(const GatherAxis& a, int tile) {
  StagedAxis s{};
  s.tile = tile, s.tiles = (a.places + tile - 1) / tile;
  const int64_t together = static_cast<int64_t>(tile - 1) * a.step + a.span() + 1, apart = static_cast<int64_t>(a.taps) * tile;
  if (a.taps == 0 || together <= apart) {
    s.lines = s.period = narrow(together), s.group_step = 0, s.line_step = 1, s.base = a.origin;
    s.tap_line_first = a.reach_first, s.tap_line_step = a.reach_step, s.place_line = a.step;
  } else {
    s.lines = narrow(apart), s.period = tile, s.group_step = a.reach_step, s.line_step = a.step, s.base = a.origin + a.reach_first;
    s.tap_line_first = 0, s.tap_line_step = tile, s.place_line = 1;
  }
  return s;
}

}  // namespace grasp_sparse::cuda
