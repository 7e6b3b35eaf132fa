"""Compiles the Triton kernels ahead of time, without a GPU, and reads their use of multiprocessor resources."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from dwrl_fast.kernels import attention, cache, gumbel, rows, scaled, yes_no

HEAD = ("hidden", "weight_yes", "weight_no", "bias_yes", "bias_no")
HEADS = ("q", "k", "v", "out", "grad", "dk", "dv", "dq", "key_blocks", "value_blocks")
PLACES = ("order", "bounds", "shared", "keys", "below", "place", "runs", "split", "seen", "counts")
POINTERS = dict.fromkeys((*HEAD, *HEADS), "*bf16") | dict.fromkeys(PLACES, "*i32")
POINTERS |= dict.fromkeys(("targets", "position", "slot", "tiles", "row_keys", "row_positions", "chosen"), "*i64")
STRIDES = tuple(f"{kind}_{x}" for kind in ("stride", "head") for x in "qkvg")
SCALARS = dict.fromkeys(("C", "Q", "T", "U", "COUNT", "capacity", "shares", "window", *STRIDES), "i32")
SCALARS |= dict.fromkeys(("clip_low", "clip_high", "beta", "scale", "cap"), "fp32")


class Variant(NamedTuple):
    """A kernel with its constants, warps and stages, and the number of bytes that a thread may spill."""

    kernel: Any
    constants: dict[str, Any]
    warps: int
    stages: int = 3
    spilled: int = 4  # one register, which Triton 3.6's assembler spills for occupancy (sm_100, float32, V 128256)


def row_pass(kernel: Any, v: int, **options: bool) -> Variant:
    """A kernel of the row pass over a vocabulary of `v`."""
    return Variant(kernel, {"V": v, "BLOCK": rows.BLOCK} | options, rows.WARPS)


def walks(channels: int, **options: bool) -> list[Variant]:
    """The attention kernels for bfloat16 heads with `channels` channels, 28 query heads and 4 key heads."""
    given = {"HAS_CAP": False, "HAS_WINDOW": False, "PRECISION": "tf32"} | options
    given |= {"GROUP": 7, "HEADS": 28, "D": channels, "BLOCK_D": channels}
    blocks = attention.sizes(torch.bfloat16, channels)
    kernels = (attention.attend_kernel, attention.to_keys_kernel, attention.to_queries_kernel)
    return [
        Variant(kernel, given | {"QUERIES": of.queries, "KEYS": of.keys}, of.warps, of.stages, spilled=500)
        for kernel, of in zip(kernels, blocks, strict=True)
    ]


BLOCKED = {"GROUP": 7, "HEADS": 4, "D": 128, "DV": 128, "BLOCK_D": 128, "BLOCK": 64}


def of_cache(channels: int, rows_: int, **options: bool) -> Variant:
    """Attention to a cache of blocks of 64 tokens, for the same heads and `rows_` rows per program."""
    given = BLOCKED | {"HAS_CAP": False, "HAS_WINDOW": False, "SHARED": False, "PRECISION": "tf32"} | options
    of = cache.sizes(torch.bfloat16, channels)
    given |= {"D": channels, "DV": channels, "BLOCK_D": channels, "ROWS": rows_, "KEYS": of.keys}
    return Variant(cache.attend_kernel, given, of.warps, of.stages, spilled=20)


VARIANTS = [
    row_pass(rows.policy_rows_kernel, 151936, HAS_CAP=True, HAS_REF=True, GRADIENT=True),
    row_pass(rows.policy_rows_kernel, 128256, HAS_CAP=False, HAS_REF=False, GRADIENT=True),
    row_pass(rows.policy_rows_kernel, 32003, HAS_CAP=False, HAS_REF=False, GRADIENT=False),
    row_pass(rows.logprob_rows_kernel, 128256, HAS_CAP=True),
    row_pass(rows.logprob_rows_grad_kernel, 151936, HAS_CAP=True, HAS_ENTROPY=True),
    row_pass(rows.logprob_rows_grad_kernel, 32003, HAS_CAP=False, HAS_ENTROPY=False),
    Variant(rows.policy_loss_kernel, {"HAS_REF": True, "HAS_ENTROPY": True, "TOKENS": rows.TOKENS}, 4),
    Variant(yes_no.yes_no_kernel, {"H": 896, "HAS_CAP": True, "HAS_BIAS": True, "BLOCK": yes_no.BLOCK}, 4),
    Variant(scaled.scaled_kernel, {"BLOCK": scaled.BLOCK}, 8),
    Variant(attention.dot_out_kernel, {"HEADS": 28, "D": 128, "BLOCK_D": 128, "ROWS": attention.ROWS}, 4, spilled=8),
    Variant(attention.sum_parts_kernel, {"HEADS": 4, "D": 128, "BLOCK_D": 128, "KEYS": 64}, 4),
    *walks(128), *walks(128, HAS_CAP=True, HAS_WINDOW=True), *walks(64), *walks(256),
    Variant(gumbel.pick_kernel, {"V": 151936, "BLOCK": gumbel.BLOCK}, gumbel.WARPS),
    Variant(cache.keep_kernel, BLOCKED | {"TOKENS": cache.KEPT}, 4),
    Variant(cache.list_kernel, BLOCKED | {"ROWS": 64, "TILES": cache.LISTED, "HAS_WINDOW": True}, 4),
    Variant(cache.join_kernel, BLOCKED | {"ROWS": cache.JOINED}, 4),
    of_cache(128, 64), of_cache(128, 16, HAS_CAP=True, HAS_WINDOW=True, SHARED=True), of_cache(64, 64),
    of_cache(256, 64),
]  # fmt: skip
NULLABLE = {"HAS_REF": "ref_logprob", "HAS_ENTROPY": "grad_entropy", "GRADIENT": "gradient"}
REGISTERS, WARPS_HELD = 65536, 64  # of a multiprocessor, from sm_80 on


class Compiled(NamedTuple):
    """registers a thread; spill_stores, spill_loads and shared in bytes, the last a program's; warps of a program."""

    ptx: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int
    warps: int

    @property
    def occupancy(self) -> float:
        """The share of a multiprocessor's warps that can be resident, limited by registers, which are allocated in
        units of 8 per thread.
        """
        programs = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(1.0, programs * self.warps / WARPS_HELD)


