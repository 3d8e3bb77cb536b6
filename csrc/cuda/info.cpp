// Introspection for Python: importing this module registers the operators for CUDA. No torch header here, as in csrc/info.cpp.
#undef TORCH_TARGET_VERSION  // the pybind11 of torch 2.11 refuses it, as if it were one of torch's own headers
#include <pybind11/pybind11.h>

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "Compiled CUDA kernels of grasp_sparse; the operators register themselves as torch.ops.grasp_sparse.*";
  m.def("targets", [] { return GRASP_SPARSE_CUDA_TARGETS; }, "GPU architectures compiled for, such as \"sm_80 sm_90\".");
}
