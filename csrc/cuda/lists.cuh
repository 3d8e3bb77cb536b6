// The weights as the product kernel reads them, made at every call: values change with every step, and what a cached structure
// would save (a few microseconds of reading indices) is not worth state that must be found, kept and dropped. No host waits
// for any of it, so a call can be captured in a graph.
//
// Rows are dealt to tiles of R rows, one a warp, so that every tile has about as many weights. The weights of a tile form one
// stream: chunk of input channels by chunk, within it row by row, each row filled up to whole groups of four with zeros that
// multiply what the row multiplies anyway. A weight is a value and a 16-bit place: which line of the staged chunk (stage.cuh) it
// multiplies.
//
//     by_count [rows]                    rows, those with most weights first
//     bounds [rows * lists, chunks + 1]  where each list crosses from chunk to chunk
//     sizes, starts [tiles, chunks, R]   groups of each row in each chunk, and those before them in the tile
//     totals, begins [tiles]             groups of each tile; where its stream begins, or -1: an index points outside the weight
//     groups                             the streams
//
// Indices are not trusted: an index out of place is not followed, and every row of its tile comes out as NaN.
#pragma once

#include "device.h"
#include "gather.h"

namespace grasp_sparse::cuda {

constexpr int kGroup = 4;

template <class T>
struct alignas(8) Group {
  uint16_t place[kGroup];
  T value[kGroup];
};

// The taps of one axis in use, and the staged line of each.
struct TapLines {
  int first, every, count;  // as GatherAxis
  int line_first, line_step;

  // Of place k of the kernel; -1 if it is not in use.
  __device__ int line(int k) const {
    const int past = k - first;
    if (past < 0 || past % every || past / every >= count) return -1;
    return line_first + past / every * line_step;
  }
};

// The weights one pass walks. An output owns one list whose indices are input channels with their taps (by row), or one list of
// input channels for every tap (by column).
struct Lists {
  const int *ptr, *index, *permutation;  // permutation: the way back to the values, or null
  int rows, nnz;
  int channels, chunk, chunks;
  int taps, kernel_w;
  bool by_column;
  TapLines h, w;
  int lines_h, lines_w;

  __device__ int per_row() const { return by_column ? taps : 1; }
  __device__ int per_channel() const { return by_column ? 1 : taps; }

  __device__ int begin(int64_t list) const { return min(max(ptr[list], 0), nnz); }
  __device__ int end(int64_t list) const { return max(min(ptr[list + 1], nnz), begin(list)); }

  // The staged line of a weight, counted from the first of its chunk; -1 where it has none.
  __device__ int place(int channel, int tap) const {
    const int line_h = h.line(tap / kernel_w), line_w = w.line(tap % kernel_w);
    return line_h < 0 || line_w < 0 ? -1 : (channel % chunk * lines_h + line_h) * lines_w + line_w;
  }
};

struct Bounds {
  const int* at;
  int chunks;

