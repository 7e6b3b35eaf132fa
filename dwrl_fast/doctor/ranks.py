"""Checks of several processes: communication, shared computation, and memory."""

import math
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dwrl_fast.doctor.finding import Finding, status_of
from dwrl_fast.doctor.setup import Computed, Setup, compute, difference
from dwrl_fast.doctor.weights import changed, small_weights
from dwrl_fast.encode import Group
from dwrl_fast.models.finite import listed
from dwrl_fast.ranks import Ranks
from dwrl_fast.scoring import Runtime

SIZE = 2**22  # numbers in the timed sum: 16 MiB
# Gradients may differ by rounding: the relative bound, by the dtype of the pass.
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.1}
# Newer versions of PyTorch have new names for these functions and warn about the old ones.
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
NETWORK = (
    "Check the network and the communication libraries (NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME), "
    "and run the doctor on one machine first."
)


def collectives(ranks: Ranks, device: torch.device) -> Finding:
    """Run the collectives of training on inputs with known results, and time a sum."""
    own, count = ranks.rank, ranks.count
    wrong = []
    if ranks.gather(own) != list(range(count)):
        wrong.append("gather of objects")
    if ranks.from_first(lambda: 7) != 7:
        wrong.append("broadcast of objects")
    every = count * (count + 1) // 2
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        if not (ranks.sum(torch.full((5,), own + 1, dtype=dtype, device=device)) == every).all():
            wrong.append(f"sum of {dtype}")
    whole = torch.empty(2 * count, device=device)
    ALL_GATHER(whole, torch.full((2,), float(own), device=device))
    if whole.tolist() != [float(rank) for rank in range(count) for _ in range(2)]:
        wrong.append("gather of tensors")
    part = torch.empty(2, device=device)
    REDUCE_SCATTER(part, torch.arange(2.0 * count, device=device))
    if part.tolist() != [count * (2.0 * own), count * (2.0 * own + 1)]:
        wrong.append("scattered sum")
    found = sorted(set().union(*ranks.gather(set(wrong))))
    seconds = max(ranks.gather(seconds_of(lambda: ranks.sum(torch.ones(SIZE, device=device)), device)))
    backend = dist.get_backend_config().strip()
    said = f"{count} ranks over {backend}; a sum of {4 * SIZE / 2**20:.0f} MiB takes {1000 * seconds:.3g} ms"
    figures = {"ranks": count, "seconds": seconds}
    if found:
        return Finding("collectives", "fail", f"{said}; wrong results from: {', '.join(found)}", NETWORK, figures)
    return Finding(
        "collectives", "pass", f"{said}; gather, broadcast, sum and scatter give the right results", figures=figures
    )


def seconds_of(run: Callable[[], Any], device: torch.device) -> float:
    """The seconds of the second call; the first call sets up connections."""
    for _ in range(2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - started


def uneven(setup: Setup, groups: Sequence[Group], computed: Sequence[Computed]) -> Finding:
    """Compare one group (all ranks but one have none) and an odd number of groups with all groups computed together."""
    ranks = setup.runtime.ranks
    one = compute(setup, groups[:1])
    odd = groups[: max(1, len(groups) - 1 + len(groups) % 2)]
    apart = difference([*one, *compute(setup, odd)], [*computed[:1], *computed[: len(odd)]])
    worst = max(ranks.gather(max(value for key, value in apart.items() if key.endswith("mean"))))
    return Finding(
        "uneven ranks",
        status_of(worst, 0.02, 0.1),
        f"1 group (all ranks but one have none) and {len(odd)} groups: on every rank within {worst:.2g} nats of all "
        "groups computed together",
        "This is a fault of the package or of the backend: please report it with this line.",
        {"mean": worst},
    )


def gradients(runtime: Runtime) -> Finding:
    """Compare the sharded gradient of a loss on two tokens, which one rank computes while the others are idle, with
    that of the whole model on the first rank's CPU. All ranks call this together.
    """
    ranks, sharded, layout = runtime.ranks, runtime.sharded, runtime.layout
    assert sharded is not None
    batch = layout.idle()
    last = ranks.rank == ranks.count - 1
    with runtime.compute.autocast():
        value = _loss(runtime.model, batch) if last else runtime.model.idle(batch)
    value.backward()
    whole = sharded.whole()
    expected: dict[str, Tensor] = {}
    if whole is not None:
        alone = _loss(
            whole.float(), type(layout)(layout.packing, layout.token_budget, layout.pad_id, torch.device("cpu")).idle()
        )
        alone.backward()
        expected = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
    sizes, apart = {}, {}
    for name, p in sharded.parts.items():
        if p.requires_grad and p.grad is not None:
            assert isinstance(p.grad, DTensor)
            full = p.grad.full_tensor().float().cpu()
            if name in expected:
                sizes[name] = expected[name].norm().item()
                apart[name] = (full - expected[name]).norm().item()
        p.grad = None
    del whole, expected
    size = math.sqrt(sum(each**2 for each in sizes.values()))
    relative = {name: each / (size or math.nan) for name, each in apart.items()}
    worst = ranks.from_first(lambda: torch.tensor([*relative.values(), *[math.nan] * (not relative)]).max().item())
    most = ROUNDING[runtime.compute.dtype]
    wrong = ranks.from_first(lambda: [name for name, each in relative.items() if not each <= most])
    seen = f"on two tokens the gradients differ from those of the whole model by at most {worst:.1g} of their size"
    if wrong or not worst <= most:
        return Finding(
            "sharded gradients",
            "fail",
            f"{seen}: {listed(wrong)}",
            "Do not train over several processes here: use one, or other versions of PyTorch and of the backend.",
            {"relative": worst},
        )
    return Finding("sharded gradients", "pass", seen, figures={"relative": worst})


def _loss(model: Any, batch: Any) -> Tensor:
    """Minus the log-prob of the second token, or the reward."""
    if not hasattr(model, "head"):
        return model(batch).sum()
    head = model(batch, tokens=True)
    return -head.logprobs(head.token, batch.targets).sum()


def synced(runtime: Runtime) -> Iterator[Finding]:
    """Compare the replica of every rank with the gathered weights after a change of one weight. All ranks call this
    together.
    """
    ranks, sharded = runtime.ranks, runtime.sharded
    if sharded is None or sharded.replica is None:
        return
    ((name, part), *_) = small_weights(runtime)
    with changed(runtime, part):
        sharded.refresh()
        own = _stale(sharded)
    sharded.refresh()
    wrong = sorted(set().union(*ranks.gather(own | _stale(sharded))))
    if wrong:
        yield Finding(
            "replicas",
            "fail",
            f"after a change of {name} some ranks would sample from weights that are not the trained ones: "
            f"{listed(wrong)}",
            "Do not train over several processes here: use one, or other versions of PyTorch and of the backend.",
        )
    else:
        yield Finding(
            "replicas", "pass", f"after a change of {name}, and back, every rank samples from the trained weights"
        )


def _stale(sharded: Any) -> set[str]:
    """The weights whose values in this rank's replica are not bit-identical to the gathered ones."""
    whole = dict(sharded.replica.named_parameters())
    return {name for name, full in sharded.gathered() if not torch.equal(whole[name].data, full.to(whole[name].dtype))}


def peak(ranks: Ranks, device: torch.device) -> Finding:
    """The peak memory of each rank so far."""
    if device.type == "cuda":
        own = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
    every = ranks.gather(own)
    said = f"{', '.join(f'{each:.3g}' for each in every)} GiB by rank: the peak of this examination"
    return Finding("peak memory", "pass", said, figures={f"rank {i} GiB": each for i, each in enumerate(every)})
