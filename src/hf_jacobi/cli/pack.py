"""`hf-jacobi pack`: trajectories become training rows."""

from __future__ import annotations

import json

from .options import check_folder, check_places, path, positive


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Turn trajectories into training rows: clean text first, then one noisy state of each block"
    parser = commands.add_parser("pack", help=about, description=about)
    parser.add_argument("--trajectories", required=True, help="what `hf-jacobi collect` wrote, or a data set like it")
    parser.add_argument("--split", default="train", help="the split of them (default: train)")
    parser.add_argument("--output-dir", type=path, required=True, help="where it is written")
    parser.add_argument("--window-size", type=positive, default=16, help="blocks of a window (default: 16; 1 is CLLM)")
    parser.add_argument(
        "--noise-schedule",
        choices=("linear", "random", "reverse", "constant"),
        default="linear",
        help="how the noise level runs over a window (default: linear)",
    )
    parser.add_argument("--min-noise", type=float, default=0.0, help="lowest noise level (default: 0)")
    parser.add_argument("--max-noise", type=float, default=1.0, help="highest noise level (default: 1)")
    parser.add_argument("--max-length", type=positive, help="tokens a row may have; longer samples are cut")
    parser.add_argument("--pack-samples", action="store_true", help="several samples a row, up to --max-length")
    parser.add_argument(
        "--noisy-copies", type=positive, default=1, help="noisy versions of each text in a row (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random schedule (default: 0)")
    parser.add_argument("--shard-size", type=positive, default=256, help="trajectories per file (default: 256)")
    parser.add_argument("--plot", type=path, help="draw the noise levels into this PNG file")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    from ..trajectories.packing import pack_trajectories
    from ..trajectories.prompts import open_prompts
    from ..trajectories.shards import counts_in
    from ..trajectories.statistics import PackingStatistics

    others = ("trajectories", "split", "plot", "command", "run", "rest")
    settings = {name: value for name, value in vars(arguments).items() if name not in others}
    picture = arguments.plot
    check_folder(arguments.output_dir)
    check_places(None, picture)
    try:
        pack_trajectories(open_prompts(arguments.trajectories, arguments.split), **settings, progress=True)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command goes on where this stopped.")
        return 130
    statistics = PackingStatistics.from_counts(counts_in(arguments.output_dir, "packed"))
    (settings["output_dir"] / ".statistics.json").write_text(json.dumps(statistics.to_dict(), indent=2))
    print(f"{statistics.table()}\n\nwritten to {arguments.output_dir}")
    longest = len(statistics.by_place)
    if longest < arguments.window_size and arguments.noise_schedule in ("linear", "reverse"):
        print(
            f"No text has more than {longest} blocks, so a window of {arguments.window_size} never comes to its "
            "end and the noise levels there: a smaller --window-size uses them all."
        )
    if picture:
        from ..evaluation.plots import noise_levels

        noise_levels(statistics).figure.savefig(picture, dpi=150, bbox_inches="tight")
        print(f"drawn into {arguments.plot}")
    return 0
