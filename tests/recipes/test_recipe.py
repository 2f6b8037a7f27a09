"""Recipes: what is refused before any work, the result of a run, and which checkpoint is chosen."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import tiny_tokenizer, trained_model
from transformers import AutoModelForCausalLM, HfArgumentParser

import hf_jacobi
from hf_jacobi import JacobiForcingConfig
from hf_jacobi.cli import main
from hf_jacobi.decoding.errors import MissingFile, UsageError
from hf_jacobi.recipes import read_recipe, run_recipe
from hf_jacobi.recipes.choosing import choose
from hf_jacobi.recipes.recipe import Choice
from hf_jacobi.recipes.stages import training_arguments
from hf_jacobi.training.figures import score_function


EXAMPLES = Path(__file__).parents[2] / "examples" / "recipes"


@pytest.fixture(autouse=True)
def _cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("base")
    trained_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(count: int) -> list[str]:
    return [" ".join(f"w{3 + (7 * row + 5 * place) % 90}" for place in range(3 + row % 4)) for row in range(count)]


def recipe(model: str = "some/model", **changes) -> dict:
    """A recipe of one phase that takes a moment."""
    settings = {
        "model": model,
        "prompts": prompts(8),
        "collect": {"max_new_tokens": 16, "batch_size": 8},
        "pack": {"window_size": 2},
        "train": {"max_steps": 2, "save_steps": 1, "learning_rate": 3e-3, "use_cpu": True},
        "choose": {"count": 2, "max_new_tokens": 8, "batch_size": 2},
        "phases": [{"block_size": 4}],
    }
    for name, value in changes.items():
        before = settings.get(name)
        settings[name] = before | value if isinstance(before, dict) and isinstance(value, dict) else value
    return settings


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": ""}, "the recipe has no model"),
        ({"prompts": None, "phases": []}, "has no prompts and no phases"),
        ({"model": 5}, "`model` must be the name or the folder of a model, got int"),
        ({"phase": []}, "the recipe has no setting 'phase': did you mean 'phases'"),
        ({"phases": [{"block": 4}]}, "phase 1 has no setting 'block': did you mean 'block_size'"),
        ({"phases": [{}]}, "phase 1 has no block_size"),
        ({"phases": [4]}, "`phases` must be a list of phases"),
        ({"phases": [{"block_size": "four"}]}, "block_size of phase 1 must be a whole number"),
        ({"phases": [{"block_size": 8}, {"block_size": 4}]}, "block_size shrinks from 8 to 4 in phase 2-n4"),
        ({"phases": [{"block_size": 4, "name": "a/b"}]}, "becomes a folder"),
        ({"phases": [{"block_size": 4, "collect": "previous"}]}, "there is no phase before it"),
        (
            {"phases": [{"block_size": 4}, {"block_size": 8, "collect": "previous"}]},
            "reuses the trajectories of the previous phase, whose blocks have 4 tokens: set its block_size to 4",
        ),
        ({"collect": {"max_tokens": 5}}, "collect has no setting 'max_tokens': did you mean 'max_new_tokens'"),
        ({"collect": {"output_dir": "here"}}, "collect.output_dir cannot be set in a recipe"),
        (
            {"collect": {"block_size": 4}},
            "collect.block_size cannot be set in a recipe: set `block_size` of the phase",
        ),
        ({"pack": {"progress": True}}, "pack.progress cannot be set in a recipe"),
        ({"collect": {"as_chat": "yes"}}, "collect.as_chat must be true or false, got 'yes'"),
        ({"collect": {"repetition": "stop"}}, "collect: `repetition` must be one of"),
        ({"collect": {"dtype": "half"}}, "collect.dtype must be one of"),
        ({"collect": {"max_prompts": 0}}, "`collect.max_prompts` must be at least 1"),
        ({"pack": {"window": 2}}, "pack has no setting 'window': did you mean 'window_size'"),
        ({"pack": {"max_noise": 2.0}}, "pack: "),
        ({"pack": {"shard_size": 0}}, "pack: `shard_size` must be at least 1"),
        ({"pack": {"pack_samples": True}}, "pack: `pack_samples=True` fills rows up to `max_length`"),
        ({"pack": {"only_right": True}}, "pack.only_right keeps the answers that choose.score accepts"),
        ({"train": {"learnin_rate": 1e-3}}, "train has no setting 'learnin_rate': did you mean 'learning_rate'"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate must be a number, got 'fast'"),
        ({"train": {"max_steps": True}}, "train.max_steps must be a whole number, got True"),
        ({"train": {"output_dir": "x"}}, "train.output_dir cannot be set in a recipe: everything is written into"),
        ({"train": {"save_steps": 0.1}}, "`train.save_steps` must be a whole number"),
        ({"train": {"save_steps": 5, "logging_steps": 2}}, "save_steps must be a multiple of train.logging_steps"),
        ({"train": {"adapter_scope": "draft"}}, "trains an adapter: give the recipe an `adapter`"),
        (
            {"phases": [{"block_size": 4, "train": {"bf16": True}}, {"block_size": 4}]},
            "train.bf16 must be the same in all phases",
        ),
        ({"train": {"refresh_steps": 4}}, "train.refresh_steps cannot be set in a recipe"),
        ({"choose": {"counts": 3}}, "choose has no setting 'counts': did you mean 'count'"),
        ({"choose": {"min_agreement": 2}}, "choose.min_agreement must be from 0 to 1"),
        ({"choose": {"jacobi_config": {"block_size": None}}}, "depends on the timing of this machine"),
        ({"choose": {"jacobi_config": {"adaptive": True}}}, "depends on the timing of this machine"),
        ({"choose": {"jacobi_config": {"blocksize": 4}}}, "unknown settings"),
        ({"pack": {"noise": "uniform"}}, "pack has no setting 'window_size'"),
        ({"adapter": {"rank": 4}}, "adapter has no setting 'rank'"),
        ({"adapter": 5}, "`adapter` must hold settings"),
        ({"seed": "one"}, "seed must be a whole number"),
        ({"train": [1]}, "`train` must hold settings"),
    ],
)
def test_a_wrong_recipe_is_refused_in_a_sentence(changes, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        read_recipe(recipe(**changes))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "/no/such/folder"}, "there is no model /no/such/folder"),
        ({"prompts": "no-such-file.jsonl"}, "there is no file or folder no-such-file.jsonl"),
        ({"prompts": {"file": "x"}}, "`prompts` has no setting 'file'"),
        ({"prompts": [{"words": 1}]}, "looks like a prompt"),
        ({"choose": {"count": 8}}, "choose.count=8 holds out all of 8 prompts"),
        ({"choose": {"score": "no_such_module:score"}}, "no_such_module cannot be imported"),
        ({"train": {"learning_rate": -1.0}}, "`learning_rate` must be at least 0"),
        ({"train": {"consistency_loss": "soggy"}}, "`consistency_loss` must be one of"),
        ({"held_out": []}, "holds no rows"),
        ({"adapter": {"target_modules": ["nothing"]}}, "'nothing'.* not found"),
        ({"adapter": {"r": 0, "target_modules": ["q_proj"]}}, "should be a positive integer"),
        (
            {"adapter": {"init_lora_weights": "pissa"}, "train": {"adapter_scope": "draft"}},
            "the recipe's adapter was initialized with init_lora_weights='pissa'",
        ),
    ],
)
def test_what_is_missing_is_reported_before_any_work(changes, message, model, tmp_path):
    with pytest.raises(UsageError, match=message):
        run_recipe(recipe(**{"model": model} | changes), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_refused_by_a_dry_run_too(model, tmp_path, capsys):
    (tmp_path / "file").touch()
    with pytest.raises(MissingFile, match=r"cannot be written \(Not a directory\): name another folder"):
        run_recipe(recipe(model), tmp_path / "file" / "out")
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe(model)))
    command = ["recipe", str(tmp_path / "recipe.yaml"), "--output-dir", str(tmp_path / "file" / "out"), "--dry-run"]
    assert main(command) == 2
    assert "cannot be written (Not a directory)" in capsys.readouterr().err


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text("model: m\nprompts: p\ntrain: {learning_rate: 1e-6, max_steps: 3.0}\nphases: [{block_size: 16}]\n")
    train = read_recipe(file).phases[0].train
    assert train["learning_rate"] == 1e-6 and train["max_steps"] == 3
    file.write_text("model: [")
    with pytest.raises(UsageError, match="is not valid YAML"):
        read_recipe(file)
    with pytest.raises(OSError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_a_recipe_is_read_in_the_same_way_after_a_command_line_was_parsed():
    HfArgumentParser(JacobiForcingConfig)  # changes the types of the class's fields
    given = {"model_init_kwargs": {"attn_implementation": "eager"}, "jacobi_config": {"block_size": 4}}
    train = read_recipe(recipe(train=given)).phases[0].train
    assert train.items() >= given.items()


def test_settings_at_the_top_level_are_for_all_phases_and_a_phase_overrides_them():
    phases = [{"block_size": 4}, {"block_size": 8, "pack": {"window_size": 1}, "train": {"seed": 7}}]
    first, second = read_recipe(recipe(phases=phases, seed=3)).phases
    assert (first.name, second.name) == ("1-n4", "2-n8")
    assert first.pack == {"seed": 3, "window_size": 2} and second.pack["window_size"] == 1
    assert first.train["seed"] == 3 and second.train["seed"] == 7 and second.train["max_steps"] == 2


@pytest.mark.parametrize("name", ["paper", "cllm", "draft_only", "miniature"])
def test_the_examples_are_recipes(name, tmp_path):
    HfArgumentParser(hf_jacobi.JacobiForcingConfig)  # changes the types of the class's fields
    found = read_recipe(EXAMPLES / f"{name}.yaml")
    for phase in found.phases:
        phase.train.update(use_cpu=True)
        arguments = training_arguments(found, phase, tmp_path, rows=1000)
        assert arguments.save_steps % arguments.logging_steps == 0
    if name == "paper":
        assert [(phase.block_size, phase.pack["window_size"]) for phase in found.phases] == [(16, 16), (32, 8)]
        assert all(phase.train["max_steps"] == 10_000 for phase in found.phases)
        assert all(phase.train["learning_rate"] == 1e-6 for phase in found.phases)
        assert all(phase.pack["max_length"] == 2048 for phase in found.phases)
    if name == "miniature":
        assert [phase.collect is None for phase in found.phases] == [False, True, True]


def test_the_best_of_the_fastest_checkpoints_that_keep_their_quality_is_chosen():
    def point(step, tpf, agreement, **others):
        return {"step": step, "tokens_per_forward": tpf, "agreement": agreement} | others

    before = point(0, 1.0, 1.0, score=0.9)
    points = [point(1, 2.0, 0.9), point(2, 3.0, 0.7), point(3, 2.97, 0.8), point(4, 4.0, 0.4)]
    assert choose(points, before, Choice(min_agreement=0.5))["step"] == 3
    assert choose(points, before, Choice(min_agreement=0.5, near=0.0))["step"] == 2
    assert choose(points, before, Choice(min_agreement=0.95))["step"] == 1, "none keeps its quality: the best"
    scored = [point(1, 2.0, 0.1, score=0.9), point(2, 3.0, 0.9, score=0.85), point(3, 2.5, 0.1, score=0.89)]
    assert choose(scored, before, Choice(max_score_loss=0.01))["step"] == 3
    assert choose(scored, before, Choice(max_score_loss=0.1))["step"] == 2


def test_checkpoints_are_chosen_with_the_settings_that_the_model_keeps(model, tmp_path):
    decoding = {"draft_init": "vocabulary", "pool_size": 0}
    settings = {
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "collect": {"draft_init": "vocabulary"},
        "train": {"adapter_scope": "draft", "accept_cut": True},
        "choose": {"jacobi_config": decoding},
        "phases": [{"block_size": 4}],
    }
    given = recipe(model, **settings) | {"pack": {"noise": "uniform", "noisy_copies": 2}}
    report = run_recipe(given, tmp_path, progress=False)
    assert [point["agreement"] for point in report["phases"][0]["curve"]] == [1.0] * 3
    kept = json.loads((tmp_path / "model" / "generation_config.json").read_text())["jacobi"]
    assert kept.items() >= (decoding | {"block_size": 4}).items()
    packed = report["phases"][0]["packed"]
    assert packed["noisy_blocks"] >= 2 * report["phases"][0]["trajectories"]["blocks"], "two copies of each block"


@pytest.mark.parametrize("settings", [{"position_cost": 0.1, "adaptive": True}, {"draft_init": "vocabulary"}])
def test_settings_that_do_not_depend_on_the_clock_are_allowed(settings):
    (phase,) = read_recipe(recipe(choose={"jacobi_config": settings})).phases
    assert phase.choose.decoding(8, 3) == {"block_size": 8, "seed": 3} | settings


def test_a_run_leaves_a_model_that_decodes_and_a_report(model, tmp_path):
    phases = [{"block_size": 4}, {"block_size": 8, "train": {"max_steps": 1}}]
    report = run_recipe(recipe(model, phases=phases), tmp_path, progress=False)
    first, second = report["phases"]
    assert [point["step"] for point in first["curve"]] == [0, 1, 2]
    assert [point["step"] for point in second["curve"]] == [0, 1]
    assert first["curve"][0]["agreement"] == 1.0 and report["before"]["tokens_per_forward"] > 1
    assert first["trajectories"]["sequences"] == 6, "two of eight prompts are held out"
    assert second["curve"][0]["agreement"] == first["curve"][first["chosen"]]["agreement"], (
        "the second phase starts from the chosen checkpoint"
    )
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert f"| {first['chosen']} (chosen) |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "curve.png").stat().st_size > 1000
    assert not list(tmp_path.rglob("checkpoint-*"))
    log = json.loads((tmp_path / "1-n4" / "log.json").read_text())
    assert [line["step"] for line in log] == [1, 2] and "consistency_loss" in log[0]
    chosen = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(tmp_path / "model"))
    assert chosen.generation_config.jacobi["block_size"] == 8
    ids = torch.tensor([[5, 6, 7]])
    output = chosen.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False, return_dict_in_generate=True
    )
    assert output.jacobi_stats.tokens_per_forward > 1
    trajectories = hf_jacobi.collect_trajectories(
        AutoModelForCausalLM.from_pretrained(tmp_path / "1-n4" / "model"), tiny_tokenizer(), prompts(6), 8, 16, 8,
        progress=False,
    )  # fmt: skip
    from hf_jacobi.trajectories.prompts import open_prompts

    assert trajectories[:] == open_prompts(str(tmp_path / "2-n8" / "trajectories"))[:], (
        "from the model of the first phase"
    )

    with pytest.raises(UsageError, match=r"belongs to another recipe .*max_steps 1, now 2"):
        run_recipe(recipe(model, phases=[phases[0], {"block_size": 8}]), tmp_path)
    assert run_recipe(recipe(model, phases=phases), tmp_path, progress=False) == report, "all stages are done"
    (tmp_path / "recipe.json").write_text("{")
    with pytest.raises(UsageError, match=r"recipe\.json is not a JSON file"):
        run_recipe(recipe(model, phases=phases), tmp_path)


def test_a_folder_with_other_work_is_refused_and_not_changed(model, tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(UsageError, match=r"holds other work \(model\)"):
        run_recipe(recipe(model), tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["model"]


def test_other_held_out_prompts_are_noticed(model, tmp_path):
    file = tmp_path / "held_out.txt"
    settings = recipe(model, held_out=str(file), phases=[{"block_size": 4}, {"block_size": 4, "name": "again"}])
    file.write_text("\n".join(prompts(2)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_jacobi.recipes.stages.collect", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_recipe(settings, tmp_path / "out", progress=False)
    file.write_text("\n".join(prompts(4)[2:]))
    with pytest.raises(UsageError, match="held-out prompts differ from those"):
        run_recipe(settings, tmp_path / "out", progress=False)


@pytest.mark.parametrize("scope", ["all", "draft"])
def test_an_adapter_is_trained_further_from_phase_to_phase(model, tmp_path, scope):
    report = run_recipe(
        recipe(
            model,
            adapter={"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
            train={"adapter_scope": scope, "max_steps": 1},
            phases=[{"block_size": 4}, {"block_size": 4, "name": "again", "collect": "previous"}],
            keep_checkpoints=True,
        ),
        tmp_path,
        progress=False,
    )
    assert [phase["name"] for phase in report["phases"]] == ["1-n4", "2-again"]
    assert not (tmp_path / "2-again" / "trajectories").exists() and list(tmp_path.rglob("checkpoint-1"))
    for folder in ("1-n4/model", "model"):
        assert (tmp_path / folder / "adapter_config.json").exists()
    if scope == "draft":
        assert all(point["agreement"] == 1.0 for phase in report["phases"] for point in phase["curve"])
    from safetensors.torch import load_file

    first, second = (load_file(tmp_path / one / "adapter_model.safetensors") for one in ("1-n4/model", "model"))
    moved = [name for name in first if not torch.equal(first[name], second[name])]
    assert first.keys() == second.keys() and moved
    largest = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert largest < 0.01, "the second phase continues the first adapter: a new one would differ more"


def test_only_correct_answers_are_trained_on_and_checkpoints_are_chosen_by_their_share(model, tmp_path):
    asked = []

    def score(row: dict, completion: str) -> bool:
        asked.append(row["id"])
        return row["number"] % 2 == 0

    rows = [{"id": f"q{number}", "prompt": text, "number": number} for number, text in enumerate(prompts(8))]
    settings = recipe(model, prompts=rows, pack={"only_right": True}, train={"max_steps": 1})
    report = run_recipe(settings | {"choose": settings["choose"] | {"score": score}}, tmp_path, progress=False)
    assert report["phases"][0]["packed"]["rows"] == 3 and report["phases"][0]["trajectories"]["sequences"] == 6
    assert all(point["score"] == 0.5 for point in report["phases"][0]["curve"])
    assert "tokens_per_forward_right" in report["before"] and {"q6", "q7", "q0"} <= set(asked)
    with pytest.raises(UsageError, match="`score` must be a function"):
        run_recipe(recipe(model), tmp_path / "other", score="no")


def test_a_dry_run_prints_the_plan_and_a_run_follows_it(model, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(prompts(8)))
    settings = recipe("elsewhere", prompts="nowhere.txt")
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(settings))
    command = ["recipe", str(file), "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--model", model]) == 2
    assert "there is no file or folder nowhere.txt" in capsys.readouterr().err
    command += ["--model", model, "--prompts", str(tmp_path / "prompts.txt")]
    assert main([*command, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "phase 1-n4, from " + model in said and "prompts    6, held out 2" in said
    assert "2 steps; " in said and not (tmp_path / "out").exists()
    assert main(command) == 0
    assert "tokens per forward" in capsys.readouterr().out
    assert main([*command, "--dry-run"]) == 0
    assert capsys.readouterr().out.count(", done") == 4
    file.write_text("modle: x\n")
    assert main(command) == 2
    assert "did you mean 'model'" in capsys.readouterr().err


def test_the_miniatures_problems_are_prompts_whose_answers_can_be_checked(tmp_path):
    pytest.importorskip("benchmarks.miniature")
    is_right = score_function(f"{EXAMPLES / 'miniature_problems.py'}:is_right")
    program = [sys.executable, str(EXAMPLES / "miniature_problems.py"), str(tmp_path / "prompts.jsonl"), "6"]
    subprocess.run(program, check=True, timeout=120)
    rows = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(rows) == 6 and {row["task"] for row in rows} == {"math", "sql"}
    assert all(is_right(row, row["completion"]) and not is_right(row, "no idea") for row in rows)
