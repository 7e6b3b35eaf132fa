"""The results of `ops_cases.results` with error bounds for every number: the definitions and their derivatives."""

from typing import Any

import torch
from rounding import Bounds, Rounded, product
from torch import Tensor

from dwrl_fast.ops import oracle, products


def bounds(
    operator: str, x: dict[str, Any], *, direct: bool = False, clip_low: float = 0.2, clip_high: float = 0.2,
    beta: float = 0.0, normalization: str = "vocab",
) -> Bounds:  # fmt: skip
    """hidden's dtype applies to the logits, their gradient, and the returned gradients; everything between is in the
    wide dtype. Logits of scores are wide, and so are all logits if products return wide results (`direct`: on CUDA).
    """
    narrow, (t, v) = x["hidden"].dtype, (len(x["targets"]), len(x["weight"]))
    every = torch.arange(v)
    scores = operator == "yes_no_logprob"
    if scores:
        x = x | {"head": x["head"] | {"temperature": 1.0}}  # it has none
    columns = torch.tensor([v - 1, 0]) if normalization == "yes_no" else every
    targets = torch.full((t,), 0 if normalization == "yes_no" else v - 1) if scores else x["targets"]
    logits, slope = _logits(x, columns, products.wide(narrow) if scores or direct else narrow)
    logp = logits.log_softmax()
    p, logprob = logp.exp(), logp[torch.arange(t), targets]
    entropy = (p * logp * -1).sum(1)
    a, w = x["advantage"].double(), x["token_weight"].double()
    if operator == "linear_policy_loss":
        found, k = _policy(x, logprob, entropy, (1 - clip_low, 1 + clip_high), beta)
        k, h = k * 1.5, 0 * w
    elif scores:
        whole = _logits(x, every, products.wide(narrow))[0].log_softmax()[:, [v - 1, 0]]
        either = Rounded(whole.value, whole.error.sum(1, keepdim=True), whole.u)  # one label from the other
        found, k, h = {"score": logprob, "mass": either.exp().sum(1)}, logprob * 0 + a, 0 * w
    else:
        found, k, h = {"logprob": logprob, "entropy": entropy}, logprob * 0 + a, w
    onehot = torch.zeros_like(p.value).scatter_(1, targets[:, None], 1)
    d_logits = (p * -1 + onehot) * k[:, None] - p * (logp + entropy[:, None]) * h[:, None]
    return found | _products(x, columns, (d_logits * slope).narrowed(narrow))


def _double(x: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    bias = x["bias"]
    return (
        x["hidden"].detach().double(),
        x["weight"].detach().double(),
        None if bias is None else bias.detach().double(),
    )


def _logits(x: dict[str, Any], columns: Tensor, narrow: torch.dtype) -> tuple[Rounded, Rounded]:
    """The logits of some columns, after soft-cap and temperature, and their derivative with respect to the head's
    output.
    """
    head = {"temperature": 1.0, "softcap": None} | x["head"]
    hidden, weight, bias = _double(x)
    wide = products.wide(x["hidden"].dtype)
    z = (Rounded.given(hidden, wide) @ weight[columns].t()).narrowed(narrow)
    if bias is not None:
        z = (z + bias[columns]).narrowed(narrow)
    one = Rounded.given(torch.ones_like(z.value), wide)
    if head["softcap"] is None:
        slope = one
    else:
        u = (z * (1 / head["softcap"])).tanh()
        z, slope = u * head["softcap"], one - u * u
    return z * (1 / head["temperature"]), slope * (1 / head["temperature"])


def _products(x: dict[str, Any], columns: Tensor, d_logits: Rounded) -> Bounds:
    """The returned gradients, from the logit gradients of some columns."""
    hidden, weight, bias = _double(x)
    narrow, back = x["hidden"].dtype, d_logits.moved(Tensor.t)

    def whole(some: Rounded) -> Rounded:
        return some.moved(lambda y: y.new_zeros(len(weight), y.shape[1]).index_copy(0, columns, y))

    found = {"d_hidden": product(d_logits, weight[columns], narrow), "d_weight": whole(product(back, hidden, narrow))}
    if bias is not None:
        found["d_bias"] = whole(product(back, torch.ones_like(hidden[:, :1]), narrow))[:, 0]
    return found


def _policy(
    x: dict[str, Any], logprob: Rounded, entropy: Rounded, edges: tuple[float, float], beta: float
) -> tuple[Bounds, Rounded]:
    """Loss, logprob, stats, and the derivative of the loss with respect to logprob. Rounding moves no ratio over a clip
    boundary.
    """
    a, w, old = (x[k].double() for k in ("advantage", "token_weight", "old_logprob"))
    trained = oracle.trained_rows(a, w, beta)
    log_ratio = logprob - old
    ratio = log_ratio.exp()
    clipped = ((a > 0) & (ratio.value > edges[1])) | ((a < 0) & (ratio.value < edges[0]))
    slope = ratio * (a * ~clipped)
    edge = torch.full_like(a, edges[0]).masked_fill(a > 0, edges[1])
    gain = slope + edge * a * clipped
    kl = log_ratio * torch.nan
    if beta:
        apart = logprob * 0 + old + 0.1 - logprob
        kl = apart.exp() - 1 - apart
        gain, slope = gain - kl * beta, slope + (apart.exp() - 1) * beta
    one = logprob * 0 + 1
    terms = (one, one * w, ratio, log_ratio, one * clipped, kl, entropy, one * 0)
    size = log_ratio * log_ratio.value.sign()
    parts = [y[trained].sum(0) for y in terms]
    parts += [Rounded(y.value[trained].amax(), y.error[trained].amax(), y.u) for y in (ratio, size)]
    stats = Rounded(*(torch.stack([getattr(y, k) for y in parts]) for k in ("value", "error")), one.u)
    w = w * -trained.double()
    kept = logprob * torch.where(trained, 1.0, torch.nan)
    return {"loss": (gain * w).sum(0), "logprob": kept, "stats": stats}, slope * w
