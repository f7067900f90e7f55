"""The step that all semi-supervised trainers share, and the data that it takes."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA
from nnunetv2.utilities.helpers import dummy_context
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import Optimizer

from nnunetv2_selfreg.data.foreground import Foreground, as_list, at_full_resolution
from nnunetv2_selfreg.data.splits import read_splits
from nnunetv2_selfreg.data.two_stream import TwoStreamLoader, UnlabeledLoader
from nnunetv2_selfreg.data.unlabeled import UnlabeledPool, find_pool, recipe
from nnunetv2_selfreg.losses.consistency import gaussian_ramp_up
from nnunetv2_selfreg.training.reliable import ReliableTraining


class SemiSupervised(ReliableTraining):
    """Trains on batches whose first samples are labelled (see TwoStreamLoader for the batch).

    A family implements :meth:`semi_supervised_loss`, :meth:`student_batch` if the network sees other samples than the
    loader's, and :meth:`after_step` if something follows the optimiser. The cascade is not supported: an unlabelled
    case has no segmentation of the stage before.
    """

    unlabeled_batch_size: int | None = None
    """Unlabelled samples a step, on top of the plan's batch, divided among GPUs; None: as many as the plan's batch; 0:
    none, where the family can be trained with labels alone."""
    ramp_up_length: float = 1.0
    """Share of the training after which the unlabelled term has its full weight; the ramp is Gaussian."""
    passes_of_unlabeled: int = 1
    """How often the network sees each unlabelled sample in a step: a fact of the family, no setting."""

    _steps_in_epoch = 0
    _needs_unlabeled = True

    def semi_supervised_loss(self, output: Sequence[Tensor], target, batch: dict) -> Tensor:
        """The loss of a step.

        Args:
            output: the network's outputs for `batch["data"]`, the `L` labelled samples first, `(B, K, *spatial)`,
                highest resolution first; one without deep supervision.
            target: of the `L` labelled samples, as nnU-Net's loss takes it.
            batch: the batch on the device.
        """
        raise NotImplementedError

    def student_batch(self, batch: dict) -> dict:
        """The batch whose `data` the network sees; here as the loader made it."""
        return batch

    def after_step(self) -> None:
        """Called after the optimiser."""

    def supervised_loss(self, output: Sequence[Tensor], target) -> Tensor:
        """The trainer's loss of the labelled samples."""
        target = as_list(target)
        return self.apply_loss(self.loss, [scale[: len(target[0])] for scale in output], target)

    def apply_loss(self, loss: nn.Module, output: Sequence[Tensor], target: Sequence[Tensor]) -> Tensor:
        """A loss of nnU-Net's, of lists of `(B, K, *spatial)` and `(B, 1 or R, *spatial)`, highest resolution first:
        with deep supervision it takes them as they are, otherwise their only tensors."""
        return loss(output, target) if self.enable_deep_supervision else loss(output[0], target[0])

    def keep_terms(self, terms: Mapping[str, Tensor]) -> None:
        """Notes the terms of a step's loss for the log."""
        self._terms = {name: term.detach() for name, term in terms.items()}

    def loss_terms(self) -> dict[str, Tensor]:
        return {**self._terms, **super().loss_terms()}

    @property
    def ramp(self) -> float:
        """Weight of the unlabelled term at this step, see :func:`gaussian_ramp_up`."""
        return gaussian_ramp_up(self.progress, self.ramp_up_length)

    @property
    def progress(self) -> float:
        """The share of the training that is done."""
        return (self.current_epoch + self._steps_in_epoch / self.num_iterations_per_epoch) / self.num_epochs

    def initialize(self) -> None:
        if self.is_cascaded:
            raise NotImplementedError(
                f"{type(self).__name__} cannot train {self.configuration_name}: unlabelled cases have no segmentation "
                "of the previous stage. Use 3d_fullres or 3d_lowres."
            )
        self._require("ramp_up_length", self.ramp_up_length > 0, "greater than 0")
        super().initialize()
        self.foreground = Foreground.of(self.label_manager)
        self._terms: dict[str, Tensor] = {}

    def on_train_epoch_start(self) -> None:
        self._steps_in_epoch = 0
        super().on_train_epoch_start()

    def optimise(self, batch: dict) -> dict:
        # nnU-Net's train_step with another loss: it has no seam between forward pass and loss.
        self._refuse_unknown_labels(batch)
        trained = self.trained_modules()
        for _, optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(batch)
        scaler = self.grad_scaler
        (loss if scaler is None else scaler.scale(loss)).backward()
        for module, optimizer in trained:
            if scaler is not None:
                scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(module.parameters(), 12)
            optimizer.step() if scaler is None else scaler.step(optimizer)
        if scaler is not None:
            scaler.update()
        self.after_step()
        self._steps_in_epoch += 1
        return {"loss": loss.detach().cpu().numpy()}

    def validation_step(self, batch: dict) -> dict:
        self._refuse_unknown_labels(batch)
        return super().validation_step(batch)

    def _refuse_unknown_labels(self, batch: dict) -> None:
        """A label out of range would end a GPU's work with an assertion that names nothing."""
        unknown = self.foreground.unknown_labels(at_full_resolution(batch["target"]))
        if unknown:
            found = ", ".join(f"{label} in {batch['keys'][sample]}" for sample, label in unknown.items())
            message = (
                f"Not among the data set's labels: {found}, of {self.preprocessed_dataset_folder}. Correct the files "
                "in labelsTr, and preprocess again."
            )
            self.print_to_log_file(message, also_print_to_console=False)
            raise ValueError(message)

    def loss_of(self, batch: dict) -> Tensor:
        """The loss of a loader's batch, through the network."""
        batch = {name: self._to_device(value) for name, value in batch.items()}
        with torch.autocast(self.device.type) if self.device.type == "cuda" else dummy_context():
            batch = self.student_batch(batch)
            output = self.network(batch["data"])
            output = output if isinstance(output, (list, tuple)) else [output]
            return self.semi_supervised_loss(output, batch["target"], batch)

    def trained_modules(self) -> list[tuple[nn.Module, Optimizer]]:
        """What a step optimises. The gradients of each module are clipped on their own, as nnU-Net clips them."""
        return [(self.network, self.optimizer)]

    def _to_device(self, value):
        """Tensors and lists of them; what else is in a batch stays as it is."""
        if isinstance(value, list):
            return [self._to_device(part) for part in value]
        return value.to(self.device, non_blocking=True) if isinstance(value, Tensor) else value

    def unlabeled_pool(self) -> UnlabeledPool:
        """The images that this fold trains on without labels; errors as in :func:`find_pool`."""
        listed = self._listed_as_unlabeled()  # first: nnU-Net's do_split does not check the file
        train, val = self.do_split()
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
        pool = self.unlabeled_pool() if samples else None  # its errors come before any worker starts
        with _without_workers():  # they go around both streams, below
            train, val = super().get_dataloaders()
        labeled = self.labeled_stream(train.data_loader)
        if pool is None:
            self.print_to_log_file("No unlabelled samples: trained with labels alone")
            loaders = labeled, val.data_loader
        else:
            unlabeled = UnlabeledLoader(pool, samples, like=train.data_loader)
            self.print_to_log_file(f"{len(pool.identifiers)} unlabelled cases, {samples} samples of them a step")
            loaders = TwoStreamLoader(labeled, unlabeled), val.data_loader
        workers = get_allowed_n_proc_DA()
        half = max(1, workers // 2) if workers else 0
        augmenters = (
            self._in_workers(loaders[0], workers, max(6, workers // 2)),
            self._in_workers(loaders[1], half, max(3, workers // 4)),
        )
        for augmenter in augmenters:
            next(augmenter)
        return augmenters

    def labeled_stream(self, loader: nnUNetDataLoader):
        """The labelled stream, made of nnU-Net's loader of the training cases; runs in the worker processes."""
        return loader

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
            raise ValueError(f"unlabeled_batch_size is {self.unlabeled_batch_size}, fewer than the {world} processes")
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
