"""`run_recipe` runs the phases of a recipe; an interrupted run can be resumed at any point."""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from transformers import AutoConfig, AutoTokenizer

from ..decoding.errors import MissingFile, UsageError
from ..decoding.files import read_json, write_whole
from ..training.config import JacobiForcingConfig
from ..training.figures import score_function
from ..trajectories.collect import process_state
from ..trajectories.encoding import BadPrompt
from ..trajectories.prompts import check_columns, encode_prompt, open_prompts
from ..trajectories.shards import LOCK, alone_in
from . import stages
from .display import Display, showing
from .recipe import SECTIONS, Phase, Recipe, read_recipe
from .report import draw, markdown


OPENED = ("data", "split", "name")  # the settings of prompts that are given as a dictionary


def run_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    output_dir: str | Path,
    *,
    score: Callable[[Any, str], bool] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """
    Trains a model in phases. Each phase collects trajectories from the current model, packs them, trains, and chooses
    the checkpoint that decodes held-out prompts fastest among those that keep their quality. An interrupted run
    resumes when it is started again with the same arguments, and gives the same result.

    Args:
        recipe: a YAML file or a dictionary; see `read_recipe` and `examples/recipes`.
        output_dir: the folder for a subfolder per phase, the finished `model`, and the report.
        score: a function of a held-out prompt's row and the text of its completion that says whether the answer is
            correct; replaces `choose.score`.
        progress: whether to show a progress bar.

    Returns:
        The report, as in `report.json`: `before`, the figures of the initial model, and `phases`, each with its
        `curve` (figures by step), the step that was `chosen`, and whether the chosen checkpoint `kept` its quality.

    Raises:
        `ValueError`: the recipe is invalid, or `output_dir` belongs to another recipe. Raised before any work is done.
        `OSError`: `output_dir` cannot be written.
    """
    recipe = with_score(read_recipe(recipe), score)
    folder = Path(output_dir).expanduser()
    work = Work(recipe, folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK).touch()
    with alone_in(folder):
        work.note_recipe()
        with showing(progress) as display:
            for phase in recipe.phases:
                work.run(phase, display)
            return work.report()


def with_score(recipe: Recipe, score: Callable[[Any, str], bool] | None) -> Recipe:
    """The recipe with a scoring function for all its phases."""
    if score is None:
        return recipe
    if not callable(score):
        raise UsageError(f"`score` must be a function of a row and a completion, got {score!r:.60}.")
    phases = (replace(phase, choose=replace(phase.choose, score=score)) for phase in recipe.phases)
    return replace(recipe, phases=tuple(phases))


