"""`hf-jacobi tune` finds the fastest settings on this machine and writes them into a checkpoint."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path

from ..decoding.errors import UsageError
from ..decoding.files import read_json
from .demo_model import HUB_ID, demo_checkpoint, packaged, unpacked
from .models import MODEL, find, place_of
from .options import (
    Prompts,
    add_dtype,
    add_prompts,
    check_place,
    check_places,
    named,
    path,
    positive,
    wrapped,
    write_json,
    write_picture,
)


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Find the settings of Jacobi decoding that are fastest on this machine, and write them into the checkpoint"
    parser = commands.add_parser("tune", help=about, description=about)
    parser.add_argument("model", nargs="?", help=MODEL)
    parser.add_argument(
        "--adapter", help="an adapter for MODEL, a folder or a Hub id; the settings are written into its folder"
    )
    add_prompts(parser, count=6)
    parser.add_argument("--max-new-tokens", type=positive, default=48, help="maximum tokens per text (default: 48)")
    parser.add_argument(
        "--batch-sizes",
        type=positive,
        nargs="+",
        default=[1],
        help="batch sizes to measure the cost of forwards for (default: 1)",
    )
    add_dtype(parser)
    parser.add_argument("--output", type=path, help="write the measurements to this JSON file")
    parser.add_argument(
        "--plots", type=path, help="plot costs, settings and predictions into this folder (needs matplotlib)"
    )
    parser.add_argument(
        "--save-to", type=path, help="write the settings into the generation_config.json of this folder instead"
    )
    parser.add_argument("--dry-run", action="store_true", help="do not write the settings")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    check_places(arguments.output, arguments.plots and arguments.plots / "knee.png")
    target = None if arguments.dry_run else target_of(arguments)
    prompts = Prompts(arguments)
    found = find(arguments.model, arguments.adapter)
    tokenizer = found.tokenizer()
    ids = prompts.encode(tokenizer)

    from tqdm import tqdm

    from ..decoding import enable
    from ..evaluation.tune import tune

    loaded = found.load(arguments.dtype)
    for one in {id(loaded.writer): loaded.writer, id(loaded.model): loaded.model}.values():
        enable(one)
    report = tune(
        loaded.model,
        tokenizer,
        ids,
        base=loaded.writer,
        present=loaded.config.to_dict() if loaded.tuned else None,
        batch_sizes=arguments.batch_sizes,
        max_new_tokens=arguments.max_new_tokens,
        progress=lambda items, title: tqdm(items, desc=title, leave=False),
    )
    report["setup"] |= {"model": found.name, "adapter": found.adapter_name}
    print_report(report)
    try:
        _write_report(arguments, report)
    finally:  # a failure to write the report does not lose the settings
        if target is not None:
            print(write_into(target, report["decoding"], report["jacobi"]))
    return 0


def _write_report(arguments, report: dict) -> None:
    """Writes the report and its plots to the files that the user named."""
    if arguments.output:
        write_json(arguments.output, report)
    if arguments.plots:
        from ..evaluation import plots

        for draw in (plots.knee, plots.tuned_settings, plots.predicted_against_measured):
            write_picture(arguments.plots / f"{draw.__name__}.png", draw(report))


def write_into(folder: Path, decoding: str, jacobi: dict) -> str:
    """Writes settings into a checkpoint and into the decoder that it carries, if any; returns a line for each file."""
    from ..decoding.config import write_settings
    from ..hub.carried import rewrite_settings

    settings = write_settings(folder, decoding, jacobi)
    done = [f"written to {folder / 'generation_config.json'}"]
    if rewrite_settings(folder, settings):
        done.append(f"and to {folder / 'custom_generate' / 'settings.py'}")
    if (folder / "evaluation.json").exists():
        done.append(
            "The evaluation.json in this folder can be outdated now: `hf-jacobi bench --evaluation` measures again."
        )
    return "\n".join(done)


def target_of(arguments) -> Path:
    """
    The folder whose generation config gets the settings.

    Raises:
        `UsageError`: there is no such folder, or it cannot be written.
    """
    folder = arguments.save_to or arguments.adapter
    if folder is None and arguments.model is None and (unpacked().exists() or packaged()):
        folder = demo_checkpoint()
    elif folder is None:
        folder = place_of(HUB_ID if arguments.model is None else arguments.model)
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is no folder to write the settings into: name one with --save-to, or use --dry-run."
        )
    file = folder / "generation_config.json"
    check_place(file)
    if file.exists():
        read_json(file)
    return folder


def print_report(report: dict) -> None:
    """Prints the measurements and the chosen settings."""
    print(wrapped(", ".join(f"{name} {value}" for name, value in report["setup"].items() if value)), end="")
    print("\nforward over" + "".join(f"{tokens:>7}" for tokens in report["costs"]["tokens"]) + "  tokens")
    for rows, seconds in report["costs"]["seconds"].items():
        title = "takes" if rows == "1" else f"{rows} rows"
        print(f"{title:12}" + "".join(f"{1000 * value:>7.1f}" for value in seconds) + "  ms")
    print(f"\n{'tokens per second':>37}")
    print(f"{'TPF':>6}{'positions':>11}{'predicted':>11}{'measured':>10}  settings")
    for row in sorted(report["grid"], key=lambda row: -row["predicted"]):
        checked = report["checked"].get(str(row["settings"]))
        measured = f"{checked['tokens_per_second']:.1f}" if checked else ""
        figures = f"{row['tokens_per_forward']:>6.2f}{row['positions_per_forward']:>11.1f}{row['predicted']:>11.1f}"
        lines = textwrap.wrap(_named(row["settings"]), max(24, shutil.get_terminal_size().columns - 40))
        print(f"{figures}{measured:>10}  " + f"\n{'':40}".join(lines))
    print(f"{1:>6.2f}{1:>11.1f}{'':>11}{report['checked']['AR']['tokens_per_second']:>10.1f}  AR")
    if report["decoding"] == "ar":
        found = "No setting was faster than AR, so the checkpoint is set to decode by AR."
    else:
        found = f"speed-up {report['speedup']:.2f}x over AR with {_named(report['jacobi'])}"
    print(f"\n{wrapped(found)}", end="")


def _named(settings: dict) -> str:
    """Settings in one phrase, without the measured costs, which the table shows."""
    return named({name: value for name, value in settings.items() if not isinstance(value, (list, dict))})