  __device__ int begin(int64_t list, int chunk) const { return at[list * (chunks + 1) + chunk]; }
  __device__ int count(int64_t list, int chunk) const { return max(begin(list, chunk + 1) - begin(list, chunk), 0); }
};

// The row a tile has in a slot: rows are dealt in rounds, to and fro.
__device__ inline int dealt_row(const int* by_count, int rows, int tiles, int tile, int slot) {
  const int64_t rank = static_cast<int64_t>(slot) * tiles + (slot & 1 ? tiles - 1 - tile : tile);
  return rank < rows ? by_count[rank] : -1;
}

constexpr int kRankThreads = 256;

// by_count: a row's place is the number of rows before it. Every row is compared with every other: a block does so for a row a
// lane, each of its warps with a share of the others.
static __global__ void __launch_bounds__(kRankThreads) rank_rows(Lists lists, int* by_count) {
  int* const counts = reinterpret_cast<int*>(shared_memory());
  const int per_row = lists.per_row(), warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, row = blockIdx.x * kWarp + lane;
  // Never below that of rows which do not exist, or ranks would leave by_count: corrupt lists may end before they begin.
  const auto weights = [&](int64_t r) { return max(lists.end(r * per_row + per_row - 1) - lists.begin(r * per_row), 0); };
  const int own = row < lists.rows ? weights(row) : 0;
  int rank = 0;
  for (int first = 0; first < lists.rows; first += kRankThreads) {
    const int other = first + threadIdx.x;
    __syncthreads();
    counts[threadIdx.x] = other < lists.rows ? weights(other) : -1;
    __syncthreads();
    for (int i = warp * kWarp; i < (warp + 1) * kWarp; ++i)
      rank += counts[i] > own || (counts[i] == own && first + i < row);
  }
  __syncthreads();
  counts[threadIdx.x] = rank;
  __syncthreads();
  if (warp > 0 || row >= lists.rows) return;
  for (int i = lane + kWarp; i < kRankThreads; i += kWarp) rank += counts[i];
  by_count[rank] = row;
}

constexpr int kBoundThreads = 256;

static __global__ void __launch_bounds__(kBoundThreads) find_bounds(Lists lists, int64_t count, int* bounds) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kBoundThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t list = i / (lists.chunks + 1);
  const int chunk = static_cast<int>(i % (lists.chunks + 1));
  int low = lists.begin(list), high = lists.end(list);
  if (chunk == 0) high = low;
  if (chunk == lists.chunks) low = high;
  const int64_t first = static_cast<int64_t>(chunk) * lists.chunk * lists.per_channel();
  while (low < high) {
    const int middle = low + (high - low) / 2;
    if (lists.index[middle] < first)
      low = middle + 1;
    else
      high = middle;
  }
  bounds[i] = low;
}

constexpr int kPlaceThreads = 256;
constexpr uint32_t kPlaceBits = 0xffff, kNowhere = ~kPlaceBits;

// Where a weight of a list by row multiplies, for a pass that walks the list once for every tile: its chunk above 16 bits of place
// in it. No such chunk, where its index points outside the weight.
static __global__ void __launch_bounds__(kPlaceThreads) find_places(Lists lists, uint32_t* places) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kPlaceThreads + threadIdx.x;
  if (j >= lists.nnz) return;
  const int index = lists.index[j], channel = index / lists.taps;
  const bool inside = index >= 0 && channel < lists.channels;
  const uint32_t chunk = inside ? channel / lists.chunk : 0, place = inside ? lists.place(channel, index % lists.taps) : 0;
  places[j] = inside ? chunk << 16 | place : kNowhere;
}

// Weights of a row in a chunk: of its one list, or of those of the taps in use before `tap`.
__device__ inline int64_t weights_before(const Lists& lists, const Bounds& bounds, int64_t row, int chunk, int tap) {
  if (!lists.by_column) return tap ? bounds.count(row, chunk) : 0;
  int64_t sum = 0;
  for (int a = 0; a < lists.h.count; ++a)  // not every tap asked whether it is in use: that divides
    for (int b = 0; b < lists.w.count; ++b) {
      const int k = (lists.h.first + a * lists.h.every) * lists.kernel_w + lists.w.first + b * lists.w.every;
      if (k >= tap) return sum;
      sum += bounds.count(row * lists.taps + k, chunk);
    }
  return sum;
}

