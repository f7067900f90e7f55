"""Losses as pure tensor functions, and thin modules around them. Imports torch only."""

from nnunetv2_selfreg.losses.selfreg import (
    SelfRegularizedLoss,
    internal_feature_distillation,
    semantic_consistency,
)

__all__ = ["SelfRegularizedLoss", "internal_feature_distillation", "semantic_consistency"]
