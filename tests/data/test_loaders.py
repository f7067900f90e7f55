"""The batch of two streams: its parts, and the modes of loading."""

import multiprocessing

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.base.basic_transform import ImageOnlyTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from workspace import Run, put_batch_shapes, seed

from nnunetv2_selfreg.data.targets import WithWeakView
from nnunetv2_selfreg.training.dual_task import DualTask
from nnunetv2_selfreg.training.query_consistency import QueryConsistency


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
@pytest.mark.parametrize("variant", ["labels", "regions_ignore"])
def test_batch_is_as_the_design_says(variant, configuration, data_sets):
    trainer = Run(data_sets.name(variant), configuration, "nnUNetTrainerMeanTeacher_2epochs_2iters").build()
    trainer.unlabeled_batch_size = 3
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    batch = next(loader)
    patch = tuple(trainer.configuration_manager.patch_size)
    assert batch["data"].shape == (2 + 3, 1, *patch)
    assert batch["data_weak"].shape == (3, 1, *patch)
    assert len(batch["target"][0]) == 2
    train, val = trainer.do_split()
    assert set(batch["keys"][:2]) <= set(train)
    assert not set(batch["keys"][2:]) & {*train, *val}
    assert {k for _ in range(5) for k in next(loader)["keys"][2:]} == set(trainer.unlabeled_pool().identifiers)


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_labelled_part_is_the_batch_of_stock_nnunet(configuration, data_sets):
    """Foreground oversampling included: the same draws make the same samples."""
    batches = []
    for trainer in ("nnUNetTrainer_2epochs_2iters", "nnUNetTrainerMeanTeacher_2epochs_2iters"):
        built = Run(data_sets.name("labels"), configuration, trainer).build()
        built.initialize()
        loader, _ = built.get_dataloaders()
        seed(0)
        batches.append(next(loader))
    stock, mine = batches
    assert list(mine["keys"][:2]) == list(stock["keys"])
    torch.testing.assert_close(mine["data"][:2], stock["data"], rtol=0, atol=0)
    torch.testing.assert_close(mine["target"], stock["target"], rtol=0, atol=0)


def test_strong_views_stand_behind_the_labelled_samples_and_weak_ones_apart(data_sets):
    trainer = Run(data_sets.name("labels"), "2d", "nnUNetTrainerMeanTeacher_2epochs_2iters").build()
    trainer.initialize()
    loader = trainer.get_dataloaders()[0].data_loader
    patch = (1, *trainer.configuration_manager.patch_size)
    loader.unlabeled.views = lambda image: (torch.full(patch, 111.0), torch.full(patch, 222.0))  # strong, weak
    batch = next(loader)
    assert (batch["data"][2:] == 111).all()
    assert (batch["data_weak"] == 222).all()
    assert not (batch["data"][:2] == 111).any()


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_unlabelled_crops_are_as_large_as_labelled_ones_before_rotation(configuration, data_sets):
    """Larger than the patch, or rotated patches would have corners of nothing."""
    trainer = Run(data_sets.name("labels"), configuration, "nnUNetTrainerMeanTeacher_2epochs_2iters").build()
    trainer.initialize()
    loader = trainer.get_dataloaders()[0].data_loader
    sizes, views = [], loader.unlabeled.views
    loader.unlabeled.views = lambda image: sizes.append(tuple(image.shape[1:])) or views(image)
    next(loader)
    patch = tuple(trainer.configuration_manager.patch_size)
    before_rotation = tuple(loader.labeled.patch_size)[-len(patch) :]
    assert set(sizes) == {before_rotation}
    assert all(larger >= final for larger, final in zip(before_rotation, patch, strict=True))
    assert before_rotation != patch


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_unlabelled_crops_come_from_anywhere(configuration, data_sets):
    trainer = Run(data_sets.name("labels"), configuration, "nnUNetTrainerMeanTeacher_2epochs_2iters").build()
    trainer.initialize()
    loader = trainer.get_dataloaders()[0].data_loader.unlabeled
    final = [1, *loader.final_patch_size[-2:]] if configuration == "2d" else list(loader.final_patch_size)
    shape = [n + 4 for n in final]  # so the middle of a patch has five places on each axis, the patch in the image
    picture = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)
    seed(0)
    crops = [loader._crop(picture)[0] for _ in range(300)]
    middles = [int(crop[tuple(n // 2 for n in crop.shape)]) for crop in crops]
    for positions, length in zip(np.unravel_index(middles, shape), final, strict=True):
        assert {length // 2 + offset for offset in range(5)} <= set(positions)  # nnU-Net pads odd margins by one more


@pytest.mark.parametrize(
    ("method", "trainer", "unlabeled"),
    [
        ("fork", "nnUNetTrainerMeanTeacher", 2),
        ("forkserver", "nnUNetTrainerMeanTeacher", 2),
        pytest.param("spawn", "nnUNetTrainerMeanTeacher", 2, marks=pytest.mark.matrix),
        ("fork", "nnUNetTrainerDualTask", 0),
        pytest.param("spawn", "nnUNetTrainerDualTask", 2, marks=pytest.mark.matrix),
        ("spawn", "nnUNetTrainerTinyDualKMaxUXNet", 2),
    ],
)
def test_loader_goes_to_a_worker_however_it_is_started(method, trainer, unlabeled, data_sets):
    trainer = Run(data_sets.name("labels"), "2d", f"{trainer}_2epochs_2iters").build()
    trainer.unlabeled_batch_size = unlabeled
    trainer.initialize()
    loader, _ = trainer.get_dataloaders()
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=put_batch_shapes, args=(loader.data_loader, queue))
    worker.start()
    shapes = queue.get(timeout=120)
    worker.join()
    expected = {"data": 2 + unlabeled} | ({"data_weak": unlabeled} if unlabeled else {})
    expected |= {"distance": 2} if isinstance(trainer, DualTask) else {}
    expected |= {"labeled_weak": 2} if isinstance(trainer, QueryConsistency) else {}
    assert {name: shape[0] for name, shape in shapes.items()} == expected
    assert worker.exitcode == 0


@pytest.mark.parametrize("number", [0, -1])
def test_impossible_number_of_unlabelled_samples_is_an_error(number, data_sets):
    trainer = Run(data_sets.name("labels"), "2d", "nnUNetTrainerMeanTeacher_2epochs_2iters").build()
    trainer.unlabeled_batch_size = number
    trainer.initialize()
    with pytest.raises(ValueError, match=f"unlabeled_batch_size is {number}"):
        trainer.get_dataloaders()


class GivenLoader:
    """Yields one batch of images whose first channel is 1 and second 2, as its transforms make them."""

    transforms = ComposeTransforms([])

    def __next__(self):
        image = torch.stack((torch.full((4, 4), 1.0), torch.full((4, 4), 2.0)))
        sample = self.transforms(image=image, segmentation=torch.zeros(1, 4, 4))
        return {"data": sample["image"][None], "target": [sample["segmentation"][None]]}


class Brighter(ImageOnlyTransform):
    def _apply_to_image(self, image, **_):
        return image + 100


def test_weak_view_of_a_labelled_sample_is_the_one_without_intensity_transforms():
    loader = GivenLoader()
    loader.transforms = ComposeTransforms([Brighter()])
    batch = next(WithWeakView(loader))
    assert batch["data"][0, :, 0, 0].tolist() == [101, 102]
    assert batch["labeled_weak"][0, :, 0, 0].tolist() == [1, 2]
    assert batch["data"].is_contiguous()
    assert batch["labeled_weak"].is_contiguous()
    assert next(loader)["data"].shape[1] == 2  # others still get nnU-Net's
