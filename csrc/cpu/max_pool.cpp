// max_pool2d, max_pool2d_backward: in the layout of the input, with one byte a window that says which of its places won.
//
// With the channels or the batch innermost a pixel is a run of numbers side by side, and every window takes whole runs. In NCHW the
// pixels of L planes at a time are packed side by side first, as convolutions do, and the results unpacked. Backward each pixel
// gathers from the windows that hold it, so nothing is added up in memory.
#include <limits>
#include <type_traits>

#include "isa.h"
#include "parallel.h"
#include "pool_window.h"
#include "scratch.h"

namespace grasp_sparse {

namespace {

constexpr int64_t kGrainElements = 16384;

// `outer` sheets of height x width pixels, each a run of numbers.
struct Sheets {
  int64_t outer, height, width, run;
  int64_t row() const { return width * run; }
  int64_t size() const { return height * row(); }
};

Sheets sheets_of(const Tensor& t, Layout layout) {
  const bool chwn = layout == Layout::chwn;
  return {t.size(chwn ? 1 : 0), t.size(2), t.size(3), t.size(chwn ? 0 : 1)};
}

// One axis of a pass: which position of what is read each tap of a position of what is written means.
struct Forward {
  static int64_t at(const Axis& axis, int64_t output, int64_t tap) {
    const int64_t input = output * axis.stride - axis.pad_begin + tap * axis.dilation;
    return input >= 0 && input < axis.input ? input : -1;
  }
  // Positions `step` apart read alike, each `advance` further on.
  static int64_t step(const Axis&) { return 1; }
  static int64_t advance(const Axis& axis) { return axis.stride; }
};
struct Backward {
  static int64_t at(const Axis& axis, int64_t input, int64_t tap) {
    const int64_t first = input + axis.pad_begin - tap * axis.dilation;
    return first >= 0 && first % axis.stride == 0 && first / axis.stride < axis.output ? first / axis.stride : -1;
  }
  static int64_t step(const Axis& axis) { return axis.stride; }
  static int64_t advance(const Axis&) { return 1; }
};

// What the pixels of a row read, relative to where the sheet begins.
struct Reads {
  std::vector<int64_t> offsets;
  std::vector<uint8_t> taps;

  template <class Pass>
  void set(const Window& window, int64_t row, int64_t col, const Sheets& read) {
    offsets.clear(), taps.clear();
    for (int64_t r = 0; r < window.h.kernel; ++r) {
      const int64_t y = Pass::at(window.h, row, r);
      for (int64_t s = 0; y >= 0 && s < window.w.kernel; ++s)
        if (const int64_t x = Pass::at(window.w, col, s); x >= 0)
          offsets.push_back(y * read.row() + x * read.run), taps.push_back(static_cast<uint8_t>(r * window.w.kernel + s));
    }
  }
};

template <class S>
S minus_infinity() {
  if constexpr (std::is_same_v<S, Bf16>)
    return {0xff80};
  else
    return -std::numeric_limits<S>::infinity();
}

// Columns `step` apart that read alike, because they miss the same taps at an edge, or none.
struct Run {
  int64_t col, count;
};

// All columns of a row in runs: the same for every row, so found once a call.
template <class Pass>
std::vector<Run> runs_of(const Axis& axis, int64_t width) {
  const auto alike = [&](int64_t col, int64_t other) {
    bool same = true;
    for (int64_t s = 0; s < axis.kernel; ++s) same &= (Pass::at(axis, col, s) < 0) == (Pass::at(axis, other, s) < 0);
    return same;
  };
  std::vector<Run> runs;
  const int64_t step = Pass::step(axis);
  for (int64_t phase = 0; phase < std::min(step, width); ++phase)
    for (int64_t col = phase; col < width; col += runs.back().count * step) {
      runs.push_back({col, 1});
      while (col + runs.back().count * step < width && alike(col, col + runs.back().count * step)) ++runs.back().count;
    }
  return runs;
}

// One row of a sheet that is written; pointers are to the sheets.
template <class Pass, class S>
void pool_row(const Window& window, const std::vector<Run>& runs, const Sheets& read, const Sheets& written, int64_t row, const S* from,
              const uint8_t* places, S* out, uint8_t* places_out) {
  static thread_local Reads reads;
  const int64_t step = Pass::step(window.w), advance = Pass::advance(window.w) * read.run;
  for (const auto& [col, count] : runs) {
    reads.set<Pass>(window, row, col, read);
    const int64_t to = row * written.row() + col * written.run;
    if (reads.taps.empty() && places_out) {  // windows whose every tap is in the padding; forward, where step is 1
      std::fill_n(out + to, count * written.run, minus_infinity<S>());
      std::fill_n(places_out + to, count * written.run, uint8_t{kMostTaps});
      continue;
    }
    const PoolArgs<S> args{from, places, reads.offsets.data(), reads.taps.data(), static_cast<int>(reads.taps.size()), count,
                           written.run, advance, step * written.run, out + to, places_out ? places_out + to : nullptr};
    if constexpr (std::is_same_v<Pass, Forward>)
      kernels<S>().max_pool(args);
    else
      kernels<S>().max_pool_grad(args);
  }
}

template <class Pass, class S>
void pool_sheets(const Window& window, const Sheets& read, const Sheets& written, const S* from, const uint8_t* places, S* out,
                 uint8_t* places_out) {
  const int64_t grain = std::max<int64_t>(1, kGrainElements / std::max<int64_t>(1, written.row()));
  const std::vector<Run> runs = runs_of<Pass>(window.w, written.width);
  parallel_for(0, written.outer * written.height, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t sheet = task / written.height, base = sheet * read.size(), to = sheet * written.size();
      pool_row<Pass, S>(window, runs, read, written, task % written.height, from + base, places ? places + base : nullptr, out + to,
                        places_out ? places_out + to : nullptr);
    }
  });
}

