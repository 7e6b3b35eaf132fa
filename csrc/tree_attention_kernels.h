// Tree attention in at::vec: flash attention's online softmax over tiles of queries and keys. Included once for each instruction set.
//
// One key head of one segment at a time. Keys are stored in panels of kKeys tokens, transposed within a panel. Queries are in blocks of
// consecutive tokens, with the G heads of a token in adjacent rows. A block may span nodes. From a panel it uses the tile of keys that
// any of its queries attends to, in whole groups. If not all queries attend to all of them, the tile is masked with exact zeros.

#pragma once

#include "tree_attention.h"
#include "tree_attention_product.h"

#include <ATen/cpu/vec/functional.h>

namespace dwrl_fast::ROW_PASS_NAMESPACE {

constexpr int64_t kKeys = 64, kGroup = 16, kQueryRows = 64;
constexpr double kMasked = -1e30, kExpFloor = -1e4;  // e to the floor is 0 in every dtype

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Aligned to cache lines, because vectors that cross a line take twice as long.
template <typename real_t>
class Buffer {
 public:
  explicit Buffer(int64_t count) : data_(static_cast<real_t*>(std::aligned_alloc(64, round_up(count * sizeof(real_t) + 1, 64)))) {
    if (!data_) throw std::bad_alloc();
  }
  operator real_t*() const { return data_.get(); }

 private:
  struct Free {
    void operator()(real_t* p) const { std::free(p); }
  };
  std::unique_ptr<real_t[], Free> data_;
};

// Keys [key, key + count) of a panel; count 0: no key is seen.
struct Tile {
  int64_t key, count;
  bool masked;
};

// What both passes share: the mask of a segment, and the layout of rows and panels.
template <typename scalar_t, typename real_t>
class Walk {
 public:
  static constexpr int64_t kWidth = Vec<real_t>::size();
  static_assert(kGroup % kWidth == 0 && kKeys % kGroup == 0);

  explicit Walk(const Attention<scalar_t, real_t>& attention)
      : a(attention), longest(round_up(longest_of(a.tree), kKeys)), row(round_up(a.dim, kWidth)),
        tokens(std::max<int64_t>(1, kQueryRows / a.group)), rows(tokens * a.group), stop(longest), index(longest), place(longest),
        panel(kKeys * row) {}

 protected:
  const Attention<scalar_t, real_t> a;
  const int64_t longest, row;  // of a segment, in whole panels; of a row, in whole vectors
  const int64_t tokens, rows;  // of a block of queries
  Segment segment{};

  void open(int64_t number) {
    segment = a.tree.segments[number];
    const int64_t n = segment.size(), panels = round_up(n, kKeys) / kKeys;
    bounds.assign(panels * kKeys / kGroup, {n, 0, std::numeric_limits<int64_t>::max(), 0});
    for (int64_t i = 0; i < panels * kKeys; ++i) {
      const bool there = i < n;
      const int64_t s = there ? a.tree.end[segment.begin + i] - segment.begin : 0;  // no query attends to the padding of a panel
      const int64_t p = there ? a.tree.position[segment.begin + i] : 0;
      stop[i] = static_cast<real_t>(s);
      index[i] = static_cast<real_t>(i);
      place[i] = static_cast<real_t>(p);
      Bounds& b = bounds[i / kGroup];
      b.least_stop = std::min(b.least_stop, s);
      b.most_stop = std::max(b.most_stop, s);
      if (there) b.least_place = std::min(b.least_place, p);
      b.most_place = std::max(b.most_place, p);
    }
  }

