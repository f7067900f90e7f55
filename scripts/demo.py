"""From raw images to contours with nnU-Net's own commands: `make demo`, or `make demo DATA=.../DatasetXXX_Name`.

Without DATA it writes a phantom data set first. It plans and preprocesses, trains nnUNetTrainerSelfReg briefly,
predicts cases that were held out, prints their Dice and draws their contours. It shows that everything works and is no
benchmark: on a CPU the images are resampled coarsely, the network has half the planned features and the training is
minutes long.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import phantom
import torch
from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets
from tqdm import tqdm

from nnunetv2_selfreg.analysis.contours import Case, contour_figure
from nnunetv2_selfreg.benchmark.commands import ExitStatusError, add_configuration, call

CPU_VOXELS = 40**3  # a median image of at most so many voxels trains in a fraction of a second a step on two cores
HELD_OUT = 3
FEWEST = 5 + HELD_OUT  # nnU-Net makes five folds of the others
MARKER = "made-by-the-demo.txt"
EXPECTED = "expected a folder DatasetXXX_Name with dataset.json, imagesTr and labelsTr (nnU-Net's raw format)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a raw nnU-Net data set, .../DatasetXXX_Name; default: the phantom")
    parser.add_argument("--folder", type=Path, default=Path("demo-run"), help="everything is written below it")
    parser.add_argument("--cases", type=int, default=24, help=f"use at most so many of the data set; {FEWEST} or more")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=50, help="training iterations an epoch")
    arguments = parser.parse_args()
    for name, least in (("cases", FEWEST), ("epochs", 1), ("iterations", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}")
    try:
        demo = Demo(arguments, raw_cases(arguments.data) if arguments.data else None)
        demo.make_folder()
    except ValueError as error:
        print(f"DATA={arguments.data}: {error}" if arguments.data else error, file=sys.stderr)
        return 2
    try:
        demo.run()
    except KeyboardInterrupt:
        print(f"\nInterrupted. What there is stays in {demo.folder}; the next demo begins anew there.", file=sys.stderr)
        return 130
    return 0


def raw_cases(folder: Path) -> dict[str, dict]:
    """Identifier -> `{"images": [...], "label": ...}` of a raw nnU-Net data set, every file present.

    Raises:
        ValueError: it is not a data set; the message says what is wrong.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no such folder; {EXPECTED}")
    if not re.fullmatch(r"Dataset\d{3}_.+", folder.absolute().name):
        raise ValueError(f"{folder.absolute().name} is not a data set's name; {EXPECTED}")
    try:
        content = load_json(str(folder / "dataset.json"))
        channels, _ = len(content["channel_names"]), content["labels"]
        cases = get_filenames_of_train_images_and_targets(str(folder), content)
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"cannot use dataset.json or imagesTr ({error!r}); {EXPECTED}") from None
    for identifier, case in cases.items():
        if len(case["images"]) != channels:
            raise ValueError(f"case {identifier} has {len(case['images'])} of {channels} channels in imagesTr")
        missing = [file for file in [*case["images"], case["label"]] if not Path(file).is_file()]
        if missing:
            raise ValueError(f"{missing[0]} of case {identifier} is missing")
    if len(cases) < FEWEST:
        raise ValueError(f"it has {len(cases)} training cases, the demo needs {FEWEST}")
    return cases


