// The border between the operations (linear.cpp, conv2d.cpp, batch_norm.cpp, update.cpp: torch tensors, threads, validation) and
// the loops that are compiled once per instruction set and type (kernels.cpp): plain structs and a few function pointers per element type.
//
// Activations are worked on in slices of L batch lanes, L * sizeof(T) = 64 bytes, packed as [channel][row][column][L].
// Every kept weight then multiplies one contiguous vector, whatever its place: the weight is a (value, offset) pair and a
// convolution is a walk over such pairs, with no bounds test because the padding is part of the packed image.
#pragma once

#include <cstdint>

#include "norm_args.h"
#include "storage.h"

namespace grasp_sparse {

constexpr int kSliceBytes = 64;

template <class T>
constexpr int kLanes = kSliceBytes / static_cast<int>(sizeof(T));

// An output larger than this has left L2 before anyone reads it; writing past the cache then saves reading every line first: a quarter
// of the time of linear 1024 -> 1024, batch 512, 98 %. Steps of networks lose where the line is drawn higher, so that L3 holds what
// the next layer reads: for products at 8 and 32 MiB ResNet-32 6 and 8 %, VGG-19 7 and 4 %, ResNet-50 4 and 10 %; for norms at
// 16 MiB 4, 1 and 1 % (a Zen 4, 95 to 98 % of the multiply-adds removed).
constexpr int64_t kStreamBytes = 1 << 20;

// Copies source rows [row_begin, row_end) of one slice into its packed image, which is zeroed first.
template <class S>
struct PackArgs {
  const S* src;            // first lane, channel 0, row 0, column 0
  int64_t sn, sc, sh, sw;  // strides in elements: lane, channel, row, column
  int lanes;               // valid lanes, 1 … L; the rest are packed as zeros
  int channels;
  int row_begin, row_end, width;
  const int64_t* row_place;  // [row - row_begin] place of a source row within a packed channel, in elements; -1: unused
  const int64_t* col_place;  // [width] what a source column adds to it; -1: unused
  Compute<S>* dst;
  int64_t channel_size;  // elements of one packed channel
  bool zero_first;       // some packed places have no source (padding)
  const S* gate;         // zeros are packed where the element here, of the same place, is not positive; or null
  NormGradient<S> norm;  // if there is one, what it makes of src is packed; channels lie side by side then
};

// Copies packed pixels [channel][row][column][L], rows and columns without gaps, into an output whose columns lie side by side.
template <class S>
struct UnpackArgs {
  const Compute<S>* packed;
  int64_t channel_size;  // elements
  int rows, cols, channels;
  S* out;  // at the first pixel
  int64_t on, oc, oh;
  int lanes;
};

// A band that is read after this one, to be asked for while this one is worked on: spread over the work, for a core that has as
// many requests under way as it can drops further ones.
struct Ahead {
  const char* data;  // null: nothing
  int64_t channel_step, row_step;  // in bytes
  int channels, rows, lines;       // lines of 64 bytes in a row
};

// Rows of a packed band that lie in a ring, row r of the image at r % rows: the next band overwrites what nobody reads any more and
// moves nothing. The places of the taps depend on where in the ring a row of output begins; there is a list for every beginning.
struct Ring {
  int rows;           // 0: no ring, rows lie one after the other
  int first;          // where the first row of output begins
  int64_t list_step;  // from the list for one beginning to that of the next, in entries
};

// The kept weights that a pass walks, channel after channel. Entry j reads the pixel at packed + place[j] where the places were
// looked up, and checked, before; else at packed + (place[j] - first) * step, and a walk ends at the first place that is not
// in [first, first + count): what follows belongs to another block of channels, or the place is corrupt.
struct Entries {
  const int32_t* place;
  const int32_t *begin, *end;  // [channels] the entries of a channel
  const int32_t* origin;       // [channels] where its walk began, blocks ago
  bool checked;
  int32_t first;
  uint32_t count;
  int64_t step;
  int32_t* stopped;  // [channels] where the walks ended, for the next block; or null
  bool* complete;    // set to false when a walk ends before its end; or null
};

// What makes entries blocks of [outputs, inputs] weights: an entry's place is that of its first input, the others follow
// channel_step elements apart. The last blocks may reach past the channels there are; what values hold there is not used.
// Entries, channel_begin and channel_end then count rows of blocks.
struct Blocks {
  int outputs, inputs;              // 0: entries are single weights
  int64_t output_step, input_step;  // from one weight of a block to the next, in values
  int64_t channel_step;
  int32_t last;          // entries at this place or beyond have
  int last_inputs;       // this many inputs
  int channels;          // outputs of all blocks together
  const int32_t* index;  // [entries] which block of values an entry is; null: its own number
};

// What a product takes along: beside out, sums[entry] += sum over pixels and lanes of x[channel][pixel] * packed[place of the entry
// + place of the pixel]. With packed g and the transposed list these are both gradients, of one load for two multiply-adds.
template <class T>
struct Companion {
  const T* x;  // packed, at the first pixel
  int64_t channel_size, row_step;
  T* sums;
  bool start;   // nothing is in the sums yet: write them
  Ahead ahead;  // of x
};

// Sums of the pixels of every channel, about a value near them: of them, and of their squares.
struct Moments {
  double *pivot, *first, *second;  // [channels]; null: not wanted
  bool start;                      // there is no value yet: the first pixel becomes it, and the sums are written