// Planes of NCHW, L at a time: packed[pixel][L] and back. Bytes go one by one.
template <class S>
void pack_planes(const S* planes, int64_t plane_size, int lanes, Compute<S>* packed) {
  static thread_local std::vector<int64_t> places;
  constexpr int64_t L = kLanes<Compute<S>>;
  places.resize(plane_size);
  for (int64_t i = 0; i < plane_size; ++i) places[i] = i * L;
  const int64_t row_place = 0;
  PackArgs<S> args{};
  args.src = planes, args.sn = plane_size, args.sc = plane_size, args.sh = plane_size, args.sw = 1;
  args.lanes = lanes, args.channels = 1, args.row_end = 1, args.width = static_cast<int>(plane_size);
  args.row_place = &row_place, args.col_place = places.data();
  args.dst = packed, args.channel_size = plane_size * L;
  kernels<S>().pack(args);
}

template <class S>
void unpack_planes(const Compute<S>* packed, int64_t plane_size, int lanes, S* planes) {
  kernels<S>().unpack({packed, 0, 1, static_cast<int>(plane_size), 1, planes, plane_size, 0, 0, lanes});
}

template <class Pass, class S>
void pool_planes(const Window& window, Sheets read, Sheets written, const S* from, const uint8_t* places, S* out, uint8_t* places_out) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  const int64_t planes = read.outer, read_size = read.size(), written_size = written.size();
  read.run = written.run = L;
  const std::vector<Run> runs = runs_of<Pass>(window.w, written.width);
  parallel_for(0, ceil_div(planes, L), 1, [&](int64_t begin, int64_t end) {
    TaskScratch& task = TaskScratch::mine();
    T* packed = task.packed.template reserve<T>(read.size());
    T* result = task.packed_g.template reserve<T>(written.size());
    uint8_t* bytes = task.staged.template reserve<uint8_t>(places ? read.size() : written.size());
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * L;
      const int lanes = static_cast<int>(std::min(L, planes - first));
      pack_planes(from + first * read_size, read_size, lanes, packed);
      if (places)
        for (int l = 0; l < L; ++l)
          for (int64_t i = 0; i < read_size; ++i) bytes[i * L + l] = l < lanes ? places[(first + l) * read_size + i] : 0;
      for (int64_t row = 0; row < written.height; ++row)
        pool_row<Pass, T>(window, runs, read, written, row, packed, places ? bytes : nullptr, result, places ? nullptr : bytes);
      unpack_planes(result, written_size, lanes, out + first * written_size);
      if (places_out)
        for (int l = 0; l < lanes; ++l)
          for (int64_t i = 0; i < written_size; ++i) places_out[(first + l) * written_size + i] = bytes[i * L + l];
    }
  });
}

// Chooses by layout. Tensors lie as `layout` says.
template <class Pass, class S>
void pool(const Window& window, Layout layout, const Tensor& read, const Tensor& written, const S* from, const uint8_t* places, S* out,
          uint8_t* places_out) {
  if (layout != Layout::nchw)
    return pool_sheets<Pass, S>(window, sheets_of(read, layout), sheets_of(written, layout), from, places, out, places_out);
  const auto planes = [](const Tensor& t) { return Sheets{t.size(0) * t.size(1), t.size(2), t.size(3), 1}; };
  pool_planes<Pass, S>(window, planes(read), planes(written), from, places, out, places_out);
}

}  // namespace

std::tuple<Tensor, Tensor> max_pool2d(const Tensor& x, Sizes kernel_size, Sizes stride, Sizes padding, Sizes dilation, bool ceil_mode) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "Expected x of shape [N, C, H, W] on the CPU, got ", x.dim(), " dimensions.");
  const Window window = pool_window(Sizes{x.size(2), x.size(3)}, kernel_size, stride, padding, dilation, ceil_mode);
  const Layout layout = layout_of(x);
  const Tensor in = in_layout(x, layout), y = empty_images(x, layout, x.size(1), window.h.output, window.w.output);
  const Tensor places = empty_bytes(y);
  if (y.numel() == 0) return {y, places};
  for_storage(x, "max_pool2d", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    pool<Forward, S>(window, layout, in, y, const_data<S>(in), nullptr, mutable_data<S>(y), mutable_data<uint8_t>(places));
  });
  return {y, places};
}

Tensor max_pool2d_backward(const Tensor& g, const Tensor& places, Sizes input_size, Sizes kernel_size, Sizes stride, Sizes padding,
                           Sizes dilation, bool ceil_mode) {
  STD_TORCH_CHECK(g.is_cpu() && places.is_cpu(), "Expected g and places on the CPU.");
  const Window window = pool_window(g, places, input_size, kernel_size, stride, padding, dilation, ceil_mode);
  const Layout layout = layout_of(places);
  const Tensor grad = in_layout(g, layout), picked = in_layout(places, layout);
  const Tensor gx = empty_images(g, layout, g.size(1), input_size[0], input_size[1]);
  if (gx.numel() == 0) return gx;
  for_storage(g, "max_pool2d_backward", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    pool<Backward, S>(window, layout, grad, gx, const_data<S>(grad), const_data<uint8_t>(picked), mutable_data<S>(gx), nullptr);
  });
  return gx;
}

}  // namespace grasp_sparse

STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CPU, m) {
  m.impl("max_pool2d", TORCH_BOX(&grasp_sparse::max_pool2d));
  m.impl("max_pool2d_backward", TORCH_BOX(&grasp_sparse::max_pool2d_backward));
}
