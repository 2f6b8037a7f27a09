"""
Puts a trained miniature where `hf-jacobi demo` finds it, with its figures, and writes its model card.

    python -m benchmarks.miniature.ship RECIPE --folder runs/miniature

RECIPE is a recipe of table 1 that has been measured.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from hf_jacobi.cli.models import MINIATURE
from hf_jacobi.decoding.config import write_settings
from hf_jacobi.hub.card import EVALUATION, NOTE, render_card

from .__main__ import FIGURES
from .recipes import RECIPES, Recipe, sliding
from .tables import MAIN_ROWS, RACED
from .tasks import held_out_problems


ROOT = Path(__file__).parents[2]
CARD = ROOT / "model_cards" / f"{MINIATURE.name}.md"
WEIGHTS = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
SHIPPED = sliding(16)
DEMONSTRATED = 2  # problems of each task
REMARK = (
    "It has 3.5 million parameters, a tokenizer of its own, and knows two tasks: arithmetic in words, written as "
    "`Question: ...\\nSolution:\\n`, and questions about a table, answered by a query in SQL. Its base model was "
    "trained from scratch on those by `python -m benchmarks.miniature`, which made this one, too, with clean context "
    "(a window of 1, which is CLLM's recipe). It is there to show what training on trajectories does, and is of no "
    "use for anything else."
)


def evaluation(figures: dict[str, Any], recipe: str) -> dict[str, Any]:
    """The figures of a recipe's model and of its base, in the form that a model card takes."""
    results = []
    for title, model, _ in MAIN_ROWS:
        row = figures["main"].get(title)
        if row is None or model not in ("base", recipe):
            continue
        for task in ("math", "sql"):
            if task in row:
                count = row[task]["problems"]
                all_of_them = count == figures["main"]["AR"][task]["problems"]
                kept = ("tokens_per_forward", "solve_rate")[: 1 + all_of_them]
                metrics = {key: round(row[task][key], 4) for key in kept}
                results.append({"dataset": f"{task}, {count} held out", "decoding": title, "metrics": metrics})
        metrics = {key: round(row["race"][key], 4) for key in ("tokens_per_forward", "speedup", "tokens_per_second")}
        results.append({"dataset": f"both, {2 * RACED} timed", "decoding": title, "metrics": metrics})
    setup = figures["setup"]
    return {
        "recipe": recipe,
        "measured_on": f"{setup['device']}, {setup['threads']} threads, {setup['dtype']}, torch {setup['torch']}, "
        f"transformers {setup['transformers']}; timed on {RACED} problems of each task, one at a time, speed-up over "
        "AR of the base model in the same run",
        "results": results,
    }


def history(model: Path, recipe: Recipe) -> str:
    """How it was trained, where the card's table shows only half of it."""
    if not json.loads((model / "curve.json").read_text())["chosen"].startswith("mending"):
        return ""
    return (
        f"\n\nIt was trained twice: for {recipe.steps:,} steps of four rows at a rate of {recipe.learning_rate}, "
        f"while the weight of the AR loss grew from {recipe.ar_loss_weight_start:g} to {recipe.ar_loss_weight:g}, on "
        f"{recipe.prompts:,} completions of its base model; then with the settings below, on those of them that solve "
        "their problem."
    )


def ship(model: Path, tokenizer: Path, recipe: str) -> None:
    """Copies the files that decoding needs from a model that `benchmarks.miniature` chose."""
    shutil.rmtree(MINIATURE, ignore_errors=True)
    MINIATURE.mkdir(parents=True)
    for name in WEIGHTS:
        source = model if (model / name).exists() else tokenizer
        shutil.copy(source / name, MINIATURE / name)
    note = json.loads((model / NOTE).read_text())
    problems = [problem.prompt for problem in held_out_problems(DEMONSTRATED)]
    note |= {"remark": f"{REMARK}{history(model, RECIPES[recipe])}", "example": problems[0]}
    note["jacobi"] = write_settings(MINIATURE, jacobi=SHIPPED.settings)["jacobi"]
    contents = {
        NOTE: note,
        EVALUATION: evaluation(json.loads(FIGURES.read_text()), recipe),
        "prompts.json": problems,
    }
    for name, content in contents.items():
        (MINIATURE / name).write_text(json.dumps(content, indent=1) + "\n")
    CARD.write_text(card())


def card() -> str:
    """The model card of the included miniature, from its training notes and its figures."""
    note, measured = (json.loads((MINIATURE / name).read_text()) for name in (NOTE, EVALUATION))
    return render_card(MINIATURE.name, note, measured, packaged=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=sorted({model for _, model, _ in MAIN_ROWS} & set(RECIPES)))
    parser.add_argument("--folder", type=Path, default=Path("runs/miniature"), help="the benchmark's folder")
    arguments = parser.parse_args()
    ship(arguments.folder / "models" / arguments.recipe, arguments.folder / "base", arguments.recipe)
