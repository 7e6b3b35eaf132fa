// Attention of new tokens to keys and values in a cache of blocks. A block is written once and read by every text that begins with it.
//
// Q new tokens, Hq query and Hkv key heads, G = Hq / Hkv, D values per head. A block holds kKeys consecutive tokens of a text: its keys
// [Hkv, D, kKeys], transposed, and its values [Hkv, kKeys, Dv], Dv >= D in whole vectors of every instruction set. A tile is what some
// consecutive new tokens see of a block; they see the keys at their own position in the text and before.

#pragma once

#include "tree_attention.h"

namespace dwrl_fast {

constexpr int64_t kBlockTokens = 64;

// A row of the operator's `tiles`: the first `count` tokens of `block`, the first of them at `position`, for queries [start, stop).
struct CacheTile {
  int64_t block, position, count, start, stop;
};

template <typename scalar_t, typename real_t>
struct CacheAttention {
  int64_t tokens, query_tokens;             // Q, and the tokens of a block of queries
  int64_t group, dim, value_stride, heads;  // G, D, Dv, Hkv
  real_t scale, cap;                        // cap 0: none
  int64_t window;                           // 0: none
  Heads<const scalar_t> q, k, v;
  Heads<scalar_t> out;
  scalar_t *keys, *values;
  const int64_t *position, *slot;  // [Q]; a slot is block * kBlockTokens + offset, or -1: the token is not stored
  const CacheTile* tiles;
  const std::vector<std::vector<int64_t>>& seen;  // for each block of queries, the tiles that any of its queries sees, in order

  scalar_t* keys_of(int64_t block, int64_t head) const { return keys + (block * heads + head) * dim * kBlockTokens; }
  scalar_t* values_of(int64_t block, int64_t head) const { return values + (block * heads + head) * kBlockTokens * value_stride; }
};

// A worker stores new tokens, then computes blocks of queries, one key head at a time, in its own buffers.
struct CacheWork {
  Work keep, run;
};

template <typename scalar_t, typename real_t>
struct CachePass {
  CacheWork (*work)(const CacheAttention<scalar_t, real_t>&);
};

using CachePasses = Passes<CachePass>;

CachePasses cache_passes_avx512();
CachePasses cache_passes_avx2();

}  // namespace dwrl_fast
