// Selects the entry points for a processor and a tensor: `f(pass, scalar, real)` of its dtype, called with values of the element's and of the sums' type.

#pragma once

#include "row_pass_table.h"

#include <ATen/ATen.h>
#include <ATen/Version.h>

namespace dwrl_fast {

// What the entry points are compiled for. Follows ATen's own choice, and so the environment's ATEN_CPU_CAPABILITY.
inline std::string instruction_set() {
#ifdef DWRL_FAST_X86_VARIANTS
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512" || capability == "AVX2") return capability;
#endif
  return "DEFAULT";
}

// `f(pass, scalar, real)` with the entry points of x's dtype, and with values of the element's and of the sums' type.
template <template <typename, typename> class Pass, typename F>
void dispatch(const Passes<Pass>& passes, const at::Tensor& x, const char* name, F f) {
  switch (x.scalar_type()) {
    case at::kFloat: return f(passes.float32, float(), float());
    case at::kDouble: return f(passes.float64, double(), double());
    case at::kBFloat16: return f(passes.bfloat16, c10::BFloat16(), float());
    default: TORCH_CHECK_TYPE(false, name, " must be float32, float64 or bfloat16, not ", x.scalar_type());
  }
}

}  // namespace dwrl_fast
