"""The batch of two streams: its parts, the geometry of the views, the modes of loading."""

import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from workspace import Run, put_batch_shapes

from nnunetv2_selfreg.data import signed_distance_map
from nnunetv2_selfreg.data.foreground import Foreground
from nnunetv2_selfreg.data.two_stream import TwoViews, WithSignedDistances, outside_of_body
from nnunetv2_selfreg.training.dual_task import DualTask


def transforms(dimension: int, dummy_2d: bool = False, masks: bool = False):
    patch = (16,) * dimension
    axes = tuple(range(dimension))
    return nnUNetTrainer.get_training_transforms(
        patch, (-0.5, 0.5), [[1.0] * dimension, [0.5] * dimension], axes, dummy_2d, use_mask_for_norm=[masks, False]
    )


def seed(number: int) -> None:
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 (some transforms draw from it)


CASES = [(2, False), (3, False), (3, True)]


def image(dimension: int, dummy_2d: bool = False) -> torch.Tensor:
    """Two equal channels: a body, brighter to one corner, with nothing around it. Dummy 2D crops no larger in depth."""
    shape = (16, 20, 20) if dummy_2d else (20,) * dimension
    body = torch.zeros((1, *shape))
    body[(0, *[slice(3, n - 3) for n in shape])] = 1
    ramp = sum(torch.meshgrid(*(torch.linspace(0, 1, n) for n in shape), indexing="ij"))
    return (body * (0.5 + ramp)).repeat(2, *[1] * dimension)


@pytest.mark.parametrize(("dimension", "dummy_2d"), CASES)
def test_views_differ_in_intensities_only(dimension, dummy_2d):
    views = TwoViews(transforms(dimension, dummy_2d))
    differ = 0
    for number in range(25):
        seed(number)
        strong, weak = views(image(dimension, dummy_2d))
        assert strong.shape == weak.shape == (2, *[16] * dimension)
        differ += not torch.equal(strong, weak)
        correlation = np.corrcoef(strong[0].flatten(), weak[0].flatten())[0, 1]
        assert abs(correlation) > 0.4, number  # the same geometry; gamma may invert, blur and noise may be strong
    assert differ > 10


@pytest.mark.parametrize(("dimension", "dummy_2d"), CASES)
def test_weak_view_is_what_nnunets_own_list_makes_without_intensities(dimension, dummy_2d):
    everything = transforms(dimension, dummy_2d)
    spatial = [t for t in everything.transforms if not isinstance(t, RandomTransform)]  # the others are intensities
    assert len(spatial) < len(everything.transforms)
    views = TwoViews(everything)
    picture = image(dimension, dummy_2d)
    different = 0
    for number in range(10):
        seed(number)
        expected = ComposeTransforms(spatial)(image=picture, segmentation=torch.zeros_like(picture[:1]))["image"]
        seed(number)
        _, weak = views(picture)
        torch.testing.assert_close(weak, expected, rtol=0, atol=0)
        different += not torch.equal(weak, picture[tuple(slice(n) for n in weak.shape)])
    assert different == 10


def test_masked_channels_are_zero_outside_of_the_body_in_both_views(monkeypatch):
    views = TwoViews(transforms(3, masks=True))
    shared, samples = views.shared, []
    monkeypatch.setattr(views, "shared", lambda **sample: samples.append(shared(**sample)) or samples[-1])
    for number in range(10):
        seed(number)
        strong, weak = views(image(3) + 0.01)  # as resampling leaves it outside
        sample = samples[-1]
        outside = sample["segmentation"][0] < 0
        assert outside.any()
        assert not outside.all()
        assert (sample["image"][:, outside] != 0).any()
        assert (strong[0][outside] == 0).all()
        assert (weak[0][outside] == 0).all()
        torch.testing.assert_close(weak[0][~outside], sample["image"][0][~outside])
        torch.testing.assert_close(weak[1], sample["image"][1])  # not a masked channel


def test_mask_is_the_images_own_with_holes_filled():
    picture = torch.zeros(2, 7, 7)
    picture[0, 2:5, 2:5] = 1
    picture[0, 3, 3] = 0
    mask = outside_of_body(picture)
    assert mask.shape == (1, 7, 7)
    assert mask.dtype == torch.int16
    assert set(mask.unique().tolist()) == {-1, 0}
    assert mask[0, 3, 3] == 0
    assert (mask == 0).sum() == 9


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
        ("spawn", "nnUNetTrainerMeanTeacher", 2),
        ("fork", "nnUNetTrainerDualTask", 0),
        ("spawn", "nnUNetTrainerDualTask", 2),
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
    assert {name: shape[0] for name, shape in shapes.items()} == expected
    assert worker.exitcode == 0


@pytest.mark.parametrize("number", [0, -1])
def test_impossible_number_of_unlabelled_samples_is_an_error(number, data_sets):
    trainer = Run(data_sets.name("labels"), "2d", "nnUNetTrainerMeanTeacher_2epochs_2iters").build()
    trainer.unlabeled_batch_size = number
    trainer.initialize()
    with pytest.raises(ValueError, match=f"unlabeled_batch_size is {number}"):
        trainer.get_dataloaders()


class Labeled:
    """A labelled stream of one batch, as nnU-Net's loader yields it."""

    def set_thread_id(self, thread_id):
        self.thread = thread_id

    def __next__(self):
        target = torch.zeros(2, 1, 4, 6, 5)
        target[0, 0, 1:3, 2:4] = 1
        target[1, 0, :2] = 2
        return {"data": torch.zeros(2, 1, 4, 6, 5), "target": [target, target[..., ::2, ::2, ::2]], "keys": ["a", "b"]}


@pytest.mark.parametrize("copied", [False, True])
def test_stream_brings_the_maps_of_each_class_in_the_spacing_given(copied):
    spacing = (3.0, 1.0, 0.5)
    stream = WithSignedDistances(Labeled(), Foreground(2, regions=False, ignore_label=None), spacing)
    if copied:  # as worker processes that are not forked get it
        stream = pickle.loads(pickle.dumps(stream))
    stream.set_thread_id(3)  # as nnU-Net's augmenter does in each worker
    assert stream.loader.thread == 3
    batch = next(iter(stream))
    assert batch["distance"].shape == (2, 2, 4, 6, 5)
    for sample in (0, 1):
        for label in (1, 2):
            mask = (batch["target"][0][sample, 0] == label).numpy()
            expected = signed_distance_map(mask, spacing)
            np.testing.assert_array_equal(batch["distance"][sample, label - 1], expected)