class Work:
    """
    A recipe whose files, models and settings have been opened and checked.

    Args:
        recipe: the recipe.
        folder: the output folder.

    Raises:
        `ValueError`: the model, the prompts or a scoring function cannot be found, this machine does not support a
            setting, or the folder belongs to another recipe.
        `OSError`: the folder cannot be written.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        self.recipe, self.folder = recipe, folder
        self.place = stages.Place(folder, recipe)
        self._check_folder()
        check_writable(folder)
        if (count := process_state().num_processes) > 1:
            raise UsageError(
                f"a recipe runs in one process, not in {count}: run `hf-jacobi collect`, `pack` and `train` one by "
                "one with `accelerate launch`."
            )
        self.scores = {phase.name: self._score(phase) for phase in recipe.phases}
        self.arguments = {
            phase.name: stages.training_arguments(recipe, phase, self.place.of(phase) / "training")
            for phase in recipe.phases
        }
        self.device = next(iter(self.arguments.values())).device
        self.tokenizer = tokenizer_of(recipe.model)
        stages.check_adapter_fits(recipe)
        self.prompts, held_out = self._open()
        self.held_out = self._encode(held_out)

    def _check_folder(self) -> None:
        file = self.folder / "recipe.json"
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{self.folder} is a file: name a folder.")
        if not file.exists():
            if self.folder.exists() and (there := [one.name for one in self.folder.iterdir() if one.name != LOCK]):
                raise UsageError(
                    f"{self.folder} holds other work ({', '.join(sorted(there)[:3])}): name an empty or a new folder."
                )
            return
        before, now = read_json(file), json.loads(json.dumps(self.recipe.to_dict()))
        if other := differences(before, now):
            raise UsageError(
                f"{self.folder} belongs to another recipe ({'; '.join(other[:3])}): use that recipe, or name another "
                "folder."
            )

    def note_recipe(self) -> None:
        """Writes the recipe into the folder, so that a later run can check that it has not changed."""
        self._check_folder()  # another run can have started in the meantime
        stages.write_json(self.folder / "recipe.json", self.recipe.to_dict())

    def _score(self, phase: Phase):
        score = phase.choose.score
        return score_function(score) if isinstance(score, str) else score

    def _open(self) -> tuple[Any, Any]:
        """The prompts for the training, and the held-out prompts."""
        first = self.recipe.phases[0]
        column = (first.collect or {}).get("prompt_column")
        found = []
        for name, source in (("prompts", self.recipe.prompts), ("held_out", self.recipe.held_out)):
            if source is None:
                continue
            rows = opened(name, source)
            check_columns(rows, column)
            found.append(rows)
        if len(found) == 2:
            return found[0], found[1]
        rows, count = found[0], first.choose.count
        if count >= len(rows):
            raise UsageError(
                f"choose.count={count} holds out all of {len(rows)} prompts: lower it, or name prompts in `held_out`."
            )
        return stages.some_of(rows, 0, len(rows) - count), stages.some_of(rows, len(rows) - count, len(rows))

    def _encode(self, rows) -> list[tuple[Any, list[int]]]:
        """The held-out prompts, each a row and its token ids."""
        phase = self.recipe.phases[0]
        settings = phase.collect or {}
        column, as_chat = settings.get("prompt_column"), settings.get("as_chat", False)
        found = []
        for number, row in enumerate(rows):
            try:
                prompt = encode_prompt(
                    number, row, column, self.tokenizer, as_chat, settings.get("chat_template_kwargs")
                )
            except BadPrompt:
                continue
            if prompt.ids:
                found.append((row, prompt.ids))
            if len(found) == phase.choose.count:
                break
        if not found:
            raise UsageError("no held-out prompt can be used: check `held_out`, or the end of `prompts`.")
        return found

    def run(self, phase: Phase, display: Display) -> None:
        """Runs the stages of a phase that are not done."""
        place, score = self.place, self.scores[phase.name]
        number = self.recipe.phases.index(phase) + 1

        def begin(stage: str):
            free_memory()
            display.begin(f"phase {number} of {len(self.recipe.phases)}: {stage}")
            return display.tell

        done = place.stages_done(phase)
        if len(done) == len(SECTIONS):
            self._clear(phase)
            return
        before = stages.reference(
            place, self.recipe.phases[0], self.tokenizer, self.held_out, self.scores[self.recipe.phases[0].name],
            self.device, begin("before"),
        )  # fmt: skip
        if "collect" not in done:
            stages.collect(place, phase, self.prompts, self.tokenizer, self.device, begin("collect"))
        if "pack" not in done:
            begin("pack")
            stages.pack(place, phase, self.prompts, self.tokenizer, score)
        if "train" not in done:
            stages.train(place, phase, self.tokenizer, begin("train"))
        if "choose" not in done:
            stages.choose_checkpoint(
                place, phase, self.tokenizer, self.held_out, before, score, self.device, begin("choose")
            )
        self._clear(phase)

    def _clear(self, phase: Phase) -> None:
        if not self.recipe.keep_checkpoints:
            shutil.rmtree(self.place.of(phase) / "training", ignore_errors=True)

    def report(self) -> dict[str, Any]:
        """Writes the report as JSON and Markdown, and as a plot if matplotlib is installed."""
        before = read_json(self.folder / "before.json")
        for name in ("texts", "prompts"):
            before.pop(name)
        report = {
            "model": self.recipe.model,
            "held_out": len(self.held_out),
            "scored": "score" in before,
            "before": before,
            "phases": [stages.report_of(self.place, phase) for phase in self.recipe.phases],
        }
        stages.write_json(self.folder / "report.json", report)
        write_whole(self.folder / "report.md", markdown(report))
        draw(report, self.folder / "curve.png")
        return report


def free_memory() -> None:
    """Frees the model of the previous stage, which holds reference cycles."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def tokenizer_of(model: str):
    """
    The tokenizer of a model.

    Raises:
        `ValueError`: the model or its tokenizer cannot be loaded.
    """
    path = Path(model)
    if not path.exists() and (model.startswith(("/", ".", "~")) or model.count("/") > 1):
        raise MissingFile(f"there is no model {model}: name a folder or a model on the Hub.")
    what = "the model"
    try:
        AutoConfig.from_pretrained(model)
        what = "the tokenizer of the model"
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".")
        raise MissingFile(f"{what} {model} cannot be loaded: {reason}.") from error


