"""Measurements of the miniature, each kept in a file of its own, so that a run goes on where it stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import cached_property

from tqdm import tqdm

from hf_jacobi.evaluation.bench import setup_of
from hf_jacobi.evaluation.measuring import AR, Method, compare, race

from .evaluate import MAX_NEW_TOKENS, answer, summary
from .forcing import Workplace, base_model, forced_model, load, load_tokenizer
from .recipes import RECIPES
from .tasks import held_out_problems


class Results:
    """
    Figures of models and ways of decoding on held-out problems, measured when first asked for.

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

    def model(self, name: str):
        """The model of a recipe, or `"base"`."""
        base = base_model(self.place)
        return load(base if name == "base" else forced_model(self.place, RECIPES[name]), base)

    def answers(self, name: str, method: Method, count: int) -> list[dict]:
        """The answers to the first `count` held-out problems of each task."""

        def measure() -> list[dict]:
            return answer(self.model(name), self.tokenizer, held_out_problems(count), method)

        return self._kept(f"answers/{name}/{method.name}, {count}", measure)

    def quality(self, name: str, method: Method, count: int | None = None) -> dict[str, dict]:
        """Solve rate, tokens per forward and share of texts identical to the base model's; by task and for both."""
        answers = self.answers(name, method, count or self.count)
        return summary(answers, self.answers("base", AR, self.count)[: len(answers)])

    def race(self, name: str, contestants: list[tuple[str, Method]], count: int) -> dict[str, dict]:
        """Time of models with ways of decoding on `count` problems of each task; the first is the yardstick."""

        def measure() -> dict:
            models = {model: self.model(model) for model in {model for model, _ in contestants}}
            named = {f"{model}: {method.name}": (models[model], method) for model, method in contestants}
            prompts = [self.tokenizer(problem.prompt, return_tensors="pt") for problem in held_out_problems(count)]
            prompts = [{key: prompt[key] for key in ("input_ids", "attention_mask")} for prompt in prompts]
            runs = race(named, prompts, MAX_NEW_TOKENS)
            return compare(list(tqdm(runs, desc="race", total=len(prompts), leave=False)))

        return self._kept(f"races/{name}, {count}", measure)

    def curve(self, name: str) -> dict:
        """What `forced_model` notes of the training."""
        return json.loads((forced_model(self.place, RECIPES[name]) / "curve.json").read_text())

    @cached_property
    def setup(self) -> dict[str, str | int]:
        """What the figures are measured on."""
        return setup_of(self.model("base"))

    def _kept(self, name: str, measure: Callable):
        path = self.place.folder / "results" / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())["result"]
        start = time.time()
        result = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        note = {"setup": self.setup, "seconds": time.time() - start, "result": result}
        path.write_text(json.dumps(note))
        return result