  // The keys of a panel that the queries [from, to) see.
  Tile tile(int64_t panel_number, int64_t from, int64_t to) const {
    int64_t least = 0, most = 0;  // positions of the queries
    if (a.window > 0) {
      const auto [l, m] = std::minmax_element(place + from, place + to);
      least = static_cast<int64_t>(*l);
      most = static_cast<int64_t>(*m);
    }
    Tile tile{0, 0, false};
    const int64_t start = panel_number * kKeys, end = std::min(to, start + kKeys);
    for (int64_t j = start; j < end; j += kGroup) {
      const Bounds& b = bounds[j / kGroup];
      if (b.most_stop <= from || (a.window > 0 && least - b.most_place >= a.window)) continue;
      if (tile.count == 0) tile.key = j;
      tile.count = j + kGroup - tile.key;
    }
    for (int64_t j = tile.key; j < tile.key + tile.count; j += kGroup) {
      const Bounds& b = bounds[j / kGroup];
      tile.masked |= j + kGroup > from + 1 || b.least_stop < to || (a.window > 0 && most - b.least_place >= a.window);
    }
    return tile;
  }

  // Mask of the keys in a vector from j on that the query at t sees.
  Vec<real_t> seen(int64_t t, int64_t j) const {
    const Vec<real_t> here(index[t]);
    Vec<real_t> s = (Vec<real_t>::loadu(stop + j) > here) & (Vec<real_t>::loadu(index + j) <= here);
    if (a.window > 0) s = s & (Vec<real_t>::loadu(place + j) > Vec<real_t>(place[t] - a.window));
    return s;
  }

  Vec<real_t> capped(const Vec<real_t>& x) const { return (x * Vec<real_t>(1 / a.cap)).tanh() * Vec<real_t>(a.cap); }

  // Rows [count heads, row] of the tokens from `from` (in the segment), times `factor`; zeros past a row's and the segment's end.
  void load(real_t* to, const Heads<const scalar_t>& x, int64_t from, int64_t count, int64_t head, int64_t heads, real_t factor) const {
    const Vec<real_t> f(factor);
    for (int64_t t = from; t < from + count; ++t) {
      for (int64_t h = head; h < head + heads; ++h, to += row) {
        if (t >= segment.size()) {
          std::fill_n(to, row, real_t(0));
          continue;
        }
        const scalar_t* source = x.at(segment.begin + t, h);
        if constexpr (kInPlace<scalar_t, real_t>) {
          each(source, a.dim, [&](Vec<real_t> v, int64_t i, int64_t n) { (v * f).store(to + i, n); });
        } else {
          widen(source, to, a.dim);
          each(to, a.dim, [&](Vec<real_t> v, int64_t i, int64_t n) { (v * f).store(to + i, n); });
        }
        std::fill(to + a.dim, to + row, real_t(0));
      }
    }
  }

  void store(const Heads<scalar_t>& x, const real_t* from, int64_t first, int64_t count, int64_t head, int64_t heads) const {
    for (int64_t t = first; t < first + count; ++t) {
      for (int64_t h = head; h < head + heads; ++h, from += row) {
        scalar_t* to = x.at(segment.begin + t, h);
        if constexpr (kInPlace<scalar_t, real_t>) {
          std::copy_n(from, a.dim, to);
        } else {
          narrow(from, to, a.dim);
        }
      }
    }
  }

  // A panel's rows [kKeys, row] -> [D, kKeys].
  void transpose(const real_t* from, real_t* to) const {
    at::vec::transpose_mxn<real_t>(from, row, to, kKeys, static_cast<int>(kKeys), static_cast<int>(a.dim));
  }

  int64_t panels() const { return round_up(segment.size(), kKeys) / kKeys; }

 private:
  struct Bounds {
    int64_t least_stop, most_stop, least_place, most_place;
  };
  std::vector<Bounds> bounds;  // of each group of keys

  static int64_t longest_of(const Tree& tree) {
    int64_t n = 0;
    for (const Segment& s : tree.segments) n = std::max(n, s.size());
    return n;
  }

 protected:
  Buffer<real_t> stop, index, place, panel;
};

// The state of the online softmax: scores of a tile, and sums so far, relative to the largest score so far.
template <typename real_t>
class Online {
 public:
  static constexpr int64_t kWidth = Vec<real_t>::size();

