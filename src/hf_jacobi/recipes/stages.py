"""The stages of a phase. Each leaves files behind, and does nothing where these are whole."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, PrinterCallback, TrainerCallback

from ..decoding.errors import UsageError, of_usage
from ..decoding.files import read_json, write_whole
from ..decoding.mixin import enable
from ..hub.plain_lora import refuse_changing
from ..training.config import JacobiForcingConfig
from ..training.figures import Score
from ..training.trainer import JacobiForcingTrainer, load_model
from ..trajectories.collect import collect_trajectories, read_report
from ..trajectories.corruption import pack_completions
from ..trajectories.packing import pack_trajectories
from ..trajectories.prompts import name_of_prompt, open_prompts
from ..trajectories.shards import counts_in
from ..trajectories.statistics import PackingStatistics
from .choosing import choose, figures_of, keeps
from .recipe import Phase, Recipe


CHECKPOINTS = 4  # of a phase, where `save_steps` is left out
LOG_STEPS = 10  # at most, between two lines of the log
# What a log says of the clock, or of the process since it was started: no two runs would agree on it.
OF_CLOCK = ("runtime", "per_second", "train_loss", "total_flos")
LEFT_OUT = ("optimizer*", "*.pth", "scheduler.pt", "scaler.pt", "training_args.bin", "trainer_state.json")


class Place:
    """
    Where a recipe keeps what it makes.

    Args:
        folder: of the recipe.
        recipe: the recipe.
    """

    def __init__(self, folder: Path, recipe: Recipe):
        self.folder = folder
        self.recipe = recipe

    def of(self, phase: Phase) -> Path:
        """The folder of a phase."""
        return self.folder / phase.name

    def trajectories(self, phase: Phase) -> Path:
        """The folder of its trajectories, which may be the one before's."""
        while phase.collect is None:
            phase = self.recipe.phases[self.recipe.phases.index(phase) - 1]
        return self.of(phase) / "trajectories"

    def model(self, phase: Phase) -> Path:
        """The folder of the model that it ends with; that of the last one is the result."""
        is_last = phase is self.recipe.phases[-1]
        return self.folder / "model" if is_last else self.of(phase) / "model"

    def start(self, phase: Phase) -> str:
        """The name or folder of the model that it begins with."""
        number = self.recipe.phases.index(phase)
        return str(self.model(self.recipe.phases[number - 1])) if number else self.recipe.model

    def stages_done(self, phase: Phase) -> list[str]:
        """Which stages of a phase are done, in their order."""
        marks = {
            "collect": self.trajectories(phase) / ".done",
            "pack": self.of(phase) / "packed" / ".done",
            "train": self.of(phase) / "log.json",
            "choose": self.of(phase) / "choice.json",
        }
        return [name for name, file in marks.items() if file.exists()]


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(content, indent=1) + "\n")


def load(name: str, base: str, dtype: str, device: torch.device, **settings):
    """A model, an adapter on its base, ready to decode."""
    model = AutoModelForCausalLM.from_pretrained(base if is_adapter(name) else name, dtype=dtype, **settings)
    if is_adapter(name):
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name)
    return enable(model.eval().to(device))


def is_adapter(name: str) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(name) / "adapter_config.json").exists()


def collect(place: Place, phase: Phase, rows, tokenizer, device, tell) -> None:
    """Collects the trajectories of a phase by the model that it begins with."""
    folder = place.trajectories(phase)
    arguments = dict(phase.collect)
    skip, most = arguments.pop("skip_prompts", 0) or 0, arguments.pop("max_prompts", None)
    dtype = arguments.pop("dtype", "auto")
    rows = some_of(rows, skip, len(rows) if most is None else skip + most)
    model = load(place.start(phase), place.recipe.model, dtype, device)
    collect_trajectories(
        model, tokenizer, rows, block_size=phase.block_size, output_dir=folder, progress=tell, **arguments
    )
    (folder / ".done").touch()


def some_of(rows, first: int, end: int):
    """A part of some rows."""
    chosen = range(min(first, len(rows)), min(end, len(rows)))
    if not chosen:
        raise UsageError(f"skip_prompts={first} leaves nothing of {len(rows)} prompts: lower it.")
    return rows.select(chosen) if isinstance(rows, Dataset) else rows[chosen.start : chosen.stop]


