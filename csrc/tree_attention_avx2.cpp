// Tree attention for x86 with AVX2. What is not at::vec is included before the pragma, so that no shared inline function needs AVX2.

#include "tree_attention.h"

#ifdef DWRL_FAST_X86_VARIANTS
#pragma GCC target("avx2,fma,f16c")
// Before version 13, g++ does not define these on meeting the pragma, and at::vec goes by them.
#ifndef __AVX__
#define __AVX__ 1
#endif
#ifndef __AVX2__
#define __AVX2__ 1
#endif
#ifndef __FMA__
#define __FMA__ 1
#endif
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#define ROW_PASS_NAMESPACE avx2
#include "tree_attention_kernels.h"

namespace dwrl_fast {
AttentionPasses attention_passes_avx2() { return avx2::attention_passes(); }
}  // namespace dwrl_fast
#endif