  Online(int64_t rows, int64_t row) : out(rows * row), scores(rows * kKeys), row(row), maximum(rows), sums(rows * kWidth) {}

  Buffer<real_t> out, scores;  // [rows, row], [rows, kKeys]

  void open(int64_t rows) {
    std::fill_n(+maximum, rows, static_cast<real_t>(kMasked));
    std::fill_n(+sums, rows * kWidth, real_t(0));
  }

  // Replaces the scores of one row by exponentials, and rescales earlier sums to the new maximum.
  void softmax(int64_t r, int64_t keys, bool first) {
    real_t* s = scores + r * kKeys;
    Vec<real_t> top(static_cast<real_t>(kMasked));
    for (int64_t j = 0; j < keys; j += kWidth) top = at::vec::maximum(top, Vec<real_t>::loadu(s + j));
    const real_t most =
        at::vec::vec_reduce_all<real_t>([](const Vec<real_t>& x, const Vec<real_t>& y) { return at::vec::maximum(x, y); }, top);
    Vec<real_t> sum = Vec<real_t>::loadu(sums + r * kWidth);
    if (!(most <= maximum[r])) {  // NaN is passed on
      const Vec<real_t> shrink(std::exp(maximum[r] - most));
      maximum[r] = most;
      sum = sum * shrink;
      if (!first) scale(out + r * row, shrink);
    }
    const Vec<real_t> m(maximum[r]), floor(static_cast<real_t>(kExpFloor));
    for (int64_t j = 0; j < keys; j += kWidth) {
      const Vec<real_t> e = exp_of_negative(at::vec::clamp_min(Vec<real_t>::loadu(s + j) - m, floor));
      e.store(s + j);
      sum = sum + e;
    }
    sum.store(sums + r * kWidth);
  }

  // Finishes a row's output: 0 if it saw no key. Returns the logarithm of its softmax sum.
  real_t finish(int64_t r) {
    const real_t sum = sum_of(Vec<real_t>::loadu(sums + r * kWidth));
    scale(out + r * row, Vec<real_t>(sum == 0 ? 0 : 1 / sum));
    return maximum[r] + std::log(sum);
  }

 private:
  int64_t row;
  Buffer<real_t> maximum, sums;

  void scale(real_t* x, const Vec<real_t>& factor) const {
    for (int64_t i = 0; i < row; i += kWidth) (Vec<real_t>::loadu(x + i) * factor).store(x + i);
  }
};

template <typename scalar_t, typename real_t>
class Forward : Walk<scalar_t, real_t> {
  using Base = Walk<scalar_t, real_t>;
  using Base::a, Base::row, Base::rows, Base::tokens, Base::segment, Base::panel, Base::kWidth;

 public:
  explicit Forward(const Attention<scalar_t, real_t>& attention)
      : Base(attention), keys_t(Base::longest * a.dim), values(Base::longest * row), queries(rows * row), online(rows, row) {}

  void run(int64_t head, int64_t number) {
    Base::open(number);
    for (int64_t p = 0; p < Base::panels(); ++p) {
      Base::load(panel, a.k, p * kKeys, kKeys, head, 1, 1);
      Base::transpose(panel, keys_t + p * kKeys * a.dim);
      Base::load(values + p * kKeys * row, a.v, p * kKeys, kKeys, head, 1, 1);
    }
    for (int64_t from = 0; from < segment.size(); from += tokens) block(head, from, std::min(from + tokens, segment.size()));
  }

 private:
  Buffer<real_t> keys_t, values, queries;
  Online<real_t> online;

