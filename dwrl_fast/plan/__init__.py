"""Predicts the needs of a run: memory by kind, time by stage, and cost, on 1 to 1,024 GPUs. The real model is traced
under the real FSDP2 with fake tensors (trace.py); the rest is arithmetic on the trace (memory.py, seconds.py).
"""

from dwrl_fast.plan.options import PlanConfig, parse_plan
from dwrl_fast.plan.profile import Profile, load_profile
from dwrl_fast.plan.setup import Setup, planned
from dwrl_fast.plan.sizing import Sized

__all__ = ["PlanConfig", "Profile", "Setup", "Sized", "load_profile", "parse_plan", "planned"]
