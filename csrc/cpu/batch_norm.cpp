// batch_norm_train, batch_norm_backward: normalisation by the statistics of the batch, with residual add and ReLU.
//
// In channels_last all channels pass by together: one pass for the sums, a second one for the result, which walks back
// from where the first ended, since that is what the cache still holds. In NCHW and CHWN every channel is on its own, and its second pass
// finds it in the cache. How the work is cut depends on shapes only, so any number of threads gives the same bits.
#include <algorithm>
#include <cmath>

#include "isa.h"
#include "layout.h"
#include "parallel.h"
#include "scratch.h"

namespace grasp_sparse {

namespace {

constexpr int64_t kParts = 32;           // of the sums in channels_last
constexpr int64_t kPartBytes = 64 << 10;  // at least, of x
constexpr int64_t kStepBytes = 256 << 10;  // of x, in one call of a loop of the second pass
constexpr int64_t kWideBytes = 512;        // columns the loops like: eight AVX-512 vectors
constexpr int64_t kMostColumns = 512;

// Above this a result is written past the cache.
constexpr int64_t kNormStreamBytes = 4 << 20;

struct Sheet {
  int64_t offset, rows, cols, stride;
};

// How the elements of a batch of images become sheets.
struct Cut {
  int64_t channels, per_channel;
  bool together;                                        // channels lie side by side (channels_last)
  int64_t runs, run_length, run_stride, channel_stride;  // otherwise: where the elements of one channel lie
  int64_t cols;                                         // of a sheet
  int64_t element_bytes;

  Cut(const Tensor& x, Layout layout)
      : channels(x.size(1)), per_channel(x.size(0) * x.size(2) * x.size(3)), together(layout == Layout::channels_last),
        element_bytes(static_cast<int64_t>(x.element_size())) {
    const int64_t plane = x.size(2) * x.size(3);
    const bool nchw = layout == Layout::nchw;
    runs = nchw ? x.size(0) : 1;
    run_length = nchw ? plane : per_channel;
    run_stride = nchw ? channels * plane : per_channel;
    channel_stride = nchw ? plane : per_channel;
    const int64_t wide = kWideBytes / element_bytes;
    if (together) {
      cols = channels * fold(wide);
    } else {
      cols = run_length <= kMostColumns / 2 ? std::max<int64_t>(run_length, 1) : wide;
    }
  }

  // channels_last: how many pixels make up a row of a sheet.
  int64_t fold(int64_t wide) const {
    for (int64_t pixels = 1; pixels * channels <= kMostColumns; ++pixels)
      if (pixels * channels % wide == 0) return pixels;
    return std::max<int64_t>(1, kMostColumns / 4 / channels);
  }

  int64_t rows() const { return per_channel * channels / cols; }  // of all channels together

  // Rows [begin, end) of all channels together; the pixels that fill no row come after the last.
  template <class F>
  void rows_together(int64_t begin, int64_t end, const F& f) const {
    f(Sheet{begin * cols, end - begin, cols, cols});
    const int64_t rest = per_channel * channels - rows() * cols;
    if (end == rows() && rest) f(Sheet{rows() * cols, 1, rest, rest});
  }

  template <class F>
  void channel(int64_t c, const F& f) const {
    if (cols == run_length) return f(Sheet{c * channel_stride, runs, cols, run_stride});
    const int64_t rows = run_length / cols, rest = run_length % cols;
    for (int64_t run = 0; run < runs; ++run) {
      const int64_t at = c * channel_stride + run * run_stride;
      f(Sheet{at, rows, cols, cols});
      if (rest) f(Sheet{at + rows * cols, 1, rest, rest});
    }
  }
};

// What a pass knows about a channel; the loops want it once per column.
template <class T>
struct Columns {
  T *mean, *scale, *bias, *offset, *slope;

  Columns(AlignedBuffer& buffer, int64_t cols) {
    mean = buffer.reserve<T>(5 * cols);
    scale = mean + cols, bias = scale + cols, offset = bias + cols, slope = offset + cols;
  }
  void point(NormArgs<T>& args) const {
    args.mean = mean, args.scale = scale, args.bias = bias, args.offset = offset, args.slope = slope;
  }
};

// The tensors of one call; null where absent.
template <class T>
struct Norm {
  const T *x, *g, *residual, *y, *weight, *bias, *mean, *var;
  T *out, *g_residual, *mean_out, *var_out, *g_weight, *g_bias;
  double eps;
  bool relu;