  void block(int64_t head, int64_t from, int64_t to) {
    const int64_t m = (to - from) * a.group;
    Base::load(queries, a.q, from, to - from, head * a.group, a.group, a.scale);
    online.open(m);
    real_t *scores = online.scores, *out = online.out;
    bool first = true;
    for (int64_t p = 0; p * kKeys < to; ++p) {
      const Tile tile = Base::tile(p, from, to);
      if (tile.count == 0) continue;
      const real_t* columns = keys_t + p * kKeys * a.dim + (tile.key - p * kKeys);
      product<real_t>(m, tile.count, a.dim, {scores, kKeys}, {queries, row, 1}, {columns, kKeys}, false);
      for (int64_t r = 0; r < m; ++r) {
        real_t* s = scores + r * kKeys;
        if (a.cap != 0)
          for (int64_t j = 0; j < tile.count; j += kWidth) Base::capped(Vec<real_t>::loadu(s + j)).store(s + j);
        if (tile.masked) mask(s, from + r / a.group, tile);
        online.softmax(r, tile.count, first);
      }
      product<real_t>(m, row, tile.count, {out, row}, {scores, kKeys, 1}, {values + tile.key * row, row}, !first);
      first = false;
    }
    finish(head, from, to);
  }

  void mask(real_t* s, int64_t t, const Tile& tile) const {
    const Vec<real_t> masked(static_cast<real_t>(kMasked));
    for (int64_t j = 0; j < tile.count; j += kWidth)
      Vec<real_t>::blendv(masked, Vec<real_t>::loadu(s + j), Base::seen(t, tile.key + j)).store(s + j);
  }

  void finish(int64_t head, int64_t from, int64_t to) {
    for (int64_t r = 0; r < (to - from) * a.group; ++r)
      *a.lse.at(segment.begin + from + r / a.group, head * a.group + r % a.group) = online.finish(r);
    Base::store(a.out, online.out, from, to - from, head * a.group, a.group);
  }
};

template <typename scalar_t, typename real_t>
class Backward : Walk<scalar_t, real_t> {
  using Base = Walk<scalar_t, real_t>;
  using Base::a, Base::row, Base::rows, Base::tokens, Base::segment, Base::panel, Base::kWidth;

 public:
  explicit Backward(const Attention<scalar_t, real_t>& attention)
      : Base(attention), keys(Base::longest * row), keys_t(Base::longest * a.dim), values_t(Base::longest * a.dim),
        d_keys(Base::longest * row), d_values(Base::longest * row), queries(rows * row), d_out(rows * row), d_queries(rows * row),
        p(rows * kKeys), ds(rows * kKeys), lse(rows), delta(rows) {}

  void run(int64_t head, int64_t number) {
    Base::open(number);
    for (int64_t i = 0; i < Base::panels(); ++i) {
      Base::load(keys + i * kKeys * row, a.k, i * kKeys, kKeys, head, 1, 1);
      Base::transpose(keys + i * kKeys * row, keys_t + i * kKeys * a.dim);
      Base::load(panel, a.v, i * kKeys, kKeys, head, 1, 1);
      Base::transpose(panel, values_t + i * kKeys * a.dim);
    }
    std::fill_n(+d_keys, Base::panels() * kKeys * row, real_t(0));
    std::fill_n(+d_values, Base::panels() * kKeys * row, real_t(0));
    for (int64_t from = 0; from < segment.size(); from += tokens) block(head, from, std::min(from + tokens, segment.size()));
    Base::store(a.d_k, d_keys, 0, segment.size(), head, 1);
    Base::store(a.d_v, d_values, 0, segment.size(), head, 1);
  }

 private:
  Buffer<real_t> keys, keys_t, values_t, d_keys, d_values, queries, d_out, d_queries, p, ds, lse, delta;

