// Tree attention for x86 with AVX2.

#include "tree_attention.h"

#ifdef DWRL_FAST_X86_VARIANTS
#include "instruction_set.h"
#include "tree_attention_kernels.h"

namespace dwrl_fast {
AttentionPasses attention_passes_avx2() { return avx2::attention_passes(); }
}  // namespace dwrl_fast
#endif
