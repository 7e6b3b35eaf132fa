// Operator `cache_attention_`: its checks, the tiles that each query sees, and the division of work among threads.

#include "attention_heads.h"
#include "cache_attention.h"
#include "dispatch.h"

#include <torch/library.h>

#include <optional>

#define ROW_PASS_NAMESPACE baseline
#include "cache_attention_kernels.h"

namespace dwrl_fast {
namespace {

using at::Tensor;

constexpr int64_t kRows = 64;  // rows of a block of queries, shared by G heads

const CachePasses& passes() {
  static const CachePasses chosen = [] {
#ifdef DWRL_FAST_X86_VARIANTS
    if (instruction_set() == "AVX512") return cache_passes_avx512();
    if (instruction_set() == "AVX2") return cache_passes_avx2();
#endif
    return baseline::cache_passes();
  }();
  return chosen;
}

const int64_t* counts(const Tensor& x, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK_VALUE(
      x.is_contiguous() && x.scalar_type() == at::kLong && x.sizes() == sizes, name, " must be a contiguous int64 ", sizes, ", not ",
      x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<int64_t>();
}

void check_cache(const Tensor& x, const Tensor& q, at::IntArrayRef sizes, const char* name) {
  TORCH_CHECK_VALUE(
      x.is_contiguous() && x.scalar_type() == q.scalar_type() && x.sizes() == sizes, name, " must be a contiguous ", q.scalar_type(), " ",
      sizes, ", not ", x.scalar_type(), " ", x.sizes());
}

// Checks that all reads and writes are inside the cache, and that no query sees keys that were not written.
void check_plan(const int64_t* slot, int64_t tokens, const CacheTile* tiles, int64_t count, int64_t blocks) {
  for (int64_t i = 0; i < tokens; ++i)
    TORCH_CHECK_VALUE(
        -1 <= slot[i] && slot[i] < blocks * kBlockTokens, "slot ", i, " is ", slot[i], ": the cache has ", blocks * kBlockTokens);
  for (int64_t i = 0; i < count; ++i) {
    const CacheTile& t = tiles[i];
    TORCH_CHECK_VALUE(
        0 <= t.block && t.block < blocks && 0 <= t.position && 0 < t.count && t.count <= kBlockTokens && 0 <= t.start && t.start <= t.stop &&
            t.stop <= tokens,
        "tile ", i, " is (", t.block, ", ", t.position, ", ", t.count, ", ", t.start, ", ", t.stop, "): block below ", blocks,
        ", count 1 to ", kBlockTokens, ", queries within ", tokens);
  }
}

std::vector<std::vector<int64_t>> seen_by(const CacheTile* tiles, int64_t count, int64_t tokens, int64_t query_tokens) {
  std::vector<std::vector<int64_t>> seen((tokens + query_tokens - 1) / query_tokens);
  for (int64_t i = 0; i < count; ++i) {
    if (tiles[i].start == tiles[i].stop) continue;  // seen by no query
    for (int64_t b = tiles[i].start / query_tokens; b * query_tokens < tiles[i].stop; ++b) seen[b].push_back(i);
  }
  return seen;
}

Tensor cache_attention_(
    const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& keys, const Tensor& values, const Tensor& position,
    const Tensor& slot, const Tensor& tiles, double scale, std::optional<double> softcap, std::optional<int64_t> window) {
  TORCH_CHECK_VALUE(q_any.dim() == 3 && k_any.dim() == 3 && keys.dim() == 4 && values.dim() == 4, "q, k: [Q, heads, D]; keys, values: 4-d");
  const int64_t tokens = q_any.size(0), heads = k_any.size(1), dim = q_any.size(2), blocks = keys.size(0);
  TORCH_CHECK_VALUE(heads > 0 && q_any.size(1) > 0 && q_any.size(1) % heads == 0, "q has ", q_any.size(1), " heads, k ", heads);
  for (const Tensor* x : {&k_any, &v_any})
    TORCH_CHECK_VALUE(
        x->sizes() == at::IntArrayRef({tokens, heads, dim}) && x->scalar_type() == q_any.scalar_type(), "k and v must be ",
        q_any.scalar_type(), " [", tokens, ", ", heads, ", ", dim, "], not ", x->scalar_type(), " ", x->sizes());
  check_cache(keys, q_any, {blocks, heads, dim, kBlockTokens}, "keys");
  check_cache(values, q_any, {blocks, heads, kBlockTokens, baseline::round_up(dim, 16)}, "values");
  const int64_t *places = counts(position, {tokens}, "position"), *slots = counts(slot, {tokens}, "slot");
  const auto* read = reinterpret_cast<const CacheTile*>(counts(tiles, {tiles.size(0), 5}, "tiles"));
  check_plan(slots, tokens, read, tiles.size(0), blocks);
  const Tensor q = dense_rows(q_any), k = dense_rows(k_any), v = dense_rows(v_any), out = at::empty(q.sizes(), q.options());
  const int64_t group = q.size(1) / heads, query_tokens = std::max<int64_t>(1, kRows / group);
  const auto seen = seen_by(read, tiles.size(0), tokens, query_tokens);
  dispatch(passes(), q, "q", [&](const auto& pass, auto scalar, auto real) {
    using scalar_t = decltype(scalar);
    using real_t = decltype(real);
    const CacheAttention<scalar_t, real_t> a{
        tokens, query_tokens, group, dim, values.size(3), heads, static_cast<real_t>(scale), static_cast<real_t>(softcap.value_or(0)),
        window.value_or(0), read_heads<scalar_t>(q), read_heads<scalar_t>(k), read_heads<scalar_t>(v),
        write_heads<scalar_t>(out), keys.mutable_data_ptr<scalar_t>(), values.mutable_data_ptr<scalar_t>(), places, slots, read, seen};
    share(heads, tokens, [&] { return pass.work(a).keep; });
    share(heads, static_cast<int64_t>(seen.size()), [&] { return pass.work(a).run; });
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(dwrl_fast, m) {
  m.def(
      "cache_attention_(Tensor q, Tensor k, Tensor v, Tensor(a!) keys, Tensor(b!) values, Tensor position, Tensor slot, Tensor tiles, "
      "float scale, float? softcap, int? window) -> Tensor");
}

TORCH_LIBRARY_IMPL(dwrl_fast, CPU, m) { m.impl("cache_attention_", cache_attention_); }

}  // namespace
}  // namespace dwrl_fast
