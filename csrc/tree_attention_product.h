// Small matrix products in at::vec, for operands that fit into the caches. Included once for each instruction set, inside its namespace.

#pragma once

#include "row_pass_kernels.h"

namespace dwrl_fast::ROW_PASS_NAMESPACE {

// An operand whose elements are broadcast: either stride may be 1, so a transpose costs nothing.
template <typename real_t>
struct Left {
  const real_t* data;
  int64_t row_stride, column_stride;
};

// A matrix with dense rows.
template <typename real_t>
struct Dense {
  real_t* data;
  int64_t stride;
};

#ifdef CPU_CAPABILITY_AVX512
constexpr int kVectors = 4, kRegisterRows = 6;  // 24 sums, 4 columns and a broadcast in 32 registers
#else
constexpr int kVectors = 2, kRegisterRows = 6;  // 12 sums in 16
#endif

// One block of C, held in registers: C = A B, or C += A B. The product is summed separately first, so that its error does not grow with C.
template <typename real_t, int rows, int vectors>
inline void product_block(Dense<real_t> c, Left<real_t> a, Dense<const real_t> b, int64_t depth, bool add) {
  constexpr int64_t width = Vec<real_t>::size();
  Vec<real_t> sum[rows][vectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) sum[r][i] = Vec<real_t>(0);
  for (int64_t k = 0; k < depth; ++k) {
    Vec<real_t> column[vectors];
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) column[i] = Vec<real_t>::loadu(b.data + k * b.stride + i * width);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const Vec<real_t> x(a.data[r * a.row_stride + k * a.column_stride]);
#pragma GCC unroll 8
      for (int i = 0; i < vectors; ++i) sum[r][i] = at::vec::fmadd(x, column[i], sum[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) {
      real_t* to = c.data + r * c.stride + i * width;
      (add ? sum[r][i] + Vec<real_t>::loadu(to) : sum[r][i]).store(to);
    }
}

// The last rows, fewer than a block.
template <typename real_t, int rows, int vectors>
inline void product_rest(int64_t m, Dense<real_t> c, Left<real_t> a, Dense<const real_t> b, int64_t depth, bool add) {
  if constexpr (rows > 0) {
    if (m == rows) return product_block<real_t, rows, vectors>(c, a, b, depth, add);
    product_rest<real_t, rows - 1, vectors>(m, c, a, b, depth, add);
  }
}

template <typename real_t, int vectors>
void product_columns(int64_t m, Dense<real_t> c, Left<real_t> a, Dense<const real_t> b, int64_t depth, bool add) {
  for (; m >= kRegisterRows; m -= kRegisterRows) {
    product_block<real_t, kRegisterRows, vectors>(c, a, b, depth, add);
    c.data += kRegisterRows * c.stride;
    a.data += kRegisterRows * a.row_stride;
  }
  product_rest<real_t, kRegisterRows - 1, vectors>(m, c, a, b, depth, add);
}

template <typename real_t, int vectors>
inline void product_some(
    int64_t some, int64_t m, Dense<real_t> c, Left<real_t> a, Dense<const real_t> b, int64_t depth, bool add) {
  if constexpr (vectors > 0) {
    if (some == vectors) return product_columns<real_t, vectors>(m, c, a, b, depth, add);
    product_some<real_t, vectors - 1>(some, m, c, a, b, depth, add);
  }
}

// C [m, n] = A [m, depth] B [depth, n], or C += A B. n is a multiple of the vector width.
template <typename real_t>
void product(int64_t m, int64_t n, int64_t depth, Dense<real_t> c, Left<real_t> a, Dense<const real_t> b, bool add) {
  constexpr int64_t width = Vec<real_t>::size();
  int64_t left = n / width;
  for (int64_t blocks = (left + kVectors - 1) / kVectors; blocks > 0; --blocks) {
    const int64_t some = (left + blocks - 1) / blocks;  // equal shares, so that there is no block of a single vector next to wide ones
    product_some<real_t, kVectors>(some, m, c, a, b, depth, add);
    c.data += some * width;
    b.data += some * width;
    left -= some;
  }
}

}  // namespace dwrl_fast::ROW_PASS_NAMESPACE
