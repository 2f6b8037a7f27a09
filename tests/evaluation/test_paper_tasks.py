"""The paper's tasks are found by name and use its prompts, its settings and its scoring."""

import sys
import types

import datasets
import pytest

from hf_jacobi import JacobiConfig
from hf_jacobi.evaluation.tasks import scoring


pytest.importorskip("lm_eval", reason="needs lm-eval: the extra 'harness'")

from lm_eval.tasks import TaskManager

from hf_jacobi.evaluation.lm_eval import SETTINGS, TASKS


pytestmark = pytest.mark.harness
DOCS = {
    "paper_humaneval": {"prompt": "\ndef one():\n", "test": "def check(f): assert f() == 1", "entry_point": "one"},
    "paper_gsm8k": {"question": "How many?", "answer": "3 * 400 = <<3*400=1200>>1200\n#### 1,200"},
    "paper_math500": {"problem": "What is $x$?", "answer": "\\frac{1}{2}"},
}


@pytest.fixture(scope="module")
def tasks():
    """The tasks, each with one question instead of its data set on the Hub."""
    with pytest.MonkeyPatch.context() as patch:
        data = {name: datasets.DatasetDict(test=datasets.Dataset.from_list([doc])) for name, doc in DOCS.items()}
        manager = TaskManager(include_path=str(TASKS))
        places = {"openai/openai_humaneval": "paper_humaneval", "openai/gsm8k": "paper_gsm8k"}
        load = lambda path, *_, **__: data[places.get(path, "paper_math500")]  # noqa: E731
        patch.setattr(datasets, "load_dataset", load)
        yield manager.load(list(DOCS))["tasks"]


def test_questions_and_settings(tasks):
    asked = {name: tasks[name].doc_to_text(doc) for name, doc in DOCS.items()}
    assert asked["paper_humaneval"].endswith("completion:\n```python\ndef one():\n```")
    assert asked["paper_gsm8k"] == "Problem: How many?\nMark your solution with \\boxed\nAnswer:"
    for task in tasks.values():
        given = task.config.generation_kwargs
        settings = JacobiConfig(**{name: given[name] for name in SETTINGS if name in given})
        assert (settings.block_size, settings.max_blocks, settings.spawn_ratio, settings.pool_size) == (64, 2, 0.85, 4)


@pytest.mark.parametrize(
    ("task", "answer", "score"),
    [
        ("paper_gsm8k", "So there are \\boxed{1200}.", 1.0),
        ("paper_gsm8k", "\\boxed{12}, no: \\boxed{\\$1{,}200.00}", 1.0),
        ("paper_gsm8k", "There are 1200.", 0.0),
        ("paper_gsm8k", "\\boxed{1201}", 0.0),
        ("paper_math500", "It is $\\boxed{\\frac12}$", 1.0),
        ("paper_math500", "It is $\\boxed{2}$", 0.0),
        ("paper_math500", "\\fbox{3}", 0.0),
        ("paper_gsm8k", "\\boxed\n{1200}", 0.0),
    ],
)
def test_boxed_answers(task, answer, score):
    assert scoring.boxed_answer(DOCS[task], [answer]) == {"exact_match": score}


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [("\\text{Ann}", "\\text{Bob}", 0.0), ("\\text{(C)}", "", 0.0), ("(3,4)", "(34)", 0.0), ("12", "12.0", 1.0)],
)
def test_only_numbers_are_compared_as_numbers(expected, answer, score):
    assert scoring.boxed_answer({"answer": expected}, [f"\\boxed{{{answer}}}"]) == {"exact_match": score}


def test_programs_follow_the_prompt(tasks, monkeypatch):
    doc = DOCS["paper_humaneval"]
    answers = ["Here:\n```python3\nx = 1\n```\nAnd\n```\ny\n```", "x = 2", "```Python\ncut = 1"]
    programs = scoring.programs([answers], [doc])[0]
    assert [program.removeprefix(doc["prompt"]).strip() for program in programs] == ["x = 1", "x = 2", "cut = 1"]
    ran = []
    utils = types.ModuleType("lm_eval.tasks.humaneval.utils")
    utils.pass_at_k = lambda **given: ran.append(given) or {"pass@1": 1.0}
    monkeypatch.setitem(sys.modules, "lm_eval.tasks.humaneval.utils", utils)
    task = tasks["paper_humaneval"]
    task.process_results(doc, programs)
    assert ran[0]["references"] == [task.doc_to_target(doc)] == ["def check(f): assert f() == 1\ncheck(one)"]