def compiled(variant: int, capability: int, logits: str, gradient: str) -> Compiled:
    """logits, gradient: Triton's names of their dtypes. A narrower gradient overwrites the logits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, warps, stages, _ = VARIANTS[variant]
    constants = constants | {name: None for flag, name in NULLABLE.items() if constants.get(flag) is False}
    kinds = POINTERS | SCALARS | {"logits": f"*{logits}"}
    if kernel is not rows.policy_loss_kernel:  # its gradient is per token and float32
        kinds |= {"gradient": f"*{gradient}"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
    # PyTorch's memory is aligned to 16 bytes. Triton then compiles wide loads, which need more registers.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind[0] == "*" or name in STRIDES
    }
    constants = {name: value for name, value in constants.items() if name in signature}
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    return Compiled(made.asm["ptx"], *_assembled(made.asm["ptx"], capability), made.metadata.shared, warps)


def _assembled(ptx: str, capability: int) -> tuple[int, int, int]:
    """Registers, bytes of spill stores and of spill loads, as the assembler that Triton bundles reports them."""
    from triton.backends import nvidia

    target = re.search(r"\.target (\w+)", ptx)
    assert target
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        assembler = Path(nvidia.__file__).parent / "bin" / ("ptxas-blackwell" if capability >= 100 else "ptxas")
        command = [str(assembler), "-v", "--gpu-name", target[1], file.name, "-o", os.devnull]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers and spills, report
    return int(registers[1]), int(spills[1]), int(spills[2])
