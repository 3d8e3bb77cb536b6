// The passes on activations stored in bfloat16.
#include "passes.cuh"

namespace grasp_sparse::cuda {
GRASP_SPARSE_PASSES(Bf16)
}  // namespace grasp_sparse::cuda
