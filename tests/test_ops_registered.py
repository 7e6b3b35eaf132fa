"""Registration: opcheck on every operator, eager equals compiled, gradcheck on the definitions."""

from typing import Any

import pytest
import torch
from dwrl_fast.kernels import yes_no
from ops_cases import inputs

from dwrl_fast import ops
from dwrl_fast.ops import clipped, extension, logprob, oracle

built = pytest.mark.skipif(extension.problem() is not None, reason="the C++ operators are not built")
T, H, V = 13, 8, 67


def tokens(**options: Any) -> dict[str, Any]:
    return inputs((T, H, V), torch.float32, **options)


def arguments(name: str) -> Any:
    """(operator, arguments) for each way in which a registered operator is called. The results have no NaN, because
    opcheck compares them.
    """
    x = {k: y.detach() if isinstance(y, torch.Tensor) else y for k, y in tokens().items()}
    head, t = (x["hidden"], x["weight"], x["bias"]), x["targets"]
    old, a, w = x["old_logprob"], x["advantage"] + 9, x["token_weight"] + 0.1
    differentiable = tuple(y.clone().requires_grad_() for y in head)
    rule, scaling = (0.2, 0.2, 0.1), (1.0, None)
    raw: Any = torch.ops.dwrl_fast
    z = torch.randn(T, V)
    return {
        "linear_policy_loss": [
            (clipped._linear_policy_loss, (*head, t, old, a, w, old - 0.1, *rule, *scaling, *needs, "cpu"))
            for needs in ((True, True, True), (True, False, False), (False, False, False))
        ],
        "policy_loss": [(clipped._policy_loss, (old, old - 0.1, a, w, old, -old, *rule, "cpu"))],
        "linear_logprob": [(logprob._linear_logprob, (*differentiable, t, *scaling, True, 3, "cpu"))],
        "linear_logprob_backward": [
            (logprob._linear_logprob_backward, (a, None, *head, t, *scaling, True, True, False, "cpu"))
        ],
        "policy_rows_": [(raw.policy_rows_.default, (z, t, old, a, w, None, *rule[:2], 0.0, *scaling, True))],
        "logprob_rows_": [(raw.logprob_rows_.default, (z, t, *scaling))],
        "logprob_rows_grad_": [(raw.logprob_rows_grad_.default, (z, t, a, w, *scaling))],
        "policy_loss_rows": [(raw.policy_loss_rows.default, (old, old - 0.1, a, w, old, -old, *rule))],
        "gumbel_pick": [(raw.gumbel_pick.default, (z.log_softmax(-1), torch.arange(T), torch.arange(T)))],
        "cache_attention_": [
            (raw.cache_attention_.default, (z[:4, :32].view(4, 4, 8), *z[:2, :64].view(2, 4, 2, 8), *cache(), *given))
            for given in ((0.3, None, None), (0.3, 5.0, 2))
        ],
        "yes_no_scores_backward": [
            (yes_no._scores_backward, (a, torch.stack([a, w], 1), *head, 3, 5, True, True, True))
        ],
    }[name]


def cache() -> tuple[torch.Tensor, ...]:
    """Two blocks of two heads of 8 channels, and a step of 4 tokens; the last token is not kept."""
    keys, values = (torch.zeros(2, *shape) for shape in ops.cache_shapes(2, 8))
    slot = torch.tensor([64, 65, 66, -1])
    return keys, values, torch.arange(4), slot, torch.tensor([[1, 0, 3, 0, 4]])


ROW_PASS = ["policy_rows_", "logprob_rows_", "logprob_rows_grad_", "policy_loss_rows"]
NAMES = [
    "linear_policy_loss", "policy_loss", "linear_logprob", "linear_logprob_backward", "yes_no_scores_backward",
    "gumbel_pick", "cache_attention_", *ROW_PASS,
]  # fmt: skip


@built
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name: str) -> None:
    """The operators of the row pass run inside other operators, which support tracing. Only their schema is tested."""
    tests: dict[str, Any] = {"test_utils": "test_schema"} if name in ROW_PASS else {}
    for operator, args in arguments(name):
        torch.library.opcheck(operator, args, **tests)


@built
def test_nothing_registered_is_left_unchecked() -> None:
    """`yes_no_scores` launches a Triton kernel, so test_ops_triton.py checks it. `instruction_set` has no tensors, so
    test_ops_instruction_sets.py checks it.
    """
    extension.problem()
    all_names = {n.split("::")[1].split(".")[0] for n in torch._C._dispatch_get_all_op_names() if "dwrl_fast::" in n}
    ours = {n for n in all_names if not n.startswith("tree_")}
    assert ours == {*NAMES, "yes_no_scores", "instruction_set"}


@pytest.mark.slow
@built
def test_eager_equals_compiled() -> None:
    x = tokens(softcap=20.0)
    old, a, w = x["old_logprob"], x["advantage"], x["token_weight"]

    def everything(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        r = ops.linear_policy_loss(hidden, weight, x["targets"], old, a, w, bias=bias, softcap=20.0)
        lp, entropy = ops.linear_logprob(hidden, weight, x["targets"], temperature=0.7, return_entropy=True)
        given = ops.policy_loss(lp, old, a, w, ref_logprob=old, beta=0.1)
        s, mass = ops.yes_no_logprob(hidden, weight, 3, 5, return_mass=True)
        two = ops.yes_no_logprob(hidden, weight, 3, 5, normalization="yes_no")
        total = 2 * r.loss + given.loss + entropy.sum() + s.sum() + two.sum()
        return total, r.logprob, r.stats, given.stats, mass

    head = x["hidden"], x["weight"], x["bias"]
    eager = everything(*head)
    compiled = torch.compile(everything, fullgraph=True)(*head)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(other, one, equal_nan=True, rtol=1e-6, atol=1e-6)
    gradients = (torch.autograd.grad(y[0], head) for y in (eager, compiled))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", [{}, {"softcap": 5.0, "temperature": 0.7}], ids=str)
@pytest.mark.parametrize("operator", ["linear_policy_loss", "beta", "linear_logprob", "vocab", "yes_no"])
def test_gradcheck_of_the_definitions(operator: str, head: dict[str, Any]) -> None:
    x = inputs((9, 4, 11), torch.float64, **head)
    old, a, w = x["old_logprob"], x["advantage"], x["token_weight"]
    cap: Any = {"softcap": head.get("softcap")}

    def value(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Any:
        if operator == "linear_logprob":
            return oracle.linear_logprob(hidden, weight, x["targets"], bias=bias, return_entropy=True, **head)
        if operator in ("vocab", "yes_no"):
            return oracle.yes_no_logprob(hidden, weight, 1, 2, normalization=operator, bias=bias, **cap)
        kl = {"ref_logprob": old - 0.2, "beta": 0.3} if operator == "beta" else {}
        return oracle.linear_policy_loss(hidden, weight, x["targets"], old, a, w, bias=bias, **head, **kl).loss

    assert torch.autograd.gradcheck(value, (x["hidden"], x["weight"], x["bias"]))