def opened(name: str, source: Any):
    """The rows of a recipe's prompts, given as data, as a name, or as `data` with a `split` and a `name`."""
    if isinstance(source, Mapping):
        if unknown := [key for key in source if key not in OPENED]:
            raise UsageError(f"`{name}` has no setting {unknown[0]!r}: the settings are {', '.join(OPENED)}.")
        if not source.get("data"):
            raise UsageError(f"`{name}` names no data: set `data` to a file, a folder or a data set on the Hub.")
        rows = open_prompts(source["data"], source.get("split"), source.get("name"))
    else:
        rows = open_prompts(source)
    if isinstance(rows, IterableDataset):
        raise UsageError(f"`{name}` is a stream, which has no length: pass a data set with a length.")
    return rows


def check_writable(folder: Path) -> None:
    """
    Tries to write to a folder, or to the folder in which it would be created, and leaves nothing there.

    Raises:
        `MissingFile`: that fails.
    """
    try:
        place = next(one for one in (folder, *folder.parents) if one.exists())
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise MissingFile(f"{folder} cannot be written ({error.strerror}): name another folder.") from error


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """The differences between two recipes, a phrase for each."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(key for key in now if key not in before)]
        return [
            one
            for key in keys
            for one in differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        ]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now), start=1)
        return [one for number, (old, new) in pairs for one in differences(old, new, f"{name} {number}")]
    if before == now:
        return []
    return [f"{name} {_short(before)}, now {_short(now)}"]


def _short(value: Any) -> str:
    return f"{len(value)} entries" if isinstance(value, (list, dict)) else f"{value!r:.60}"


def plan(recipe: Recipe, output_dir: str | Path) -> str:
    """The steps of `run_recipe`, and which of them are done: for `hf-jacobi recipe --dry-run`."""
    work = Work(recipe, Path(output_dir).expanduser())
    lines = [
        f"model      {recipe.model}" + (f", with an adapter ({_settings(recipe.adapter)})" if recipe.adapter else ""),
        f"prompts    {len(work.prompts)}, held out {len(work.held_out)}",
    ]
    for phase in recipe.phases:
        done = work.place.stages_done(phase)
        lines += ["", f"phase {phase.name}, from {work.place.start(phase)}"]
        steps = _steps(phase, work.arguments[phase.name])
        lines += [f"  {name:9}{text}{', done' if name in done else ''}" for name, text in steps.items()]
    return "\n".join([*lines, "", f"result     {work.folder / 'model'}"])


def _steps(phase: Phase, args: JacobiForcingConfig) -> dict[str, str]:
    """The stages of a phase, each with its settings in words."""
    length = f"{args.max_steps} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    collect = "the trajectories of the previous phase" if phase.collect is None else _settings(phase.collect)
    interval = f"every {args.save_steps} steps" if "save_steps" in phase.train else "every quarter of the training"
    return {
        "collect": f"blocks of {phase.block_size}; {collect}",
        "pack": _settings(phase.pack),
        "train": f"{length}; {_settings(phase.train)}",
        "choose": f"a checkpoint {interval}, {phase.choose.max_new_tokens} tokens for each prompt",
    }


def _settings(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in settings.items()) or "the default settings"
