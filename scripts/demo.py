"""From raw images to contours with nnU-Net's own commands: `make demo`, or `make demo DATA=.../DatasetXXX_Name`.

Without DATA it writes a phantom data set first. It plans and preprocesses, trains nnUNetTrainerSelfReg briefly, predicts
cases that were held out, prints their Dice and draws their contours. It shows that everything works, and is no benchmark:
on a CPU the images are resampled coarsely, the network has half the planned features and the training is minutes long.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import phantom
import torch
from tqdm import tqdm

from nnunetv2_selfreg.analysis.contours import Case, contour_figure

PLANS = "nnUNetPlans"
CPU_VOXELS = 48**3  # a median image of at most so many voxels trains in a fraction of a second a step on two cores
HELD_OUT = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a raw nnU-Net data set, .../DatasetXXX_Name; default: the phantom")
    parser.add_argument("--folder", type=Path, default=Path("demo-run"), help="everything is written below it")
    parser.add_argument("--cases", type=int, default=24, help="use at most so many cases of the data set")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=50, help="training iterations an epoch")
    arguments = parser.parse_args()
    try:
        cases = raw_cases(arguments.data) if arguments.data else None
    except (OSError, ValueError) as error:
        print(f"DATA={arguments.data}: {error}", file=sys.stderr)
        return 2
    Demo(arguments, cases).run()
    return 0


def raw_cases(folder: Path) -> dict[str, dict]:
    """Identifier -> {"images": [...], "label": ...} of a raw nnU-Net data set.

    Raises:
        ValueError: it is not a data set, with what is missing.
    """
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    expected = "expected a folder DatasetXXX_Name with dataset.json, imagesTr and labelsTr (nnU-Net's raw format)"
    if not folder.is_dir():
        raise ValueError(f"there is no such folder; {expected}")
    if not re.fullmatch(r"Dataset\d{3}_.+", folder.resolve().name):
        raise ValueError(f"{folder.resolve().name} is not a data set's name; {expected}")
    description = folder / "dataset.json"
    if not description.is_file():
        raise ValueError(f"dataset.json is missing; {expected}")
    try:
        content = json.loads(description.read_text(encoding="utf-8"))
        channels, _ = len(content["channel_names"]), content["labels"]
        cases = get_filenames_of_train_images_and_targets(str(folder), content)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, FileNotFoundError) as error:
        raise ValueError(
            f"dataset.json or imagesTr cannot be used ({type(error).__name__}: {error}); {expected}"
        ) from None
    if len(cases) < 5 + HELD_OUT:
        raise ValueError(
            f"it has {len(cases)} training cases, the demo needs {5 + HELD_OUT}: 5 folds and {HELD_OUT} to predict"
        )
    for identifier, case in cases.items():
        if len(case["images"]) != channels:
            raise ValueError(f"case {identifier} has {len(case['images'])} of {channels} channels in imagesTr")
        for file in [*case["images"], case["label"]]:
            if not Path(file).is_file():
                raise ValueError(f"case {identifier}: {file} is missing")
    return cases


class Demo:
    """The stages of the demo, each one nnU-Net command or a few lines."""

    def __init__(self, arguments: argparse.Namespace, cases: dict[str, dict] | None) -> None:
        self.arguments = arguments
        self.cases = cases
        self.source = arguments.data.resolve() if arguments.data else None
        self.name = self.source.name if self.source else "Dataset002_Phantom"
        self.id = self.name[7:10]
        self.folder = arguments.folder.resolve() / self.name
        self.raw = self.folder / "nnUNet_raw" / self.name
        self.preprocessed = self.folder / "nnUNet_preprocessed" / self.name
        self.predictions = self.folder / "predictions"
        self.trainer = f"nnUNetTrainerSelfReg_{arguments.epochs}epochs_{arguments.iterations}iters"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)  # only what an earlier demo of this data set wrote
        (self.folder / "logs").mkdir(parents=True)
        stages = [self.write_raw, self.plan_and_preprocess, self.train, self.predict, self.evaluate, self.draw]
        for number, stage in enumerate(stages, 1):
            print(f"[{number}/{len(stages)}] {stage.__doc__}", flush=True)
            start = time.monotonic()
            stage()
            print(f"      done in {time.monotonic() - start:.0f} s", flush=True)
        print(
            f"\nEverything is in {self.folder}:\n"
            f"  contours.png            reference and prediction of the held-out cases\n"
            f"  predictions/            their segmentations, and summary.json with all metrics\n"
            f"  nnUNet_results/         the trained model: checkpoints, log, progress.png\n"
            f"  nnUNet_raw/, nnUNet_preprocessed/, logs/"
        )

    def write_raw(self) -> None:
        """Write the raw data set, with cases held out"""
        if self.cases is None:
            phantom.write_dataset(self.raw, train=15, test=HELD_OUT)
            return
        chosen = sorted(self.cases)[: self.arguments.cases]
        print(f"      {len(chosen)} of {len(self.cases)} cases of {self.source}, the last {HELD_OUT} held out")
        for case in chosen:
            part = "Ts" if case in chosen[-HELD_OUT:] else "Tr"
            for image in self.cases[case]["images"]:
                _link(Path(image), self.raw / f"images{part}")
            _link(Path(self.cases[case]["label"]), self.raw / f"labels{part}")
        content = json.loads((self.source / "dataset.json").read_text(encoding="utf-8"))
        content.pop("dataset", None)  # paths of the original
        content["numTraining"] = len(chosen) - HELD_OUT
        (self.raw / "dataset.json").write_text(json.dumps(content, indent=4), encoding="utf-8")

    def plan_and_preprocess(self) -> None:
        """nnUNetv2_plan_and_preprocess"""
        command = ["nnUNetv2_plan_and_preprocess", "-d", self.id, "-npfp", "2", "--verify_dataset_integrity"]
        spacing = self.coarse_spacing() if self.device == "cpu" else None
        if spacing is not None:
            print(f"      for the CPU resampled to {' x '.join(f'{s:.3g}' for s in spacing)} mm")
            command += ["-overwrite_target_spacing", *map(str, spacing)]
        self.call([*command, "--no_pp"])
        self.add_small_configuration()
        self.call(["nnUNetv2_preprocess", "-d", self.id, "-c", self.base_configuration, "-np", "2"])

    def train(self) -> None:
        """nnUNetv2_train"""
        command = ["nnUNetv2_train", self.id, "demo", "0", "-tr", self.trainer, "-device", self.device]
        with tqdm(total=self.arguments.epochs, unit="epoch", desc="      " + self.trainer) as bar:
            self.call(command, on_line=lambda line: bar.update("Epoch time" in line))

    def predict(self) -> None:
        """nnUNetv2_predict"""
        self.call(
            ["nnUNetv2_predict", "-d", self.id, "-c", "demo", "-f", "0", "-tr", self.trainer, "-device", self.device]
            + ["-i", str(self.raw / "imagesTs"), "-o", str(self.predictions), "-npp", "1", "-nps", "1"]
        )

    def evaluate(self) -> None:
        """nnUNetv2_evaluate_folder"""
        self.call(
            ["nnUNetv2_evaluate_folder", str(self.raw / "labelsTs"), str(self.predictions), "-np", "2"]
            + ["-djfile", str(self.raw / "dataset.json"), "-pfile", str(self.preprocessed / f"{PLANS}.json")]
        )
        for case, dice in self.dice().items():
            print(f"      {case}: Dice " + ", ".join(f"{label} {value:.3f}" for label, value in dice.items()))

    def draw(self) -> None:
        """Draw contours.png"""
        from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

        plans = PlansManager(str(self.preprocessed / f"{PLANS}.json"))
        read = plans.image_reader_writer_class()
        ending = json.loads((self.raw / "dataset.json").read_text(encoding="utf-8"))["file_ending"]
        cases = []
        for case, dice in self.dice().items():
            image, properties = read.read_images([str(self.raw / "imagesTs" / f"{case}_0000{ending}")])
            reference, _ = read.read_seg(str(self.raw / "labelsTs" / f"{case}{ending}"))
            prediction, _ = read.read_seg(str(self.predictions / f"{case}{ending}"))
            title = f"{case}: Dice " + ", ".join(f"{label} {value:.2f}" for label, value in dice.items())
            cases.append(Case(title, image[0], reference[0], prediction[0], properties["spacing"]))
        contour_figure(cases, self.folder / "contours.png")

    def dice(self) -> dict[str, dict[str, float]]:
        """Case -> label -> Dice, from nnU-Net's summary."""
        summary = json.loads((self.predictions / "summary.json").read_text(encoding="utf-8"))
        names = {str(value): name for name, value in summary_labels(self.raw).items()}
        return {
            Path(case["prediction_file"]).name.split(".")[0]: {
                names.get(label, label): np.nan if metrics["Dice"] is None else metrics["Dice"]
                for label, metrics in case["metrics"].items()
            }
            for case in summary["metric_per_case"]
        }

    def coarse_spacing(self) -> list[float] | None:
        """The median spacing, coarsened evenly until a median image has at most CPU_VOXELS. None: no need, or 2D."""
        from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

        content = json.loads((self.raw / "dataset.json").read_text(encoding="utf-8"))
        images = sorted((self.raw / "imagesTr").glob(f"*_0000{content['file_ending']}"))
        read = determine_reader_writer_from_dataset_json(content, str(images[0]), verbose=False)()
        shapes, spacings = [], []
        for image in images:
            array, properties = read.read_images([str(image)])
            shapes.append(array.shape[1:])
            spacings.append(properties["spacing"])
        shape, spacing = np.median(shapes, axis=0), np.median(spacings, axis=0)
        factor = (shape.prod() / CPU_VOXELS) ** (1 / 3)
        return None if shape[0] == 1 or factor <= 1 else [float(s) for s in spacing * factor]

    @property
    def base_configuration(self) -> str:
        plans = json.loads((self.preprocessed / f"{PLANS}.json").read_text(encoding="utf-8"))
        return "3d_fullres" if "3d_fullres" in plans["configurations"] else "2d"

    def add_small_configuration(self) -> None:
        """Adds `demo` to the plans: the planned network with half the features, batches of two."""
        path = self.preprocessed / f"{PLANS}.json"
        plans = json.loads(path.read_text(encoding="utf-8"))
        base = plans["configurations"][self.base_configuration]
        architecture = json.loads(json.dumps(base["architecture"]))
        features = architecture["arch_kwargs"]["features_per_stage"]
        architecture["arch_kwargs"]["features_per_stage"] = [f // 2 for f in features]
        plans["configurations"]["demo"] = {
            "inherits_from": self.base_configuration,
            "batch_size": 2,
            "architecture": architecture,
        }
        path.write_text(json.dumps(plans, indent=4), encoding="utf-8")

    def call(self, command: list[str], on_line=lambda line: None) -> None:
        """Runs one of nnU-Net's commands of this environment, with its output in logs/. Ends the demo if it fails."""
        log = self.folder / "logs" / f"{command[0]}.txt"
        environment = {key: value for key, value in os.environ.items() if key != "nnUNet_extTrainer"}
        environment |= {
            name: str(self.folder / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
        }
        environment.setdefault("nnUNet_def_n_proc", "2")
        environment["PYTHONUNBUFFERED"] = "1"
        program = Path(sys.executable).with_name(command[0])
        with (
            log.open("a", encoding="utf-8") as out,
            subprocess.Popen(
                [str(program), *command[1:]],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            ) as process,
        ):
            for line in process.stdout:
                out.write(line)
                on_line(line)
        if process.returncode != 0:
            tail = "".join(log.read_text(encoding="utf-8").splitlines(keepends=True)[-15:])
            sys.exit(f"{' '.join(command)}\nfailed with status {process.returncode}; the end of {log}:\n{tail}")


def summary_labels(raw: Path) -> dict[str, object]:
    """Label name -> the key that nnU-Net's summary uses for it: a number, or a tuple for a region."""
    labels = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))["labels"]
    return {name: tuple(value) if isinstance(value, list) else value for name, value in labels.items()}


def _link(file: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        (folder / file.name).symlink_to(file.resolve())
    except OSError:  # no links here, as on Windows without the right to
        shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    sys.exit(main())
