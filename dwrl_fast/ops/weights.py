"""The weights of thoughts and pairs: a few numbers a group, so plain PyTorch in log space on any device."""

from dwrl_fast.reference import DualWeights, PreferenceWeights, dual_weights, preference_weights

__all__ = ["DualWeights", "PreferenceWeights", "dual_weights", "preference_weights"]
