"""Runs every Triton kernel once, on shapes small enough for a sanitizer.

    python -m bench.gpu.calls [--repeats 100]

With `--repeats N` it uses larger shapes and runs N more times on the same inputs in PyTorch's deterministic mode: all
results must be equal bit for bit. Prints a line per call, and the results in JSON as the last line.
"""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import command
from bench.operators.heads import drawn_head
from bench.operators.tree_attention import Heads, Plan, drawn, minibatch
from dwrl_fast import ops

Call = Callable[[], tuple[Tensor, ...]]
SMALL, LARGE = (37, 64, 1003), (2212, 1024, 151936)  # T, H, V
SMALL_CACHE, LARGE_CACHE = (3, 100, 5), (256, 400, 90)  # thoughts, shared tokens, tokens of each thought
SMALL_TREE = Plan(torch.tensor([0, 40, 57, 60]), torch.tensor([40, 57, 60, 75]), torch.tensor([-1, 0, 1, 0]))


def calls(large: bool, device: str = "cuda") -> Iterator[tuple[str, Call]]:
    """Every call by name. large: use the shapes of a real model instead of those for a sanitizer."""
    for dtype in (torch.float32, torch.bfloat16):
        yield from head_calls(*(LARGE if large else SMALL), dtype, device)
    yield from loss_calls(100_003 if large else 1500, device)
    if device == "cuda":
        yield from attention_calls(minibatch("rmb", 40), (torch.bfloat16,)) if large else attention_calls(SMALL_TREE)
    yield from cache_calls(*(LARGE_CACHE if large else SMALL_CACHE), device)
    yield from draw_calls(LARGE[2] if large else SMALL[2], device)


def head_calls(t: int, h: int, v: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Call]]:
    """The operators of the head, plain and with all optional arguments."""
    g, hidden, weight, targets = drawn_head(t, h, v, dtype, device)
    draw = partial(torch.randn, generator=g, device=device)
    bias = draw(v).to(dtype).requires_grad_()
    with torch.no_grad():
        old = ops.linear_logprob(hidden, weight, targets, backend="triton") + 0.3 * draw(t)
    tokens = old, draw(t), torch.rand(t, generator=g, device=device)
    name = f"{str(dtype)[6:]}, T {t}, H {h}, V {v}"

    def policy(**options: Tensor | float) -> tuple[Tensor, ...]:
        inputs = [hidden, weight, *(x for x in [options.get("bias")] if isinstance(x, Tensor))]
        found = ops.linear_policy_loss(hidden, weight, targets, *tokens, backend="triton", **options)  # type: ignore[arg-type]
        return found.loss, found.logprob, found.stats, *torch.autograd.grad(found.loss, inputs)

    def logprob(**options: float) -> tuple[Tensor, ...]:
        found = ops.linear_logprob(
            hidden, weight, targets, return_entropy=True, backend="triton", **options  # type: ignore[call-overload]
        )  # fmt: skip
        return *found, *torch.autograd.grad((found[0] * tokens[1] + found[1]).sum(), (hidden, weight))

    def score(normalization: str) -> tuple[Tensor, ...]:
        found = ops.yes_no_logprob(
            hidden, weight, 3, 5, normalization=normalization, return_mass=True, backend="triton"
        )
        return *found, *torch.autograd.grad(found[0].sum(), (hidden, weight))

    capped: dict[str, float] = {"softcap": 20.0, "temperature": 0.7}
    found: dict[str, Call] = {
        "linear_policy_loss": policy,
        "linear_policy_loss with bias, soft-cap, KL": partial(policy, bias=bias, ref_logprob=old, beta=0.1, **capped),
        "linear_logprob": logprob,
        "linear_logprob with soft-cap": partial(logprob, **capped),
        **{f"yes_no_logprob {n}": partial(score, n) for n in ("vocab", "yes_no")},
    }
    for what, call in found.items():
        yield f"{what}, {name}", call


def loss_calls(t: int, device: str) -> Iterator[tuple[str, Call]]:
    """`policy_loss` of `t` tokens, with the KL term and the entropy."""
    lp, old, a, w = torch.randn(4, t, generator=torch.Generator(device).manual_seed(0), device=device)
    lp.requires_grad_()

    def loss() -> tuple[Tensor, ...]:
        found = ops.policy_loss(lp, old, a, w, ref_logprob=old, beta=0.1, entropy=-old, backend="triton")
        return found.loss, found.logprob, found.stats, *torch.autograd.grad(found.loss, lp)

    yield f"policy_loss, T {t}", loss


