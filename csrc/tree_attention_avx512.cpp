// Tree attention for x86 with AVX512.

#include "tree_attention.h"

#ifdef DWRL_FAST_X86_VARIANTS
#define DWRL_FAST_AVX512
#include "instruction_set.h"
#include "tree_attention_kernels.h"

namespace dwrl_fast {
AttentionPasses attention_passes_avx512() { return avx512::attention_passes(); }
}  // namespace dwrl_fast
#endif
