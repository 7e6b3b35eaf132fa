// Tree attention for x86 with AVX512. What is not at::vec is included before the pragma, so that no shared inline function needs AVX512.

#include "tree_attention.h"

#ifdef DWRL_FAST_X86_VARIANTS
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
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
#ifndef __AVX512F__
#define __AVX512F__ 1
#endif
#ifndef __AVX512BW__
#define __AVX512BW__ 1
#endif
#ifndef __AVX512VL__
#define __AVX512VL__ 1
#endif
#ifndef __AVX512DQ__
#define __AVX512DQ__ 1
#endif
// GCC 12 takes the undefined upper halves in its own intrinsics for a mistake.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#define ROW_PASS_NAMESPACE avx512
#include "tree_attention_kernels.h"

namespace dwrl_fast {
AttentionPasses attention_passes_avx512() { return avx512::attention_passes(); }
}  // namespace dwrl_fast
#endif
