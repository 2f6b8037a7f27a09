"""Measurements of the miniature, each in a separate file, so that a run resumes where it stopped."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_jacobi.evaluation.bench import setup_of
from hf_jacobi.evaluation.measuring import AR, Method, compare, race

from .evaluate import MAX_NEW_TOKENS, answer, summary
from .forcing import Workplace, base_model, forced_model, load, load_tokenizer
from .recipes import RECIPES
from .tasks import held_out_problems


class Results:
    """
    Figures of models and ways of decoding on held-out problems, measured on first use, and again when a model
    or a way of decoding has changed.

    Args:
        place: where models and measurements are kept.
        problems: held-out problems of each task.
    """

    def __init__(self, place: Workplace, problems: int):
        self.place = place
        self.count = problems

    @cached_property
    def tokenizer(self):
        return load_tokenizer(base_model(self.place))

    def path(self, name: str) -> Path:
        """The folder of a recipe's model, or of `"base"`; trained if missing."""
        return base_model(self.place) if name == "base" else forced_model(self.place, RECIPES[name])

    def model(self, name: str):
        """The model of a recipe, or `"base"`."""
        return load(self.path(name), self.path("base"))

    def answers(self, name: str, method: Method, count: int) -> list[dict]:
        """The answers to the first `count` held-out problems of each task."""

        def measure() -> list[dict]:
            return answer(self.model(name), self.tokenizer, held_out_problems(count), method)

        return self._kept(f"answers/{name}/{method.name}, {count}", [(name, method)], measure)

    def quality(self, name: str, method: Method, count: int | None = None) -> dict[str, dict]:
        """Solve rate, tokens per forward and share of texts identical to the base model's, by task and for both."""
        answers = self.answers(name, method, count or self.count)
        return summary(answers, self.answers("base", AR, self.count)[: len(answers)])

    def race(self, name: str, contestants: list[tuple[str, Method]], count: int) -> dict[str, dict]:
        """Times models and ways of decoding on `count` problems of each task; the first is the baseline."""

        def measure() -> dict:
            models = {model: self.model(model) for model in {model for model, _ in contestants}}
            named = {f"{model}: {method.name}": (models[model], method) for model, method in contestants}
            prompts = [self.tokenizer(problem.prompt, return_tensors="pt") for problem in held_out_problems(count)]
            prompts = [{key: prompt[key] for key in ("input_ids", "attention_mask")} for prompt in prompts]
            runs = race(named, prompts, MAX_NEW_TOKENS)
            return compare(list(tqdm(runs, desc="race", total=len(prompts), leave=False)))

        return self._kept(f"races/{name}, {count}", contestants, measure)

    def curve(self, name: str) -> dict:
        """The notes of `forced_model` about the training."""
        return json.loads((forced_model(self.place, RECIPES[name]) / "curve.json").read_text())

    @cached_property
    def setup(self) -> dict[str, str | int]:
        """The machine and versions that the figures are measured on."""
        return setup_of(self.model("base"))

    def _kept(self, name: str, contestants: Iterable[tuple[str, Method]], measure: Callable):
        path = self.place.folder / "results" / f"{name}.json"
        measured = self._identity(contestants)
        if path.exists() and (kept := json.loads(path.read_text())).get("measured") == measured:
            return kept["result"]
        start = time.time()
        result = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        note = {"setup": self.setup, "measured": measured, "seconds": time.time() - start, "result": result}
        path.write_text(json.dumps(note))
        return result

    def _identity(self, contestants: Iterable[tuple[str, Method]]) -> list[list[Any]]:
        """Weights and settings of what is measured, always with the base model's, which adapters need."""
        base = fingerprint(self.path("base"))
        return [[base, fingerprint(self.path(name)), method.decoding, method.settings] for name, method in contestants]


@cache
def fingerprint(model: Path) -> str:
    """Identifies the weights in a folder."""
    digest = hashlib.sha256()
    for file in sorted(model.glob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]