def pack(place: Place, phase: Phase, rows, tokenizer, score: Score | None) -> None:
    """Packs the trajectories of a phase."""
    folder = place.of(phase) / "packed"
    trajectories = open_prompts(str(place.trajectories(phase)))
    arguments = dict(phase.pack)
    if arguments.pop("only_right", False):
        trajectories = right_ones(trajectories, rows, tokenizer, score)
    if "noise" in arguments:
        pack_completions(trajectories, tokenizer, phase.block_size, output_dir=folder, **arguments)
    else:
        pack_trajectories(trajectories, output_dir=folder, **arguments)
    (folder / ".done").touch()


def right_ones(trajectories: Dataset, rows, tokenizer, score: Score) -> Dataset:
    """The trajectories whose text is the right answer."""
    asked = {name_of_prompt(number, row): row for number, row in enumerate(rows)}
    right = [
        number
        for number, row in enumerate(trajectories)
        if score(asked[row["prompt_id"]], tokenizer.decode(row["completion_ids"], skip_special_tokens=True))
    ]
    if not right:
        raise UsageError(f"not one of {len(trajectories)} completions is right: leave pack.only_right out.")
    return trajectories.select(right)


def training_arguments(recipe: Recipe, phase: Phase, folder: Path, rows: int | None = None) -> JacobiForcingConfig:
    """
    The trainer's arguments in a phase.

    Args:
        recipe, phase: what they say.
        folder: of the checkpoints.
        rows: how many there are to train on, if that is known: by it the checkpoints are spread over epochs.

    Raises:
        `ValueError`: a value is out of range, or nothing for this machine.
    """
    given = {
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "steps",
        "eval_prompts": 0,
        **phase.train,
    }
    if phase.choose.jacobi_config is not None and given.get("jacobi_config") is None:
        given["jacobi_config"] = {"block_size": phase.block_size} | phase.choose.jacobi_config
    with of_usage(ValueError, ImportError, TypeError):
        probe = JacobiForcingConfig(output_dir=str(folder), **given)
    steps = probe.max_steps
    if steps <= 0:
        if rows is None:
            return probe
        batch = probe.per_device_train_batch_size
        per_epoch = math.ceil(math.ceil(rows / batch) / probe.gradient_accumulation_steps)
        steps = math.ceil(per_epoch * probe.num_train_epochs)
    log = given.get("logging_steps")
    every = given.get("save_steps") or max(1, steps // CHECKPOINTS)
    if "save_steps" not in given and log:
        every = max(log, every // log * log)
    given |= {"save_steps": every}
    given |= {"logging_steps": log or max(one for one in range(1, LOG_STEPS + 1) if every % one == 0)}
    return JacobiForcingConfig(output_dir=str(folder), **given)


class Telling(TrainerCallback):
    """Tells the display of each step, and has the last one saved."""

    def __init__(self, tell):
        self.tell = tell

    def on_train_begin(self, args, state, control, **kwargs):
        self.tell(state.global_step, state.max_steps)

    def on_step_end(self, args, state, control, **kwargs):
        self.tell(state.global_step, state.max_steps)
        control.should_save |= state.global_step >= state.max_steps
        return control


def train(place: Place, phase: Phase, tokenizer, tell) -> None:
    """Trains the model of a phase, from its last whole checkpoint on if there is one."""
    recipe, folder = place.recipe, place.of(phase) / "training"
    packed = open_prompts(str(place.of(phase) / "packed"))
    arguments = training_arguments(recipe, phase, folder, len(packed))
    start, peft_config = place.start(phase), None
    inner = load_model(recipe.model if is_adapter(start) else start, arguments.model_init_kwargs)
    arguments.model_init_kwargs = None  # a model that is there takes none
    if is_adapter(start):
        from peft import PeftModel

        inner = PeftModel.from_pretrained(inner, start, is_trainable=True)
    elif recipe.adapter is not None:
        peft_config = lora(recipe)
    trainer = JacobiForcingTrainer(
        model=inner,
        args=arguments,
        train_dataset=packed,
        processing_class=tokenizer,
        peft_config=peft_config,
        callbacks=[Telling(tell)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.base_name = recipe.model  # of the card: not the folder of the phase before
    last = whole_checkpoints(folder)[-1:]
    trainer.train(resume_from_checkpoint=str(last[0]) if last else None)
    log = [
        {name: line[name] for name in sorted(line) if not name.endswith(OF_CLOCK)}
        for line in trainer.state.log_history
    ]
    write_json(place.of(phase) / "log.json", [line for line in log if "loss" in line])


def lora(recipe: Recipe):
    """The configuration of the recipe's adapter."""
    from peft import LoraConfig

    with of_usage(ValueError, TypeError):
        return LoraConfig(**{"task_type": "CAUSAL_LM", **recipe.adapter})


def check_adapter_fits(recipe: Recipe) -> None:
    """Raises `UsageError` for an adapter that the model cannot have, or that could not only draft."""
    from peft import get_peft_model

    config = lora(recipe)
    if recipe.phases[0].train.get("adapter_scope") == "draft":
        refuse_changing(config, "the recipe's adapter")
    config.init_lora_weights = True  # other ways compute with the weights
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(recipe.model))
    with of_usage(ValueError, TypeError, RuntimeError):
        get_peft_model(model, config, low_cpu_mem_usage=True)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a training in their order; one that was left half-written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda one: int(one.name.rsplit("-", 1)[1]))
    for one in found:
        try:
            json.loads((one / "trainer_state.json").read_text())  # which is written last
        except (OSError, ValueError):
            shutil.rmtree(one)
    return [one for one in found if one.exists()]


def choose_checkpoint(place: Place, phase: Phase, tokenizer, held_out, before, score, device, tell) -> None:
    """
    Decodes held-out prompts by the model that a phase began with and by its checkpoints, and keeps one of these.

    Args:
        held_out: rows and tokens of prompts.
        before: the figures and texts of the model before all training (`reference`).
    """
    choice, recipe = phase.choose, place.recipe
    folder = place.of(phase)
    checkpoints = {int(one.name.rsplit("-", 1)[1]): one for one in whole_checkpoints(folder / "training")}
    models = {0: place.start(phase)} | {step: str(one) for step, one in checkpoints.items()}
    curve = []
    for number, (step, name) in enumerate(models.items()):
        file = folder / "choice" / f"step-{step}.json"
        if not file.exists():
            model = load(name, recipe.model, choice.dtype, device)
            settings = choice.decoding(phase.block_size, recipe.seed)
            first, total = number * len(held_out), len(models) * len(held_out)
            show = functools.partial(lambda first, total, done: tell(first + done, total), first, total)
            found, _ = figures_of(model, tokenizer, held_out, settings, choice, score, before["texts"], show)
            write_json(file, {"step": step} | found)
        curve.append(read_json(file))
    chosen = choose(curve[1:], before, choice)
    copy_whole(checkpoints[chosen["step"]], place.model(phase))
    note = {"curve": curve, "chosen": chosen["step"], "kept": keeps(chosen, before, choice)}
    write_json(folder / "choice.json", note)


def copy_whole(source: Path, target: Path) -> None:
    """Copies what a checkpoint needs to decode: all of it, or nothing."""
    scratch = target.with_name(f".{target.name}.tmp")
    for leftover in (scratch, target):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(source, scratch, ignore=shutil.ignore_patterns(*LEFT_OUT))
    scratch.rename(target)


def reference(place: Place, phase: Phase, tokenizer, held_out, score, device, tell) -> dict[str, Any]:
    """The figures and texts of the model before all training, decoded once as the first phase says."""
    file = place.folder / "before.json"
    digest = hashlib.blake2b(json.dumps([ids for _, ids in held_out]).encode(), digest_size=16).hexdigest()
    if not file.exists():
        choice, recipe = phase.choose, place.recipe
        model = load(recipe.model, recipe.model, choice.dtype, device)
        settings = choice.decoding(phase.block_size, recipe.seed)
        found, texts = figures_of(
            model, tokenizer, held_out, settings, choice, score, tell=lambda done: tell(done, len(held_out))
        )
        write_json(file, found | {"prompts": digest, "texts": texts})
    before = read_json(file)
    if before["prompts"] != digest:
        raise UsageError(
            f"the held-out prompts are others than those that {place.folder} was begun with: go on with those, or "
            "name another folder."
        )
    return before


def report_of(place: Place, phase: Phase) -> dict[str, Any]:
    """What a phase that is done came to."""
    folder = place.of(phase)
    collected = read_report(place.trajectories(phase)).to_dict()
    kept = ("prompts", "sequences", "tokens", "blocks", "iterations_per_block", "tokens_per_iteration")
    packed = PackingStatistics.from_counts(counts_in(folder / "packed", "packed"))
    return {
        "name": phase.name,
        "block_size": phase.block_size,
        "trajectories": {name: collected[name] for name in kept},
        "packed": {
            "rows": packed.rows,
            "tokens": packed.clean_tokens + packed.noisy_tokens,
            "noisy_blocks": packed.blocks,
        },
        **read_json(folder / "choice.json"),
    }
