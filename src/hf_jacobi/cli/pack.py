"""`hf-jacobi pack`: trajectories become training rows."""

from __future__ import annotations

import json

from ..decoding.errors import UsageError
from .options import check_folder, check_places, path, positive


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Turn trajectories into training rows: clean text first, then one noisy state of each block"
    parser = commands.add_parser("pack", help=about, description=about)
    parser.add_argument("--trajectories", required=True, help="what `hf-jacobi collect` wrote, or a data set like it")
    parser.add_argument("--split", default="train", help="the split of them (default: train)")
    parser.add_argument("--output-dir", type=path, required=True, help="where it is written")
    parser.add_argument("--window-size", type=positive, help="blocks of a window (default: 16; 1 is CLLM)")
    parser.add_argument(
        "--noise-schedule",
        choices=("linear", "random", "reverse", "constant"),
        help="how the noise level runs over a window (default: linear)",
    )
    parser.add_argument("--min-noise", type=float, help="lowest noise level (default: 0)")
    parser.add_argument("--max-noise", type=float, help="highest noise level (default: 1)")
    parser.add_argument(
        "--noise",
        choices=("uniform", "corrupt"),
        help="draw noise from the vocabulary instead: whole blocks, or a share of the text; --trajectories may be any "
        "rows with prompt_ids and completion_ids then",
    )
    parser.add_argument("--tokenizer", help="whose tokens are drawn, with --noise: a folder or a Hub id")
    parser.add_argument("--block-size", type=positive, help="tokens of a block, with --noise (default: 16)")
    parser.add_argument("--corrupt-share", type=float, help="of the text, with --noise corrupt (default: 0.5)")
    parser.add_argument("--max-length", type=positive, help="tokens a row may have; longer samples are cut")
    parser.add_argument("--pack-samples", action="store_true", help="several samples a row, up to --max-length")
    parser.add_argument(
        "--noisy-copies", type=positive, default=1, help="noisy versions of each text in a row (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: 0)")
    parser.add_argument("--shard-size", type=positive, default=256, help="trajectories per file (default: 256)")
    parser.add_argument("--plot", type=path, help="draw the noise levels into this PNG file")
    parser.set_defaults(run=run)


OF_TRAJECTORIES = {"window_size": 16, "noise_schedule": "linear", "min_noise": 0.0, "max_noise": 1.0}
OF_COMPLETIONS = {"tokenizer": None, "block_size": 16, "corrupt_share": 0.5}
SHARED = ("output_dir", "max_length", "pack_samples", "noisy_copies", "seed", "shard_size")


def _packing(arguments):
    """The function that packs, and its arguments; those of the other one are refused."""
    own, other = (OF_COMPLETIONS, OF_TRAJECTORIES) if arguments.noise else (OF_TRAJECTORIES, OF_COMPLETIONS)
    if given := [f"--{name.replace('_', '-')}" for name in other if getattr(arguments, name) is not None]:
        way = "without --noise" if arguments.noise else "with --noise"
        raise UsageError(f"{', '.join(given)} can be had {way} alone: drop {'it' if len(given) == 1 else 'them'}.")
    if arguments.noise and arguments.tokenizer is None:
        raise UsageError("--noise draws tokens: name their --tokenizer, a folder or a Hub id.")
    settings = {name: getattr(arguments, name) for name in SHARED}
    settings |= {
        name: value if getattr(arguments, name) is None else getattr(arguments, name) for name, value in own.items()
    }
    if not arguments.noise:
        from ..trajectories.packing import pack_trajectories

        return pack_trajectories, settings
    from ..hub.publish import load_tokenizer
    from ..trajectories.corruption import pack_completions

    settings["tokenizer"] = load_tokenizer(arguments.tokenizer)
    return pack_completions, settings | {"noise": arguments.noise}


def run(arguments) -> int:
    """Runs the command."""
    from ..trajectories.prompts import open_prompts
    from ..trajectories.shards import counts_in
    from ..trajectories.statistics import PackingStatistics

    pack, settings = _packing(arguments)
    picture = arguments.plot
    check_folder(arguments.output_dir)
    check_places(None, picture)
    try:
        pack(open_prompts(arguments.trajectories, arguments.split), **settings, progress=True)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where this stopped.")
        return 130
    statistics = PackingStatistics.from_counts(counts_in(arguments.output_dir, "packed"))
    (settings["output_dir"] / ".statistics.json").write_text(json.dumps(statistics.to_dict(), indent=2))
    print(f"{statistics.table()}\n\nwritten to {arguments.output_dir}")
    longest = len(statistics.by_place)
    window, schedule = settings.get("window_size", 1), settings.get("noise_schedule")
    if longest < window and schedule in ("linear", "reverse"):
        print(
            f"No text has more than {longest} blocks, so a window of {window} never comes to its "
            "end and the noise levels there: a smaller --window-size uses them all."
        )
    if picture:
        from ..evaluation.plots import noise_levels

        noise_levels(statistics).figure.savefig(picture, dpi=150, bbox_inches="tight")
        print(f"drawn into {arguments.plot}")
    return 0
