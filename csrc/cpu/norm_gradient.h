// The gradient of what a batch norm is given, in one place: of vectors of columns (norm.h), or of one number (pack.h).
#pragma once

#include "vec.h"

namespace grasp_sparse {
namespace GRASP_SPARSE_ISA {

// g: that of what the norm gave, before its ReLU if there is one; d: x - mean.
template <bool Relu, class V>
GRASP_SPARSE_INLINE V input_grad_of(V g, V d, V scale, V bias, V offset, V slope) {
  if constexpr (Relu) g = positive(d * scale + bias, g);
  return g * scale - offset - d * slope;
}

}  // namespace GRASP_SPARSE_ISA
}  // namespace grasp_sparse
