// The passes on activations stored in float32.
#include "passes.cuh"

namespace grasp_sparse::cuda {
GRASP_SPARSE_PASSES(float)
}  // namespace grasp_sparse::cuda
