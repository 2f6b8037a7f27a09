"""`hf-jacobi ngrams` builds a table of n-grams from text that a model wrote."""

from __future__ import annotations

from itertools import chain

from ..trajectories.sources import path_of
from .options import check_folder, path, positive, wrapped


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Build a table of n-grams from text that the model wrote, to draft its next texts from"
    parser = commands.add_parser("ngrams", help=about, description=about)
    parser.add_argument(
        "--trajectories",
        required=True,
        nargs="+",
        help="outputs of `hf-jacobi collect`, or any rows with prompt_ids and completion_ids",
    )
    parser.add_argument("--split", default="train", help="the split (default: train)")
    parser.add_argument(
        "--output-dir",
        type=path,
        required=True,
        help="the folder that receives ngrams.npz; if it is a checkpoint, its settings name the table from then on, "
        "and it decodes by Jacobi decoding unless they say otherwise",
    )
    parser.add_argument(
        "--order", type=positive, default=4, help="tokens of the longest context, up to 8 (default: 4)"
    )
    parser.add_argument(
        "--max-entries", type=positive, default=500_000, help="contexts to keep, about 8 bytes each (default: 500000)"
    )
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    for source in arguments.trajectories:
        path_of(source)  # before the slow imports

    from ..decoding.config import JacobiConfig
    from ..decoding.files import read_json
    from ..decoding.ngram_table import TABLE, NgramTable
    from ..trajectories.ngrams import COLUMNS, build_ngram_table
    from ..trajectories.prompts import only_prompts, open_prompts
    from .tune import write_into

    folder = arguments.output_dir
    check_folder(folder)
    sources = [open_prompts(source, arguments.split) for source in arguments.trajectories]
    rows = chain.from_iterable(only_prompts(rows, *COLUMNS) for rows in sources)
    file = build_ngram_table(rows, folder, order=arguments.order, max_entries=arguments.max_entries)
    entries = len(NgramTable.read(file))
    print(f"{entries:,} contexts, {file.stat().st_size / 1e3:,.0f} kB, written to {file}")
    if any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        settings = folder / "generation_config.json"
        kept = read_json(settings) if settings.exists() else {}
        jacobi = JacobiConfig.coerce(kept.get("jacobi")).to_dict() | {"ngram_table": TABLE}
        decoding = kept.get("decoding") or "jacobi"
        print(write_into(folder, decoding, jacobi))
        if decoding != "jacobi":
            print(wrapped(f"The settings keep decoding={decoding!r}; the table serves decoding='jacobi'."), end="")
    else:
        print(wrapped(f'Name it in calls, JacobiConfig(ngram_table="{folder}"), or build it in a checkpoint.'), end="")
    return 0
