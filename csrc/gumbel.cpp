// `gumbel_pick`: a draw from a softmax for each row of log-probabilities. The noise depends only on the row's key, its position and the
// token. Equals `gumbel_pick` in dwrl_fast/ops/oracle.py.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace dwrl_fast {
namespace {

using at::Tensor;

// Philox 4x32 with 10 rounds (Salmon et al., 2011), with the counters of `tl.randint4x`.
std::array<uint32_t, 4> philox(uint64_t key, uint32_t low, uint32_t high) {
  std::array<uint32_t, 4> c{low, high, 0, 0};
  auto k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
    c = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<uint32_t>(b), static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1,
         static_cast<uint32_t>(a)};
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return c;
}

// -log of an exponential variate. The token with the largest sum of this and its log-probability is drawn.
float gumbel(uint32_t bits) {
  constexpr float kUnit = 0x1p-32f;
  const float w = std::min(static_cast<float>(bits) * kUnit + kUnit / 2, 1 - 0x1p-24f);
  return -std::log(-std::log1p(-w));
}

int64_t pick(const float* logprob, int64_t count, uint64_t key, uint32_t position) {
  constexpr float kLog2 = 0.693147181f;
  float best = -std::numeric_limits<float>::infinity();
  int64_t chosen = 0;
  for (int64_t start = 0; start < count; start += 4) {
    const auto bits = philox(key, static_cast<uint32_t>(start / 4), position);
    for (int64_t i = start; i < std::min(start + 4, count); ++i) {
      if (std::isnan(logprob[i])) return i;  // like argmax; the caller raises an error
      // This is an upper bound of -log(w), which is above -log(-log1p(-w)): most tokens need no logarithm.
      const float most = kLog2 * (static_cast<float>(std::countl_zero(bits[i - start])) + 1.001f);
      if (logprob[i] + most <= best) continue;
      const float value = logprob[i] + gumbel(bits[i - start]);
      if (value > best) best = value, chosen = i;
    }
  }
  return chosen;
}

Tensor gumbel_pick(const Tensor& logprob, const Tensor& keys, const Tensor& positions) {
  TORCH_CHECK(logprob.dim() == 2 && logprob.scalar_type() == at::kFloat && logprob.size(1) > 0, "logprob: float32 [R, V]");
  for (const Tensor* x : {&keys, &positions})
    TORCH_CHECK(x->dim() == 1 && x->scalar_type() == at::kLong && x->size(0) == logprob.size(0), "keys, positions: int64 [R]");
  const Tensor rows = logprob.contiguous(), own = keys.contiguous(), places = positions.contiguous();
  Tensor found = at::empty_like(own);
  const auto* read = rows.const_data_ptr<float>();
  const auto* key = own.const_data_ptr<int64_t>();
  const auto* position = places.const_data_ptr<int64_t>();
  auto* out = found.mutable_data_ptr<int64_t>();
  const int64_t count = rows.size(1);
  at::parallel_for(0, rows.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      out[r] = pick(read + r * count, count, static_cast<uint64_t>(key[r]), static_cast<uint32_t>(position[r]));
    }
  });
  return found;
}

TORCH_LIBRARY_FRAGMENT(dwrl_fast, m) {
  m.def("gumbel_pick(Tensor logprob, Tensor keys, Tensor positions) -> Tensor", {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(dwrl_fast, CPU, m) { m.impl("gumbel_pick", gumbel_pick); }

}  // namespace
}  // namespace dwrl_fast
