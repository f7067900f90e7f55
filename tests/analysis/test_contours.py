"""Which slices are drawn, and what is drawn on them."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from nnunetv2_selfreg.analysis.contours import PREDICTION, REFERENCE, Case, contour_figure


def ball(radius: float, shape=(20, 24, 28)) -> np.ndarray:
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return (np.linalg.norm(grid - np.array(shape) / 2, axis=-1) < radius).astype(np.uint8)


def colours(file) -> set[str]:
    pixels = (plt.imread(file)[..., :3] * 255).round().astype(int)
    return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(pixels.reshape(-1, 3), axis=0)}


@pytest.mark.parametrize("shape", [(20, 24, 28), (1, 24, 28)])
def test_reference_and_prediction_are_drawn_in_their_colours(shape, tmp_path):
    reference, prediction = ball(8, shape), ball(5, shape)
    case = Case("a case", np.random.default_rng(0).normal(size=shape), reference, prediction, [2.0, 1.0, 1.0])
    contour_figure([case, case], tmp_path / "both.png")
    assert {REFERENCE, PREDICTION} <= colours(tmp_path / "both.png")


def test_slices_are_where_the_reference_is_fullest(tmp_path, monkeypatch):
    """A small second structure at the edge does not count, nor does what only the prediction has."""
    drawn = []
    monkeypatch.setattr("nnunetv2_selfreg.analysis.contours._draw_slice", lambda _axes, _case, z: drawn.append(z))
    reference = ball(6)
    reference[0, 0, :3] = 2
    prediction = np.ones_like(reference)
    contour_figure([Case("a case", np.zeros(reference.shape), reference, prediction, [1, 1, 1])], tmp_path / "x.png")
    assert len(drawn) == 3
    assert drawn == sorted(drawn)
    assert 4 < drawn[0] < drawn[1] == 10 < drawn[2] < 16


def test_voxels_keep_their_proportions(tmp_path, monkeypatch):
    aspects = []
    original = plt.Axes.imshow
    monkeypatch.setattr(
        plt.Axes, "imshow", lambda self, image, **kw: aspects.append(kw["aspect"]) or original(self, image, **kw)
    )
    case = Case("a case", np.zeros((20, 24, 28)), ball(6), ball(6), [5.0, 3.0, 1.5])
    contour_figure([case], tmp_path / "x.png", slices=1)
    assert aspects == [2.0]
