// The entry points of the row functions for each dtype, and the instruction sets that they are compiled for.

#pragma once

#include "row_pass.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>
#include <c10/util/complex.h>
#include <c10/util/irange.h>

#include <algorithm>
#include <array>
#include <bitset>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define DWRL_FAST_X86_VARIANTS
#endif

namespace dwrl_fast {

// Entry points by the dtype of the elements and by the dtype of sums.
template <template <typename scalar_t, typename real_t> class Pass>
struct Passes {
  Pass<float, float> float32;
  Pass<double, double> float64;
  Pass<c10::BFloat16, float> bfloat16;
};

using RowPasses = Passes<RowPass>;

RowPasses row_passes_avx512();
RowPasses row_passes_avx2();

}  // namespace dwrl_fast