// sizes, starts, totals: one warp a tile, one lane a row of it.
template <int R>
__global__ void __launch_bounds__(kWarp) count_groups(Lists lists, Bounds bounds, const int* by_count, int tiles, uint16_t* sizes,
                                                      int* starts, int* totals) {
  static_assert(R <= kWarp);
  const int tile = blockIdx.x, lane = threadIdx.x;
  const int row = lane < R ? dealt_row(by_count, lists.rows, tiles, tile, lane) : -1;
  int64_t before = 0;
  bool sound = true;
  for (int chunk = 0; chunk < lists.chunks; ++chunk) {
    const int64_t weights = row < 0 ? 0 : weights_before(lists, bounds, row, chunk, lists.per_row());
    const int64_t groups = (weights + kGroup - 1) / kGroup;
    sound &= groups <= UINT16_MAX;
    int64_t upto = groups;
    for (int step = 1; step < kWarp; step *= 2) {
      const int64_t more = __shfl_up_sync(kAllLanes, upto, step);
      if (lane >= step) upto += more;
    }
    const int64_t at = (static_cast<int64_t>(tile) * lists.chunks + chunk) * R + lane;
    if (lane < R) sizes[at] = static_cast<uint16_t>(groups), starts[at] = static_cast<int>(before + upto - groups);
    before += __shfl_sync(kAllLanes, upto, kWarp - 1);
  }
  int unsound = !sound || before > INT32_MAX;
  for (int step = kWarp / 2; step; step /= 2) unsound |= __shfl_xor_sync(kAllLanes, unsound, step);
  if (lane == 0) totals[tile] = unsound ? -1 : static_cast<int>(before);
}

// begins and groups: one block a tile, one warp a row of it.
template <class T, int R>
__global__ void __launch_bounds__(R * kWarp, 1) fill_groups(Lists lists, Bounds bounds, const int* by_count, int tiles,
                                                            const uint16_t* sizes, const int* starts, const int* totals,
                                                            const T* values, int64_t capacity, int64_t* begins, Group<T>* groups) {
  const int tile = blockIdx.x, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  int* const out_of_place = reinterpret_cast<int*>(shared_memory());
  if (threadIdx.x == 0) *out_of_place = 0;
  int64_t begin = 0;
  for (int other = lane; other < tile; other += kWarp) begin += max(totals[other], 0);
  for (int step = kWarp / 2; step; step /= 2) begin += __shfl_xor_sync(kAllLanes, begin, step);
  __syncthreads();

  const int total = totals[tile];
  const bool fits = total >= 0 && begin + total <= capacity;
  const int row = dealt_row(by_count, lists.rows, tiles, tile, warp);
  if (fits && row >= 0) {
    const int64_t sizes_at = static_cast<int64_t>(tile) * lists.chunks * R + warp;
    bool sound = true;
    for (int k = 0; k < lists.per_row(); ++k) {
      if (lists.by_column && lists.place(0, k) < 0) continue;
      const int64_t list = static_cast<int64_t>(row) * lists.per_row() + k;
      for (int j = lists.begin(list) + lane; j < lists.end(list); j += kWarp) {
        const int index = lists.index[j], from = lists.permutation ? lists.permutation[j] : j;
        const int channel = index / lists.per_channel(), tap = lists.by_column ? k : index % lists.per_channel();
        const int chunk = channel / lists.chunk;
        const bool inside = index >= 0 && channel < lists.channels && from >= 0 && from < lists.nnz &&
                            j >= bounds.begin(list, chunk) && j < bounds.begin(list, chunk + 1);
        sound &= inside;
        if (!inside) continue;
        const int64_t at = weights_before(lists, bounds, row, chunk, k) + j - bounds.begin(list, chunk);
        Group<T>& group = groups[begin + starts[sizes_at + static_cast<int64_t>(chunk) * R] + at / kGroup];
        group.place[at % kGroup] = static_cast<uint16_t>(lists.place(channel, tap));
        group.value[at % kGroup] = values[from];
      }
    }
    __syncwarp();
    for (int chunk = lane; chunk < lists.chunks; chunk += kWarp) {
      const int64_t weights = weights_before(lists, bounds, row, chunk, lists.per_row());
      Group<T>& last = groups[begin + starts[sizes_at + static_cast<int64_t>(chunk) * R] + weights / kGroup];
      for (int at = weights % kGroup; at && at < kGroup; ++at) last.place[at] = last.place[0], last.value[at] = 0;
    }
    if (!sound) *out_of_place = 1;
  }
  __syncthreads();
  if (threadIdx.x == 0) begins[tile] = fits && !*out_of_place ? begin : -1;
}

}  // namespace grasp_sparse::cuda
