// The passes on activations stored in float64.
#include "passes.cuh"

namespace grasp_sparse::cuda {
GRASP_SPARSE_PASSES(double)
}  // namespace grasp_sparse::cuda
