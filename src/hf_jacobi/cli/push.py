"""`hf-jacobi push` publishes a checkpoint on the Hub, with the decoder and a model card."""

from __future__ import annotations

import functools

from ..decoding.errors import UsageError


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Publish a checkpoint on the Hub together with the decoder, so that it decodes fast when it is loaded"
    parser = commands.add_parser("push", help=about, description=about)
    parser.add_argument("model", help="the folder of a model or an adapter; with --space also a Hub id")
    parser.add_argument("repo_id", help="user/name on the Hub")
    parser.add_argument(
        "--tokenizer", help="a folder or a Hub id (default: the model's folder, else that of its base model)"
    )
    parser.add_argument(
        "--evaluation",
        help="a JSON file with figures for the card; `hf-jacobi bench --evaluation` writes one",
    )
    parser.add_argument(
        "--format",
        choices=("lora",),
        help="write a draft-only adapter as a plain LoRA, for hf_jacobi.load_draft_adapter and other engines",
    )
    parser.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    parser.add_argument("--output-dir", help="keep the pushed files in this folder, which must be empty or new")
    parser.add_argument("--dry-run", action="store_true", help="list the files of the push, but push nothing")
    parser.add_argument("--space", action="store_true", help="push a Space with a chat page of the model instead")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    tell = functools.partial(print, flush=True)
    if arguments.space:
        if arguments.tokenizer or arguments.evaluation or arguments.format:
            raise UsageError("--tokenizer, --evaluation and --format are for a model: drop them, or drop --space.")
        from ..hub.space import publish_space

        place = publish_space(
            arguments.model,
            arguments.repo_id,
            arguments.output_dir,
            arguments.dry_run,
            private=arguments.private,
            tell=tell,
        )
    else:
        from ..hub import publish

        place = publish(
            arguments.model,
            arguments.repo_id,
            arguments.tokenizer,
            arguments.output_dir,
            arguments.dry_run,
            evaluation=arguments.evaluation,
            format=arguments.format,
            private=arguments.private,
            tell=tell,
        )
    if not arguments.dry_run:
        print(f"pushed: {place}")
    elif place:
        print(f"nothing was pushed; written to {place}")
    else:
        print("nothing was pushed; --output-dir keeps these files in a folder")
    return 0
