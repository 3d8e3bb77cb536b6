// Chooses, once, which compiled body of the kernels runs on this machine.
#include "isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "isa_info.h"

namespace grasp_sparse {

// Of kernels.cpp. Whatever is compiled for an instruction set runs only where the machine has it.
#define GRASP_SPARSE_BODY(isa)                                                         \
  namespace isa {                                                                      \
  template <class S>                                                                   \
  const Kernels<S>& table();                                                           \
  const IsaBody* body() {                                                              \
    static const IsaBody all = {#isa, table<float>(), table<double>(), table<Bf16>()}; \
    return &all;                                                                       \
  }                                                                                    \
  }
GRASP_SPARSE_BODY(scalar)
#ifdef GRASP_SPARSE_X86
GRASP_SPARSE_BODY(avx2)
GRASP_SPARSE_BODY(avx512)
#endif

namespace {

const IsaBody* find(const std::string& name) {
#ifdef GRASP_SPARSE_X86
  __builtin_cpu_init();
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return avx512::body();
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2::body();
#endif
  if (name == "scalar") return scalar::body();
  return nullptr;
}

const IsaBody& choose() {
  const char* forced = std::getenv("GRASP_SPARSE_ISA");
  if (forced != nullptr && *forced != '\0') {
    if (const IsaBody* body = find(forced)) return *body;
    std::string names;
    for (const std::string& name : runnable_isas()) names += (names.empty() ? "" : ", ") + name;
    throw std::runtime_error("GRASP_SPARSE_ISA: Expected one of " + names + " on this machine, got '" + forced +
                             "'; unset it to take the best.");
  }
  return *find(runnable_isas().front());
}

}  // namespace

const IsaBody& active_isa() {
  static const IsaBody& body = choose();
  return body;
}

std::vector<std::string> compiled_isas() {
#ifdef GRASP_SPARSE_X86
  return {"avx512", "avx2", "scalar"};
#else
  return {"scalar"};
#endif
}

std::vector<std::string> runnable_isas() {
  std::vector<std::string> names;
  for (const std::string& name : compiled_isas())
    if (find(name) != nullptr) names.push_back(name);
  return names;
}

std::string active_isa_name() { return active_isa().name; }

}  // namespace grasp_sparse
