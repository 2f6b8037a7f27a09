"""`hf-jacobi pack` turns trajectories into training rows."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from typing import Any

from ..decoding.errors import UsageError
from ..trajectories.sources import path_of
from .options import INTERRUPTED, check_folder, check_places, path, positive, wrapped, write_picture


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Turn trajectories into training rows: clean text first, then one noisy state of each block"
    parser = commands.add_parser("pack", help=about, description=about)
    parser.add_argument(
        "--trajectories", required=True, help="the output of `hf-jacobi collect`, or a data set of the same form"
    )
    parser.add_argument("--split", default="train", help="the split (default: train)")
    parser.add_argument(
        "--output-dir", type=path, required=True, help="the output folder; an interrupted run resumes there"
    )
    parser.add_argument("--window-size", type=positive, help="blocks per window (default: 16; 1 is CLLM)")
    parser.add_argument(
        "--noise-schedule",
        choices=("linear", "random", "reverse", "constant"),
        help="how the noise level changes over a window (default: linear)",
    )
    parser.add_argument("--min-noise", type=float, help="lowest noise level (default: 0)")
    parser.add_argument("--max-noise", type=float, help="highest noise level (default: 1)")
    parser.add_argument(
        "--noise",
        choices=("uniform", "corrupt"),
        help="draw the noise from the vocabulary instead, for whole blocks or for a share of the tokens; "
        "--trajectories can then be any rows with prompt_ids and completion_ids",
    )
    parser.add_argument("--tokenizer", help="with --noise: the tokenizer to draw from, a folder or a Hub id")
    parser.add_argument("--block-size", type=positive, help="with --noise: tokens per block (default: 16)")
    parser.add_argument(
        "--corrupt-share", type=float, help="with --noise corrupt: the share of the tokens (default: 0.5)"
    )
    parser.add_argument("--max-length", type=positive, help="maximum tokens per row; longer samples are cut")
    parser.add_argument("--pack-samples", action="store_true", help="fill rows with samples, up to --max-length")
    parser.add_argument(
        "--noisy-copies", type=positive, default=1, help="noisy versions of each text in a row (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise (default: 0)")
    parser.add_argument("--shard-size", type=positive, default=256, help="trajectories per file (default: 256)")
    parser.add_argument("--plot", type=path, help="plot the noise levels into this PNG file (needs matplotlib)")
    parser.set_defaults(run=run)


OF_TRAJECTORIES = ("window_size", "noise_schedule", "min_noise", "max_noise")
OF_COMPLETIONS = ("tokenizer", "block_size", "corrupt_share")
SHARED = ("output_dir", "max_length", "pack_samples", "noisy_copies", "seed", "shard_size")


def _packing(arguments) -> tuple[Callable, dict[str, Any]]:
    """The packing function and its arguments; arguments of the other packing function are refused."""
    own, other = (OF_COMPLETIONS, OF_TRAJECTORIES) if arguments.noise else (OF_TRAJECTORIES, OF_COMPLETIONS)
    if given := [f"--{name.replace('_', '-')}" for name in other if getattr(arguments, name) is not None]:
        need = "cannot be used with" if arguments.noise else "can only be used with"
        raise UsageError(f"{', '.join(given)} {need} --noise: drop {'it' if len(given) == 1 else 'them'}.")
    if arguments.noise and arguments.tokenizer is None:
        raise UsageError("--noise draws tokens: name their --tokenizer, a folder or a Hub id.")
    settings = {name: getattr(arguments, name) for name in SHARED}
    settings |= {name: getattr(arguments, name) for name in own if getattr(arguments, name) is not None}
    if not arguments.noise:
        from ..trajectories.packing import pack_trajectories

        return pack_trajectories, settings
    from ..hub.publish import load_tokenizer
    from ..trajectories.corruption import pack_completions

    settings["tokenizer"] = load_tokenizer(arguments.tokenizer)
    return pack_completions, settings | {"noise": arguments.noise}


def run(arguments) -> int:
    """Runs the command."""
    path_of(arguments.trajectories)  # before the slow imports

    from ..trajectories.pieces import most_blocks
    from ..trajectories.prompts import open_prompts
    from ..trajectories.shards import counts_in
    from ..trajectories.statistics import PackingStatistics

    pack, settings = _packing(arguments)
    check_folder(arguments.output_dir)
    check_places(None, arguments.plot)
    rows = open_prompts(arguments.trajectories, arguments.split)
    known = {name: one.default for name, one in inspect.signature(pack).parameters.items()} | settings
    warning = "" if arguments.noise else unused_levels(most_blocks(rows), known)
    if warning:  # before the work
        print(wrapped(warning), end="", flush=True)
    try:
        pack(rows, **settings, progress=True)
    except KeyboardInterrupt:
        print(INTERRUPTED)
        return 130
    statistics = PackingStatistics.from_counts(counts_in(arguments.output_dir, "packed"))
    (arguments.output_dir / ".statistics.json").write_text(json.dumps(statistics.to_dict(), indent=2))
    print(f"{statistics.table()}\n\nwritten to {arguments.output_dir}")
    if not arguments.noise and not warning:  # `max_length` can have cut all texts
        print(wrapped(unused_levels(len(statistics.by_place), known)), end="")
    if arguments.plot:
        from ..evaluation.plots import noise_levels

        write_picture(arguments.plot, noise_levels(statistics))
        print(f"plotted into {arguments.plot}")
    return 0


def unused_levels(longest: int | None, settings: Mapping[str, Any]) -> str:
    """
    A warning if no text fills a window.

    Args:
        longest: the number of blocks of the longest text, if known.
        settings: the arguments of `pack_trajectories`.
    """
    window_size = settings["window_size"]
    if longest is None or longest >= window_size or settings["noise_schedule"] not in ("linear", "reverse"):
        return ""
    return (
        f"No text has more than {longest} block{'s' * (longest != 1)}, so the noise levels at the end of a window of "
        f"{window_size} are not used: a smaller --window-size uses them all."
    )
