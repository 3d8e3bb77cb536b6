// Introspection for Python: what was built and which body runs. Importing this module loads the operators too.
// pybind11 comes with torch. No torch header here: torch's own pybind11 ones refuse TORCH_TARGET_VERSION.
#undef TORCH_TARGET_VERSION  // and so does, in torch 2.11, pybind11 itself
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/isa_info.h"

#if defined(__SANITIZE_ADDRESS__)
static constexpr char kSanitized[] = ", sanitized";
#else
static constexpr char kSanitized[] = "";
#endif

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of grasp_sparse; the operators register themselves as torch.ops.grasp_sparse.*";
  m.def("compiled_isas", &grasp_sparse::compiled_isas, "CPU instruction sets compiled in, best first.");
  m.def("runnable_isas", &grasp_sparse::runnable_isas, "Those this CPU can run, best first.");
  m.def("active_isa", &grasp_sparse::active_isa_name, "The one in use. ValueError if GRASP_SPARSE_ISA cannot be met.");
  m.def("compiler", [] { return std::string(__VERSION__) + kSanitized; }, "Version of the C++ compiler.");
}
