// Which operations the kernels are registered for: the package's own on CUDA, or those of the tests, run by the emulator.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(GRASP_SPARSE_EMULATED)
#define GRASP_SPARSE_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(grasp_sparse_emulated, CPU, m)
#else
#define GRASP_SPARSE_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(grasp_sparse, CUDA, m)
#endif
