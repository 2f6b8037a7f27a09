"""
Runs the stages one after the other, each in a separate process with a time limit, and collects their figures.

Nothing here imports torch: whatever happens to a stage (an exception, a hang, a kill for memory), the others get their
turn and the whole run ends in time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .bundle import unpack
from .report import report


ROOT = Path(__file__).parents[2]
# In order of importance, with the share of the time left that each may take; the last may take all of it.
STAGES = {"exactness": 0.16, "attention": 0.2, "decoding": 0.5, "training": 0.45, "smollm2": 1.0}
RESERVE = 4.0  # seconds kept for the report
LOG_LIMIT = 4 << 20  # bytes of output kept per stage


@dataclass(frozen=True)
class Plan:
    """
    What to run.

    Args:
        stages: names from `STAGES`.
        minutes: for everything.
        output: the folder of the results.
        bundle: folders that `benchmarks.gpu.bundle` made, or none.
        dry: whether everything has toy size.
        faults: a list of `STAGE=KIND`: which fault to plant in which stage, for the tests.
    """

    stages: Sequence[str]
    minutes: float
    output: Path
    bundle: Sequence[Path] = ()
    dry: bool = False
    faults: Sequence[str] = ()


def run(plan: Plan) -> dict[str, Any]:
    """
    Runs a plan; returns what `results.json` holds.

    `results.json` is rewritten whenever a stage reports something new, so it stays complete if this process is killed.
    """
    start = time.monotonic()
    deadline = start + 60 * plan.minutes - RESERVE
    plan.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"minutes": plan.minutes, "dry_run": plan.dry, "stages": {}}
    chosen = [name for name in STAGES if name in plan.stages]
    with tempfile.TemporaryDirectory() as scratch:
        bundle = Path(scratch) / "bundle"
        try:
            results["bundle"] = unpack(plan.bundle, bundle)
        except Exception as error:  # stages that do not need it can still run
            results["bundle"] = {"error": f"{type(error).__name__}: {error}"}
        for number, name in enumerate(chosen):
            left = deadline - time.monotonic()
            seconds = left if number == len(chosen) - 1 else left * STAGES[name]
            if seconds < 1:
                results["stages"][name] = {"status": "not run: no time was left"}
                continue
            run_stage(name, seconds, plan, bundle, Path(scratch), results)
            _write(plan.output, results)
    results["seconds"] = round(time.monotonic() - start, 1)
    _write(plan.output, results)
    return results


def run_stage(name: str, seconds: float, plan: Plan, bundle: Path, scratch: Path, results: dict[str, Any]) -> None:
    """Runs one stage and writes each of its figures into `results` at once."""
    file, log = scratch / f"{name}.json", scratch / f"{name}.log"
    options = ["--dry-run"] if plan.dry else []
    for stage, kind in (fault.split("=") for fault in plan.faults):
        options += ["--fault", kind] if stage == name else []
    command = [sys.executable, "-m", "benchmarks.gpu.stage", name, "--file", str(file), "--seconds", str(seconds)]
    command += ["--bundle", str(bundle), "--output", str(plan.output.resolve()), *options]
    print(f"{name}: at most {seconds:.0f} s", flush=True)
    start = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=_environment(bundle, plan.dry), stdout=output, stderr=output, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() - start < seconds:
                time.sleep(0.2)
                _gather(name, file, results) and _write(plan.output, results)
        finally:  # also after an interruption
            timed_out = process.poll() is None
            _end(process)
    _gather(name, file, results)
    stage = results["stages"].setdefault(name, {"figures": {}, "errors": {}, "skipped": {}})
    code = process.returncode
    done = f"done, {len(stage['errors'])} figures failed" if stage["errors"] else "done"
    stage["status"] = "stopped: its time was up" if timed_out else done if code == 0 else f"failed: exit code {code}"
    stage["seconds"] = round(time.monotonic() - start, 1)
    if code != 0 and not timed_out:
        stage["last_output"] = log.read_text(errors="replace")[-2000:]
    with (plan.output / "log.txt").open("ab") as whole, log.open("rb") as own:
        own.seek(max(0, log.stat().st_size - LOG_LIMIT // len(STAGES)))
        whole.write(f"\n==== {name} ====\n".encode() + own.read())


def _environment(bundle: Path, dry: bool) -> dict[str, str]:
    paths = [str(ROOT), str(ROOT / "src"), str(ROOT / "tests"), str(bundle / "site")]
    paths += [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    settings = {"HF_HUB_OFFLINE": "1", "PYTORCH_ALLOC_CONF": "expandable_segments:True", "PYTHONUNBUFFERED": "1"}
    if dry:  # needs no compiler; beside other processes, two threads are slower than one
        settings |= {"TORCH_COMPILE_DISABLE": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return os.environ | settings | {"PYTHONPATH": os.pathsep.join(paths)}


def _end(process: subprocess.Popen) -> None:
    """Ends a stage and whatever it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def _gather(name: str, file: Path, results: dict[str, Any]) -> bool:
    """Reads what a stage has written; returns whether it is new."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return False
    before = results["stages"].get(name)
    results["stages"][name] = content | {"status": "running"}
    return results["stages"][name] != before


def _write(output: Path, results: dict[str, Any]) -> None:
    scratch = output / "results.part"
    scratch.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(scratch, output / "results.json")
    (output / "report.md").write_text(report(results))
