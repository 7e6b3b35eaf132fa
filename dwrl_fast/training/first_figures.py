"""Warnings after the first rollout batch about a model that will learn slowly."""

from collections.abc import Iterator, Mapping

from dwrl_fast.config import TrainConfig

MASS_WARN, CUT_WARN, UNREAD_WARN = 0.5, 0.2, 0.2  # the same limits as in the doctor


def warnings(values: Mapping[str, float], config: TrainConfig) -> Iterator[str]:
    """A line for each bad figure of the first step, with the remedy."""
    if values.get("label_mass", 1.0) < MASS_WARN:
        yield (
            f"the two labels together have only probability {values['label_mass']:.2g} where the score is read. Use a "
            "template (--template) that asks more clearly for a label, or for labels that the model does answer "
            "with. A model that follows instructions better starts higher. docs/pretrained.md has figures"
        )
    if values.get("truncation_rate", 0.0) > CUT_WARN:
        shorter = "" if config.template == "brief" else ", or ask for a thought of one sentence: --template brief"
        yield (
            f"{values['truncation_rate']:.0%} of the thoughts are cut at --max_completion_length "
            f"{config.max_completion_length}. Raise it{shorter}"
        )
    if values.get("unparsable", 0.0) > UNREAD_WARN:
        yield (
            f"{values['unparsable']:.0%} of the verdicts cannot be read and get no reward. Raise "
            "--max_completion_length, or start from a model that knows the verdict's form (docs/methods.md, sft)"
        )