class Demo:
    """The stages of the demo: nnU-Net's commands, each with its output in logs/."""

    def __init__(self, arguments: argparse.Namespace, cases: dict[str, dict] | None) -> None:
        self.arguments = arguments
        self.cases = cases
        self.source = arguments.data.absolute() if arguments.data else None
        self.name = self.source.name if self.source else "Dataset002_Phantom"
        self.id = self.name[7:10]
        self.folder = arguments.folder.resolve() / self.name
        self.raw = self.folder / "nnUNet_raw" / self.name
        self.plans = self.folder / "nnUNet_preprocessed" / self.name / "nnUNetPlans.json"
        self.predictions = self.folder / "predictions"
        self.trainer = f"nnUNetTrainerSelfReg_{arguments.epochs}epochs_{arguments.iterations}iters"
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def run(self) -> None:
        stages = {
            "writing the raw data set, some cases held out": self.write_raw,
            "planning and preprocessing": self.plan_and_preprocess,
            f"training {self.trainer} on the {self.device}": self.train,
            "predicting the held-out cases": self.predict,
            "evaluating the predictions": self.evaluate,
            "drawing contours.png": self.draw,
        }
        for number, (what, stage) in enumerate(stages.items(), 1):
            print(f"[{number}/{len(stages)}] {what}", flush=True)
            start = time.monotonic()
            stage()
            print(f"      done in {time.monotonic() - start:.0f} s", flush=True)
        print(
            f"\nEverything is in {self.folder}:\n"
            "  contours.png      reference and prediction of the held-out cases\n"
            "  predictions/      their segmentations, and summary.json with all metrics\n"
            "  nnUNet_results/   the trained model: checkpoints, log, progress.png\n"
            "  nnUNet_raw/, nnUNet_preprocessed/, logs/"
        )

    def make_folder(self) -> None:
        """An empty folder for this demo, in the place of an earlier demo's.

        Raises:
            ValueError: the folder is not an earlier demo's, or the data lie in it.
        """
        sources = [Path(case["label"]).resolve() for case in (self.cases or {}).values()]
        if any(file.is_relative_to(self.folder) for file in sources):
            raise ValueError(f"it lies in {self.folder}, which the demo would empty; copy it elsewhere")
        if self.folder.exists() and not (self.folder / MARKER).is_file():
            raise ValueError(f"{self.folder} is not an earlier demo's; give another one with --folder")
        if self.folder.exists():
            shutil.rmtree(self.folder)
        (self.folder / "logs").mkdir(parents=True)
        (self.folder / MARKER).write_text("Written by scripts/demo.py, which empties this folder when it runs again.\n")

    def write_raw(self) -> None:
        if self.source is None or self.cases is None:
            phantom.write_dataset(self.raw, train=15, test=HELD_OUT)
            return
        content = load_json(str(self.source / "dataset.json"))
        ending = content["file_ending"]
        chosen = sorted(self.cases)[: self.arguments.cases]
        print(f"      {len(chosen)} of {len(self.cases)} cases of {self.source}, the last {HELD_OUT} held out")
        for case in chosen:
            part = "Ts" if case in chosen[-HELD_OUT:] else "Tr"
            for channel, image in enumerate(self.cases[case]["images"]):
                _link(Path(image), self.raw / f"images{part}" / f"{case}_{channel:04d}{ending}")
            _link(Path(self.cases[case]["label"]), self.raw / f"labels{part}" / f"{case}{ending}")
        content.pop("dataset", None)  # the paths of the original
        content["numTraining"] = len(chosen) - HELD_OUT
        save_json(content, str(self.raw / "dataset.json"), sort_keys=False)

    def plan_and_preprocess(self) -> None:
        spacing = self.coarse_spacing() if self.device == "cpu" else None
        coarse = ["-overwrite_target_spacing", *map(str, spacing)] if spacing else []
        if spacing:
            print(f"      resampled to {' x '.join(f'{s:.3g}' for s in spacing)} mm for the CPU")
        plan = ["nnUNetv2_plan_and_preprocess", "-d", self.id, "-npfp", "2", "--verify_dataset_integrity", "--no_pp"]
        self.call(*plan, *coarse)
        base = self.add_small_configuration()
        self.call("nnUNetv2_preprocess", "-d", self.id, "-c", base, "-np", "2")

    def train(self) -> None:
        command = ["nnUNetv2_train", self.id, "demo", "0", "-tr", self.trainer, "-device", self.device]
        with tqdm(total=self.arguments.epochs, unit="epoch", desc="      training") as bar:
            self.call(*command, on_line=lambda line: bar.update("Epoch time" in line))

    def predict(self) -> None:
        model = ["-d", self.id, "-c", "demo", "-f", "0", "-tr", self.trainer, "-device", self.device]
        folders = ["-i", str(self.raw / "imagesTs"), "-o", str(self.predictions)]
        self.call("nnUNetv2_predict", *model, *folders, "-npp", "1", "-nps", "1")

    def evaluate(self) -> None:
        files = ["-djfile", str(self.raw / "dataset.json"), "-pfile", str(self.plans)]
        self.call("nnUNetv2_evaluate_folder", str(self.raw / "labelsTs"), str(self.predictions), *files, "-np", "2")
        for line in self.dice().values():
            print(f"      {line}")

    def draw(self) -> None:
        read, cases = self.reader(), []
        ending = self.description["file_ending"]
        for case, title in self.dice().items():
            image, properties = read.read_images([str(self.raw / "imagesTs" / f"{case}_0000{ending}")])
            reference, _ = read.read_seg(str(self.raw / "labelsTs" / f"{case}{ending}"))
            prediction, _ = read.read_seg(str(self.predictions / f"{case}{ending}"))
            cases.append(Case(title, image[0], reference[0], prediction[0], properties["spacing"]))
        contour_figure(cases, self.folder / "contours.png")

    def dice(self) -> dict[str, str]:
        """Case -> a line with the Dice of each label, from nnU-Net's summary."""
        # The summary names a label by its number and a region by its tuple of numbers.
        labels = self.description["labels"].items()
        names = {str(tuple(value) if isinstance(value, list) else value): name for name, value in labels}
        lines = {}
        for case in load_json(str(self.predictions / "summary.json"))["metric_per_case"]:
            identifier = Path(case["prediction_file"]).name.removesuffix(self.description["file_ending"])
            dice = [f"{names.get(label, label)} {metrics['Dice']:.3f}" for label, metrics in case["metrics"].items()]
            lines[identifier] = f"{identifier}: Dice " + ", ".join(dice)
        return lines

    def coarse_spacing(self) -> list[float] | None:
        """The median spacing, coarsened evenly until a median image has at most CPU_VOXELS. None: no need, or 2D."""
        read, shapes, spacings = self.reader(), [], []
        for image in (self.raw / "imagesTr").glob(f"*_0000{self.description['file_ending']}"):
            array, properties = read.read_images([str(image)])
            shapes.append(array.shape[1:])
            spacings.append(properties["spacing"])
        shape, spacing = np.median(shapes, axis=0), np.median(spacings, axis=0)
        factor = (shape.prod() / CPU_VOXELS) ** (1 / 3)
        return None if shape[0] == 1 or factor <= 1 else [float(s) for s in spacing * factor]

    def add_small_configuration(self) -> str:
        """Adds `demo` to the plans: the planned network with half the features, batches of two. Returns what it is
        derived from."""
        configurations = load_json(str(self.plans))["configurations"]
        base = "3d_fullres" if "3d_fullres" in configurations else "2d"
        features = configurations[base]["architecture"]["arch_kwargs"]["features_per_stage"]
        half = {"features_per_stage": [n // 2 for n in features]}
        add_configuration(self.plans, "demo", base, {"batch_size": 2}, half)
        return base

    @property
    def description(self) -> dict:
        """The data set's dataset.json."""
        return load_json(str(self.raw / "dataset.json"))

    def reader(self):
        image = next((self.raw / "imagesTr").glob(f"*{self.description['file_ending']}"))
        return determine_reader_writer_from_dataset_json(self.description, str(image), verbose=False)()

    def call(self, *command: str, on_line: Callable[[str], object] = lambda _: None) -> None:
        """Runs one of nnU-Net's commands with the demo's own folders. Ends the demo if it fails."""
        environment = {key: value for key, value in os.environ.items() if key != "nnUNet_extTrainer"}
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            environment[name] = str(self.folder / name)
        environment["nnUNet_def_n_proc"] = environment.get("nnUNet_def_n_proc", "2")
        try:
            call(*command, log=self.folder / "logs" / f"{command[0]}.txt", environment=environment, on_line=on_line)
        except ExitStatusError as error:
            sys.exit(str(error))


def _link(file: Path, link: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(file.resolve())
    except OSError:  # no links here, as on Windows without the right to
        shutil.copyfile(file, link)


if __name__ == "__main__":
    sys.exit(main())
