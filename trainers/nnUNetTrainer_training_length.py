"""Finds `<any trainer>_<N>epochs` and `<any trainer>_<N>epochs_<M>iters` for nnU-Net, and helps with misspelled names.

nnU-Net asks each module here for the name that `-tr` was given, so the module answers for names that no class has.
"""

from nnunetv2_selfreg.training.length import trainer_of_name


def __getattr__(name: str):
    globals()[name] = trainer = trainer_of_name(name)  # kept: nnU-Net asks twice
    return trainer
