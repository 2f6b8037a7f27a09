"""`hf-jacobi tune`: the fastest settings on this machine, written into a checkpoint."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

from ..decoding.errors import UsageError
from .demo_model import DEMO_MODEL, HUB_ID, demo_checkpoint, packaged, unpacked
from .models import load, with_adapter
from .options import add_dtype, add_prompts, check_places, named, positive, prompts_of, wrapped


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Find the settings of Jacobi decoding that are fastest on this machine, and write them into the checkpoint"
    parser = commands.add_parser("tune", help=about, description=about)
    parser.add_argument("model", nargs="?", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--adapter", type=Path, help="the folder of an adapter for it, whose settings are tuned")
    add_prompts(parser, count=6)
    parser.add_argument("--max-new-tokens", type=positive, default=48, help="length of the texts (default: 48)")
    add_dtype(parser)
    parser.add_argument("--output", type=Path, help="write what was measured to this JSON file")
    parser.add_argument("--plots", type=Path, help="draw the knee, the settings and the check into this folder")
    parser.add_argument("--save-to", type=Path, help="the generation_config.json of this folder instead")
    parser.add_argument("--dry-run", action="store_true", help="change no checkpoint")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    from tqdm import tqdm

    from ..decoding import enable
    from ..decoding.config import write_settings
    from ..evaluation.tune import tune

    check_places(arguments.output, arguments.plots and arguments.plots / "knee.png")
    target = None if arguments.dry_run else target_of(arguments)
    base, tokenizer = load(arguments.model, arguments.dtype)
    model, base, _ = with_adapter(base, arguments.adapter) if arguments.adapter else (base, base, None)
    for one in {id(base): base, id(model): model}.values():
        enable(one)
    report = tune(
        model,
        tokenizer,
        prompts_of(arguments, tokenizer),
        base=base,
        max_new_tokens=arguments.max_new_tokens,
        progress=lambda items, title: tqdm(items, desc=title, leave=False),
    )
    print_report(report)
    if target is not None:
        write_settings(target, report["decoding"], report["jacobi"])
        print(f"written to {target / 'generation_config.json'}")
    if arguments.output:
        arguments.output.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.plots:
        from ..evaluation import plots

        for draw in (plots.knee, plots.tuned_settings, plots.predicted_against_measured):
            draw(report).figure.savefig(arguments.plots / f"{draw.__name__}.png", dpi=120, bbox_inches="tight")
    return 0


def target_of(arguments) -> Path:
    """The folder whose generation config gets the settings."""
    folder = arguments.save_to or arguments.adapter
    if folder is None and arguments.model is None and (unpacked().exists() or packaged()):
        folder = demo_checkpoint()
    elif folder is None:
        folder = Path(arguments.model or HUB_ID)
    if not folder.expanduser().is_dir():
        raise UsageError(
            f"{folder} is no folder to write the settings into: name one with --save-to, or use --dry-run"
        )
    return folder.expanduser()


def print_report(report: dict) -> None:
    """What was found, and on what."""
    print(wrapped(", ".join(f"{name} {value}" for name, value in report["setup"].items())), end="")
    print("\nforward over" + "".join(f"{tokens:>7}" for tokens in report["knee"]["tokens"]) + "  tokens")
    print("takes       " + "".join(f"{1000 * value:>7.1f}" for value in report["knee"]["seconds"]) + "  ms")
    print(f"\n{'tokens per second':>37}")
    print(f"{'TPF':>6}{'positions':>11}{'predicted':>11}{'measured':>10}  settings")
    for row in sorted(report["grid"], key=lambda row: -row["predicted"]):
        checked = report["checked"].get(str(row["settings"]))
        measured = f"{checked['tokens_per_second']:.1f}" if checked else ""
        figures = f"{row['tokens_per_forward']:>6.2f}{row['positions_per_forward']:>11.1f}{row['predicted']:>11.1f}"
        lines = textwrap.wrap(named(row["settings"]), 40)
        print(f"{figures}{measured:>10}  " + f"\n{'':40}".join(lines))
    print(f"{1:>6.2f}{1:>11.1f}{'':>11}{report['checked']['AR']['tokens_per_second']:>10.1f}  AR")
    if report["decoding"] == "ar":
        found = "Nothing was faster than one token at a time, so that is what the checkpoint is to do."
    else:
        found = f"{report['speedup']:.2f}x AR with {named(report['jacobi'])}"
    print(f"\n{wrapped(found)}", end="")
