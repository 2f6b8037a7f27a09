"""Jacobi Forcing of the base model by a recipe, with the library's functions."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_jacobi
from hf_jacobi.evaluation.measuring import AR

from .base import train_base
from .evaluate import MAX_NEW_TOKENS, answer, summary
from .recipes import BASE_PROBLEMS, RECIPES, Recipe, sliding
from .tasks import is_solved, training_problems


VALIDATION = 150  # problems of each task, none of them held out or trained on
BATCH_SIZE = 4
KEPT = 0.01  # the share of the solve rate that the chosen checkpoint may lose
NEAR = 0.02  # the share of tokens per forward that may be lost for a better solve rate


@dataclass(frozen=True)
class Workplace:
    """
    Where a run keeps its files, and how much of the training data it uses.

    Args:
        folder: where everything is kept.
        fraction: the share of the training data to use; less than 1 is for trying out.
    """

    folder: Path
    fraction: float = 1.0

    def some_of(self, count: int) -> int:
        """This share of a number of problems."""
        return max(2 * BATCH_SIZE, int(count * self.fraction))


def base_model(place: Workplace) -> Path:
    """The base model, trained if missing."""
    target = place.folder / "base"
    if not (target / "config.json").exists():
        train_base(target, place.some_of(BASE_PROBLEMS))
    return target


def load(path: Path, base: Path | None = None):
    """A model that is ready to decode; an adapter is put on its base."""
    if (path / "adapter_config.json").exists():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
    else:
        model = AutoModelForCausalLM.from_pretrained(path)
    return hf_jacobi.enable(model.eval().to("cuda" if torch.cuda.is_available() else "cpu"))


def load_tokenizer(base: Path):
    """The miniature's tokenizer."""
    return AutoTokenizer.from_pretrained(base)


def trajectories(place: Workplace, block_size: int) -> datasets.Dataset:
    """The base model's completions of problems it was not trained on, with every state of their blocks."""
    prompts = max(recipe.prompts for recipe in RECIPES.values() if recipe.block_size == block_size)
    folder = place.folder / f"trajectories-n{block_size}"
    return completions(base_model(place), place.some_of(prompts), block_size, folder)


def completions(base: Path, prompts: int, block_size: int, folder: Path) -> datasets.Dataset:
    """
    Trajectories of a number of problems, kept in a folder.

    They are collected in bfloat16, which takes little more than half of float32's time on a CPU that supports it.
    """
    problems = training_problems(prompts, "forcing")
    return hf_jacobi.collect_trajectories(
        load(base).to(torch.bfloat16),
        load_tokenizer(base),
        [{"id": str(number), "prompt": problem.prompt} for number, problem in enumerate(problems)],
        block_size=block_size,
        max_new_tokens=MAX_NEW_TOKENS,
        batch_size=64,
        output_dir=folder,
        progress=True,
    )


def forced_model(place: Workplace, recipe: Recipe) -> Path:
    """
    The folder of a recipe's model, trained if missing: the chosen checkpoint and `curve.json`.

    Raises:
        `ValueError`: the existing folder was made by another recipe of that name.
    """
    target = place.folder / "models" / recipe.name
    if (target / "curve.json").exists():
        if json.loads((target / "curve.json").read_text()).get("recipe") != asdict(recipe):
            raise ValueError(f"{target} was made by another recipe of that name: delete it to train again.")
        return target
    base = base_model(place)
    prompts = place.some_of(recipe.prompts)
    rows = trajectories(place, recipe.block_size)
    rows = rows.filter(lambda row: int(row["prompt_id"]) < prompts, keep_in_memory=True)
    work = place.folder / "training" / recipe.name
    drafting = learn_to_draft(place, recipe, base, rows, work / "drafting")
    mending = mend(place, recipe, drafting.last, rows, work / "mending") if recipe.mending_steps else None
    phases = [phase for phase in (drafting, mending) if phase]
    curve = []
    chosen = name_of(drafting.last)
    if sum(len(phase.checkpoints) for phase in phases) > 1:
        curve = try_checkpoints(base, phases, place.some_of(2 * VALIDATION))
        chosen = choose(curve)["checkpoint"]
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work / chosen, target, ignore=shutil.ignore_patterns("optimizer.pt", "*.pth"))
    note = {
        "recipe": asdict(recipe),
        "chosen": chosen,
        "curve": curve,
        "log": [line for phase in phases for line in phase.log],
    }
    (target / "curve.json").write_text(json.dumps(note, indent=1))
    shutil.rmtree(work)
    return target


@dataclass(frozen=True)
class Phase:
    """
    A finished training.

    Args:
        folder: the folder of its checkpoints.
        tokens_per_step: mean tokens of the data per step.
        log: the logged entries.
    """

    folder: Path
    tokens_per_step: float
    log: list[dict]

    @property
    def checkpoints(self) -> list[Path]:
        """Its checkpoints, in order."""
        return sorted(self.folder.glob("checkpoint-*"), key=_step)

    @property
    def last(self) -> Path:
        """The last checkpoint."""
        return self.checkpoints[-1]


