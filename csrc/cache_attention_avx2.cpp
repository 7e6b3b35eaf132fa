// Attention over a cache for x86 with AVX2.

#include "cache_attention.h"

#ifdef DWRL_FAST_X86_VARIANTS
#include "instruction_set.h"
#include "cache_attention_kernels.h"

namespace dwrl_fast {
CachePasses cache_passes_avx2() { return avx2::cache_passes(); }
}  // namespace dwrl_fast
#endif
