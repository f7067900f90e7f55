"""The commit is that of this package's checkout, or none."""

import subprocess

import pytest

from nnunetv2_selfreg.benchmark.machine import commit


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    git(tmp_path, "init", "--quiet")
    (tmp_path / "readme").touch()
    git(tmp_path, "add", ".")
    git(tmp_path, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "first")
    return tmp_path


def git(folder, *arguments) -> str:
    return subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def write_package(folder):
    """Returns the file that asks."""
    file = folder / "nnunetv2_selfreg" / "benchmark" / "machine.py"
    file.parent.mkdir(parents=True)
    file.touch()
    return file


def test_commit_of_a_checkout_tells_whether_files_were_changed(repository):
    file = write_package(repository)
    git(repository, "add", ".")
    git(repository, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "second")
    assert commit(file) == git(repository, "rev-parse", "--short", "HEAD")
    (repository / "readme").write_text("changed")
    assert commit(file) == git(repository, "rev-parse", "--short", "HEAD") + "+"


@pytest.mark.parametrize("installed", ["venv/lib/python3.11/site-packages", "."])
def test_package_that_lies_in_another_repository_has_no_commit(installed, repository, monkeypatch):
    monkeypatch.chdir(repository)
    assert commit(write_package(repository / installed)) is None


def test_package_outside_any_repository_has_no_commit(tmp_path):
    assert commit(write_package(tmp_path)) is None
