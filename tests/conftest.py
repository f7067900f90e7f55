"""nnU-Net's environment for all tests: folders of the session, small numbers of processes, the checkout's trainers."""

import multiprocessing
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]

# Set before nnU-Net is imported anywhere: it reads some of these once.
_session = tempfile.TemporaryDirectory(prefix="nnunetv2-selfreg-tests-")
# nnU-Net's picture of 3000 x 5400 pixels would take longer than the few steps of an epoch here.
Path(_session.name, "matplotlibrc").write_text("savefig.dpi: 20\n")
for _name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
    os.environ[_name] = str(Path(_session.name) / _name)
# Shared: set by the process that starts pytest-xdist's workers, inherited by them.
os.environ.setdefault("TESTS_DATA_SETS", _session.name + "/data_sets")
Path(os.environ["TESTS_DATA_SETS"]).mkdir(exist_ok=True)
os.environ.update(
    nnUNet_n_proc_DA="0",
    nnUNet_def_n_proc="1",
    nnUNet_extTrainer=os.pathsep.join([str(ROOT / "trainers"), str(ROOT / "tests" / "small_trainers")]),
    nnUNet_compile="f",
    MATPLOTLIBRC=_session.name + "/matplotlibrc",
    OMP_NUM_THREADS="1",  # the networks are tiny: a second thread costs more than it brings
    PYTHONWARNINGS="ignore::FutureWarning",
)
# Before any test starts the server: later it would be ignored.
multiprocessing.set_forkserver_preload(
    [
        "nnunetv2.run.run_training",
        "nnunetv2.inference.predict_from_raw_data",
        "nnunetv2.evaluation.evaluate_predictions",
    ]
)


# A loaded machine has no deadlines.
settings.register_profile("no deadlines", deadline=None)
settings.load_profile("no deadlines")


def pytest_addoption(parser):
    parser.addoption(
        "--commands",
        action="store_true",
        help="run the tests that take long too, and every cell of the trainer matrix through nnU-Net's commands",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "matrix: takes long, runs only with --commands")


def pytest_runtest_setup(item):
    if item.get_closest_marker("matrix"):
        leave_to_matrix(item.config)


def leave_to_matrix(config) -> None:
    if not config.getoption("--commands"):
        pytest.skip("make test-matrix runs this")


@pytest.fixture
def only_if_chosen(request):
    """Skips a test whose class has not chosen it, like the marker `matrix`."""
    return lambda chosen: chosen or leave_to_matrix(request.config)


@pytest.fixture
def compiling_without_code(monkeypatch):
    """`torch.compile` with a backend that generates no code, which would take minutes."""
    import torch

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def data_sets():
    """The tiny data sets, written and preprocessed at first use."""
    import workspace

    return workspace.DataSets()


@pytest.fixture(scope="class")
def cells(request, data_sets):
    """The cells of the trainer that the test class names."""
    from contract import Cells
    from workspace import Commands, InProcess

    runner = Commands() if request.config.getoption("--commands") else InProcess()
    return Cells(request.cls.trainer, data_sets, runner, request.cls.prepare)