  double inverse_deviation(int64_t c) const { return 1 / std::sqrt(static_cast<double>(var[c]) + eps); }
  T scale(int64_t c) const { return static_cast<T>((weight ? weight[c] : 1) * inverse_deviation(c)); }
  T shift(int64_t c) const { return bias ? bias[c] : T(0); }
};

template <class T>
NormArgs<T> on_sheet(const Norm<T>& norm, const Columns<T>& columns, const Sheet& sheet) {
  NormArgs<T> args{};
  columns.point(args);
  args.rows = sheet.rows, args.cols = sheet.cols, args.stride = sheet.stride;
  args.x = norm.x + sheet.offset;
  return args;
}

// Whether `rows` of a sheet start on lines, and the whole is large.
template <class T>
bool may_stream(const T* out, const Cut& cut, const Sheet& sheet) {
  const int64_t bytes = cut.channels * cut.per_channel * cut.element_bytes;
  const auto aligned = [](int64_t elements) { return elements * sizeof(T) % kSliceBytes == 0; };
  return bytes > kNormStreamBytes && reinterpret_cast<uintptr_t>(out + sheet.offset) % kSliceBytes == 0 && aligned(sheet.stride);
}

// One channel's two sums, of every column that belongs to it in every part.
struct Sums {
  double first = 0, second = 0;
  void add(const double* totals, int64_t cols, int64_t parts, int64_t from, int64_t step) {
    for (int64_t part = 0; part < parts; ++part, totals += 2 * cols)
      for (int64_t col = from; col < cols; col += step) first += totals[col], second += totals[cols + col];
  }
};

// Runs one operation: `prepare` fills the columns of channels [begin, end) for the sums, `pass` adds to the sums of a sheet,
// `finish` turns a channel's sums into its results and the columns of the second pass, which `write` runs on a sheet.
template <class T, class Prepare, class Pass, class Finish, class Write>
void two_passes(const Cut& cut, const Prepare& prepare, const Pass& pass, const Finish& finish, const Write& write) {
  if (cut.per_channel == 0) return;
  if (!cut.together) {
    parallel_for(0, cut.channels, 1, [&](int64_t begin, int64_t end) {
      const Columns<T> columns(TaskScratch::mine().packed, cut.cols);
      double* totals = TaskScratch::mine().packed_g.reserve<double>(2 * cut.cols);
      for (int64_t c = begin; c < end; ++c) {
        std::fill_n(totals, 2 * cut.cols, 0.0);
        for (int64_t col = 0; col < cut.cols; ++col) prepare(c, columns, col);
        cut.channel(c, [&](const Sheet& sheet) { pass(columns, sheet, totals); });
        Sums sums;
        sums.add(totals, cut.cols, 1, 0, 1);
        finish(c, sums, columns, 0);
        for (T* of : {columns.mean, columns.scale, columns.bias, columns.offset, columns.slope}) std::fill_n(of, cut.cols, of[0]);
        cut.channel(c, [&](const Sheet& sheet) { write(columns, sheet); });
      }
    });
    return;
  }
  const Columns<T> columns(CallScratch::mine().values, cut.cols);
  const int64_t rows = cut.rows(), row_bytes = cut.cols * cut.element_bytes;
  const int64_t parts = std::clamp<int64_t>(rows * row_bytes / kPartBytes, 1, kParts), part_rows = ceil_div(rows, parts);
  double* totals = CallScratch::mine().sums.reserve<double>(parts * 2 * cut.cols);
  for (int64_t col = 0; col < cut.cols; ++col) prepare(col % cut.channels, columns, col);
  parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      double* mine = totals + part * 2 * cut.cols;
      std::fill_n(mine, 2 * cut.cols, 0.0);
      cut.rows_together(std::min(rows, part * part_rows), std::min(rows, (part + 1) * part_rows),
                        [&](const Sheet& sheet) { pass(columns, sheet, mine); });
    }
  });
  for (int64_t c = 0; c < cut.channels; ++c) {
    Sums sums;
    sums.add(totals, cut.cols, parts, c, cut.channels);
    finish(c, sums, columns, c);
  }
  for (T* of : {columns.mean, columns.scale, columns.bias, columns.offset, columns.slope})
    for (int64_t col = cut.channels; col < cut.cols; ++col) of[col] = of[col - cut.channels];
  const int64_t step = std::max<int64_t>(1, kStepBytes / row_bytes), steps = std::max<int64_t>(1, ceil_div(rows, step));
  parallel_for(0, steps, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i)
      cut.rows_together(i * step, std::min(rows, (i + 1) * step), [&](const Sheet& sheet) { write(columns, sheet); });
  });
}

