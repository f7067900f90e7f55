"""Where this package's trainers are, what there is, and whether nnU-Net finds it."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nnunetv2_selfreg.errors import UserError

VARIABLE = "nnUNet_extTrainer"


@dataclass(frozen=True)
class Trainer:
    """A trainer as its file states it."""

    name: str
    summary: str
    file: Path


def trainers_folder() -> Path:
    """The folder with the trainers: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).absolute().parent  # as the .pth line writes it, links kept
    installed = package / "trainers"
    return installed if installed.is_dir() else package.parent / "trainers"


def list_trainers(folder: Path | None = None) -> list[Trainer]:
    """All trainer classes in `folder`, by name. The files are read, not imported, so one that cannot be
    imported is listed too; one that is no Python is not."""
    trainers = []
    for file in sorted((folder or trainers_folder()).glob("*.py")):
        with contextlib.suppress(SyntaxError, ValueError):  # the latter of another encoding
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ClassDef) and node.name.startswith("nnUNetTrainer"):
                    summary = (ast.get_docstring(node) or "").partition("\n")[0]
                    trainers.append(Trainer(node.name, summary, file))
    return sorted(trainers, key=lambda trainer: trainer.name)


def trainers_of_others() -> list[Trainer]:
    """Those in the folders of `nnUNet_extTrainer` that are not this package's."""
    ours = trainers_folder().resolve()
    folders = [folder for folder in external_folders() if folder.resolve() != ours]
    return [trainer for folder in folders for trainer in list_trainers(folder)]


def external_folders() -> list[Path]:
    """The folders that `nnUNet_extTrainer` names, in the order in which nnU-Net searches them."""
    return [Path(folder) for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder.strip()]


def searched_folder(trainer: Trainer) -> Path | None:
    """The first folder of `nnUNet_extTrainer` that has the trainer's file: the one nnU-Net takes it from."""
    return next((folder for folder in external_folders() if (folder / trainer.file.name).is_file()), None)


def set_at_start() -> Path | None:
    """The `.pth` file of a regular installation, which extends `nnUNet_extTrainer` at interpreter start."""
    file = trainers_folder().parent.parent / "nnunetv2_selfreg.pth"
    return file if file.is_file() else None


def why_not_found(name: str) -> str | None:
    """None if nnU-Net finds the trainer `name`, looked up exactly as `nnUNetv2_train -tr` does; otherwise its error."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        with contextlib.redirect_stdout(io.StringIO()):
            recursive_find_trainer_class_by_name(name)
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever a trainer's module raises is the answer
        file = failed_import(error)
        return f"{type(error).__name__}: {error}" + (f" ({file} cannot be imported)" if file else "")
    return None


def require(names: Iterable[str]) -> None:
    """Raises a UserError if nnU-Net does not find one of the trainers: before work starts."""
    for name in names:
        if error := why_not_found(name):
            raise UserError(f"-tr {name}: {error}")


def failed_import(error: BaseException) -> str | None:
    """The file in a folder of `nnUNet_extTrainer` that raised an error, or is no Python; None of other errors."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        files.append(error.filename)
    ours = trainers_folder().resolve()  # one of ours asks for other names, so it is in tracebacks of theirs
    folders = [folder.resolve() for folder in external_folders() if folder.resolve() != ours]
    for file in reversed(files):
        if any(Path(file).resolve().is_relative_to(folder) for folder in folders):
            return file
    return None


def export_line() -> str:
    """The shell line that makes nnU-Net find the trainers where nothing else does."""
    before = f"${{{VARIABLE}}}{os.pathsep}" if os.environ.get(VARIABLE) else ""
    return f'export {VARIABLE}="{before}{trainers_folder()}"'
