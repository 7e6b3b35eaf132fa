// Attention over a cache for x86 with AVX512.

#include "cache_attention.h"

#ifdef DWRL_FAST_X86_VARIANTS
#define DWRL_FAST_AVX512
#include "instruction_set.h"
#include "cache_attention_kernels.h"

namespace dwrl_fast {
CachePasses cache_passes_avx512() { return avx512::cache_passes(); }
}  // namespace dwrl_fast
#endif
