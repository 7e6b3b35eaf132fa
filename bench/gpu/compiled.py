"""The Triton kernels compiled ahead of time, for GPUs that are not here: what each takes of a multiprocessor."""

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from dwrl_fast.kernels import copies, rows, yes_no

HEAD = ("hidden", "weight_yes", "weight_no", "bias_yes", "bias_no")
POINTERS = dict.fromkeys(("targets", "order", "bounds"), "*i64") | dict.fromkeys((*HEAD, "copies", "sums"), "*bf16")
SCALARS = dict.fromkeys(("C", "T"), "i32") | dict.fromkeys(("clip_low", "clip_high", "beta", "scale", "cap"), "fp32")
ROWS = {"BLOCK": rows.BLOCK}
VARIANTS: list[tuple[Any, dict[str, Any], int]] = [  # kernel, constants, warps
    (rows.policy_rows_kernel, ROWS | {"V": 151936, "HAS_CAP": True, "HAS_REF": True, "GRADIENT": True}, rows.WARPS),
    (rows.policy_rows_kernel, ROWS | {"V": 128256, "HAS_CAP": False, "HAS_REF": False, "GRADIENT": True}, rows.WARPS),
    (rows.policy_rows_kernel, ROWS | {"V": 32003, "HAS_CAP": False, "HAS_REF": False, "GRADIENT": False}, rows.WARPS),
    (rows.logprob_rows_kernel, ROWS | {"V": 128256, "HAS_CAP": True}, rows.WARPS),
    (rows.logprob_rows_grad_kernel, ROWS | {"V": 151936, "HAS_CAP": True, "HAS_ENTROPY": True}, rows.WARPS),
    (rows.logprob_rows_grad_kernel, ROWS | {"V": 32003, "HAS_CAP": False, "HAS_ENTROPY": False}, rows.WARPS),
    (rows.policy_loss_kernel, {"HAS_REF": True, "HAS_ENTROPY": True, "TOKENS": rows.TOKENS}, 4),
    (yes_no.yes_no_kernel, {"H": 896, "HAS_CAP": True, "HAS_BIAS": True, "BLOCK": yes_no.BLOCK}, 4),
    (copies.sum_copies_kernel, {"CHANNELS": 512, "COPIES": copies.COPIES, "BLOCK": 512}, 4),
]
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
        """Share of the warps that a multiprocessor can hold, by registers: they are given out in 8 a thread."""
        programs = REGISTERS // (-(-self.registers // 8) * 8 * 32 * self.warps)
        return min(1.0, programs * self.warps / WARPS_HELD)


def compiled(variant: int, capability: int, logits: str, gradient: str) -> Compiled:
    """logits, gradient: Triton's names of their dtypes. A narrower gradient lies over the logits."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, constants, warps = VARIANTS[variant]
    constants = constants | {name: None for flag, name in NULLABLE.items() if constants.get(flag) is False}
    constants["STRIDE"] = constants.get("V", 0) * (2 if (logits, gradient) == ("fp32", "bf16") else 1)
    kinds = POINTERS | SCALARS | {"logits": f"*{logits}"}
    if kernel is not rows.policy_loss_kernel:  # there the gradient is per token, and float32
        kinds |= {"gradient": f"*{gradient}"}
    signature = {name: "constexpr" if name in constants else kinds.get(name, "*fp32") for name in kernel.arg_names}
    # PyTorch's memory is aligned to 16 bytes, and Triton then compiles wide loads, which take more registers.
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    constants = {name: value for name, value in constants.items() if name in signature}
    made = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": warps},
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
