// The product on blocks: a tile of G outputs x P pixels stays in registers while the blocks of these outputs pass by. An input of
// a block costs P loads and G values for G*P multiply-adds, so activations may come from L2 or L3 at the speed of the registers.
// Tiles are staged and written in chunks of pixels, for P alone would make short runs.
#pragma once

#include "product.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

#if defined(__AVX512F__)
constexpr int kBlockTile = 24;  // accumulators of one slice each, of 32 registers
#else
constexpr int kBlockTile = kMaxTile;
#endif
constexpr int kMostOutputs = kBlockTile < 8 ? kBlockTile : 8;
constexpr int kBlocksAhead = 6;  // of a transposed list, whose values lie anywhere
constexpr int kChunkPixels = 16, kStagedOutputs = 32;  // 32 KiB, of L1

template <class T>
struct BlockTile {
  const T* packed;  // at the first pixel
  const T* values;  // at the first output within any block
  const Entries* entries;
  const Blocks* blocks;
  int row;          // of blocks
  const T* bias;    // of the first output, or null
  int biased;       // outputs that have one
  bool relu;
  T* tile;          // [G][output_size]
  int64_t output_size;
};

// A function of its own, as product_tile is.
template <class T, int G, int P>
__attribute__((noinline)) void block_tile(const BlockTile<T>& t) {
  constexpr int L = kLanes<T>;
  const Blocks& b = *t.blocks;
  const int64_t output_step = b.output_step, input_step = b.input_step, channel_step = b.channel_step;
  const int64_t block_size = static_cast<int64_t>(b.outputs) * b.inputs;
  const int32_t *const places = t.entries->place, *const index = b.index;
  const int32_t end = t.entries->end[t.row], last = b.last;
  Vec<T> acc[G * P];
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
    const Vec<T> first = broadcast(g < t.biased ? t.bias[g] : T(0));
#pragma GCC unroll 16
    for (int c = 0; c < P; ++c) acc[g * P + c] = first;
  }
  for (int32_t j = t.entries->begin[t.row]; j < end; ++j) {
    const T* at = t.packed + places[j];
    const T* value = t.values + block_size * (index ? index[j] : j);
    if (index && end - j > kBlocksAhead) __builtin_prefetch(t.values + block_size * index[j + kBlocksAhead]);
    const int inputs = places[j] < last ? b.inputs : b.last_inputs;
    for (int i = 0; i < inputs; ++i, at += channel_step, value += input_step) {
      if constexpr (P <= G) {
        Vec<T> x[P];
#pragma GCC unroll 16
        for (int c = 0; c < P; ++c) x[c] = load(at + c * L);
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) {
          const Vec<T> w = broadcast(value[g * output_step]);
#pragma GCC unroll 16
          for (int c = 0; c < P; ++c) multiply_add(acc[g * P + c], w, x[c]);
        }
      } else {
        Vec<T> w[G];
#pragma GCC unroll 8
        for (int g = 0; g < G; ++g) w[g] = broadcast(value[g * output_step]);
#pragma GCC unroll 16
        for (int c = 0; c < P; ++c) {
          const Vec<T> x = load(at + c * L);
#pragma GCC unroll 8
          for (int g = 0; g < G; ++g) multiply_add(acc[g * P + c], w[g], x);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int g = 0; g < G; ++g) {
#pragma GCC unroll 16
    for (int c = 0; c < P; ++c) {
      Vec<T>& sum = acc[g * P + c];
      if (t.relu) {
#pragma GCC unroll 4
        for (int n = 0; n < kNatives; ++n) sum.part[n] = positive(sum.part[n], sum.part[n]);
      }
      store(t.tile + g * t.output_size + c * L, sum);
    }
  }
}

// Pixels of a tile of G outputs, at most.
constexpr int most_pixels(int outputs) { return kBlockTile / outputs < kChunkPixels ? kBlockTile / outputs : kChunkPixels; }

template <class T, int G, int P>
void run_block_tile(const BlockTile<T>& t, int outputs, int pixels) {
  if constexpr (G > 0 && P > 0) {
    if (outputs < G) return run_block_tile<T, G - 1, G == 1 ? 0 : most_pixels(G == 1 ? 1 : G - 1)>(t, outputs, pixels);
    if (pixels < P) return run_block_tile<T, G, P - 1>(t, outputs, pixels);
    block_tile<T, G, P>(t);
  }
}

// The staged outputs [channels][rows * cols][L].
template <class T, bool Stream, class S>
void write_chunk(const ProductArgs<S>& p, const T* staged, int channels, int rows, int cols, S* out) {
  constexpr int L = kLanes<T>;
  const int64_t size = static_cast<int64_t>(rows) * cols * L;
  if (p.oc == 1 && p.on != 1) {
    for (int r = 0; r < rows; ++r)
      for (int c = 0; c < cols; ++c)
        unpack_channel_runs<T, Stream>(staged + (r * cols + c) * L, size, channels, out + r * p.oh + c * p.ow, p.on, p.lanes);
    return;
  }
  const bool runs = p.ow == 1 && p.on != 1, one_run = rows == 1 || p.oh == cols;
  for (int channel = 0; channel < channels; ++channel, staged += size, out += p.oc) {
    if (runs) {
      const int count = one_run ? 1 : rows, length = one_run ? rows * cols : cols;
      for (int r = 0; r < count; ++r)
        unpack_some_pixels<T, Stream>(staged + r * length * L, length, out + r * p.oh, p.on, p.lanes);
    } else {
      for (int r = 0; r < rows; ++r)
        for (int c = 0; c < cols; ++c)
          unpack_lanes<T, Stream>(staged + (r * cols + c) * L, out + r * p.oh + c * p.ow, p.on, p.lanes);
    }
  }
}

// All outputs of rows x cols <= kChunkPixels pixels from (row, col) on.
template <class S>
void block_chunk(const ProductArgs<S>& p, int row, int col, int rows, int cols, const Ahead& ahead) {
  using T = Compute<S>;
  constexpr int L = kLanes<T>;
  const Blocks& b = p.blocks;
  const int groups = (b.outputs - 1) / kMostOutputs + 1, group = (b.outputs - 1) / groups + 1;  // of outputs, about equal
  const int most = most_pixels(group), strips = (cols + most - 1) / most;
  const bool channels_last = p.oc == 1 && p.on != 1;
  const int held = channels_last ? kStagedOutputs / group * group : group;
  const int64_t size = static_cast<int64_t>(rows) * cols * L;
  S* const out = p.out + row * p.oh + col * p.ow;
  // Pieces of `held` outputs that all begin a line, or else no stores past the cache.
  const bool whole = !channels_last || (b.outputs % group == 0 && held % L == 0);
  const bool stream = whole && writes_lines<T>(p, out, p.channel_begin * b.outputs, channels_last, p.ow == 1 && p.on != 1);
  alignas(64) T staged[kStagedOutputs * kChunkPixels * L];
  int first = p.channel_begin * b.outputs, count = 0;
  const auto write = [&] {
    S* const to = out + first * p.oc;
    if constexpr (kCanStream && sizeof(S) == sizeof(T)) {
      if (stream) {
        write_chunk<T, true>(p, staged, count, rows, cols, to);
        first += count, count = 0;
        return;
      }
    }
    write_chunk<T, false>(p, staged, count, rows, cols, to);
    first += count, count = 0;
  };
  for (int i = p.channel_begin; i < p.channel_end; ++i) {
    fetch_share(ahead, i - p.channel_begin, p.channel_end - p.channel_begin);
    for (int o = 0; o < b.outputs; o += group) {
      const int64_t channel = static_cast<int64_t>(i) * b.outputs + o;
      if (channel >= b.channels) break;
      if (count + group > held) write();
      const int outputs = b.outputs - o < group ? b.outputs - o : group;
      const int valid = b.channels - channel < outputs ? static_cast<int>(b.channels - channel) : outputs;
      BlockTile<T> tile{nullptr, p.values + o * b.output_step, &p.entries, &p.blocks, i, p.bias ? p.bias + channel : nullptr,
                        p.bias ? valid : 0, p.relu, nullptr, size};
      for (int r = 0; r < rows; ++r) {
        for (int s = 0; s < strips; ++s) {
          const int begin = cols * s / strips, end = cols * (s + 1) / strips;
          tile.packed = p.packed + (row + r) * p.row_step + (col + begin) * L;
          tile.tile = staged + count * size + (r * cols + begin) * L;
          run_block_tile<T, kMostOutputs, most_pixels(kMostOutputs)>(tile, outputs, end - begin);
        }
      }
      count += valid;
    }
  }
  if (count) write();
  if (stream) stream_fence();
}

template <class S>
void block_product(const ProductArgs<S>& p) {
  const int strips = (p.cols + kChunkPixels - 1) / kChunkPixels;
  if (strips == 0 || p.channel_begin == p.channel_end) return;
  const int width = (p.cols + strips - 1) / strips, height = kChunkPixels / width;
  for (int row = 0; row < p.rows; row += height) {
    for (int col = 0; col < p.cols; col += width) {
      const int rows = p.rows - row < height ? p.rows - row : height, cols = p.cols - col < width ? p.cols - col : width;
      block_chunk(p, row, col, rows, cols, row == 0 && col == 0 ? p.ahead : Ahead{});
    }
  }
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
