// The row functions for x86 with AVX2.

#include "row_pass_table.h"

#ifdef DWRL_FAST_X86_VARIANTS
#include "instruction_set.h"
#include "row_pass_kernels.h"

namespace dwrl_fast {
RowPasses row_passes_avx2() { return avx2::row_passes(); }
}  // namespace dwrl_fast
#endif
