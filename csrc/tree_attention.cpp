// Operators `tree_attention` and `tree_attention_backward`: their checks, the division of a tree into segments, and of segments among
// threads.

#include "attention_heads.h"
#include "dispatch.h"

#include <torch/library.h>

#include <optional>

#define ROW_PASS_NAMESPACE baseline
#include "tree_attention_kernels.h"

namespace dwrl_fast {
namespace {

using at::Tensor;

constexpr int64_t kSegment = 64;          // trees smaller than a block of queries share a segment
constexpr int64_t kTokens = int64_t(1) << 24;  // float32 represents such counts exactly

const AttentionPasses& passes() {
  static const AttentionPasses chosen = [] {
#ifdef DWRL_FAST_X86_VARIANTS
    if (instruction_set() == "AVX512") return attention_passes_avx512();
    if (instruction_set() == "AVX2") return attention_passes_avx2();
#endif
    return baseline::attention_passes();
  }();
  return chosen;
}

const int64_t* nodes(const Tensor& x, const Tensor& start, const char* name) {
  TORCH_CHECK_VALUE(
      x.dim() == 1 && x.is_contiguous() && x.scalar_type() == at::kLong && x.sizes() == start.sizes(), name,
      " must be a contiguous int64 [M = ", start.numel(), "], not ", x.scalar_type(), " ", x.sizes());
  return x.const_data_ptr<int64_t>();
}

Tree make_tree(const Tensor& start, const Tensor& stop, const Tensor& parent, int64_t tokens) {
  const int64_t *begin = nodes(start, start, "start"), *end = nodes(stop, start, "stop"), *above = nodes(parent, start, "parent");
  TORCH_CHECK_VALUE(tokens < kTokens, "a tree of ", tokens, " tokens: at most ", kTokens - 1, " can be attended to at once");
  Tree tree{std::vector<int64_t>(tokens), std::vector<int64_t>(tokens), {}};
  std::vector<int64_t> path;                     // the nodes from the root to the last one
  std::vector<int64_t> position(start.numel());  // of each node's first token
  int64_t at = 0;
  const auto leave = [&] {
    std::fill(tree.end.begin() + begin[path.back()], tree.end.begin() + end[path.back()], at);
    path.pop_back();
  };
  for (int64_t m = 0; m < start.numel(); ++m) {
    TORCH_CHECK_VALUE(
        begin[m] == at && at <= end[m] && end[m] <= tokens, "node ", m, " has tokens [", begin[m], ", ", end[m],
        "): nodes must follow one another from 0 to U = ", tokens);
    while (!path.empty() && path.back() != above[m]) leave();
    TORCH_CHECK_VALUE(
        above[m] == (path.empty() ? -1 : path.back()), "node ", m, " has parent ", above[m],
        ", which is not on the path to node ", m - 1, ": nodes must be in depth-first order");
    if (path.empty() && (tree.segments.empty() || tree.segments.back().size() >= kSegment)) tree.segments.push_back({at, at});
    if (!path.empty()) position[m] = position[above[m]] + end[above[m]] - begin[above[m]];
    for (; at < end[m]; ++at) tree.position[at] = position[m] + at - begin[m];
    tree.segments.back().end = at;
    path.push_back(m);
  }
  while (!path.empty()) leave();
  TORCH_CHECK_VALUE(at == tokens, "the tree has ", at, " tokens; q has U = ", tokens);
  return tree;
}

void check(const Tensor& x, const Tensor& q, int64_t heads, const char* name) {
  TORCH_CHECK_VALUE(
      x.dim() == 3 && x.size(0) == q.size(0) && x.size(1) == heads && x.size(2) == q.size(2) && x.scalar_type() == q.scalar_type(),
      name, " must be a ", q.scalar_type(), " [", q.size(0), ", ", heads, ", ", q.size(2), "], not ", x.scalar_type(), " ", x.sizes());
}

void check_inputs(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(q.dim() == 3 && k.dim() == 3, "q and k must be [U, heads, D], not ", q.sizes(), " and ", k.sizes());
  TORCH_CHECK_VALUE(
      k.size(1) > 0 && q.size(1) > 0 && q.size(1) % k.size(1) == 0, "q has ", q.size(1), " heads, not a multiple of k's ", k.size(1));
  check(k, q, k.size(1), "k");
  check(v, q, k.size(1), "v");
}

// The longest segments first.
template <typename Make>
void run(const Tree& tree, int64_t heads, Make make) {
  std::vector<int64_t> order(tree.segments.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return tree.segments[a].size() > tree.segments[b].size();
  });
  share(heads, static_cast<int64_t>(order.size()), [&]() -> Work {
    return [&order, work = make()](int64_t head, int64_t i) { work(head, order[i]); };
  });
}

template <typename scalar_t, typename real_t>
Attention<scalar_t, real_t> attention(
    const Tree& tree, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse, double scale,
    std::optional<double> softcap, std::optional<int64_t> window) {
  return {tree, q.size(1) / k.size(1), q.size(2), static_cast<real_t>(scale), static_cast<real_t>(softcap.value_or(0)),
          window.value_or(0), read_heads<scalar_t>(q), read_heads<scalar_t>(k), read_heads<scalar_t>(v), write_heads<scalar_t>(out),
          write_heads<real_t>(lse), {}, {}, {}, {}};
}

// -> out [U, Hq, D] and the logarithms of the softmax's sums [U, Hq], in float32 (float64 for float64).
std::tuple<Tensor, Tensor> tree_attention(
    const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& start, const Tensor& stop, const Tensor& parent,
    double scale, std::optional<double> softcap, std::optional<int64_t> window) {
  check_inputs(q_any, k_any, v_any);
  const Tree tree = make_tree(start, stop, parent, q_any.size(0));
  const Tensor q = dense_rows(q_any), k = dense_rows(k_any), v = dense_rows(v_any);
  const Tensor out = at::empty(q.sizes(), q.options());
  const auto wide = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  const Tensor lse = at::empty({q.size(0), q.size(1)}, q.options().dtype(wide));
  dispatch(passes(), q, "q", [&](const auto& pass, auto scalar, auto real) {
    const auto a = attention<decltype(scalar), decltype(real)>(tree, q, k, v, out, lse, scale, softcap, window);
    run(tree, k.size(1), [&] { return pass.forward(a); });
  });
  return {out, lse};
}

// -> dQ, dK, dV.
std::tuple<Tensor, Tensor, Tensor> tree_attention_backward(
    const Tensor& grad, const Tensor& q_any, const Tensor& k_any, const Tensor& v_any, const Tensor& out, const Tensor& lse,
    const Tensor& start, const Tensor& stop, const Tensor& parent, double scale, std::optional<double> softcap,
    std::optional<int64_t> window) {
  check_inputs(q_any, k_any, v_any);
  check(grad, q_any, q_any.size(1), "grad");
  check(out, q_any, q_any.size(1), "out");
  const Tree tree = make_tree(start, stop, parent, q_any.size(0));
  const Tensor q = dense_rows(q_any), k = dense_rows(k_any), v = dense_rows(v_any), d_out = dense_rows(grad);
  const Tensor o = out.contiguous(), l = lse.contiguous();
  const auto like = [](const Tensor& x) { return at::empty(x.sizes(), x.options()); };
  const Tensor d_q = like(q), d_k = like(k), d_v = like(v);
  dispatch(passes(), q, "q", [&](const auto& pass, auto scalar, auto real) {
    using scalar_t = decltype(scalar);
    auto a = attention<scalar_t, decltype(real)>(tree, q, k, v, o, l, scale, softcap, window);
    a.d_out = read_heads<scalar_t>(d_out);
    a.d_q = write_heads<scalar_t>(d_q);
    a.d_k = write_heads<scalar_t>(d_k);
    a.d_v = write_heads<scalar_t>(d_v);
    run(tree, k.size(1), [&] { return pass.backward(a); });
  });
  return {d_q, d_k, d_v};
}

TORCH_LIBRARY_FRAGMENT(dwrl_fast, m) {
  m.def(
      "tree_attention(Tensor q, Tensor k, Tensor v, Tensor start, Tensor stop, Tensor parent, float scale, float? softcap, "
      "int? window) -> (Tensor, Tensor)");
  m.def(
      "tree_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor start, Tensor stop, "
      "Tensor parent, float scale, float? softcap, int? window) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(dwrl_fast, CPU, m) {
  m.impl("tree_attention", tree_attention);
  m.impl("tree_attention_backward", tree_attention_backward);
}

}  // namespace
}  // namespace dwrl_fast
