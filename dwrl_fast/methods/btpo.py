"""`btpo`: `dwrl` with both updates in one (`--alternate joint`), with standardised thought rewards (docs/method.md,
2).
"""

from typing import Any

from dwrl_fast.errors import ConfigError
from dwrl_fast.methods.dwrl import DualWeightedRL


class JointDualWeightedRL(DualWeightedRL):
    """`dwrl` with one setting of its options."""

    name = "btpo"
    summary = "dwrl in one joint update"

    @classmethod
    def validate(cls, config: Any) -> None:
        """It names one setting of `dwrl`'s options; what contradicts it is refused."""
        contrary = {"alternate": ("joint", config.alternate == "rollout" or "alternate" in config.explicit)}
        contrary["joint_reward"] = ("standardised", True)
        for name, (value, given) in contrary.items():
            if given and getattr(config, name) != value:
                raise ConfigError(
                    f"{name} = {getattr(config, name)} with method = btpo, which is dwrl with {name} = {value}: leave "
                    "it out, or use --method dwrl."
                )
        object.__setattr__(config, "alternate", "joint")
        super().validate(config)
