"""The wheel, installed as a user does: nnU-Net finds the trainers with nothing set, next to whatever else there is."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import nnunetv2
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_json
from workspace import Run

from nnunetv2_selfreg import __version__, discovery
from nnunetv2_selfreg.benchmark.protocols import names as protocol_names

ROOT = Path(__file__).resolve().parents[1]
FIND = """
import sys
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
for name in sys.argv[1:]:
    print("FOUND", recursive_find_trainer_class_by_name(name).__mro__)
"""
OWN = """
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
class nnUNetTrainerMine(nnUNetTrainer):
    pass
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    build(folder, "--wheel")
    return next(folder.glob("*.whl"))


def build(folder: Path, what: str) -> None:
    command = [sys.executable, "-m", "build", what, "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)


class Environment:
    """A virtual environment with nnU-Net, and the dependencies of the environment that runs the tests."""

    def __init__(self, folder: Path, editable_nnunet: bool) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
        (self.site / "zz_dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
        nnunet = folder / "checkout" if editable_nnunet else self.site
        shutil.copytree(nnunetv2.__path__[0], nnunet / "nnunetv2", ignore=shutil.ignore_patterns("__pycache__"))
        if editable_nnunet:
            (self.site / "nnunet_editable.pth").write_text(f"{nnunet}\n")

    def pip(self, *arguments: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "--quiet", "--no-input"]
        subprocess.run([*pip, *arguments], check=True, capture_output=True)

    def nnunet(self, entry: str, *arguments: str, **environment: str) -> None:
        """Runs one of nnU-Net's commands, as the script that pip makes for it does."""
        module, function = entry.split(":")
        script = self.site / f"{function}.py"
        script.write_text(f"from nnunetv2.{module} import {function}\nif __name__ == '__main__':\n    {function}()\n")
        done = self.run(str(script), *arguments, **environment)
        script.unlink()
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]

    def run(self, *arguments: str, python: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if key not in (discovery.VARIABLE, "PYTHONPATH")}
        # Elsewhere than in the checkout, which Python would put first on its path.
        options = {"cwd": self.python.parent, "env": {**clean, **environment}, "capture_output": True, "text": True}
        return subprocess.run([str(python or self.python), *arguments], **options, check=False)

    def find(self, *trainers: str, **environment: str) -> str:
        """What nnU-Net's look-up prints, or its error."""
        done = self.run("-c", FIND, *trainers, **environment)
        return done.stdout + done.stderr

    def variable(self, **environment: str) -> str:
        return self.run("-c", f"import os; print(os.environ.get('{discovery.VARIABLE}'))", **environment).stdout.strip()


@pytest.fixture(scope="module", params=["regular", "editable"])
def environment(request, wheel, tmp_path_factory):
    """The package installed beside a regular or an editable nnU-Net."""
    made = Environment(tmp_path_factory.mktemp(request.param), request.param == "editable")
    made.pip("install", "--no-deps", str(wheel))
    return made


REGULAR = pytest.mark.parametrize("environment", ["regular"], indirect=True)


def test_trainers_are_found_with_nothing_set_beside_the_stock_ones(environment):
    printed = environment.find("nnUNetTrainerSelfReg_2epochs_3iters", "nnUNetTrainerNoDeepSupervision")
    ours, stock = (line for line in printed.splitlines() if line.startswith("FOUND"))
    assert "SelfRegularized" in ours
    assert "nnUNetTrainerNoDeepSupervision" in stock
    assert environment.variable() == str(environment.site / "nnunetv2_selfreg" / "trainers")


@REGULAR
def test_variable_that_is_set_is_kept(environment, tmp_path):
    (tmp_path / "mine.py").write_text(OWN)
    both = f"{tmp_path}{os.pathsep}{environment.site / 'nnunetv2_selfreg' / 'trainers'}"
    assert environment.variable(nnUNet_extTrainer=str(tmp_path)) == both
    assert environment.variable(nnUNet_extTrainer=both) == both  # as in a child process
    printed = environment.find("nnUNetTrainerMine", "nnUNetTrainerSelfReg", nnUNet_extTrainer=str(tmp_path))
    mine, ours = (line for line in printed.splitlines() if line.startswith("FOUND"))
    assert "nnUNetTrainerMine" in mine
    assert "SelfRegularized" in ours


@REGULAR
def test_nnunets_commands_train_and_predict_with_the_wheel(environment, data_sets, tmp_path):
    """Nothing set but nnU-Net's three folders."""
    run = Run(data_sets.name("labels"), "2d", "nnUNetTrainerSelfReg_1epochs_1iters")
    results = {"nnUNet_results": str(tmp_path)}
    training = [run.data_set, "2d", "0", "-tr", run.trainer, "-device", "cpu"]
    environment.nnunet("run.run_training:run_training_entry", *training, **results)
    model = tmp_path / run.data_set / f"{run.trainer}__nnUNetPlans__2d"
    assert (model / "fold_0" / "validation" / "summary.json").is_file()
    prediction = ["-d", run.data_set, "-c", "2d", "-f", "0", "-tr", run.trainer, "-device", "cpu"]
    folders = ["-i", str(run.raw / "imagesTs"), "-o", str(tmp_path / "predicted")]
    entry = "inference.predict_from_raw_data:predict_entry_point"
    environment.nnunet(entry, *prediction, *folders, "-npp", "0", "-nps", "0", **results)
    assert len(list((tmp_path / "predicted").glob("*.nii.gz"))) == 1


@pytest.mark.matrix
@REGULAR
def test_environment_behind_a_link(environment, tmp_path):
    """As a home folder on a cluster often is."""
    link = tmp_path / "link"
    link.symlink_to(environment.python.parents[1])
    done = environment.run("-m", "nnunetv2_selfreg.cli", "trainers", python=link / "bin" / "python")
    assert done.returncode == 0
    assert "nnunetv2_selfreg.pth extends nnUNet_extTrainer" in done.stdout
    assert "nnUNetTrainerSelfReg " in done.stdout


@pytest.mark.parametrize("environment", ["editable"], indirect=True)  # the regular one is asked behind a link
def test_trainers_command_says_that_and_how_they_are_found(environment):
    done = environment.run("-m", "nnunetv2_selfreg.cli", "trainers")
    assert done.returncode == 0, done.stderr
    assert "nnUNetTrainerSelfReg " in done.stdout
    assert str(environment.site / "nnunetv2_selfreg.pth") in done.stdout


@REGULAR
def test_broken_package_harms_no_stock_trainer_and_says_why(environment):
    module = environment.site / "nnunetv2_selfreg" / "training" / "selfreg.py"
    whole = module.read_text()
    module.write_text("raise ImportError('torch is too old')\n")
    try:
        printed = environment.find("nnUNetTrainer", "nnUNetTrainerSelfReg")
        assert printed.count("FOUND") == 1
        assert "torch is too old" in printed
        done = environment.run("-m", "nnunetv2_selfreg.cli", "trainers")
        assert done.returncode == 1
        assert "more: ImportError: torch is too old" in done.stderr
    finally:
        module.write_text(whole)


def test_uninstalling_removes_it_all(wheel, tmp_path):
    environment = Environment(tmp_path / "environment", editable_nnunet=False)
    before = sorted(p.name for p in environment.site.iterdir())
    environment.pip("install", "--no-deps", str(wheel))
    assert environment.variable() == str(environment.site / "nnunetv2_selfreg" / "trainers")
    environment.pip("uninstall", "--yes", "nnunetv2-selfreg")
    assert sorted(p.name for p in environment.site.iterdir()) == before
    assert environment.variable() == "None"


def test_line_at_start_is_silent_when_the_folder_is_gone(wheel, tmp_path):
    environment = Environment(tmp_path / "environment", editable_nnunet=False)
    environment.pip("install", "--no-deps", str(wheel))
    shutil.rmtree(environment.site / "nnunetv2_selfreg")
    done = environment.run("-c", "pass")
    assert (done.returncode, done.stderr) == (0, "")
    assert environment.variable() == "None"


def test_wheel_carries_no_tests_and_no_scripts(wheel):
    top = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"nnunetv2_selfreg", "nnunetv2_selfreg.pth"}