def learn_to_draft(place: Workplace, recipe: Recipe, base: Path, rows: datasets.Dataset, folder: Path) -> Phase:
    """The first training, from the base model; it begins with clean context if the recipe says so."""
    steps = place.some_of(recipe.steps)
    clean_steps = int(steps * recipe.clean_share)
    parts = [
        (hf_jacobi.pack_trajectories(rows, window, schedule, max_length=1024), BATCH_SIZE * count)
        for window, schedule, count in (
            (1, "random", clean_steps),
            (recipe.window_size, recipe.noise_schedule, steps - clean_steps),
        )
        if count
    ]
    settings = recipe.training | {"max_steps": steps, "save_steps": max(1, steps // recipe.checkpoints)}
    ordered = one_after_another(parts)
    if recipe.mixed:
        ordered = ordered.shuffle(seed=0)
    return train(place, base, ordered, folder, recipe.adapter, settings)


def mend(place: Workplace, recipe: Recipe, model: Path, rows: datasets.Dataset, folder: Path) -> Phase:
    """The second training, of a model that already drafts, on the completions that solve their problem."""
    tokenizer = load_tokenizer(base_model(place))
    problems = training_problems(place.some_of(recipe.prompts), "forcing")

    def is_right(row: dict) -> bool:
        text = tokenizer.decode(row["completion_ids"], skip_special_tokens=True)
        return is_solved(problems[int(row["prompt_id"])], text)

    solved = [number for number, row in enumerate(rows) if is_right(row)]
    rows = rows.select(solved or range(len(rows)))  # a model trained for a moment solves nothing
    packed = hf_jacobi.pack_trajectories(rows, recipe.window_size, recipe.noise_schedule, max_length=1024)
    steps = place.some_of(recipe.mending_steps)
    settings = recipe.mending | {"max_steps": steps, "save_steps": max(1, steps // 2)}
    count = BATCH_SIZE * settings["gradient_accumulation_steps"] * steps
    return train(place, model, one_after_another([(packed, count)]), folder, None, settings)


def train(
    place: Workplace, model: Path, rows: datasets.Dataset, folder: Path, adapter: str | None, settings: dict
) -> Phase:
    """Trains a model on rows in order, resuming after the last checkpoint, if any."""
    lora = LoraConfig(r=128, lora_alpha=128, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = hf_jacobi.JacobiForcingTrainer(
        model=str(model),
        args=hf_jacobi.JacobiForcingConfig(
            output_dir=str(folder),
            per_device_train_batch_size=BATCH_SIZE,
            lr_scheduler_type="cosine",
            warmup_steps=min(100, settings["max_steps"] // 20),
            adam_beta2=0.98,
            train_sampling_strategy="sequential",
            bf16=True,
            compile_layers=place.fraction == 1.0 and bool(shutil.which("g++")),
            use_cpu=not torch.cuda.is_available(),
            logging_steps=10,
            report_to="none",
            seed=0,
            model_init_kwargs={"attn_implementation": "eager"},  # a dense mask is fastest for rows this short
            **settings,
        ),
        train_dataset=rows,
        peft_config=lora if adapter else None,
    )
    last = sorted(folder.glob("checkpoint-*"), key=_step)[-1:]
    trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
    tokens = sum(map(len, rows["input_ids"])) / settings["max_steps"]
    return Phase(folder, tokens, trainer.state.log_history)


def one_after_another(parts: list[tuple[datasets.Dataset, int]]) -> datasets.Dataset:
    """The given number of rows of each part, whose rows are reshuffled as often as needed."""
    draw = random.Random(0)
    chosen = []
    for rows, count in parts:
        order: list[int] = []
        while len(order) < count:
            order += draw.sample(range(len(rows)), len(rows))
        chosen.append(rows.select(order[:count]))
    return datasets.concatenate_datasets(chosen)


def name_of(checkpoint: Path) -> str:
    """Its phase and its step."""
    return f"{checkpoint.parent.name}/{checkpoint.name}"


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def try_checkpoints(base: Path, phases: list[Phase], count: int) -> list[dict]:
    """Solve rate and tokens per forward of the base model and of every checkpoint, on validation problems."""
    tokenizer = load_tokenizer(base)
    problems = training_problems(count, "validation")
    before = answer(load(base), tokenizer, problems, AR)
    curve = [{"checkpoint": "base", "training_tokens": 0, **summary(before, before)["both"]}]
    earlier = 0.0
    for phase in phases:
        for checkpoint in phase.checkpoints:
            answers = answer(load(checkpoint, base), tokenizer, problems, sliding(16))
            point = {
                "checkpoint": name_of(checkpoint),
                "training_tokens": round(earlier + _step(checkpoint) * phase.tokens_per_step),
            }
            curve.append(point | summary(answers, before)["both"])
        earlier += _step(phase.last) * phase.tokens_per_step
    return curve


def choose(curve: list[dict]) -> dict:
    """
    Of the checkpoints that keep the base model's solve rate, the one that solves most among the fastest and those
    nearly as fast; if none keeps it, the one that solves most.
    """
    base, *checkpoints = curve
    kept = [point for point in checkpoints if point["solve_rate"] >= base["solve_rate"] - KEPT]
    fastest = max((point["tokens_per_forward"] for point in kept), default=0.0)
    near = [point for point in kept if point["tokens_per_forward"] >= (1 - NEAR) * fastest]
    return max(near or checkpoints, key=lambda point: (point["solve_rate"], point["tokens_per_forward"]))
