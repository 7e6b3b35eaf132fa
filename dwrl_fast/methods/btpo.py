"""`btpo`: `dwrl` with both updates in one (`--alternate joint`), with standardised thought rewards (docs/method.md,
2).
"""

from typing import Any

from dwrl_fast.errors import ConfigError
from dwrl_fast.methods.dwrl import DualWeightedRL


class JointDualWeightedRL(DualWeightedRL):
    """`dwrl` with fixed values of some options."""

    name = "btpo"
    summary = "dwrl in one joint update"

    @classmethod
    def validate(cls, config: Any) -> None:
        """Raise ConfigError if an option contradicts the fixed values."""
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
