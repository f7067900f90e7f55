"""The recipe that distance maps are compared with is the published one."""

import sys

import numpy as np
import signed_distance_time


def test_recipe_on_a_line():
    """Each side divided by its largest distance, the inner boundary 0."""
    mask = np.array([False, False, True, True, True])
    np.testing.assert_allclose(signed_distance_time.published_recipe(mask), [1, 0.5, 0, -2 / 3, -1])


def test_table_has_a_row_for_each_mask(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["signed_distance_time.py", "--rounds", "2"])
    signed_distance_time.main()
    printed = capsys.readouterr().out
    assert all(f"| {name} |" in printed for name in ("blob", "half", "noise"))