template <class T>
void forward(const Cut& cut, const Norm<T>& norm) {
  const auto pivot = [&](int64_t c, const Columns<T>& columns, int64_t col) {
    columns.mean[col] = norm.x[cut.together ? c : c * cut.channel_stride];
  };
  const auto moments = [&](const Columns<T>& columns, const Sheet& sheet, double* totals) {
    NormArgs<T> args = on_sheet(norm, columns, sheet);
    args.first = totals, args.second = totals + cut.cols;
    kernels<T>().norm.moments(args);
  };
  const auto finish = [&](int64_t c, const Sums& sums, const Columns<T>& columns, int64_t col) {
    const double n = static_cast<double>(cut.per_channel), shift = sums.first / n;
    const double var = sums.second / n - shift * shift;
    norm.mean_out[c] = static_cast<T>(columns.mean[col] + shift);
    norm.var_out[c] = static_cast<T>(var < 0 ? 0 : var);
    columns.mean[col] = norm.mean[c], columns.scale[col] = norm.scale(c), columns.bias[col] = norm.shift(c);
  };
  const auto apply = [&](const Columns<T>& columns, const Sheet& sheet) {
    NormArgs<T> args = on_sheet(norm, columns, sheet);
    args.residual = norm.residual ? norm.residual + sheet.offset : nullptr;
    args.out = norm.out + sheet.offset;
    args.relu = norm.relu, args.stream = may_stream(norm.out, cut, sheet);
    kernels<T>().norm.apply(args);
  };
  two_passes<T>(cut, pivot, moments, finish, apply);
}

template <class T>
void backward(const Cut& cut, const Norm<T>& norm) {
  const bool mask_from_x = norm.relu && norm.y == nullptr;
  const auto normalised = [&](int64_t c, const Columns<T>& columns, int64_t col) {
    columns.mean[col] = norm.mean[c], columns.scale[col] = norm.scale(c), columns.bias[col] = norm.shift(c);
  };
  const auto reduce = [&](const Columns<T>& columns, const Sheet& sheet, double* totals) {
    NormArgs<T> args = on_sheet(norm, columns, sheet);
    args.g = norm.g + sheet.offset;
    args.y = norm.y ? norm.y + sheet.offset : nullptr;
    args.out = norm.y ? norm.g_residual + sheet.offset : nullptr;
    args.relu = mask_from_x, args.stream = norm.y && may_stream(norm.g_residual, cut, sheet);
    args.first = totals, args.second = totals + cut.cols;
    kernels<T>().norm.sums(args);
  };
  const auto finish = [&](int64_t c, const Sums& sums, const Columns<T>& columns, int64_t col) {
    const double n = static_cast<double>(cut.per_channel), inverse = norm.inverse_deviation(c), scale = norm.scale(c);
    norm.g_bias[c] = static_cast<T>(sums.first), norm.g_weight[c] = static_cast<T>(sums.second * inverse);
    columns.offset[col] = static_cast<T>(scale * sums.first / n);
    columns.slope[col] = static_cast<T>(scale * sums.second * inverse * inverse / n);
  };
  const auto input_grad = [&](const Columns<T>& columns, const Sheet& sheet) {
    NormArgs<T> args = on_sheet(norm, columns, sheet);
    args.g = (norm.y ? norm.g_residual : norm.g) + sheet.offset;
    args.out = norm.out + sheet.offset;
    args.relu = mask_from_x, args.stream = may_stream(norm.out, cut, sheet);
    kernels<T>().norm.input_grad(args);
  };
  two_passes<T>(cut, normalised, reduce, finish, input_grad);
}

