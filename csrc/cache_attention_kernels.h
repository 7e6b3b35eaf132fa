// Attention over a cache in at::vec: tiles of keys and the rows that see them, with the online softmax of tree attention. Included once
// for each instruction set.

#pragma once

#include "cache_attention.h"
#include "tree_attention_kernels.h"

namespace dwrl_fast::ROW_PASS_NAMESPACE {

static_assert(kBlockTokens == kKeys);

template <typename scalar_t, typename real_t>
class CacheForward {
 public:
  explicit CacheForward(const CacheAttention<scalar_t, real_t>& attention)
      : a(attention), row(round_up(a.dim, kWidth)), queries(a.query_tokens * a.group * row), online(a.query_tokens * a.group, row),
        keys(kInPlace<scalar_t, real_t> ? 0 : a.dim * kKeys), values(kInPlace<scalar_t, real_t> ? 0 : kKeys * a.value_stride) {}

  // Queries [from, to) of one key head.
  void run(int64_t head, int64_t block) {
    const int64_t from = block * a.query_tokens, to = std::min(from + a.query_tokens, a.tokens);
    load(head, from, to);
    online.open((to - from) * a.group);
    std::fill_n(+online.out, (to - from) * a.group * row, real_t(0));
    for (const int64_t t : a.seen[block]) tile(head, from, to, a.tiles[t]);
    store(head, from, to);
  }

  // Stores keys and values of a new token's head in the cache.
  void keep(int64_t head, int64_t token) {
    if (a.slot[token] < 0) return;
    const int64_t block = a.slot[token] / kKeys, place = a.slot[token] % kKeys;
    const scalar_t *k = a.k.at(token, head), *v = a.v.at(token, head);
    scalar_t* column = a.keys_of(block, head) + place;
    for (int64_t i = 0; i < a.dim; ++i) column[i * kKeys] = k[i];
    scalar_t* to = a.values_of(block, head) + place * a.value_stride;
    std::copy_n(v, a.dim, to);
    std::fill(to + a.dim, to + a.value_stride, scalar_t(0));
  }

 private:
  static constexpr int64_t kWidth = Vec<real_t>::size();

  const CacheAttention<scalar_t, real_t> a;
  const int64_t row;
  Buffer<real_t> queries;
  Online<real_t> online;
  Buffer<real_t> keys, values;

  void load(int64_t head, int64_t from, int64_t to) {
    const Vec<real_t> factor(a.scale);
    real_t* row_of = queries;
    for (int64_t t = from; t < to; ++t) {
      for (int64_t h = head * a.group; h < (head + 1) * a.group; ++h, row_of += row) {
        const scalar_t* source = a.q.at(t, h);
        if constexpr (kInPlace<scalar_t, real_t>) {
          each(source, a.dim, [&](Vec<real_t> v, int64_t i, int64_t n) { (v * factor).store(row_of + i, n); });
        } else {
          widen(source, row_of, a.dim);
          each(row_of, a.dim, [&](Vec<real_t> v, int64_t i, int64_t n) { (v * factor).store(row_of + i, n); });
        }
      }
    }
  }

  void tile(int64_t head, int64_t from, int64_t to, const CacheTile& tile) {
    const int64_t start = std::max(from, tile.start), stop = std::min(to, tile.stop);
    const auto [least, most] = std::minmax_element(a.position + start, a.position + stop);
    const int64_t last = tile.position + tile.count;
    if (*most < tile.position || (a.window > 0 && *least - last >= a.window - 1)) return;
    const int64_t n = round_up(tile.count, kWidth), first = (start - from) * a.group, m = (stop - start) * a.group;
    const real_t *k, *v;
    read(head, tile, k, v);
    real_t* scores = online.scores + first * kKeys;
    product<real_t>(m, n, a.dim, {scores, kKeys}, {queries + first * row, row, 1}, {k, kKeys}, false);
    for (int64_t r = 0; r < m; ++r) {
      real_t* s = scores + r * kKeys;
      if (a.cap != 0)
        for (int64_t j = 0; j < n; j += kWidth) capped(Vec<real_t>::loadu(s + j)).store(s + j);
      const int64_t place = a.position[start + r / a.group] - tile.position;
      const int64_t end = std::clamp<int64_t>(place + 1, 0, tile.count);
      const int64_t begin = a.window > 0 ? std::clamp<int64_t>(place + 1 - a.window, 0, end) : 0;
      if (begin == end) {  // before a row's first key, its maximum would be a masked value
        std::fill(s, s + n, real_t(0));
        continue;
      }
      std::fill(s, s + begin, static_cast<real_t>(kMasked));
      std::fill(s + end, s + n, static_cast<real_t>(kMasked));
      online.softmax(first + r, n, false);
    }
    product<real_t>(m, row, tile.count, {online.out + first * row, row}, {scores, kKeys, 1}, {v, a.value_stride}, true);
  }

  Vec<real_t> capped(const Vec<real_t>& x) const { return (x * Vec<real_t>(1 / a.cap)).tanh() * Vec<real_t>(a.cap); }

  // A tile's keys and values in the type of the sums: in place, or widened to a buffer.
  void read(int64_t head, const CacheTile& tile, const real_t*& k, const real_t*& v) {
    if constexpr (kInPlace<scalar_t, real_t>) {
      k = a.keys_of(tile.block, head);
      v = a.values_of(tile.block, head);
    } else {
      const scalar_t* columns = a.keys_of(tile.block, head);
      for (int64_t i = 0; i < a.dim; ++i) widen(columns + i * kKeys, keys + i * kKeys, tile.count);
      widen(a.values_of(tile.block, head), values, tile.count * a.value_stride);
      k = keys;
      v = values;
    }
  }

  void store(int64_t head, int64_t from, int64_t to) {
    for (int64_t r = 0; r < (to - from) * a.group; ++r) {
      online.finish(r);
      scalar_t* target = a.out.at(from + r / a.group, head * a.group + r % a.group);
      if constexpr (kInPlace<scalar_t, real_t>) {
        std::copy_n(online.out + r * row, a.dim, target);
      } else {
        narrow(online.out + r * row, target, a.dim);
      }
    }
  }
};

template <typename scalar_t, typename real_t>
CacheWork cache_work(const CacheAttention<scalar_t, real_t>& attention) {
  const auto pass = std::make_shared<CacheForward<scalar_t, real_t>>(attention);
  return {[pass](int64_t head, int64_t token) { pass->keep(head, token); }, [pass](int64_t head, int64_t block) { pass->run(head, block); }};
}

template <typename scalar_t, typename real_t>
CachePass<scalar_t, real_t> cache_pass() {
  return {cache_work<scalar_t, real_t>};
}

inline CachePasses cache_passes() { return {cache_pass<float, float>(), cache_pass<double, double>(), cache_pass<c10::BFloat16, float>()}; }

}  // namespace dwrl_fast::ROW_PASS_NAMESPACE
