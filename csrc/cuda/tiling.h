// How a pass is cut into blocks: plain arithmetic on the host, from the sizes of the problem and of the device.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>

#include "stage.cuh"

namespace grasp_sparse::cuda {

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // of one block at most
};

// What a pass gathers from: images [channels, h.input, w.input, batch].
struct Gathered {
  GatherAxis h, w;
  int64_t batch;
  int channels;
  int element_size;
  uintptr_t address;

  bool is_empty() const { return batch == 0 || h.places == 0 || w.places == 0; }
};

constexpr char kTooManyTaps[] = "grasp_sparse: Expected a window whose taps fit into shared memory; leave this layer dense.";
constexpr int kMaxPlaces = 1 << 16;  // staged lines that 16 bits can name

inline int power_of_two_from(int64_t n) {
  int power = 1;
  while (power < n && power < (1 << 30)) power *= 2;
  return power;
}

inline int log2_of(int power) {
  int log2 = 0;
  while ((1 << log2) < power) ++log2;
  return log2;
}

// Largest asynchronous copy that the address of the input, its batch and a line of `images` allow.
inline int copy_bytes(const Gathered& x, int images) {
  int bytes = 16;
  const uintptr_t places = x.address | static_cast<uintptr_t>(x.batch) * x.element_size;
  while (bytes > x.element_size && (places % bytes || images * x.element_size < bytes)) bytes /= 2;
  return bytes;
}

// Tiles of `outputs` outputs, `images` of them neighbours in the batch, and as many channels at a time, at most `most_channels`, as
// two buffers of `shared_bytes` together hold; nothing if not even one does.
inline std::optional<Tiling> tiling_of(const Gathered& x, int outputs, int images, int most_channels, int64_t shared_bytes) {
  const int places = outputs / images, most_h = power_of_two_from(x.h.places), most_w = power_of_two_from(x.w.places);
  int tile_w = 1;
  while (tile_w * tile_w < places) tile_w *= 2;
  tile_w = std::min({std::max(tile_w, places / most_h), most_w, places});
  const int tile_h = std::min(places / tile_w, most_h);

  Tiling t{};
  t.h = staged_axis(x.h, tile_h), t.w = staged_axis(x.w, tile_w);
  t.input_h = x.h.input, t.input_w = x.w.input;
  t.images_log2 = log2_of(images), t.tile_w_log2 = log2_of(tile_w);
  t.batch = x.batch, t.batch_tiles = (x.batch + images - 1) / images;
  t.origin_step_h = narrow(static_cast<int64_t>(tile_h) * x.h.step);
  t.origin_step_w = narrow(static_cast<int64_t>(tile_w) * x.w.step);
  t.copy_bytes = copy_bytes(x, images);
  t.channels = x.h.taps && x.w.taps ? x.channels : 0;
  const int64_t plane = static_cast<int64_t>(t.h.lines) * t.w.lines, line_bytes = static_cast<int64_t>(images) * x.element_size;
  const int64_t most = std::min<int64_t>(std::min<int64_t>(shared_bytes / 2 / line_bytes, kMaxPlaces) / plane, most_channels);
  if (most < 1 && t.channels) return std::nullopt;
  t.plane = Divisor(static_cast<unsigned>(plane)), t.lines_w = Divisor(t.w.lines);
  t.chunks = t.channels ? static_cast<int>((t.channels + most - 1) / most) : 0;
  t.chunk = t.chunks ? (t.channels + t.chunks - 1) / t.chunks : 0;
  return t;
}

// Of both buffers, and what aligns the memory behind them.
inline int64_t buffer_bytes(const Tiling& t, int element_size) {
  const int64_t elements = static_cast<int64_t>(t.chunk) * t.h.lines * t.w.lines << t.images_log2;
  return (2 * elements * element_size + 15) / 16 * 16;
}

// Neighbouring images of a line: as many as there are where nothing is seen twice, else 32 so that taps share what is staged, or
// what fills the banks of shared memory once where neighbouring outputs see lines that are no neighbours; fewer, down to `vector`,
// if a chunk would not fit.
inline std::optional<Tiling> widest_tiling(const Gathered& x, int outputs, int vector, int most_channels, int64_t shared_bytes) {
  constexpr int kShared = 32, kBankBytes = 128;
  const int shared = x.w.step == 1 ? kShared : std::max(kShared, kBankBytes / x.element_size);
  const bool seen_once = x.h.taps == 1 && x.w.taps == 1;
  int images = std::clamp(std::min(power_of_two_from(x.batch), seen_once ? outputs : shared), vector, outputs);
  for (; images >= vector; images /= 2)
    if (auto tiling = tiling_of(x, outputs, images, most_channels, shared_bytes)) return tiling;
  return std::nullopt;
}

