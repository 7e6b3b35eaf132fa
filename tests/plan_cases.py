"""A real update on ranks under PyTorch's profiler: the peak of its own allocation events."""

import json
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.plan import policy_of
from dwrl_fast.plan import PlanConfig
from dwrl_fast.ranks import Ranks


def peak(ranks: Ranks, config: PlanConfig, folder: Path) -> int:
    """Peak bytes of an update of every phase, from the profiler's events. The sums start before the model is created,
    and continue if the process was profiled before, so call this once per process.
    """
    torch.set_num_threads(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        policy, method, made = policy_of(config, ranks)
        (minibatch,) = policy.pack(made, config.minibatch_size)
        with record_function("the update"):
            for phase in method.phases:
                policy.update(phase, minibatch, method.loss, 0)
    file = folder / f"trace-{ranks.rank}.json"
    seen.export_chrome_trace(str(file))
    events = json.loads(file.read_text())["traceEvents"]
    file.unlink()
    update = next(each for each in events if each.get("name") == "the update" and "dur" in each)
    sums = [
        each["args"]["Total Allocated"]
        for each in events
        if each.get("name") == "[memory]" and update["ts"] <= each["ts"] <= update["ts"] + update["dur"]
    ]
    assert len(sums) > 100, "the profiler saw the allocations"
    return int(max(sums))
