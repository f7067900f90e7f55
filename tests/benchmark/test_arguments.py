"""The command line without what it needs to work: its help, and what it says then."""

import subprocess
import sys
from importlib.metadata import metadata

import pytest

from nnunetv2_selfreg import cli
from nnunetv2_selfreg.benchmark.arguments import INSTALL
from nnunetv2_selfreg.networks import swin

HEAVY = ("torch", "numpy", "pandas", "matplotlib", "nnunetv2", "monai", "psutil")


def without(modules, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own in which these modules cannot be imported."""
    script = f"import sys; sys.modules.update(dict.fromkeys({modules}))\n"
    script += "from nnunetv2_selfreg import cli; sys.exit(cli.main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("subcommand", ["", "benchmark", "benchmark run", "benchmark report", "benchmark metrics"])
def test_help_needs_neither_the_extra_nor_pytorch(subcommand):
    done = without(HEAVY, *subcommand.split(), "--help")
    assert done.returncode == 0, done.stderr
    assert f"usage: nnUNetv2_selfreg {subcommand}".strip() in done.stdout


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("psutil", ["run", "hippocampus", "-o", "runs"]),
        ("monai", ["run", "hippocampus", "-o", "runs"]),
        ("monai", ["metrics", "references", "predictions", "-djfile", "dataset.json", "-o", "metrics.csv"]),
    ],
)
def test_without_the_extra_one_line_says_how_to_install_it(module, arguments):
    done = without([module], "benchmark", *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"nnUNetv2_selfreg: the benchmark needs {module}")
    assert last.endswith('which is not installed: pip install "monai>=1.5" psutil')


def test_report_needs_no_extra(tmp_path):
    done = without(["monai", "psutil"], "benchmark", "report", str(tmp_path), "-o", str(tmp_path / "report"))
    assert done.stderr.splitlines()[-1].startswith(f"nnUNetv2_selfreg: {tmp_path} has no finished run")


def test_other_module_that_is_missing_is_not_taken_for_the_extra(monkeypatch):
    monkeypatch.delitem(sys.modules, "nnunetv2_selfreg.benchmark.metrics", raising=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match="pandas"):
        cli.main(["benchmark", "metrics", "references", "predictions", "-djfile", "d.json", "-o", "metrics.csv"])


def test_install_lines_are_the_extras():
    """They are spelled out, so that they help who has a wheel or a checkout."""
    extras = metadata("nnunetv2-selfreg").get_all("Requires-Dist")
    for line, extra in ((INSTALL, "benchmark"), (swin.INSTALL, "swin")):
        wanted = {name.partition(";")[0].strip() for name in extras if f"extra == '{extra}'" in name.replace('"', "'")}
        assert {text.strip('"') for text in line.split()[2:]} == wanted
