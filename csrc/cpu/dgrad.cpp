// dx = convᵀ(g, W): pack a band of g, walk the transposed list of every input channel over it.
#include "transposed.h"

namespace grasp_sparse {

template <class S>
void image_dgrad(const CsrView& csr, const Compute<S>* values, const Image<const S>& g, const Window& window, const Image<S>& dx) {
  using T = Compute<S>;
  constexpr int64_t L = kLanes<T>;
  if (dx.n == 0 || dx.c == 0 || dx.h == 0 || dx.w == 0) return;
  if (is_pointwise(window)) return image_product<S>(by_column(csr), values, static_cast<const T*>(nullptr), g, window, dx, false);
  TransposedProduct<S> product(window, dx, g.c);
  const int64_t slices = ceil_div(dx.n, L), places = product.h().count();
  product.limit_band(std::max<int64_t>(window.h.halo() ? 4 : 1, ceil_div(places, ceil_div(num_threads(), slices))));
  product.build(csr, values);

  const int64_t bands = product.bands(), parts = std::clamp<int64_t>(ceil_div(num_threads(), slices * bands), 1, dx.c);
  const std::vector<int> cut = product.cut(parts);
  share_tasks(slices * bands * parts, [&](auto&& next) {
    T* buffer = TaskScratch::mine().packed_g.template reserve<T>(product.size());
    const T* packed = nullptr;
    int64_t band_held = -1;
    MovingBand::Held held;
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t part = task % parts, band = task / parts, slice = band / bands;
      const int64_t place = product.h().first + band % bands * product.rows();
      if (band != band_held) packed = product.band(g, slice, place, buffer, held);
      band_held = band;
      product.run(packed, slice, place, cut[part], cut[part + 1], Ahead{});
    }
  }, parts);
}

template void image_dgrad<float>(const CsrView&, const float*, const Image<const float>&, const Window&, const Image<float>&);
template void image_dgrad<double>(const CsrView&, const double*, const Image<const double>&, const Window&, const Image<double>&);
template void image_dgrad<Bf16>(const CsrView&, const float*, const Image<const Bf16>&, const Window&, const Image<Bf16>&);

}  // namespace grasp_sparse
