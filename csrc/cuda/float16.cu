// The passes on activations stored in float16.
#include "passes.cuh"

namespace grasp_sparse::cuda {
GRASP_SPARSE_PASSES(Fp16)
}  // namespace grasp_sparse::cuda
