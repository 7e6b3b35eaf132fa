// The row functions for x86 with AVX512.

#include "row_pass_table.h"

#ifdef DWRL_FAST_X86_VARIANTS
#define DWRL_FAST_AVX512
#include "instruction_set.h"
#include "row_pass_kernels.h"

namespace dwrl_fast {
RowPasses row_passes_avx512() { return avx512::row_passes(); }
}  // namespace dwrl_fast
#endif
