"""Custom nnU-Net v2 trainers: self-regularised training with nnU-Net's own commands."""

__version__ = "0.1.0"
