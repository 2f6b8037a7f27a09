"""`hf-jacobi recipe` trains in phases, from prompts to an evaluated model."""

from __future__ import annotations

from ..decoding.files import read_yaml
from .options import INTERRUPTED, path


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Train in phases: each collects trajectories, packs, trains, and chooses a checkpoint by decoding"
    parser = commands.add_parser("recipe", help=about, description=about)
    parser.add_argument("recipe", type=path, metavar="RECIPE", help="a YAML file, such as those in examples/recipes")
    parser.add_argument(
        "--output-dir", type=path, required=True, help="the output folder; an interrupted run resumes there"
    )
    parser.add_argument("--model", help="replaces the recipe's model")
    parser.add_argument("--prompts", help="replaces the recipe's prompts")
    parser.add_argument("--dry-run", action="store_true", help="check everything and print the plan, but do nothing")
    parser.set_defaults(run=run)


def run(arguments) -> int:
    """Runs the command."""
    given = {"model": arguments.model, "prompts": arguments.prompts}
    settings = read_yaml(arguments.recipe, "a recipe") | {name: value for name, value in given.items() if value}

    from transformers.utils import logging

    from ..recipes.recipe import read_recipe
    from ..recipes.report import markdown
    from ..recipes.run import plan, run_recipe

    logging.set_verbosity_error()
    recipe = read_recipe(settings)
    if arguments.dry_run:
        print(plan(recipe, arguments.output_dir))
        return 0
    try:
        report = run_recipe(recipe, arguments.output_dir)
    except KeyboardInterrupt:
        print(INTERRUPTED)
        return 130
    print(f"{markdown(report)}\nwritten to {arguments.output_dir}")
    return 0
