"""The protocols that come with the package: a JSON file each, read by `nnunetv2_selfreg.benchmark.protocol`."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def names() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.json"))
