"""
How fast trajectories are packed: packed tokens per second of processor and wall-clock time, on one core.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.packing --output packing.json

The trajectories are synthetic: `--count` completions of about 200 tokens in blocks of 16, whose states converge one to
three tokens at a time. Each is packed in memory and into a folder, from a `datasets.Dataset` (what
`collect_trajectories` returns) and from a list of rows. `completions` are the same texts through `pack_completions`.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import datasets
import pyarrow
from datasets import Dataset

from hf_jacobi.trajectories import TRAJECTORY_FEATURES, pack_completions, pack_trajectories


VOCABULARY = 32_000


def made_up_trajectories(count: int, length: int, block_size: int, seed: int = 0) -> list[dict]:
    """Rows of `TRAJECTORY_FEATURES`: random text, and states that converge one to three tokens at a time."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = generator.choices(range(VOCABULARY), k=generator.randint(20, 60))
        text = generator.choices(range(VOCABULARY), k=generator.randint(length // 2, length * 3 // 2))
        blocks = []
        for start in range(0, len(text), block_size):
            final = text[start : start + block_size]
            states, converged = [], 0
            while converged < len(final):
                states.append(final[:converged] + generator.choices(range(VOCABULARY), k=len(final) - converged))
                converged += generator.randint(1, 3)
            blocks.append([*states, final])
        rows.append(
            {
                "prompt_id": str(number),
                "prompt_ids": prompt,
                "completion_ids": text,
                "block_size": block_size,
                "trajectories": blocks,
                "ended": True,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="completions")
    parser.add_argument("--length", type=int, default=200, help="tokens of a completion, on average")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="how often each way is measured; the ways take turns")
    parser.add_argument("--output", help="a JSON file for the results")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    rows = made_up_trajectories(arguments.count, arguments.length, arguments.block_size)
    sources = {"dataset": Dataset.from_list(rows, features=TRAJECTORY_FEATURES), "list": rows}
    ways = {
        "linear": lambda data, **where: pack_trajectories(data, **where),
        "random, 4 copies": lambda data, **where: pack_trajectories(data, 8, "random", noisy_copies=4, **where),
        "filled to 2048": lambda data, **where: pack_trajectories(data, max_length=2048, pack_samples=True, **where),
        "completions": lambda data, **where: pack_completions(data, VOCABULARY, **where),
    }
    measured: dict[str, dict[str, list[float]]] = {}
    for _ in range(arguments.rounds):
        for way, pack in ways.items():
            for source, data in sources.items():
                for place in ("memory", "folder"):
                    with tempfile.TemporaryDirectory() as scratch:
                        datasets.config.HF_DATASETS_CACHE = Path(scratch) / "cache"
                        where = {"output_dir": Path(scratch) / "out"} if place == "folder" else {}
                        wall, busy = time.perf_counter(), time.process_time()
                        packed = pack(data, **where)
                        wall, busy = time.perf_counter() - wall, time.process_time() - busy
                        tokens = len(packed.data.column("input_ids").combine_chunks().flatten())
                        del packed
                    found = measured.setdefault(f"{way}/{source}/{place}", {"processor": [], "wall": []})
                    found["processor"].append(tokens / busy)
                    found["wall"].append(tokens / wall)
    print(f"{'tokens a second':36}{'processor':>12}{'wall':>12}")
    for name, found in measured.items():
        print(f"{name:36}" + "".join(f"{statistics.median(found[clock]):>12,.0f}" for clock in ("processor", "wall")))
    if arguments.output:
        versions = {"datasets": datasets.__version__, "pyarrow": pyarrow.__version__}
        settings = {name: getattr(arguments, name) for name in ("count", "length", "block_size")}
        Path(arguments.output).write_text(json.dumps(versions | settings | {"tokens_per_second": measured}, indent=1))


if __name__ == "__main__":
    main()