def test_wheel_and_source_distribution_carry_the_protocols(wheel, tmp_path):
    protocols = {f"nnunetv2_selfreg/benchmark/protocols/{name}.json" for name in protocol_names()}
    assert len(protocols) > 5
    assert protocols <= set(zipfile.ZipFile(wheel).namelist())
    build(tmp_path, "--sdist")
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        assert protocols <= {name.partition("/")[2] for name in archive.getnames()}


@pytest.mark.matrix
@REGULAR
def test_benchmark_of_an_installed_package_in_any_folder(environment, data_sets, tmp_path):
    """A job as it was printed, then the report of the folder that it was told to use."""
    selfreg = ["-m", "nnunetv2_selfreg.cli", "benchmark"]
    name, runs = data_sets.name("labels"), tmp_path / "my runs"
    length = ["-c", "2d", "--epochs", "1", "--iterations", "1", "-device", "cpu"]
    trainer = ["-tr", "nnUNetTrainerSelfReg", "--jobs"]
    printed = environment.run(*selfreg, "run", "-d", name, *length, "-o", str(runs), *trainer)
    assert printed.returncode == 0, printed.stderr
    (job,) = printed.stdout.splitlines()
    path = f"{environment.python.parent}{os.pathsep}{os.environ['PATH']}"
    done = environment.run("-c", job, python=Path("/bin/sh"), PATH=path)
    assert done.returncode == 0, done.stderr
    result = load_json(str(next(runs.glob("*/*/result.json"))))
    assert (result["failure"], result["commit"]) == (None, None)
    assert result["versions"]["nnunetv2-selfreg"] == __version__
    report = environment.run(*selfreg, "report", str(runs), "-o", str(tmp_path / "report"))
    assert report.returncode == 0, report.stderr
    assert "| nnUNetTrainerSelfReg | atrium | 1 |" in (tmp_path / "report" / "report.md").read_text()
