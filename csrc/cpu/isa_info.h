// What introspection may ask about the CPU bodies; free of torch and of the kernels' types.
#pragma once

#include <string>
#include <vector>

namespace grasp_sparse {

std::vector<std::string> compiled_isas();  // best first
std::vector<std::string> runnable_isas();  // those this CPU has, best first
std::string active_isa_name();             // throws std::invalid_argument when GRASP_SPARSE_ISA cannot be met

}  // namespace grasp_sparse
