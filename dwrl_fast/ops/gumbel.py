"""Random draws whose noise depends only on a key, a position and the token, not on the rest of the batch."""

import torch
from torch import Tensor

from dwrl_fast.errors import UserError
from dwrl_fast.ops import extension, oracle
from dwrl_fast.ops.backend import choose_backend


def gumbel_pick(logprob: Tensor, keys: Tensor, positions: Tensor, *, backend: str = "auto") -> Tensor:
    """[R] int64: for each row an id drawn with probability exp(logprob), by the Gumbel-max trick.

    logprob: [R, V] float32, nats. keys: [R] int64. positions: [R] int64, 0 to 2^32 - 1, the position of the drawn token
    in its text. The noise of token v is word v mod 4 of Philox 4x32-10 (Salmon et al., 2011) with the row's key and the
    counter (v div 4, position), the numbers of `triton.language.randint4x(key, position << 32 | v div 4)`. A row's draw
    is the same in any batch; rounding differences in log-probs seldom change it. A row with NaN gives the index of a
    NaN.

    Raises UserError, which names the argument.
    """
    name = "gumbel_pick"
    if logprob.dim() != 2 or logprob.dtype != torch.float32 or 0 in logprob.shape[1:]:
        raise UserError(f"{name}: logprob is {logprob.dtype} {list(logprob.shape)}; expected float32 [R, V]")
    for label, x in (("keys", keys), ("positions", positions)):
        if x.dtype != torch.int64 or x.shape != logprob.shape[:1] or x.device != logprob.device:
            raise UserError(
                f"{name}: {label} is {x.dtype} {list(x.shape)} on {x.device}; expected int64 [R = {len(logprob)}] on "
                f"{logprob.device}"
            )
    if positions.device.type == "cpu" and positions.numel() and not 0 <= positions.min() <= positions.max() < 2**32:
        raise UserError(
            f"{name}: positions hold {int(positions.min())} to {int(positions.max())}; they must be 0 to 2^32 - 1"
        )
    chosen = choose_backend(backend, name, logprob)
    if chosen == "reference":
        return oracle.gumbel_pick(logprob, keys, positions)
    if chosen == "triton":
        return _picked(logprob, keys, positions)
    found: Tensor = torch.ops.dwrl_fast.gumbel_pick(logprob, keys, positions)
    return found


@torch.compiler.disable
def _picked(logprob: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
    from dwrl_fast.kernels import gumbel

    return gumbel.pick(logprob, keys, positions)


if extension.problem() is None:
    torch.library.register_fake("dwrl_fast::gumbel_pick", lambda logprob, keys, positions: torch.empty_like(keys))