// What one block of the product kernel is: tiles of `rows` rows by 32 * `vector` outputs, one a warp; and how many of them should
// find room on a multiprocessor.
struct ProductShape {
  int rows, vector, warps, neighbours;
};

struct ProductPlan {
  ProductShape shape;
  Tiling tiling;
  int warp_rows;         // warps side by side along the rows; the others along the outputs
  int tiles, row_blocks;  // of rows
  int64_t blocks;
  int64_t shared_bytes;
};

// Channels of a chunk at most: four chunks, so that three of them arrive behind work, unless chunks have hardly any weights then.
inline int overlapping_chunk(const Gathered& x) {
  constexpr int64_t kChunks = 4, kColumns = 64;
  const int64_t columns = static_cast<int64_t>(x.channels) * x.h.taps * x.w.taps;
  const int64_t chunks = std::clamp<int64_t>(columns / kColumns, 1, kChunks);
  return static_cast<int>((x.channels + chunks - 1) / chunks);
}

inline std::optional<ProductPlan> plan_product(const Gathered& x, int rows, const ProductShape& shape, int ring_bytes,
                                               const DeviceLimits& device) {
  constexpr int kReserved = 1024;  // bytes that every block of a multiprocessor takes besides
  ProductPlan plan{};
  plan.shape = shape;
  plan.tiles = (rows + shape.rows - 1) / shape.rows;
  plan.warp_rows = std::min(shape.warps, power_of_two_from(plan.tiles));
  plan.row_blocks = (plan.tiles + plan.warp_rows - 1) / plan.warp_rows;
  const int64_t rings = shape.warps * ring_bytes;
  const int64_t room = device.shared_bytes / shape.neighbours - (shape.neighbours > 1 ? kReserved : 0) - rings - 16;
  const int outputs = kWarp * shape.vector * (shape.warps / plan.warp_rows);
  const auto tiling = widest_tiling(x, outputs, shape.vector, overlapping_chunk(x), room);
  if (!tiling) return std::nullopt;
  plan.tiling = *tiling;
  plan.blocks = plan.tiling.tiles() * plan.row_blocks;
  plan.shared_bytes = buffer_bytes(*tiling, x.element_size) + rings;
  return plan;
}

// The first of the shapes, best first, that gives every multiprocessor a block; else the last that fits; for a window so wide that
// none does, the least one.
template <size_t Count>
ProductPlan plan_product(const Gathered& x, int rows, const ProductShape (&shapes)[Count], int ring_bytes,
                         const DeviceLimits& device) {
  std::optional<ProductPlan> best;
  for (const ProductShape& shape : shapes) {
    const auto plan = plan_product(x, rows, shape, ring_bytes, device);
    if (plan) best = plan;
    if (plan && plan->blocks >= device.multiprocessors) break;
  }
  const ProductShape& last = shapes[Count - 1];
  if (!best) best = plan_product(x, rows, ProductShape{last.rows, last.vector, 1, 1}, ring_bytes, device);
  if (!best) throw std::runtime_error(kTooManyTaps);
  return *best;
}

struct SampledPlan {
  Tiling tiling;
  int warps, shares, row_blocks, block_rows;
  int64_t blocks, shared_bytes;
};

// Shares of the outputs, until every multiprocessor has two blocks, and of the rows if that does not suffice.
inline SampledPlan plan_sampled(const Gathered& x, int rows, int64_t nnz, int sum_size, int vector, const DeviceLimits& device) {
  constexpr int64_t kWorkspace = 64 << 20;
  SampledPlan plan{};
  plan.warps = 16;
  const int64_t scratch = plan.warps * kWarp * static_cast<int64_t>(sizeof(int));
  const auto tiling = widest_tiling(x, kWarp * vector, vector, x.channels, device.shared_bytes - scratch - 16);
  if (!tiling) throw std::runtime_error(kTooManyTaps);
  plan.tiling = *tiling;
  const int64_t wanted = 2 * device.multiprocessors, chunks = std::max(tiling->chunks, 1);
  const int64_t most_shares = std::clamp<int64_t>(kWorkspace / (nnz * sum_size), 1, tiling->tiles());
  plan.shares = static_cast<int>(std::clamp<int64_t>((wanted + chunks - 1) / chunks, 1, most_shares));
  const int64_t most_blocks = std::max<int64_t>(1, rows / (2 * plan.warps));
  const int64_t parts = chunks * plan.shares;
  plan.row_blocks = static_cast<int>(std::clamp<int64_t>((wanted + parts - 1) / parts, 1, most_blocks));
  plan.block_rows = (rows + plan.row_blocks - 1) / plan.row_blocks;
  plan.blocks = static_cast<int64_t>(tiling->chunks) * plan.shares * plan.row_blocks;
  plan.shared_bytes = buffer_bytes(*tiling, x.element_size) + scratch;
  return plan;
}

}  // namespace grasp_sparse::cuda
