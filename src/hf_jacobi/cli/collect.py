"""`hf-jacobi collect`: a model completes prompts, and the trajectory of every block is recorded."""

from __future__ import annotations

import argparse
import dataclasses
import json
from itertools import islice
from typing import TYPE_CHECKING, Any

from ..decoding.errors import UsageError
from ..trajectories.sources import path_of
from .demo_model import DEMO_MODEL
from .models import load
from .options import INTERRUPTED, add_dtype, check_folder, path, positive


if TYPE_CHECKING:
    from datasets import Dataset


# Arguments of the command that are not arguments of `collect_trajectories`.
OTHERS = (
    "dataset",
    "completions",
    "dataset_name",
    "dataset_split",
    "max_prompts",
    "model",
    "adapter",
    "dtype",
    "command",
    "run",
    "rest",
)


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Have a model complete prompts, and record the trajectory of every block: training data for Jacobi Forcing"
    parser = commands.add_parser("collect", help=about, description=about)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", help="a JSON, JSONL, Parquet, CSV or text file, a folder, or a Hub id")
    source.add_argument(
        "--completions",
        metavar="DATA",
        help="data of the same kinds with prompts and completions, such as an engine's output: only the states of "
        "these completions are computed",
    )
    parser.add_argument(
        "--check", action="store_true", help="with --completions: drop those that are not the model's greedy text"
    )
    parser.add_argument(
        "--output-dir", type=path, required=True, help="the output folder; an interrupted run resumes there"
    )
    parser.add_argument("--model", help=f"a local folder or a Hub id (default: {DEMO_MODEL})")
    parser.add_argument("--adapter", help="an adapter for the model, a folder or a Hub id")
    add_dtype(parser)
    parser.add_argument("--dataset-name", help="the configuration of a data set on the Hub")
    parser.add_argument("--dataset-split", default="train", help="the split (default: train)")
    parser.add_argument("--prompt-column", help="the column with the prompts (default: the first with a usual name)")
    parser.add_argument("--as-chat", action="store_true", help="treat each text as a user's message")
    parser.add_argument(
        "--chat-template-kwargs",
        type=template_settings,
        metavar="JSON",
        help="settings of the chat template, such as '{\"enable_thinking\": false}'",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at a prompt that cannot be used (default: skip it)"
    )
    parser.add_argument("--max-prompts", type=positive, help="use only this many prompts, from the start")
    parser.add_argument("--max-prompt-length", type=positive, help="drop prompts with more tokens than this")
    parser.add_argument("--block-size", type=positive, default=32, help="tokens per block (default: 32)")
    parser.add_argument(
        "--max-new-tokens", type=positive, default=512, help="maximum tokens per completion (default: 512)"
    )
    parser.add_argument("--do-sample", action="store_true", help="sample instead of decoding greedily")
    parser.add_argument("--temperature", type=float, help="sampling temperature (default: the model's)")
    parser.add_argument("--top-k", type=positive, help="top-k of the sampling (default: the model's)")
    parser.add_argument("--top-p", type=float, help="top-p of the sampling (default: the model's)")
    parser.add_argument(
        "--draft-init",
        choices=("prompt", "vocabulary"),
        default="prompt",
        help="where the first guess of a block is drawn from (default: prompt)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling and first guesses (default: 0)")
    parser.add_argument(
        "--repetition",
        choices=("cut", "drop", "keep"),
        default="cut",
        help="what to do with text that ends in a loop (default: cut)",
    )
    parser.add_argument(
        "--overlong",
        choices=("keep", "drop"),
        default="keep",
        help="what to do with text that has no end token (default: keep)",
    )
    parser.add_argument(
        "--empty",
        choices=("drop", "keep"),
        default="drop",
        help="what to do with text that consists of an end token (default: drop)",
    )
    parser.add_argument("--batch-size", type=positive, default=16, help="sequences decoded together (default: 16)")
    parser.add_argument("--shard-size", type=positive, default=128, help="prompts per file (default: 128)")
    parser.add_argument(
        "--positions-per-forward", type=positive, default=2048, help="maximum tokens per forward (default: 2048)"
    )
    parser.set_defaults(run=run)


def template_settings(text: str) -> dict:
    """Settings of a chat template, parsed from JSON."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(
            f"must be a JSON object such as '{{\"enable_thinking\": false}}', got {text!r}"
        )
    return found


def run(arguments) -> int:
    """Runs the command."""
    given = arguments.completions is not None
    source = arguments.completions if given else arguments.dataset
    path_of(source)  # before the slow imports

    from transformers.utils import logging

    from ..trajectories.collect import collect_trajectories, process_state, read_report
    from ..trajectories.collector import CollectSettings
    from ..trajectories.completions import check_completions
    from ..trajectories.prompts import open_prompts, prompt_column

    logging.set_verbosity_error()
    settings = {name: value for name, value in vars(arguments).items() if name not in OTHERS}
    CollectSettings(**{one.name: settings[one.name] for one in dataclasses.fields(CollectSettings)})
    check_folder(arguments.output_dir)
    processes = process_state()
    if arguments.check and not given:
        raise UsageError("--check is for --completions: drop it, because the model's own text needs no check.")
    if given and arguments.do_sample:
        raise UsageError("--do-sample does not apply to --completions, which are not generated: drop --do-sample.")
    rows: Dataset = open_prompts(source, arguments.dataset_split, arguments.dataset_name)
    if arguments.max_prompts:
        rows = rows.select(range(min(arguments.max_prompts, len(rows))))
    for row in islice(rows, 1):  # checked before a model is loaded
        prompt_column(row, arguments.prompt_column)
        if given:
            check_completions(row)
    model, tokenizer = load(arguments.model, arguments.dtype, processes.device, adapter=arguments.adapter)
    try:
        data: dict[str, Any] = {"completions" if given else "dataset": rows}
        collect_trajectories(model, tokenizer, **data, **settings)
    except KeyboardInterrupt:
        print(INTERRUPTED)
        return 130
    if processes.is_main_process:
        report = read_report(arguments.output_dir)
        print(f"{report.table()}\n\nwritten to {arguments.output_dir}")
        if not given and 2 * report.overlong > report.completions:
            share = f"{report.overlong} of {report.completions} completions"
            print(f"{share} were cut at {arguments.max_new_tokens} tokens; --max-new-tokens changes that.")
    processes.destroy_process_group()
    return 0