  void block(int64_t head, int64_t from, int64_t to) {
    const int64_t m = (to - from) * a.group;
    open_block(head, from, to);
    bool first = true;
    for (int64_t i = 0; i * kKeys < to; ++i) {
      const Tile tile = Base::tile(i, from, to);
      if (tile.count == 0) continue;
      const int64_t n = tile.count, column = i * kKeys * a.dim + (tile.key - i * kKeys), at = tile.key * row;
      product<real_t>(m, n, a.dim, {p, kKeys}, {queries, row, 1}, {keys_t + column, kKeys}, false);
      product<real_t>(m, n, a.dim, {ds, kKeys}, {d_out, row, 1}, {values_t + column, kKeys}, false);
      for (int64_t r = 0; r < m; ++r) {
        if (tile.masked) {
          differentiate<true>(r, from + r / a.group, tile);
        } else {
          differentiate<false>(r, from + r / a.group, tile);
        }
      }
      product<real_t>(n, row, m, {d_values + at, row}, {p, 1, kKeys}, {d_out, row}, true);
      product<real_t>(n, row, m, {d_keys + at, row}, {ds, 1, kKeys}, {queries, row}, true);
      product<real_t>(m, row, n, {d_queries, row}, {ds, kKeys, 1}, {keys + at, row}, !first);
      first = false;
    }
    const Vec<real_t> scale(a.scale);
    for (int64_t i = 0; i < m * row; i += kWidth) (Vec<real_t>::loadu(d_queries + i) * scale).store(d_queries + i);
    Base::store(a.d_q, d_queries, from, to - from, head * a.group, a.group);
  }

  // delta = sum(dOut out) of each row, subtracted in the derivative of the softmax.
  void open_block(int64_t head, int64_t from, int64_t to) {
    const Heads<const scalar_t> out{a.out.data, a.out.token_stride, a.out.head_stride};
    Base::load(d_queries, out, from, to - from, head * a.group, a.group, 1);
    Base::load(d_out, a.d_out, from, to - from, head * a.group, a.group, 1);
    Base::load(queries, a.q, from, to - from, head * a.group, a.group, a.scale);
    for (int64_t r = 0; r < (to - from) * a.group; ++r) {
      Vec<real_t> sum(0);
      for (int64_t i = r * row; i < (r + 1) * row; i += kWidth)
        sum = at::vec::fmadd(Vec<real_t>::loadu(d_queries + i), Vec<real_t>::loadu(d_out + i), sum);
      delta[r] = sum_of(sum);
      lse[r] = *a.lse.at(segment.begin + from + r / a.group, head * a.group + r % a.group);
    }
  }

  // Replaces logits and dP by P and dS.
  template <bool masked>
  void differentiate(int64_t r, int64_t t, const Tile& tile) {
    real_t *x = p + r * kKeys, *d = ds + r * kKeys;
    const Vec<real_t> normalizer(lse[r]), minus(delta[r]), floor(static_cast<real_t>(kExpFloor)), zero(0), one(1);
    const Vec<real_t> inverse_cap(a.cap != 0 ? 1 / a.cap : 0);
    for (int64_t j = 0; j < tile.count; j += kWidth) {
      Vec<real_t> z = Vec<real_t>::loadu(x + j), slope = one;
      if (a.cap != 0) {
        z = Base::capped(z);
        const Vec<real_t> u = z * inverse_cap;
        slope = one - u * u;
      }
      Vec<real_t> e = exp_of_negative(at::vec::clamp_min(z - normalizer, floor));
      if constexpr (masked) e = Vec<real_t>::blendv(zero, e, Base::seen(t, tile.key + j));
      e.store(x + j);
      (e * (Vec<real_t>::loadu(d + j) - minus) * slope).store(d + j);
    }
  }
};

template <typename Pass, typename scalar_t, typename real_t>
Work work(const Attention<scalar_t, real_t>& attention) {
  return [pass = std::make_shared<Pass>(attention)](int64_t head, int64_t segment) { pass->run(head, segment); };
}

template <typename scalar_t, typename real_t>
AttentionPass<scalar_t, real_t> attention_pass() {
  return {work<Forward<scalar_t, real_t>, scalar_t, real_t>, work<Backward<scalar_t, real_t>, scalar_t, real_t>};
}

inline AttentionPasses attention_passes() {
  return {attention_pass<float, float>(), attention_pass<double, double>(), attention_pass<c10::BFloat16, float>()};
}

}  // namespace dwrl_fast::ROW_PASS_NAMESPACE
