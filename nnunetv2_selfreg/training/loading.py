"""What a semi-supervised training loads: nnU-Net's labelled samples, and a fold's unlabelled pool beside them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from torch import distributed as dist

from nnunetv2_selfreg.data.loaders import TwoStreamLoader, UnlabeledLoader
from nnunetv2_selfreg.data.splits import read_splits
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool, find_pool, recipe
from nnunetv2_selfreg.errors import SettingError, UnsupportedError
from nnunetv2_selfreg.training.reliable import ReliableTraining


class TwoStreams(ReliableTraining):
    """Loads unlabelled samples beside the labelled ones (see :class:`TwoStreamLoader` for the batch).

    A family extends :meth:`labeled_stream` if its labelled samples need more than nnU-Net's. The cascade is not
    supported: an unlabelled case has no segmentation of the stage before.
    """

    unlabeled_batch_size: int | None = None
    """Unlabelled samples a step, on top of the plan's batch, divided among GPUs; None: as many as the plan's batch; 0:
    none, where the family can be trained with labels alone."""

    _needs_unlabeled = True
    _dice_of_unlabeled = False  # whether nnU-Net's Dice is taken of these samples too, sample by sample over processes

    def initialize(self) -> None:
        if self.is_cascaded:
            raise UnsupportedError(
                f"{type(self).__name__} cannot train {self.configuration_name}: unlabelled cases have no segmentation "
                "of the previous stage. Use 3d_fullres or 3d_lowres."
            )
        super().initialize()

    def labeled_stream(self, loader: nnUNetDataLoader):
        """The labelled stream, made of nnU-Net's loader of the training cases; runs in the worker processes."""
        return loader

    def unlabeled_stream(self, samples: int, like: nnUNetDataLoader) -> nnUNetDataLoader:
        """The other stream, of the fold's pool; its errors come before any worker starts.

        Args:
            samples: a step, of this process.
            like: nnU-Net's loader of the training cases.
        """
        pool = self.unlabeled_pool()
        self.print_to_log_file(f"{len(pool.identifiers)} unlabelled cases, {samples} samples of them a step")
        return UnlabeledLoader(pool, samples, like)

    def unlabeled_pool(self) -> UnlabeledPool:
        """The images that this fold trains on without labels; errors as in :func:`find_pool`."""
        train, val = self.do_split()
        listed = self._listed_as_unlabeled()
        # With fold `all` nnU-Net validates on what it trains on.
        fold = {"train": train, "val": val, "unlabeled": listed}
        current = recipe(self.plans_manager, self.configuration_manager)
        return find_pool(Path(self.preprocessed_dataset_folder), fold, self.fold, current)

    def _listed_as_unlabeled(self) -> list[str]:
        file = Path(self.preprocessed_dataset_folder_base) / "splits_final.json"
        if self.fold == "all" or not file.is_file():
            return []
        splits = read_splits(file)
        return splits[self.fold].get("unlabeled", []) if self.fold < len(splits) else []

    def get_dataloaders(self):
        samples = self._unlabeled_of_this_rank()
        with _without_workers():  # they go around both streams, below
            train, val = super().get_dataloaders()
        labeled = self.labeled_stream(train.data_loader)
        if samples:
            loaders = TwoStreamLoader(labeled, self.unlabeled_stream(samples, train.data_loader)), val.data_loader
        else:
            self.print_to_log_file("No unlabelled samples: trained with labels alone")
            loaders = labeled, val.data_loader
        workers = get_allowed_n_proc_DA()
        half = max(1, workers // 2) if workers else 0
        augmenters = (
            self._in_workers(loaders[0], workers, max(6, workers // 2)),
            self._in_workers(loaders[1], half, max(3, workers // 4)),
        )
        for augmenter in augmenters:
            next(augmenter)
        return augmenters

    def _in_workers(self, loader, workers: int, cached: int):
        """As nnUNetTrainer.get_dataloaders does."""
        if workers == 0:
            return SingleThreadedAugmenter(loader, None)
        return NonDetMultiThreadedAugmenter(
            data_loader=loader,
            transform=None,
            num_processes=workers,
            num_cached=cached,
            seeds=None,
            pin_memory=self.device.type == "cuda",
            wait_time=0.002,
        )

    def _unlabeled_of_this_rank(self) -> int:
        if self.unlabeled_batch_size is None:
            return self.batch_size
        if self.unlabeled_batch_size == 0 and not self._needs_unlabeled:
            return 0
        possible = "1 at least, or None" if self._needs_unlabeled else "0 at least, or None"
        self._require("unlabeled_batch_size", self.unlabeled_batch_size >= 1, possible)
        world = dist.get_world_size() if self.is_ddp else 1
        if self.unlabeled_batch_size < world:
            raise SettingError(f"unlabeled_batch_size is {self.unlabeled_batch_size}, fewer than the {world} processes")
        if self._dice_of_unlabeled and self.configuration_manager.batch_dice:
            self._require(
                "unlabeled_batch_size",
                self.unlabeled_batch_size % world == 0,
                f"divisible by the number of processes, {world}, which share the Dice of a batch here",
            )
        share, rest = divmod(self.unlabeled_batch_size, world)
        return share + (self.local_rank < rest)


@contextmanager
def _without_workers() -> Iterator[None]:
    """nnU-Net loads in this process meanwhile."""
    before = os.environ.get("nnUNet_n_proc_DA")
    os.environ["nnUNet_n_proc_DA"] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["nnUNet_n_proc_DA"]
        else:
            os.environ["nnUNet_n_proc_DA"] = before
