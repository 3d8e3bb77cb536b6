// batch_norm_train, batch_norm_backward: normalisation by the statistics of the batch, with residual add and ReLU;
// batch_norm_eval: by given ones; and batch_norm_follow_, the running statistics.
//
// In channels_last all channels pass by together: one pass for the sums, a second one for the result, which walks back
// from where the first ended, since that is what the cache still holds. In NCHW and CHWN every channel is on its own, and
// its second pass finds it in the cache. How the work is cut depends on shapes only, so any number of threads gives the
// same bits.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "batch_norm.h"
#include "isa.h"
#include "norm_cut.h"
#include "parallel.h"
#include "scratch.h"

namespace grasp_sparse {

namespace {

constexpr int64_t kParts = 32;             // of the sums in channels_last
constexpr int64_t kPartBytes = 256 << 10;  // at least, of x
constexpr int64_t kStepBytes = 256 << 10;  // of x, in one call of a loop of the second pass

// The loops want what is of a channel once per column.
template <class T>
using Columns = NormCoefficients<T>;

template <class T>
Columns<T> reserve_columns(AlignedBuffer& buffer, int64_t cols) {
  return Columns<T>::in(buffer.reserve<T>(Columns<T>::kCount * cols), cols);
}

float value_of(Bf16 element) {
  const uint32_t bits = static_cast<uint32_t>(element.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
float value_of(float element) { return element; }
double value_of(double element) { return element; }

// The tensors of one call; null where absent. S: how images are stored; what is per channel is of what they are computed as.
template <class S>
struct Norm {
  using T = Compute<S>;
  const S *x, *g, *residual, *y;
  const T *weight, *bias, *mean, *var;
  S *out, *g_residual;
  T *mean_out, *var_out, *g_weight, *g_bias;
  NormCoefficients<T> coefficients;  // of channels, to be written instead of the gradient of x; or nulls
  double eps;
  bool relu;

  double inverse_deviation(int64_t c) const { return 1 / std::sqrt(static_cast<double>(var[c]) + eps); }
  T scale(int64_t c) const { return static_cast<T>((weight ? weight[c] : 1) * inverse_deviation(c)); }
  T shift(int64_t c) const { return bias ? bias[c] : T(0); }
};

template <class S>
NormArgs<S> on_sheet(const Norm<S>& norm, const Columns<Compute<S>>& columns, const Sheet& sheet) {
  NormArgs<S> args{columns.read()};
  args.rows = sheet.rows, args.cols = sheet.cols, args.stride = sheet.stride;
  args.x = norm.x + sheet.offset;
  return args;
}

// Whether the whole is large and every row of this sheet starts on a cache line.
template <class S>
bool may_stream(const S* out, const Cut& cut, const Sheet& sheet) {
  const int64_t bytes = cut.channels * cut.per_channel * cut.element_bytes;
  const auto aligned = [](int64_t elements) { return elements * sizeof(S) % kSliceBytes == 0; };
  return bytes > kStreamBytes && reinterpret_cast<uintptr_t>(out + sheet.offset) % kSliceBytes == 0 && aligned(sheet.stride);
}

// One channel's two sums.
struct Sums {
  double first = 0, second = 0;

  // Of `count` columns, `step` apart, of totals[2][cols].
  Sums(const double* totals, int64_t cols, int64_t from, int64_t count, int64_t step) {
    for (int64_t i = 0; i < count; ++i) first += totals[from + i * step], second += totals[cols + from + i * step];
  }
};

template <class T, class Prepare, class Pass, class Finish, class Write>
void channels_apart(const Cut& cut, const Prepare& prepare, const Pass& pass, const Finish& finish, const Write& write) {
  share_tasks(ceil_div(cut.channels, cut.group), [&](auto&& next) {
    const Columns<T> columns = reserve_columns<T>(TaskScratch::mine().packed, cut.cols);
    double* totals = TaskScratch::mine().packed_g.reserve<double>(2 * cut.cols);
    const auto spread = [&](int64_t at) { columns.each([&](T* of) { std::fill_n(of + at, cut.width, of[at]); }); };
    for (int64_t group; (group = next()) >= 0;) {
      const int64_t first = group * cut.group, count = std::min(cut.group, cut.channels - first);
      std::fill_n(totals, 2 * cut.cols, 0.0);
      for (int64_t c = 0; c < count; ++c) {
        prepare(first + c, columns, c * cut.width);
        spread(c * cut.width);
      }
      if constexpr (!std::is_null_pointer_v<Pass>) {
        cut.channels_apart(first, count, [&](const Sheet& sheet) { pass(columns, sheet, totals); });
        for (int64_t c = 0; c < count; ++c) {
          finish(first + c, Sums(totals, cut.cols, c * cut.width, cut.width, 1), columns, c * cut.width);
          spread(c * cut.width);
        }
      }
      if constexpr (!std::is_null_pointer_v<Write>) cut.channels_apart(first, count, [&](const Sheet& sheet) { write(columns, sheet); });
    }
  });
}

template <class T, class Prepare, class Pass, class Finish, class Write>
void channels_together(const Cut& cut, const Prepare& prepare, const Pass& pass, const Finish& finish, const Write& write) {
  const Columns<T> columns = reserve_columns<T>(CallScratch::mine().values, cut.cols);
  const auto spread = [&] {
    columns.each([&](T* of) {
      for (int64_t col = cut.channels; col < cut.cols; ++col) of[col] = of[col - cut.channels];
    });
  };
  const int64_t rows = cut.rows(), row_bytes = cut.cols * cut.element_bytes;
  for (int64_t c = 0; c < cut.channels; ++c) prepare(c, columns, c);
  spread();
  if constexpr (!std::is_null_pointer_v<Pass>) {
    const int64_t wanted = std::clamp<int64_t>(rows * row_bytes / kPartBytes, 1, kParts);
    const int64_t part_rows = std::max<int64_t>(1, ceil_div(rows, wanted)), parts = std::max<int64_t>(1, ceil_div(rows, part_rows));
    double* totals = CallScratch::mine().sums.reserve<double>(parts * 2 * cut.cols);
    share_tasks(parts, [&](auto&& next) {
      for (int64_t part; (part = next()) >= 0;) {
        double* mine = totals + part * 2 * cut.cols;
        std::fill_n(mine, 2 * cut.cols, 0.0);
        cut.rows_together(part * part_rows, std::min(rows, (part + 1) * part_rows),
                          [&](const Sheet& sheet) { pass(columns, sheet, mine); });
      }
    });
    for (int64_t part = 1; part < parts; ++part)
      for (int64_t i = 0; i < 2 * cut.cols; ++i) totals[i] += totals[part * 2 * cut.cols + i];
    for (int64_t c = 0; c < cut.channels; ++c) finish(c, Sums(totals, cut.cols, c, cut.width, cut.channels), columns, c);
    spread();
  }
  if constexpr (!std::is_null_pointer_v<Write>) {
    const int64_t step = std::max<int64_t>(1, kStepBytes / row_bytes), steps = std::max<int64_t>(1, ceil_div(rows, step));
    constexpr bool kBackwards = true;  // what the first pass read last may still be in cache
    share_tasks<kBackwards>(steps, [&](auto&& next) {
      for (int64_t i; (i = next()) >= 0;)
        cut.rows_together(i * step, std::min(rows, (i + 1) * step), [&](const Sheet& sheet) { write(columns, sheet); });
    });
  }
}

// Runs one operation: `prepare` sets the first column of a channel for the sums, `pass` adds to the sums of a sheet,
// `finish` turns a channel's sums into its results and its first column for the second pass, which `write` runs on a sheet.
// Where `pass` is null, `prepare` sets the column for the second pass, and that is all; where `write` is, there is none.
template <class T, class Prepare, class Pass, class Finish, class Write>
void two_passes(const Cut& cut, const Prepare& prepare, const Pass& pass, const Finish& finish, const Write& write) {
  if (cut.together)
    channels_together<T>(cut, prepare, pass, finish, write);
  else
    channels_apart<T>(cut, prepare, pass, finish, write);
}

// The first column of a channel, for the second pass forward.
template <class S>
void set_normalised(const Norm<S>& norm, int64_t c, const Columns<Compute<S>>& columns, int64_t col) {
  columns.mean[col] = norm.mean[c], columns.scale[col] = norm.scale(c), columns.bias[col] = norm.shift(c);
}

template <class S>
void apply_on_sheet(const Cut& cut, const Norm<S>& norm, const Columns<Compute<S>>& columns, const Sheet& sheet) {
  NormArgs<S> args = on_sheet(norm, columns, sheet);
  args.residual = norm.residual ? norm.residual + sheet.offset : nullptr;
  args.out = norm.out + sheet.offset;
  args.relu = norm.relu, args.stream = may_stream(norm.out, cut, sheet);
  kernels<S>().norm.apply(args);
}

template <class S>
void forward(const Cut& cut, const Norm<S>& norm) {
  using T = Compute<S>;
  const auto pivot = [&](int64_t c, const Columns<T>& columns, int64_t col) {
    columns.mean[col] = value_of(norm.x[cut.together ? c : c * cut.channel_stride]);
  };
  const auto moments = [&](const Columns<T>& columns, const Sheet& sheet, double* totals) {
    NormArgs<S> args = on_sheet(norm, columns, sheet);
    args.first = totals, args.second = totals + cut.cols;
    kernels<S>().norm.moments(args);
  };
  const auto finish = [&](int64_t c, const Sums& sums, const Columns<T>& columns, int64_t col) {
    const double n = static_cast<double>(cut.per_channel), shift = sums.first / n;
    const double var = sums.second / n - shift * shift;
    norm.mean_out[c] = static_cast<T>(columns.mean[col] + shift);
    norm.var_out[c] = static_cast<T>(var < 0 ? 0 : var);
    set_normalised(norm, c, columns, col);
  };
  const auto apply = [&](const Columns<T>& columns, const Sheet& sheet) { apply_on_sheet(cut, norm, columns, sheet); };
  two_passes<T>(cut, pivot, moments, finish, apply);
}

template <class S>
void forward_by_given(const Cut& cut, const Norm<S>& norm) {
  using T = Compute<S>;
  const auto given = [&](int64_t c, const Columns<T>& columns, int64_t col) { set_normalised(norm, c, columns, col); };
  const auto apply = [&](const Columns<T>& columns, const Sheet& sheet) { apply_on_sheet(cut, norm, columns, sheet); };
  two_passes<T>(cut, given, nullptr, nullptr, apply);
}

template <class S>
void backward(const Cut& cut, const Norm<S>& norm) {
  using T = Compute<S>;
  const bool mask_from_x = norm.relu && norm.y == nullptr;
  const auto normalised = [&](int64_t c, const Columns<T>& columns, int64_t col) { set_normalised(norm, c, columns, col); };
  const auto reduce = [&](const Columns<T>& columns, const Sheet& sheet, double* totals) {
    NormArgs<S> args = on_sheet(norm, columns, sheet);
    args.g = norm.g + sheet.offset;
    args.y = norm.y ? norm.y + sheet.offset : nullptr;
    args.out = norm.y ? norm.g_residual + sheet.offset : nullptr;
    args.relu = mask_from_x, args.stream = norm.y && may_stream(norm.g_residual, cut, sheet);
    args.first = totals, args.second = totals + cut.cols;
    kernels<S>().norm.sums(args);
  };
  const auto finish = [&](int64_t c, const Sums& sums, const Columns<T>& columns, int64_t col) {
    const double n = static_cast<double>(cut.per_channel), inverse = norm.inverse_deviation(c), scale = norm.scale(c);
    norm.g_bias[c] = static_cast<T>(sums.first), norm.g_weight[c] = static_cast<T>(sums.second * inverse);
    columns.offset[col] = static_cast<T>(scale * sums.first / n);
    columns.slope[col] = static_cast<T>(scale * sums.second * inverse * inverse / n);
    if (norm.coefficients.mean) norm.coefficients.from(c).put(columns.from(col));
  };
  if (norm.coefficients.mean) return two_passes<T>(cut, normalised, reduce, finish, nullptr);
  const auto input_grad = [&](const Columns<T>& columns, const Sheet& sheet) {
    NormArgs<S> args = on_sheet(norm, columns, sheet);
    args.g = (norm.y ? norm.g_residual : norm.g) + sheet.offset;
    args.out = norm.out + sheet.offset;
    args.relu = mask_from_x, args.stream = may_stream(norm.out, cut, sheet);
    kernels<S>().norm.input_grad(args);
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
  check_type(*t, compute_type(x), name);
  STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == x.size(1), "Expected ", name, " of ", x.size(1), " entries, got ",
                  t->numel(), ".");
  return dense(*t);
}

template <class T>
const T* pointer(const std::optional<Tensor>& t) {
  return t ? const_data<T>(*t) : nullptr;
}

// By `mean` and `var` if they are `given`, else by those of x, which are written there.
Tensor normalise(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                 const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, bool given, double eps, bool relu) {
  if (residual) check_like(*residual, x, "residual");
  const std::optional<Tensor> w = per_channel(weight, x, "weight"), b = per_channel(bias, x, "bias");
  const Layout layout = layout_of(x);
  const Tensor in = in_layout(x, layout), y = empty_images(x, layout, x.size(1), x.size(2), x.size(3));
  const std::optional<Tensor> r = residual ? std::make_optional(in_layout(*residual, layout)) : std::nullopt;
  for_storage(x, "batch norm", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    Norm<S> norm{};
    norm.x = const_data<S>(in), norm.residual = pointer<S>(r), norm.weight = pointer<T>(w), norm.bias = pointer<T>(b);
    norm.out = mutable_data<S>(y), norm.mean = const_data<T>(mean), norm.var = const_data<T>(var);
    norm.eps = eps, norm.relu = relu;
    const Cut cut(x, layout);
    if (given) return forward_by_given(cut, norm);
    norm.mean_out = mutable_data<T>(mean), norm.var_out = mutable_data<T>(var);
    forward(cut, norm);
  });
  return y;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> batch_norm_train(const Tensor& x, const std::optional<Tensor>& residual,
                                                    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                                    double eps, bool relu) {
  check_images(x);
  const Tensor mean = empty_sums(x, {x.size(1)}), var = empty_sums(x, {x.size(1)});
  return {normalise(x, residual, weight, bias, mean, var, false, eps, relu), mean, var};
}

Tensor batch_norm_eval(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool relu) {
  check_images(x);
  return normalise_given(x, residual, weight, bias, *per_channel(mean, x, "mean"), *per_channel(var, x, "var"), eps, relu);
}

Tensor normalise_given(const Tensor& x, const std::optional<Tensor>& residual, const std::optional<Tensor>& weight,
                       const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool relu) {
  return normalise(x, residual, weight, bias, mean, var, true, eps, relu);
}

NormGradients norm_gradients(const Tensor& g, const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& weight,
                             const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool relu,
                             bool input_grad) {
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
  const Tensor none = empty_strided(x, {0}, {1}), gx = input_grad ? images() : none, g_residual = y ? images() : none;
  const Tensor g_weight = empty_sums(x, {x.size(1)}), g_bias = empty_sums(x, {x.size(1)});
  const void* coefficients = nullptr;
  for_storage(x, "batch_norm_backward", [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    using T = Compute<S>;
    Norm<S> norm{};
    norm.x = const_data<S>(in), norm.g = const_data<S>(grad), norm.y = pointer<S>(out);
    norm.weight = pointer<T>(w), norm.bias = pointer<T>(b), norm.mean = const_data<T>(m), norm.var = const_data<T>(v);
    norm.out = mutable_data<S>(gx), norm.g_residual = mutable_data<S>(g_residual);
    norm.g_weight = mutable_data<T>(g_weight), norm.g_bias = mutable_data<T>(g_bias);
    norm.eps = eps, norm.relu = relu;
    if (!input_grad) norm.coefficients = reserve_columns<T>(CallScratch::mine().moments, x.size(1));
    coefficients = norm.coefficients.mean;
    backward(Cut(x, layout), norm);
  });
  return {gx, g_residual, g_weight, g_bias, y ? g_residual : grad, in, coefficients, relu && !y};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> batch_norm_backward(
    const Tensor& g, const Tensor& x, const std::optional<Tensor>& y, const std::optional<Tensor>& weight,
    const std::optional<Tensor>& bias, const Tensor& mean, const Tensor& var, double eps, bool relu) {
  const NormGradients gradients = norm_gradients(g, x, y, weight, bias, mean, var, eps, relu, true);
  return {gradients.x, gradients.residual, gradients.weight, gradients.bias};
}

void batch_norm_follow_(const Tensor& running_mean, const Tensor& running_var, const Tensor& mean, const Tensor& var,
                        double momentum, int64_t count) {
  for (const Tensor* t : {&running_mean, &running_var, &mean, &var})
    STD_TORCH_CHECK(t->is_cpu() && t->scalar_type() == mean.scalar_type() && t->dim() == 1 && t->size(0) == mean.size(0) && t->is_contiguous(),
                    "Expected running_mean, running_var, mean and var as contiguous vectors of one size and dtype on the CPU.");
  STD_TORCH_CHECK(count > 1, "Expected more than one value per channel, got ", count, ".");
  for_type(mean, "batch_norm_follow_", [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T keep = static_cast<T>(1 - momentum), mean_share = static_cast<T>(momentum);
    const T var_share = static_cast<T>(momentum * static_cast<double>(count) / static_cast<double>(count - 1));
    const T *m = const_data<T>(mean), *v = const_data<T>(var);
    T *running_m = mutable_data<T>(running_mean), *running_v = mutable_data<T>(running_var);
    for (int64_t c = 0; c < mean.size(0); ++c)
      running_m[c] = keep * running_m[c] + mean_share * m[c], running_v[c] = keep * running_v[c] + var_share * v[c];
  });
}

}  // namespace grasp_sparse

STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CPU, m) {
  m.impl("batch_norm_train", TORCH_BOX(&grasp_sparse::batch_norm_train));
  m.impl("batch_norm_eval", TORCH_BOX(&grasp_sparse::batch_norm_eval));
  m.impl("batch_norm_backward", TORCH_BOX(&grasp_sparse::batch_norm_backward));
  m.impl("batch_norm_follow_", TORCH_BOX(&grasp_sparse::batch_norm_follow_));
}