  Moments from(int channel, bool first_of_all) const {
    return {pivot + channel, first + channel, second + channel, start && first_of_all};
  }

  // Takes `count` values of a channel, given by their sums about `near`.
  void add(int64_t channel, double count, double near, double sum, double squares) const {
    if (start) pivot[channel] = near, first[channel] = second[channel] = 0;
    add_about(near - pivot[channel], count, sum, squares, first[channel], second[channel]);
  }
};

// out[channel][row][column] = bias + sum over the channel's weights of value * packed[place of the entry + place of the pixel].
template <class S>
struct ProductArgs {
  using T = Compute<S>;
  const T* packed;   // at the first pixel
  int64_t row_step;  // elements between vertically neighbouring pixels; horizontal neighbours are L apart
  int rows, cols;
  const T* values;
  Entries entries;
  Blocks blocks;
  int channel_begin, channel_end;
  const T* bias;  // [channels] or null
  bool relu;      // max(…, 0)
  S* out;         // at the first pixel
  int64_t on, oc, oh, ow;
  int lanes;
  bool stream;  // the output is too large to stay in cache: write past it where whole lines are written
  // When the packed channels come in blocks: tiles between two blocks, [channels][rows * cols][L]. Null: all at once.
  T* partial;
  bool last;  // block: write to out
  Ahead ahead;
  Ring ring;  // of packed, which then is where the ring begins
  Companion<T> with;  // of gradients() only
  Moments moments;    // of what is written, where channels of out lie side by side
};

// sums[weight] += sum over pixels and lanes of g[channel][pixel] * packed[place of the entry + place of the pixel], and, if
// wanted, channel_sums[channel] += sum over pixels and lanes of g[channel][pixel].
template <class T>
struct SampledArgs {
  const T* packed;
  int64_t row_step;
  const T* g;  // packed, at the first pixel
  int64_t g_channel_size, g_row_step;
  int rows, cols;
  Entries entries;
  Blocks blocks;  // with them no channel_sums
  int channel_begin, channel_end;
  T* sums;
  T* channel_sums;  // [channels] or null
  bool start;       // nothing is in the sums yet: write them
  Ahead ahead, ahead_g;  // of packed, of g
  Ring ring, ring_g;     // likewise
};

// Max pooling of `runs` runs of `length` windows, or gradients of as many pixels. Element i of place k of run r is
// from[r * from_step + offsets[k] + i].
template <class S>
struct PoolArgs {
  const S* from;          // x, or the gradient of y
  const uint8_t* places;  // beside the gradient: the tap that each window picked
  const int64_t* offsets;
  const uint8_t* taps;  // what picking place k is called
  int count;            // of places; at least 1 forward
  int64_t runs, length, from_step, out_step;
  S* out;
  uint8_t* places_out;  // forward
};

// One optimizer step of a stretch of weights that lie alike in every array. A weight whose bit is clear, the first weight in
// the highest bit of the first byte, becomes zero and so does its state, whatever its gradient is.
template <class T>
struct SgdArgs {
  T* value;
  const T* grad;
  T* momentum_buffer;   // null: no momentum
  const uint8_t* bits;  // null: no weight is pruned
  int64_t count;
  T lr, momentum, grad_share, weight_decay;  // grad_share = 1 - dampening
  bool nesterov, maximize, first_step;       // the first step starts the buffer with the gradient
};

template <class T>
struct AdamwArgs {
  T* value;
  const T* grad;
  T *exp_avg, *exp_avg_sq;
  const uint8_t* bits;
  int64_t count;
  T value_share, grad_share, beta2, square_share;  // 1 - lr weight_decay, 1 - beta1, beta2, 1 - beta2
  T step_size, root_share, eps;                    // lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
  bool maximize;
};

template <class T>
struct Kernels {
  void (*pack)(const PackArgs<T>&);
  void (*unpack)(const UnpackArgs<T>&);
  void (*product)(const ProductArgs<T>&);
  void (*gradients)(const ProductArgs<T>&);  // a product with its companion; null where there are too few registers for both
  void (*sampled)(const SampledArgs<T>&);
  void (*max_pool)(PoolArgs<T>);
  void (*max_pool_grad)(PoolArgs<T>);
  void (*sgd)(const SgdArgs<T>&);
  void (*adamw)(const AdamwArgs<T>&);
  NormKernels<T> norm;
};

// Only activations are bfloat16.
template <>
struct Kernels<Bf16> {
  void (*pack)(const PackArgs<Bf16>&);
  void (*unpack)(const UnpackArgs<Bf16>&);
  void (*product)(const ProductArgs<Bf16>&);
  void (*gradients)(const ProductArgs<Bf16>&);
  void (*max_pool)(PoolArgs<Bf16>);
  void (*max_pool_grad)(PoolArgs<Bf16>);
  NormKernels<Bf16> norm;
};

struct IsaBody {
  const char* name;
  Kernels<float> f32;
  Kernels<double> f64;
  Kernels<Bf16> bf16;
};

// The body in use: the best this CPU has, or the one GRASP_SPARSE_ISA names. Throws std::invalid_argument with the
// choices when that names one this machine cannot run.
const IsaBody& active_isa();

template <class T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() { return active_isa().f32; }
template <>
inline const Kernels<double>& kernels<double>() { return active_isa().f64; }
template <>
inline const Kernels<Bf16>& kernels<Bf16>() { return active_isa().bf16; }

}  // namespace grasp_sparse
