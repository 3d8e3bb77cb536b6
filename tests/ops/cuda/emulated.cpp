// The kernels of one storage type for the emulator; EMULATED_TYPE is it.
#include "passes.cuh"

namespace grasp_sparse::cuda {

GRASP_SPARSE_PASSES(EMULATED_TYPE)

}  // namespace grasp_sparse::cuda
