"""What runs before the network: unlabelled cases, folds, two-stream loading, signed distances."""

from nnunetv2_selfreg.data.signed_distance import signed_distance_map

__all__ = ["signed_distance_map"]
