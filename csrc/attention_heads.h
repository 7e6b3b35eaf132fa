// What the attention operators share: the memory layout of heads, and the division of work among threads.

#pragma once

#include "tree_attention.h"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <atomic>

namespace dwrl_fast {

// Rows of a head must be dense; other strides are arbitrary.
inline at::Tensor dense_rows(const at::Tensor& x) { return x.stride(2) == 1 || x.size(2) == 1 ? x : x.contiguous(); }

template <typename scalar_t>
Heads<const scalar_t> read_heads(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1)};
}

template <typename scalar_t>
Heads<scalar_t> write_heads(const at::Tensor& x) {
  return {x.mutable_data_ptr<scalar_t>(), x.stride(0), x.stride(1)};
}

// `heads` x `count` pieces, in order, each by any free thread: nothing is summed across pieces.
template <typename Make>
void share(int64_t heads, int64_t count, Make make) {
  std::atomic<int64_t> next{0};
  at::parallel_for(0, std::min<int64_t>(heads * count, at::get_num_threads()), 1, [&](int64_t, int64_t) {
    const Work work = make();
    for (int64_t i = next++; i < heads * count; i = next++) work(i % heads, i / heads);
  });
}

}  // namespace dwrl_fast
