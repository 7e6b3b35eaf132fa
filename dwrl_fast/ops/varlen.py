"""Attention within segments of unequal length, with its log-sum-exp: CUDA kernels that others keep, one interface.

flash_attn    the package of that name (FlashAttention-2); has a soft-cap
varlen        PyTorch's own FlashAttention: what it lacks it refuses; FlashAttention-3 and -4, where the user has
              activated one of them (torch.nn.attention.activate_flash_attention_impl), come in here

Both take bfloat16 and have no gradient of their own: forward and backward are called one by one. Both are asked for
their deterministic backward. Shapes: Tq queries, Tk keys, S segments, Hq query heads, Hkv key heads, D channels a head.
"""

import functools
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

INSTALL = "pip install flash-attn --no-build-isolation"


class Segments(NamedTuple):
    """Queries [bounds_q[s], bounds_q[s + 1]) attend to keys [bounds_k[s], bounds_k[s + 1]); none is empty.

    bounds: [S + 1] int32 on the device. longest: the most queries, keys in one segment. causal: aligned at the ends,
    the last query sees all keys of its segment.
    """

    bounds_q: Tensor
    bounds_k: Tensor
    longest_q: int
    longest_k: int
    causal: bool


class VarlenOptions(NamedTuple):
    """The options of `ops.tree_attention`. A window is for causal segments only."""

    scale: float
    softcap: float | None = None
    window: int | None = None


class Saved(NamedTuple):
    """What a backward pass reads: q, k, v as the forward pass took them, out and lse as it returned them."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor


Gradients = tuple[Tensor, Tensor, Tensor]


class Varlen(Protocol):
    """The interface of one library of kernels."""

    def problem(self, device: torch.device, dtype: torch.dtype, channels: int, softcap: float | None) -> str | None:
        """Why it cannot run such tensors, and what helps; None where it can. channels: D."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: VarlenOptions
    ) -> tuple[Tensor, Tensor]:
        """q [Tq, Hq, D]; k, v [Tk, Hkv, D] -> out [Tq, Hq, D], log-sum-exp [Hq, Tq] float32."""

    def backward(self, grad: Tensor, saved: Saved, segments: Segments, options: VarlenOptions) -> Gradients:
        """dq, dk, dv, shaped as q, k, v. grad: of out, [Tq, Hq, D]. Where out and lse are over more keys than these,
        the gradients are the part that comes from these keys.
        """


class FlashAttn:
    """The kernels of the package flash_attn."""

    def problem(self, device: torch.device, dtype: torch.dtype, channels: int, softcap: float | None) -> str | None:
        """As `Varlen.problem`."""
        return _unfit(device, dtype, channels) or _flash_attn_missing()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: VarlenOptions
    ) -> tuple[Tensor, Tensor]:
        """As `Varlen.forward`."""
        given = self._named(segments, options)
        out, lse, *_ = torch.ops.flash_attn._flash_attn_varlen_forward(q=q, k=k, v=v, **given)
        return out, lse

    def backward(self, grad: Tensor, saved: Saved, segments: Segments, options: VarlenOptions) -> Gradients:
        """As `Varlen.backward`."""
        q, k, v, out, lse = saved
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        torch.ops.flash_attn._flash_attn_varlen_backward(
            dout=grad, q=q, k=k, v=v, out=out, softmax_lse=lse, dq=dq, dk=dk, dv=dv, deterministic=True,
            **self._named(segments, options),
        )  # fmt: skip
        return dq, dk, dv

    @staticmethod
    def _named(segments: Segments, options: VarlenOptions) -> dict[str, Any]:
        windowed = options.window is not None
        return {
            "cu_seqlens_q": segments.bounds_q,
            "cu_seqlens_k": segments.bounds_k,
            "max_seqlen_q": segments.longest_q,
            "max_seqlen_k": segments.longest_k,
            "dropout_p": 0.0,
            "softmax_scale": options.scale,
            "causal": segments.causal,
            "window_size_left": options.window - 1 if options.window is not None else -1,
            "window_size_right": 0 if windowed else -1,
            "softcap": options.softcap or 0.0,
            "alibi_slopes": None,
        }


