// Attention over a tree of tokens in depth-first order, where every token attends to its path and to itself.
//
// U tokens, Hq query and Hkv key heads, G = Hq / Hkv, D values per head. In depth-first order the visibility test is two comparisons:
// the token at t attends to the key at j if j <= t < end[j], the end of the subtree of j's node. A window also requires
// position[t] - position[j] < window, with positions along the path.

#pragma once

#include "row_pass_table.h"

#include <cstdlib>
#include <memory>

namespace dwrl_fast {

// Consecutive whole trees, which one thread computes for one key head. The division, and so the order of all sums, depends only on the
// tree.
struct Segment {
  int64_t begin, end;

  int64_t size() const { return end - begin; }
};

struct Tree {
  std::vector<int64_t> end, position;  // [U]
  std::vector<Segment> segments;
};

// [U, heads, D] with a dense last dimension.
template <typename scalar_t>
struct Heads {
  scalar_t* data;
  int64_t token_stride, head_stride;

  scalar_t* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

template <typename scalar_t, typename real_t>
struct Attention {
  const Tree& tree;
  int64_t group, dim;  // G, D
  real_t scale, cap;   // cap 0: none
  int64_t window;      // 0: none
  Heads<const scalar_t> q, k, v;
  Heads<scalar_t> out;  // written by the forward pass, read by the backward pass
  Heads<real_t> lse;    // D = 1
  Heads<const scalar_t> d_out;
  Heads<scalar_t> d_q, d_k, d_v;
};

// A worker computes key head `head` of segment `segment`, one after another, in reused buffers.
using Work = std::function<void(int64_t head, int64_t segment)>;

template <typename scalar_t, typename real_t>
struct AttentionPass {
  Work (*forward)(const Attention<scalar_t, real_t>&);
  Work (*backward)(const Attention<scalar_t, real_t>&);
};

using AttentionPasses = Passes<AttentionPass>;

AttentionPasses attention_passes_avx512();
AttentionPasses attention_passes_avx2();

}  // namespace dwrl_fast
