"""`hf-jacobi demo` shows the same answer written one token at a time and many tokens at a time, side by side."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..decoding.errors import UsageError
from ..decoding.files import read_json
from .demo_model import DEMO_MODEL, first_time_note
from .models import DEMO_ADAPTER, MINIATURE, Found, encode, find
from .options import add_dtype, positive, wrapped


if TYPE_CHECKING:
    import torch

    from ..decoding import JacobiConfig


PROMPT = "Write a Python function that checks whether a number is prime, and explain how it works."
LENGTH, MINIATURE_LENGTH = 128, 300  # maximum tokens of an answer
TITLES = {"ar": "autoregressive", "jacobi": "Jacobi"}
LITTLE_GAIN = 1.5  # tokens per forward
SHORT = 32  # tokens


def add_parser(commands) -> None:
    """Adds the command to `hf-jacobi`."""
    about = "Watch a model write autoregressively (one token at a time) and by Jacobi decoding, and compare"
    default = "the miniature, which has 3.5 million parameters, solves two tasks and was trained to decode in parallel"
    parser = commands.add_parser("demo", help=about, description=about)
    parser.add_argument("--prompt", action="append", help="the question; can be given several times")
    parser.add_argument("--model", help=f"a local folder or a Hub id, of a model or an adapter (default: {default})")
    parser.add_argument(
        "--base", action="store_true", help=f"use {DEMO_MODEL}, which was not trained to decode in parallel"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, help="maximum tokens per answer (default: 128; miniature: 300)"
    )
    add_dtype(parser)
    parser.add_argument("--adapter", help="an adapter for the model, a folder or a Hub id")
    parser.add_argument(
        "--trained", action="store_true", help=f"use {DEMO_MODEL} with its draft-only adapter from this package"
    )
    parser.add_argument("--block-size", type=positive, help="tokens drafted per block")
    parser.add_argument("--max-blocks", type=positive, help="blocks in flight at the same time")
    parser.add_argument("--pool-size", type=int, help="recycled n-grams verified in each forward")
    parser.add_argument("--json", action="store_true", help="print only the comparison, as JSON")
    parser.set_defaults(run=run)


@dataclass
class Writing:
    """The answers to all prompts, with the forwards and the time that they took."""

    tokens: list[list[int]]
    texts: list[str]
    forwards: int
    seconds: float

    @property
    def count(self) -> int:
        """The number of tokens in all answers."""
        return sum(map(len, self.tokens))

    def report(self) -> dict:
        """The figures, JSON-serializable."""
        return {
            "texts": self.texts,
            "new_tokens": self.count,
            "forwards": self.forwards,
            "tokens_per_forward": round(self.count / self.forwards, 3),
            "seconds": round(self.seconds, 3),
            "tokens_per_second": round(self.count / self.seconds, 2),
        }


class Follower:
    """
    A streamer for successive answers that calls `show(text, tokens, seconds)` whenever tokens are committed.

    Args:
        tokenizer: the tokenizer.
        show: the function.
        length: maximum tokens of an answer.
        ends: the tokens that end an answer.
        numbered: whether to say which prompt each answer is for.
    """

    def __init__(self, tokenizer, show, length: int, ends: set[int], numbered: bool) -> None:
        self.tokenizer = tokenizer
        self.show = show
        self.length = length
        self.ends = ends
        self.numbered = numbered
        self.answers = 0
        self.before = self._heading()
        self.count = 0
        self.tokens: list[int] = []
        self.prompt_seen = False
        self.start = time.perf_counter()

    def put(self, value) -> None:
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.tokens += value.flatten().tolist()
        self._show()

    def end(self) -> None:
        is_cut = len(self.tokens) >= self.length and self.tokens[-1] not in self.ends
        text = self._text() + (f"\n[cut at {self.length} tokens; --max-new-tokens changes that]" if is_cut else "")
        self.count += len(self.tokens)
        self.show(text, self.count, self.elapsed())
        self.tokens, self.prompt_seen = [], False
        self.answers += 1
        self.before = f"{text}\n\n{self._heading()}"

    def _heading(self) -> str:
        return f"[prompt {self.answers + 1}]\n" if self.numbered else ""

    def elapsed(self) -> float:
        return time.perf_counter() - self.start

    def _text(self) -> str:
        return self.before + self.tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _show(self) -> None:
        self.show(self._text(), self.count + len(self.tokens), self.elapsed())


def write(
    model,
    tokenizer,
    prompts: list[dict],
    decoding: str,
    config: JacobiConfig,
    length: int,
    show,
    stop: int | None = None,
) -> Writing:
    """
    Answers the prompts in turn by greedy decoding.

    Args:
        model, tokenizer: the model and its tokenizer.
        prompts: the inputs of `generate`, of one prompt each.
        decoding: `"ar"` or `"jacobi"`.
        config: the settings of Jacobi decoding.
        length: maximum tokens of an answer.
        show: see `Follower`.
        stop: stop after this many tokens, in calls that otherwise equal those of `length` tokens.
    """
    follower = Follower(tokenizer, show, length, _end_tokens(model), len(prompts) > 1)
    settings: dict[str, Any] = {"jacobi_config": config} if decoding == "jacobi" else {}
    answers: list[list[int]] = []
    forwards = 0
    for inputs in prompts:
        if stop is not None:
            settings["stopping_criteria"] = [_stop_at(inputs["input_ids"].shape[1] + stop)]
        output = model.generate(
            **inputs,
            **settings,
            decoding=decoding,
            do_sample=False,
            max_new_tokens=length,
            streamer=follower,
            return_dict_in_generate=True,
        )
        answers.append(output.sequences[0, inputs["input_ids"].shape[1] :].tolist())
        forwards += output.jacobi_stats.forwards if decoding == "jacobi" else len(answers[-1])
    seconds = follower.elapsed()
    return Writing(answers, tokenizer.batch_decode(answers, skip_special_tokens=True), forwards, seconds)


def _end_tokens(model) -> set[int]:
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _stop_at(length: int):
    """A stopping criterion: the length of the sequence."""

    def is_done(input_ids, scores, **settings) -> torch.Tensor:
        return input_ids.new_full((len(input_ids),), input_ids.shape[1] >= length).bool()

    return is_done


def warm_up(models: dict, tokenizer, prompt: dict, config: JacobiConfig, length: int) -> None:
    """
    Begins answers of `length` tokens, for the one-time costs: among them the measurement of what positions cost, which
    later calls repeat if it came out high.
    """
    from ..decoding.timing import ATTEMPTS

    for decoding in ("ar", *ATTEMPTS * ["jacobi"]):
        write(models[decoding], tokenizer, [prompt], decoding, config, length, lambda *_: None, stop=4)


def choose(arguments) -> None:
    """Resolves which model and adapter the options mean."""
    if sum([arguments.model is not None, arguments.base, arguments.trained]) > 1:
        raise UsageError("--model, --base and --trained each select a model: give one of them.")
    if arguments.trained and arguments.adapter is not None:
        raise UsageError("--trained selects its own adapter: drop --adapter, or give --base instead of --trained.")
    if arguments.trained:
        arguments.adapter = DEMO_ADAPTER
    elif arguments.model is None and not arguments.base and arguments.adapter is None:
        arguments.model = MINIATURE


def is_miniature(found: Found) -> bool:
    """Whether a model is the miniature of this package, with or without an adapter."""
    return Path(found.base).resolve() == MINIATURE


def run(arguments) -> int:
    """Runs the demo; returns 0 if all texts are identical, else 1."""
    choose(arguments)
    if not arguments.json:  # printed before the slow imports
        name = "the miniature" if arguments.model == MINIATURE else arguments.model or DEMO_MODEL
        print(f"Loading {name} ...{first_time_note(arguments.model)}", flush=True)
    found = find(arguments.model, arguments.adapter)
    if arguments.prompt is None:
        own = json.loads((MINIATURE / "prompts.json").read_text(encoding="utf-8"))
        arguments.prompt = own if is_miniature(found) else [PROMPT]
    arguments.max_new_tokens = arguments.max_new_tokens or (MINIATURE_LENGTH if is_miniature(found) else LENGTH)

    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    threads = torch.get_num_threads()
    if is_miniature(found):
        torch.set_num_threads(1)  # so small a model gains little from more, and loses on a busy machine
    try:
        return _race(arguments, found)
    finally:
        torch.set_num_threads(threads)


def _race(arguments, found: Found) -> int:
    from ..decoding import JacobiConfig, enable

    given = {name: getattr(arguments, name) for name in ("block_size", "max_blocks", "pool_size")}
    given = {name: value for name, value in given.items() if value is not None}
    JacobiConfig(**given)
    tokenizer = found.tokenizer()
    prompts = [encode(tokenizer, prompt, "cpu") for prompt in arguments.prompt]
    loaded = found.load(arguments.dtype)
    config = dataclasses.replace(loaded.config, **given)
    models = {"ar": enable(loaded.writer), "jacobi": enable(loaded.model)}
    model = loaded.writer
    prompts = [{name: rows.to(model.device) for name, rows in inputs.items()} for inputs in prompts]
    if not arguments.json:
        for number, prompt in enumerate(arguments.prompt, start=1):
            print(wrapped(f"\nPrompt{f' {number}' if len(prompts) > 1 else ''}: {prompt.strip()}"), end="", flush=True)
    warm_up(models, tokenizer, prompts[0], config, arguments.max_new_tokens)
    writings = {}
    with _screen(arguments) as show:
        for decoding in TITLES:
            writings[decoding] = write(
                models[decoding], tokenizer, prompts, decoding, config, arguments.max_new_tokens, show(decoding)
            )
    report = compare(model, arguments, found, config, writings)
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(report)
    return 0 if report["identical"] else 1


def name_of(found: Found) -> str:
    """The name of a model for people."""
    return "the miniature" if is_miniature(found) else found.name


def is_trained(model: str | Path | None) -> bool:
    """Whether a model has a training note beside it."""
    from transformers.utils import cached_file

    from ..hub.card import NOTE

    try:
        file = cached_file(os.path.expanduser(model), NOTE) if model else None
    except OSError:  # the model has no such file
        return False
    return bool(file and read_json(Path(file)).get("settings"))


def compare(model, arguments, found: Found, config: JacobiConfig, writings: dict[str, Writing]) -> dict:
    """The figures of both decoding methods, the hardware and software, and whether the texts are identical."""
    import torch
    import transformers

    ar, jacobi = writings["ar"], writings["jacobi"]
    return {
        "model": name_of(found),
        "adapter": found.adapter_name,
        "prompts": arguments.prompt,
        "trained": found.adapter is not None or is_trained(None if found.is_demo else found.base),
        "longest": max(map(len, jacobi.tokens)),
        "max_new_tokens": arguments.max_new_tokens,
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name() if model.device.type == "cuda" else platform.processor() or "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "jacobi_config": config.to_dict(),
        "ar": ar.report(),
        "jacobi": jacobi.report(),
        "speedup": round(ar.seconds / jacobi.seconds, 3),
        "identical": ar.tokens == jacobi.tokens,
    }


def print_report(report: dict) -> None:
    """Prints the comparison as a table, with remarks."""
    columns = {"tokens": 7, "forwards": 9, "tokens/forward": 15, "seconds": 8, "tokens/second": 14, "speed-up": 9}
    print("\n")
    threads = f"{report['threads']} thread{'s' if report['threads'] > 1 else ''}"
    print(wrapped(f"{report['dtype']} on {report['device']}, {threads}, torch {report['torch']}"), end="")
    print(" " * 15 + "".join(f"{column:>{width}}" for column, width in columns.items()))
    for decoding, title in TITLES.items():
        row = report[decoding]
        cells = (
            f"{row['new_tokens']}",
            f"{row['forwards']}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['seconds']:.2f}",
            f"{row['tokens_per_second']:.1f}",
            f"{report['speedup'] if decoding == 'jacobi' else 1:.2f}x",
        )
        print(f"{title:15}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, columns.values())))
    print("The seconds do not include a warm-up, which also measures what positions cost.")
    print(f"\nTexts identical: {'yes' if report['identical'] else 'no'}")
    print(wrapped(remarks(report)), end="")


def remarks(report: dict) -> str:
    """Remarks on a comparison, one per line."""
    found = ""
    if not report["identical"]:
        found += (
            "In half precision two tokens can tie, and the number of tokens in a forward decides which one wins; "
            "float32 (--dtype float32) has practically no ties.\n"
        )
    if report["jacobi"]["new_tokens"] < SHORT:
        found += "The answer is too short for a comparison: ask for a longer one.\n"
    elif not report["trained"] and report["jacobi"]["tokens_per_forward"] < LITTLE_GAIN:
        speedup = round(report["speedup"], 2)
        outcome = "is slower here" if speedup < 1 else "gains nothing here" if speedup == 1 else "gains little here"
        found += (
            f"The model was not trained to decode in parallel, so Jacobi decoding {outcome}: after a wrong token the "
            "model seldom predicts the next token correctly, and it gains only from repeated n-grams. Training on its "
            "own drafts (Jacobi Forcing, CLLM) teaches it to predict whole blocks at once: `hf-jacobi demo` shows a "
            "small model that was trained in this way.\n"
        )
    elif report["speedup"] < 1:
        found += (
            "Jacobi decoding needs fewer forwards here but more time, because these settings make each forward too "
            "expensive for this machine. `hf-jacobi tune` looks for faster settings.\n"
        )
    return found


def _screen(arguments):
    """A context manager that gives `show(decoding)`, which returns a function to show the growing text."""
    if arguments.json:
        return nullcontext(lambda decoding: lambda *_: None)
    if not sys.stdout.isatty():
        return nullcontext(_plain_lines)
    try:
        return SideBySide()
    except ImportError:
        return nullcontext(_plain_lines)


def _plain_lines(decoding: str):
    """Prints a heading and then the text as it grows, for pipes and files."""
    print("\n" * (1 + list(TITLES).index(decoding)) + f"--- {TITLES[decoding]} ---", flush=True)
    shown = 0

    def show(text: str, tokens: int, seconds: float) -> None:
        nonlocal shown
        stable = text.rstrip("\ufffd")  # stands for a character whose bytes are incomplete
        print(stable[shown:], end="", flush=True)
        shown = max(shown, len(stable))

    return show


class SideBySide:
    """
    Two panels in the terminal, one for each decoding method. While a text (plain, or one of rich) grows, its panel
    shows the newest lines that fit; at the end it shows the whole text.
    """

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        self.Panel, self.Table, self.Text = Panel, Table, Text
        self.content = dict.fromkeys(TITLES, ("", 0, 0.0))
        self.console = Console()
        self.live = Live(self._draw(), console=self.console, refresh_per_second=20)

    def _draw(self, whole: bool = False):
        width, room = self.console.width // len(TITLES) - 4, max(1, self.console.height - 3)
        table = self.Table.grid(expand=True)
        panels = []
        for decoding, title in TITLES.items():
            text, tokens, seconds = self.content[decoding]
            lines = (self.Text(text) if isinstance(text, str) else text).wrap(self.console, max(1, width))
            shown = self.Text("\n").join(lines if whole else lines[-room:])
            table.add_column(ratio=1)
            panels.append(self.Panel(shown, title=title, subtitle=f"{tokens} tokens, {seconds:.1f} s"))
        table.add_row(*panels)
        return table

    def __enter__(self):
        self.live.__enter__()
        return self._show

    def _show(self, decoding: str):
        def show(*content) -> None:
            self.content[decoding] = content
            self.live.update(self._draw())

        return show

    def __exit__(self, *error):
        self.live.update(self._draw(whole=True))  # `live` draws once more when it ends
        return self.live.__exit__(*error)