class Aten:
    """PyTorch's own kernels."""

    def problem(self, device: torch.device, dtype: torch.dtype, channels: int, softcap: float | None) -> str | None:
        """As `Varlen.problem`."""
        if softcap is not None:
            return f"PyTorch's kernel has no soft-cap; that of the package flash_attn has one ({INSTALL})"
        return _unfit(device, dtype, channels) or _aten_missing()

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, segments: Segments, options: VarlenOptions
    ) -> tuple[Tensor, Tensor]:
        """As `Varlen.forward`."""
        given = self._named(segments, options)
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            query=q, key=k, value=v, return_debug_mask=False, **given
        )
        return out, lse

    def backward(self, grad: Tensor, saved: Saved, segments: Segments, options: VarlenOptions) -> Gradients:
        """As `Varlen.backward`."""
        q, k, v, out, lse = saved
        no_dropout = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)
        with _deterministic():
            return torch.ops.aten._flash_attention_backward(
                grad_out=grad, query=q, key=k, value=v, out=out, logsumexp=lse, rng_state=no_dropout[0],
                unused=no_dropout[1], **self._named(segments, options),
            )  # fmt: skip

    @staticmethod
    def _named(segments: Segments, options: VarlenOptions) -> dict[str, Any]:
        windowed = options.window is not None
        return {
            "cum_seq_q": segments.bounds_q,
            "cum_seq_k": segments.bounds_k,
            "max_q": segments.longest_q,
            "max_k": segments.longest_k,
            "dropout_p": 0.0,
            "is_causal": segments.causal and not windowed,  # a window that ends at the query is causal by itself
            "scale": options.scale,
            "window_size_left": options.window - 1 if options.window is not None else None,
            "window_size_right": 0 if windowed else None,
        }


VARLEN: dict[str, Varlen] = {"flash_attn": FlashAttn(), "varlen": Aten()}  # the better first


def _unfit(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """What neither can do."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if dtype != torch.bfloat16:
        return f"its kernels compute in bfloat16, and q is {dtype} (load the model in bfloat16, or use torch.autocast)"
    if channels % 8 or channels > 256:
        return f"heads have {channels} channels; its kernels take multiples of 8 up to 256"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"its kernels need compute capability 8.0 (Ampere) or newer; this GPU has {major}.{minor}"
    return None


@functools.cache
def _flash_attn_missing() -> str | None:
    try:
        importlib.import_module("flash_attn.flash_attn_interface")  # registers torch.ops.flash_attn
    except ModuleNotFoundError as error:
        return f"the package flash_attn is not installed ({error}; {INSTALL})"
    except ImportError as error:  # built for another PyTorch
        return f"the package flash_attn cannot be imported ({error}; {INSTALL} --force-reinstall --no-deps)"
    if not _takes("flash_attn", FLASH_ATTN):
        return f"the package flash_attn takes other arguments than this package knows ({INSTALL} --upgrade)"
    return None


@functools.cache
def _aten_missing() -> str | None:
    if not torch.backends.cuda.is_flash_attention_available():
        return "this PyTorch was built without flash attention"
    if not _takes("aten", ATEN):
        return f"PyTorch {torch.__version__} has other varlen flash operators than this package knows"
    return None


# What is named above to each operator. Neither is a public interface: they are looked at before they are called.
FLASH_ATTN = {
    "_flash_attn_varlen_forward": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale "
    "causal window_size_left window_size_right softcap alibi_slopes",
    "_flash_attn_varlen_backward": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k max_seqlen_q "
    "max_seqlen_k dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes deterministic",
}
ATEN = {
    "_flash_attention_forward": "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask "
    "scale window_size_left window_size_right",
    "_flash_attention_backward": "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p "
    "is_causal rng_state unused scale window_size_left window_size_right",
}


def _takes(library: str, operators: dict[str, str]) -> bool:
    """Whether each operator has these arguments, and no other without a default."""
    for name, given in operators.items():
        operator = getattr(getattr(torch.ops, library), name, None)
        if operator is None:
            return False
        arguments = operator.default._schema.arguments
        needed = {a.name for a in arguments if not a.has_default_value()}
        if not needed <= set(given.split()) <= {a.name for a in arguments}:
            return False
    return True


@contextmanager
def _deterministic() -> Iterator[None]:
    """PyTorch's operator has no argument for it."""
    settings: Any = torch.utils.deterministic
    mode, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn)
        settings.fill_uninitialized_memory = fill
