"""Mixins over nnUNetTrainer, one file for each way of training. `trainers/` composes them."""