def attention_calls(
    plan: Plan, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
) -> Iterator[tuple[str, Call]]:
    """`tree_attention` in each dtype: plain, with a window, with a soft-cap."""
    for dtype in dtypes:
        flat, gradient = drawn(int(plan.stop[-1]), Heads(28, 4, 128), dtype)

        def attention(flat: list[Tensor] = flat, gradient: Tensor = gradient, **options: Any) -> tuple[Tensor, ...]:
            out = ops.tree_attention(flat[0], flat[1], flat[2], plan, backend="triton", **options)
            return out, *torch.autograd.grad(out, flat, gradient)

        ways: dict[str, dict[str, Any]] = {
            "": {},
            " with a window": {"window": 13},
            " with soft-cap": {"softcap": 20.0},
        }
        for what, options in ways.items():
            yield f"tree_attention{what}, {str(dtype)[6:]}, U {len(gradient)}", partial(attention, **options)


def cache_calls(thoughts: int, shared: int, own: int, device: str) -> Iterator[tuple[str, Call]]:
    """`cache_attention` for thoughts that continue one text: all tokens at once, and the last token with the cache."""
    runs = [(0, shared)] + [(shared, own)] * thoughts
    first = list(itertools.accumulate((count for _, count in runs), initial=0))
    blocks = list(itertools.accumulate((-(-count // ops.BLOCK) for _, count in runs), initial=0))
    position = torch.cat([torch.arange(at, at + count) for at, count in runs])
    slot = torch.cat([blocks[i] * ops.BLOCK + torch.arange(count) for i, (_, count) in enumerate(runs)])
    last = torch.tensor(first[2:]) - 1

    def tiles(seen: Callable[[int], tuple[int, int]]) -> Tensor:
        pieces = ((i, b) for i, (_, count) in enumerate(runs) for b in range(0, count, ops.BLOCK))
        return torch.tensor([
            (blocks[i] + b // ops.BLOCK, runs[i][0] + b, min(ops.BLOCK, runs[i][1] - b), *seen(i)) for i, b in pieces
        ])  # fmt: skip

    steps = {
        "all at once": (torch.arange(first[-1]), tiles(lambda i: (first[i], first[i + 1] if i else first[-1]))),
        "the last tokens": (last, tiles(lambda i: (i - 1, i) if i else (0, thoughts))),
    }
    for dtype in (torch.float32, torch.bfloat16):
        g = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randn, generator=g, device=device, dtype=dtype)
        q, k, v = draw(first[-1], 28, 128), draw(first[-1], 4, 128), draw(first[-1], 4, 128)
        keys, values = (draw(blocks[-1], *shape) for shape in ops.cache_shapes(4, 128))
        for what, (rows, seen) in steps.items():
            new = rows.to(device)
            step = ops.CacheStep(*(x.to(device) for x in (position[rows], slot[rows], seen)))

            def attention(
                new: Tensor = new,
                step: ops.CacheStep = step,
                cache: Sequence[Tensor] = (keys, values),
                x: Sequence[Tensor] = (q, k, v),
                **options: Any,
            ) -> tuple[Tensor, ...]:
                out = ops.cache_attention(x[0][new], x[1][new], x[2][new], cache[0], cache[1], step, **options)
                return out, *(x.clone() for x in cache)

            name = f"cache_attention, {what}, {str(dtype)[6:]}, Q {len(rows)}"
            yield name, attention
            yield f"{name}, with a window and soft-cap", partial(attention, window=70, softcap=20.0)


def draw_calls(v: int, device: str) -> Iterator[tuple[str, Call]]:
    """`gumbel_pick` for a few rows."""
    g = torch.Generator(device).manual_seed(0)
    logprob = torch.randn(9, v, generator=g, device=device).log_softmax(-1)
    keys = torch.randint(2**62, (9,), generator=g, device=device)
    yield f"gumbel_pick, V {v}", lambda: (ops.gumbel_pick(logprob, keys, keys % 2**32),)


def differing(call: Call, repeats: int) -> int:
    """The number of repeats that differ from the first run in any bit."""
    first = call()
    return sum(
        not all(torch.equal(bits(x), bits(y)) for x, y in zip(call(), first, strict=True)) for _ in range(repeats)
    )


def bits(x: Tensor) -> Tensor:
    """`x` as integers, so that NaN equals itself and -0 differs from 0."""
    return x.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def main() -> None:
    """The command: run every call, or with --repeats compare its repeats, and print a line for each."""
    parser = command.parser("gpu.calls", __doc__)
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--only", default="", help="calls whose name contains this")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench.gpu.calls: there is no CUDA device")
    if args.repeats:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    found: dict[str, int] = {}
    for name, call in calls(large=args.repeats > 0):
        if args.only not in name:
            continue
        found[name] = differing(call, args.repeats)
        torch.cuda.synchronize()
        print(f"{name}: {found[name]} of {args.repeats} differ" if args.repeats else f"{name}: ran", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
