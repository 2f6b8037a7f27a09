"""The miniature: its problems, its choice of a checkpoint, its pages, and a full run at the smallest size."""

import json
import random
from dataclasses import replace
from itertools import islice, pairwise

import pytest
from card_table import metadata_of, table_of
from safetensors.torch import load_file, save_file

from benchmarks.miniature import evaluate, forcing, results, sql_task
from benchmarks.miniature.__main__ import END, FIGURES, HERE, START, main
from benchmarks.miniature.forcing import choose
from benchmarks.miniature.problems import problems
from benchmarks.miniature.ship import CARD, card, evaluation
from benchmarks.miniature.tables import render
from benchmarks.miniature.tasks import TASKS, held_out_problems, is_solved, training_problems
from hf_jacobi.cli.models import MINIATURE
from hf_jacobi.hub.card import EVALUATION


@pytest.mark.parametrize("name", TASKS)
def test_the_worked_solution_solves_its_problem_and_another_does_not(name):
    found = list(islice(problems(TASKS[name].make, "test", held_out=False), 40))
    assert all(is_solved(problem, problem.completion) for problem in found)
    wrong = [is_solved(problem, other.completion) for problem, other in pairwise(found)]
    assert sum(wrong) <= 2, "by chance"
    assert not any(is_solved(problem, "") for problem in found)


def test_no_held_out_template_and_numbers_are_trained_on():
    held_out = held_out_problems(50)
    assert len(held_out) == 100 and all(problem.is_held_out for problem in held_out)
    for seed in ("base", "forcing", "validation"):
        training = training_problems(400, seed)
        assert not {problem.key for problem in training} & {problem.key for problem in held_out}
    assert held_out == held_out_problems(60)[:100], "fewer problems are the first of more"


def test_the_key_of_a_math_problem_is_its_template_and_numbers():
    problem = TASKS["math"].make(random.Random(0))
    numbers = [word.strip(".,") for word in problem.prompt.split() if word.strip(".,").isdigit()]
    assert numbers and all(number in problem.key for number in numbers)


def test_a_query_can_neither_write_nor_run_on_for_ever():
    rows = sql_task.run("SELECT COUNT(*) FROM books")
    assert rows == [(sql_task.ROWS,)]
    assert sql_task.run("DELETE FROM books") is None
    assert sql_task.run("SELECT COUNT(*) FROM books a, books b, books c, books d, books e") is None
    assert sql_task.run("-- a comment\nSELECT COUNT(*) FROM books;") == rows
    assert sql_task.run("no query") is None


def test_the_fastest_checkpoint_that_keeps_the_solve_rate_is_chosen():
    def point(step, solved, speed):
        return {"step": step, "solve_rate": solved, "tokens_per_forward": speed}

    curve = [point(0, 0.9, 1.0), point(1, 0.9, 2.0), point(2, 0.895, 3.0), point(3, 0.8, 4.0)]
    assert choose(curve)["step"] == 2
    assert choose([*curve, point(5, 0.9, 2.95)])["step"] == 5, "nearly as fast, and better"
    assert choose([curve[0], point(1, 0.7, 2.0), point(2, 0.75, 1.5)])["step"] == 2, "none keeps it"
    assert choose([curve[0], point(1, 0.75, 1.5), point(2, 0.75, 2.0)])["step"] == 2


@pytest.mark.skipif(not FIGURES.exists(), reason="nothing measured yet")
def test_the_page_shows_what_was_measured():
    tables = (HERE / "README.md").read_text().partition(START)[2].partition(END)[0]
    assert tables == render(json.loads(FIGURES.read_text()))


@pytest.mark.parametrize("read", [table_of, metadata_of])
def test_the_figures_on_the_card_are_those_that_were_measured(read):
    figures = json.loads(FIGURES.read_text())["main"]
    shown = read(CARD.read_text())
    assert len(shown) > 10 and ("math, 500 held out", "CLLM, sliding window of 16") in shown
    for (data, decoding), metrics in shown.items():
        what, _, count = data.partition(", ")
        measured = figures[decoding]["race" if what == "both" else what]
        assert what == "both" or count == f"{measured['problems']} held out"
        assert metrics == pytest.approx({name: measured[name] for name in metrics}, rel=1e-3)


def test_the_card_of_what_ships_is_up_to_date():
    assert CARD.read_text() == card()
    measured = json.loads((MINIATURE / EVALUATION).read_text())
    assert measured == evaluation(json.loads(FIGURES.read_text()), measured["recipe"])
    assert sum(path.stat().st_size for path in MINIATURE.iterdir()) < 16e6


def test_the_code_on_the_card_of_what_ships_runs(capsys):
    code = CARD.read_text().partition("```python\n")[2].partition("```")[0]
    exec(code, {})
    assert "So there are" in capsys.readouterr().out.partition("Solution:")[2]


@pytest.mark.slow
def test_all_of_it_at_the_smallest_size_goes_on_where_it_stopped(tmp_path, monkeypatch):
    for module in (evaluate, forcing, results):
        monkeypatch.setattr(module, "MAX_NEW_TOKENS", 8)
    command = ["--folder", str(tmp_path), "--figures", str(tmp_path / "figures.json")]
    command += ["--fraction", "0.0001", "--problems", "2"]
    main(command)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["main"]["AR"]["both"]["tokens_per_forward"] == 1.0
    assert figures["main"]["draft-only adapter, sliding window of 16"]["both"]["identical"] == 1.0
    made = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(made) == 4
    main(command)
    assert made == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert json.loads((tmp_path / "figures.json").read_text()) == figures

    kept = tmp_path / "results" / "answers" / "cllm" / "sliding 16, 2.json"
    before = json.loads(kept.read_text())["measured"]
    weights = tmp_path / "models" / "cllm" / "model.safetensors"
    save_file({name: value + 1 for name, value in load_file(weights).items()}, weights, metadata={"format": "pt"})
    results.fingerprint.cache_clear()
    main(command)
    assert json.loads(kept.read_text())["measured"] != before, "other weights are measured again"

    monkeypatch.setitem(forcing.RECIPES, "cllm", replace(forcing.RECIPES["cllm"], learning_rate=1e-4))
    with pytest.raises(ValueError, match="another recipe"):
        main(command)