void check_images(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.dim() == 4, "Expected x of shape [N, C, H, W] on the CPU, got ", x.dim(), " dimensions.");
  STD_TORCH_CHECK(x.numel() > 0, "Expected x with at least one element per channel.");
}

void check_like(const Tensor& t, const Tensor& x, const char* name) {
  check_type(t, x.scalar_type(), name);
  bool same = t.dim() == 4;
  for (int d = 0; same && d < 4; ++d) same = t.size(d) == x.size(d);
  STD_TORCH_CHECK(same, "Expected ", name, " of the shape of x.");
}

// The contiguous vector [C], or nothing.
std::optional<Tensor> per_channel(const std::optional<Tensor>& t, const Tensor& x, const char* name) {
  if (!t) return std::nullopt;
  check_type(*t, x.scalar_type(), name);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1), "Expected ", name, " of ", x.size(1), " entries, got ", t->numel(), ".");
  return dense(*t);
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? const_data<T>(*t) : nullptr;
}

Tensor empty_vector(const Tensor& like, int64_t size) { return empty_strided(like, {size}, {1}); }

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                    double eps, bool relu) {
  check_images(x);
  if (residual) check_like(*residual, x, "residual");
  const std::optional<Tensor> w = per_channel(weight, x, "weight"), b = per_channel(bias, x, "bias");
  const Layout layout = layout_of(x);
  const Tensor in = in_layout(x, layout), y = empty_images(x, layout, x.size(1), x.size(2), x.size(3));
  const std::optional<Tensor> r = residual ? std::make_optional(in_layout(*residual, layout)) : std::nullopt;
  const Tensor mean = empty_vector(x, x.size(1)), var = empty_vector(x, x.size(1));
  for_type(x, "batch_norm_train", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Norm<T> norm{};
    norm.x = const_data<T>(in), norm.residual = pointer<T>(r), norm.weight = pointer<T>(w), norm.bias = pointer<T>(b);
    norm.out = mutable_data<T>(y), norm.mean = norm.mean_out = mutable_data<T>(mean), norm.var = norm.var_out = mutable_data<T>(var);
    norm.eps = eps, norm.relu = relu;
    forward(Cut(x, layout), norm);
  });
  return {y, mean, var};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(const Tensor& g, const Tensor& x, const std::optional<Tensor>& y,
                                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                               const Tensor& mean, const Tensor& var, double eps, bool relu) {
  check_images(x);
  check_like(g, x, "g");
  STD_TORCH_CHECK(!y || relu, "Expected y only where relu is true.");
  if (y) check_like(*y, x, "y");
  const std::optional<Tensor> w = per_channel(weight, x, "weight"), b = per_channel(bias, x, "bias");
  const Tensor m = *per_channel(mean, x, "mean"), v = *per_channel(var, x, "var");
  const Layout layout = layout_of(x);
  const Tensor in = in_layout(x, layout), grad = in_layout(g, layout);
  const auto images = [&] { return empty_images(x, layout, x.size(1), x.size(2), x.size(3)); };
  const std::optional<Tensor> out = y ? std::make_optional(in_layout(*y, layout)) : std::nullopt;
  const Tensor gx = images(), g_residual = y ? images() : empty_vector(x, 0);
  const Tensor g_weight = empty_vector(x, x.size(1)), g_bias = empty_vector(x, x.size(1));
  for_type(x, "batch_norm_backward", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    Norm<T> norm{};
    norm.x = const_data<T>(in), norm.g = const_data<T>(grad), norm.y = pointer<T>(out);
    norm.weight = pointer<T>(w), norm.bias = pointer<T>(b), norm.mean = const_data<T>(m), norm.var = const_data<T>(v);
    norm.out = mutable_data<T>(gx), norm.g_residual = mutable_data<T>(g_residual);
    norm.g_weight = mutable_data<T>(g_weight), norm.g_bias = mutable_data<T>(g_bias);
    norm.eps = eps, norm.relu = relu;
    backward(Cut(x, layout), norm);
  });
  return {gx, g_residual, g_weight, g_bias};
}

}  // namespace grasp_sparse

STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CPU, m) {
  m.impl("batch_norm_train", TORCH_BOX(&grasp_sparse::batch_norm_train));
  m.impl("batch_norm_backward", TORCH_BOX(&grasp_sparse::batch_norm_backward));
}
