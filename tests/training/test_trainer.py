"""The trainer is exact under accumulation and several processes, resumes, and refuses what it cannot do."""

import copy
import inspect
import json
import os
import shutil
import subprocess
import sys
import warnings
from contextlib import nullcontext
from functools import partialmethod
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from models import ARCHITECTURES, tiny_model, tiny_tokenizer
from oracle import oracle_logits
from packed_rows import packed, trajectories
from transformers import AutoModelForCausalLM, GenerationConfig, TrainingArguments

import hf_jacobi
from hf_jacobi import JacobiForcingConfig, JacobiForcingTrainer
from hf_jacobi.decoding.compat import CACHE
from hf_jacobi.trajectories.packing import PACKED_FEATURES


@pytest.fixture(autouse=True)
def _cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


def rows(count: int, **settings) -> Dataset:
    return Dataset.from_list(packed(count, **settings), features=PACKED_FEATURES)


def arguments(folder, **settings) -> JacobiForcingConfig:
    defaults = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_steps": 1,
        "eval_prompts": 0,
    }
    return JacobiForcingConfig(**defaults | settings)


def trainer_of(model, folder, data=None, **settings):
    others = {
        name: settings.pop(name)
        for name in inspect.signature(JacobiForcingTrainer.__init__).parameters
        if name in settings
    }
    others.setdefault("processing_class", tiny_tokenizer())
    return JacobiForcingTrainer(
        model=model, args=arguments(folder, **settings), train_dataset=rows(8) if data is None else data, **others
    )


def is_compiled(model) -> bool:
    return any(module._compiled_call_impl for module in model.modules())


def gradients_of_a_step(folder, **settings) -> dict[str, torch.Tensor]:
    """The gradients of the first optimizer step, read when the optimizer runs."""
    model = tiny_model(attention=settings.pop("attention", None))
    torch.manual_seed(0)  # of the adapter, if there is one
    evaluations = settings.pop("evaluations", 0)
    trainer = trainer_of(model, folder, learning_rate=0.0, max_grad_norm=0.0, **settings)
    found = {}
    for _ in range(evaluations):
        trainer.evaluate(rows(2, seed=1))
    trainer.create_optimizer()
    step = trainer.optimizer.step

    def spy(*args, **kwargs):
        found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return step(*args, **kwargs)

    trainer.optimizer.step = spy
    trainer.train()
    return found


def assert_same(ours, theirs, tolerance=1e-5):
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in theirs.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-12)
        assert float(error) < tolerance, (name, float(error))


def test_the_loss_is_that_of_the_oracle(tmp_path):
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, ar_loss_weight=2.0, temperature=1.5)
    some = packed(3)
    loss = trainer.compute_loss(model, trainer.data_collator(some))
    consistency, ar = [], []
    for row in some:
        logits = oracle_logits(model, row)
        for index, (block, twin) in enumerate(zip(row["block_ids"], row["twin_ids"])):
            if block < 0 and index + 1 < len(row["labels"]) and row["labels"][index + 1] != -100:
                ar.append(torch.nn.functional.cross_entropy(logits[index], torch.tensor(row["labels"][index + 1])))
            if twin >= 0 and row["labels"][twin + 1] != -100:
                teacher = (logits[twin] / 1.5).softmax(-1).detach()
                consistency.append(-(teacher * (logits[index] / 1.5).log_softmax(-1)).sum() * 1.5**2)
    expected = torch.stack(consistency).mean() + 2.0 * torch.stack(ar).mean()
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


def test_a_cut_loss_is_that_of_the_oracle(tmp_path):
    """After some training, so that some predictions are correct; the logged figures cover all positions."""
    model = tiny_model()
    settings = {"consistency_loss": "tv", "accept_cut": True, "block_position_weight": 0.5, "ar_loss_weight": 2.0}
    trainer = trainer_of(model, tmp_path, max_steps=30, learning_rate=1e-2, **settings)
    trainer.train()
    some = packed(3)
    loss, terms = trainer.compute_loss(model.eval(), trainer.data_collator(some), return_outputs=True)
    expected, every, ar, counted, right = 0.0, 0.0, [], 0, 0
    for row in some:
        logits = oracle_logits(model, row)
        previous = None
        for index, (block, twin) in enumerate(zip(row["block_ids"], row["twin_ids"])):
            if block < 0 and index + 1 < len(row["labels"]) and row["labels"][index + 1] != -100:
                ar.append(torch.nn.functional.cross_entropy(logits[index], torch.tensor(row["labels"][index + 1])))
            if twin < 0 or row["labels"][twin + 1] == -100:
                continue
            if block != previous:
                previous, place, failed = block, 0, False
            tv = (logits[twin].softmax(-1) - logits[index].softmax(-1)).abs().sum() / 2
            every += float(tv.detach())
            if not failed:
                expected, counted = expected + 0.5**place * tv, counted + 1
            hit = int(logits[index].argmax()) == row["labels"][twin + 1]
            place, failed, right = place + 1, failed or not hit, right + hit
    count = trainer.planner(trainer.data_collator(some)).targets.counts[1]
    assert 0 < right < count and right < counted < count, "some blocks are cut, and some predictions are right"
    assert float(terms.uncut) == pytest.approx(every, rel=1e-4) and int(terms.right) == right
    assert float(loss.detach()) == pytest.approx(float(expected / count + 2 * torch.stack(ar).mean()), rel=1e-4)


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
        {"activation_checkpointing": True},
        {"loss_chunk_size": 5},
    ],
)
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("loss", [{}, {"accept_cut": True, "consistency_loss": "lk", "block_position_weight": 0.8}])
def test_a_step_is_one_large_batch_however_it_is_cut(tmp_path, settings, kind, loss):
    adapter = {} if kind == "full" else {"peft_config": lora()}
    ours, theirs = (gradients_of_a_step(tmp_path, **adapter, **loss, **changed) for changed in (settings, {}))
    assert_same(ours, theirs)
    assert all("lora_" in name for name in ours) == (kind == "lora")


SCRIPT = """
import sys
import warnings
sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
from test_trainer import gradients_of_a_step
found = gradients_of_a_step({folder!r}, **{settings!r})
import torch.distributed as dist
assert dist.get_world_size() == 2
if dist.get_rank() == 0: torch.save(found, {out!r})
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_two_processes_take_the_step_of_one(tmp_path):
    here = Path(__file__).parent
    path = [str(here), str(here.parent), str(Path(hf_jacobi.__file__).parents[1])]
    out = str(tmp_path / "gradients.pt")
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    file = tmp_path / "script.py"
    file.write_text(SCRIPT.format(path=path, folder=str(tmp_path / "two"), settings=settings, out=out))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", str(file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    two = {name.removeprefix("module."): value for name, value in torch.load(out).items()}
    assert_same(two, gradients_of_a_step(tmp_path))


def curve(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["full", "lora", "draft"])
def test_the_loss_falls_and_a_resumed_run_goes_the_same_way(tmp_path, kind):
    def make(folder):
        peft_config = None
        if kind != "full":
            peft_config = lora()
        scope = "draft" if kind == "draft" else "all"
        torch.manual_seed(0)
        return trainer_of(
            tiny_model(), folder, max_steps=12, save_strategy="steps", save_steps=6, learning_rate=1e-2,
            per_device_train_batch_size=4, peft_config=peft_config, adapter_scope=scope,
        )  # fmt: skip

    whole = make(tmp_path / "whole")
    whole.train()
    losses = curve(whole)
    assert len(losses) == 12
    assert whole.state.log_history[-2]["consistency_loss"] < whole.state.log_history[0]["consistency_loss"]
    resumed = make(tmp_path / "whole")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert curve(resumed) == pytest.approx(losses, rel=1e-4)


def lora(targets=("q_proj", "v_proj", "up_proj")):
    from peft import LoraConfig

    return LoraConfig(r=4, target_modules=list(targets))


def test_what_is_logged(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path, max_steps=2, eval_dataset=rows(4, seed=1), eval_prompts=2,
                         eval_max_new_tokens=12, eval_strategy="steps", eval_steps=1)  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert {"loss", "consistency_loss", "ar_loss", "noisy_accuracy", "tokens_per_second"} <= logged.keys()
    assert logged["loss"] == pytest.approx(logged["consistency_loss"] + logged["ar_loss"], rel=1e-4)
    evaluated = {key for entry in trainer.state.log_history for key in entry if key.startswith("eval_")}
    assert {
        "eval_loss", "eval_consistency_loss", "eval_ar_loss", "eval_noisy_accuracy", "eval_tokens_per_forward",
        "eval_agreement",
    } <= evaluated  # fmt: skip
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(metrics["eval_consistency_loss"] + metrics["eval_ar_loss"])
    assert metrics["eval_tokens_per_forward"] >= 1


def test_evaluation_sums_over_all_batches(tmp_path):
    """With rows of different lengths, the mean of the batches' means would be a different number."""
    data = rows(5, seed=1)
    names = ("eval_loss", "eval_ar_loss", "eval_consistency_loss", "eval_noisy_accuracy")
    figures = []
    for size in (1, 2, 5):
        trainer = trainer_of(tiny_model(), tmp_path, eval_dataset=data, per_device_eval_batch_size=size)
        trainer.predict(rows(2))
        metrics = trainer.evaluate()
        figures.append([metrics[name] for name in names])
    assert figures[0] == pytest.approx(figures[1], rel=1e-5) and figures[1] == pytest.approx(figures[2], rel=1e-5)


def test_several_evaluation_sets_and_the_best_model_by_what_decoding_gives(tmp_path):
    sets = {"one": rows(2), "two": rows(3, seed=1)}
    trainer = trainer_of(
        tiny_model(), tmp_path, eval_dataset=sets, eval_prompts=1, eval_max_new_tokens=8, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, max_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_one_tokens_per_forward", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    assert trainer.state.best_metric >= 1
    assert {"eval_one_ar_loss", "eval_two_ar_loss"} <= {key for entry in trainer.state.log_history for key in entry}


def test_agreement_after_a_resume_is_with_the_text_before_the_training(tmp_path):
    settings = {
        "eval_dataset": rows(2), "eval_prompts": 2, "eval_max_new_tokens": 16, "save_strategy": "steps",
        "save_steps": 2, "learning_rate": 3e-2, "max_steps": 4,
    }  # fmt: skip
    whole = trainer_of(tiny_model(), tmp_path, **settings)
    whole.train()
    expected = whole.evaluate()["eval_agreement"]
    assert expected < 1
    resumed = trainer_of(tiny_model(), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.evaluate()["eval_agreement"] == expected


def test_decoding_in_evaluation_serves_models_that_train_with_flex_attention(tmp_path):
    trainer = trainer_of(tiny_model(max_position_embeddings=32), tmp_path, eval_dataset=rows(2), eval_prompts=1)
    trainer.model.set_attn_implementation("flex_attention")
    assert trainer.decoding.figures()["agreement"] == 1.0  # and no further than there are positions
    assert trainer.model.config._attn_implementation == "flex_attention"


def test_arguments_of_another_trainer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must be a JacobiForcingConfig"):
        JacobiForcingTrainer(tiny_model(), TrainingArguments(str(tmp_path), use_cpu=True), train_dataset=rows(2))


def test_agreement_does_not_count_the_ties_of_half_precision(tmp_path):
    settings = {
        "eval_dataset": rows(8),
        "eval_prompts": 8,
        "eval_max_new_tokens": 96,
        "learning_rate": 0.0,
        "bf16": True,
    }
    trainer = trainer_of(tiny_model(), tmp_path, **settings)
    trainer.train()
    assert trainer.evaluate()["eval_agreement"] == 1.0


def test_agreement_is_whole_before_anything_was_learned(tmp_path):
    trainer = trainer_of(
        tiny_model(), tmp_path, eval_dataset=rows(4), eval_prompts=3, eval_max_new_tokens=16, learning_rate=0.0
    )
    assert trainer.evaluate()["eval_agreement"] == 1.0


def test_a_saved_model_decodes_with_jacobi_and_has_a_card(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path / "out", eval_dataset=rows(2), eval_prompts=1, eval_max_new_tokens=8)
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    config = GenerationConfig.from_pretrained(tmp_path / "out")
    assert config.decoding == "jacobi" and config.jacobi["block_size"] == 4
    model = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    output = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=8, return_dict_in_generate=True)
    assert output.jacobi_stats.new_tokens
    card = (tmp_path / "out" / "README.md").read_text()
    for part in ("library_name: transformers", "jacobi-forcing", "learning_rate", "tokens per forward", "2512.14681"):
        assert part in card


def test_an_adapter_is_saved_with_how_it_decodes(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path / "out", peft_config=lora())
    trainer.train()
    trainer.save_model()
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["decoding"] == "jacobi"
    assert (tmp_path / "out" / "adapter_config.json").exists()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and 'jacobi_config={"block_size": 4' in card


def test_a_model_by_name_and_bfloat16(tmp_path):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = JacobiForcingTrainer(
        str(tmp_path / "base"),
        arguments(tmp_path / "out", bf16=True, model_init_kwargs={"attn_implementation": "sdpa"}),
        train_dataset=rows(8),
    )
    trainer.train()
    assert 0 < curve(trainer)[0] < 100
    exact = trainer_of(tiny_model(), tmp_path)
    exact.train()
    assert curve(trainer)[0] == pytest.approx(curve(exact)[0], rel=0.05)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_of_every_architecture_is_that_of_its_own_logits(name, tmp_path):
    attention = "eager" if name in ("gemma2", "gpt_oss") else None
    model = tiny_model(name, attention=attention)
    trainer = trainer_of(model, tmp_path)
    row = packed(1)[0]
    _, terms = trainer.compute_loss(model, trainer.data_collator([row]), return_outputs=True)
    length = row["block_ids"].count(-1)
    text = torch.tensor([row["input_ids"][:length]])
    logits = model(text, use_cache=False).logits[0, :-1].float()
    labels = torch.tensor(row["labels"][1:length])
    expected = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
    assert float(terms.ar.detach()) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_weight_of_the_ar_loss_grows_slowly_at_first(tmp_path):
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, ar_loss_weight=16.0, ar_loss_weight_start=1.0, max_steps=4)
    seen = []
    compute = trainer.compute_loss

    def spy(*args, **kwargs):
        loss, terms = compute(*args, **kwargs | {"return_outputs": True})
        counts = kwargs.get("num_items_in_batch")
        if counts is None:  # evaluating
            return loss
        seen.append(float((loss - terms.consistency / counts[1]) / (terms.ar / counts[0])))
        return loss

    trainer.compute_loss = spy
    trainer.train()
    assert seen == pytest.approx([16 ** ((step / 3) ** 2) for step in range(4)], rel=1e-3)
    assert seen[-1] == pytest.approx(16.0, rel=1e-3)
    logged = [line["ar_loss_weight"] for line in trainer.state.log_history if "ar_loss_weight" in line]
    assert logged == pytest.approx(seen, rel=1e-3)
    metrics = trainer.evaluate(rows(4))
    expected = metrics["eval_consistency_loss"] + 16.0 * metrics["eval_ar_loss"]
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


def compile_quickly(monkeypatch) -> None:
    """In one graph, as always, but without generating code for it, which takes a minute."""
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))


@pytest.mark.compile
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("scope", ["all", "draft"])
def test_compiled_layers_give_the_same_gradients(tmp_path, monkeypatch, scope):
    if scope == "draft":
        compile_quickly(monkeypatch)
    settings = {"peft_config": lora(), "adapter_scope": "draft", "attention": "eager"} if scope == "draft" else {}
    expected = gradients_of_a_step(tmp_path, **settings)
    torch._dynamo.reset()
    counts = torch._dynamo.utils.counters
    counts.clear()
    assert_same(gradients_of_a_step(tmp_path, compile_layers=True, **settings), expected, 1e-4)
    assert counts["stats"]["unique_graphs"] > 0
    assert not (scope == "draft" and counts["graph_break"]), "the adapter does not break a layer into pieces"


@pytest.mark.compile
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_decoding_in_between_is_not_compiled_and_nothing_is_afterwards(tmp_path):
    model = tiny_model()
    settings = {"compile_layers": True, "eval_prompts": 2, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 2}
    trainer = trainer_of(model, tmp_path, eval_dataset=rows(2), eval_max_new_tokens=4, **settings)
    compiled = {True: set(), False: set()}  # by whether it decodes

    def spy(module, inputs, named):
        compiled[named.get(CACHE) is not None].add(is_compiled(model))

    model.model.register_forward_pre_hook(spy, with_kwargs=True)
    trainer.train()
    assert compiled == {True: {False}, False: {True}}
    assert not is_compiled(model)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_training_that_breaks_off_leaves_nothing_compiled(tmp_path):
    model = tiny_model()
    trainer = trainer_of(model, tmp_path, compile_layers=True)

    def breaks(*args, **kwargs):
        assert is_compiled(model)
        raise RuntimeError("on purpose")

    trainer.training_step = breaks
    with pytest.raises(RuntimeError, match="on purpose"):
        trainer.train()
    assert not is_compiled(model)


def test_compiling_needs_a_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match=r"install g\+\+"):
        trainer_of(tiny_model(), tmp_path, compile_layers=True)


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_goes_by_the_new_name_and_the_old_one(tmp_path, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        args = arguments(tmp_path, **{name: True})
    assert args.activation_checkpointing and args.gradient_checkpointing
    args = arguments(tmp_path)
    assert not args.activation_checkpointing and not args.gradient_checkpointing


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"data": Dataset.from_list(trajectories(2))}, "pack them with pack_trajectories first"),
        ({"data": Dataset.from_list([{"input_ids": [1, 2]}])}, "lacks the columns"),
        ({"data": rows(2).select([])}, "is empty"),
        ({"block_size": 3}, "blocks of 4 tokens, but block_size=3"),
        ({"block_size": 8}, "blocks of 4 tokens, but block_size=8"),
        ({"torch_compile": True}, "set compile_layers=True instead"),
        ({"adapter_scope": "draft"}, "pass a `peft_config`"),
        ({"model_init_kwargs": {"dtype": "auto"}}, "given by name"),
        ({"consistency_loss": "l2"}, "`consistency_loss` must be one of"),
        ({"ar_loss_weight_start": 2.0}, "`ar_loss_weight_start` must be above 0 and at most"),
        ({"temperature": 0.0}, "`temperature` must be above 0"),
        ({"block_position_weight": 0.0}, "`block_position_weight` must be above 0"),
        ({"block_position_weight": float("nan")}, "`block_position_weight` must be a finite number"),
        ({"jacobi_config": {"blocksize": 3}}, "unknown settings"),
    ],
)
def test_bad_input_is_refused_at_construction(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny_model(), tmp_path, **settings)


def test_a_draft_only_adapter_needs_layers_that_know_rows(tmp_path):
    with pytest.raises(ValueError, match="without their rows"):
        trainer_of(tiny_model("llama4"), tmp_path, peft_config=lora(["gate_proj"]), adapter_scope="draft")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_draft_only_adapter_is_evaluated_while_it_trains(tmp_path, checkpointing):
    """With checkpointing, PEFT prepares each forward for a backward pass, which evaluation never runs."""
    trainer = trainer_of(
        tiny_model(), tmp_path, peft_config=lora(), adapter_scope="draft", activation_checkpointing=checkpointing,
        max_steps=3, eval_dataset=rows(3), eval_strategy="steps", eval_steps=1, eval_prompts=1, eval_max_new_tokens=8,
    )  # fmt: skip
    trainer.train()
    assert trainer.evaluate()["eval_agreement"] == 1.0


@pytest.mark.compile
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_draft_only_adapter_that_trains_compiled_is_told_its_tokens_by_peft_again(tmp_path, monkeypatch):
    """While it decodes in between, and after training."""
    compile_quickly(monkeypatch)
    trainer = trainer_of(
        tiny_model(attention="eager"), tmp_path, peft_config=lora(), adapter_scope="draft", compile_layers=True,
        max_steps=2, eval_dataset=rows(3), eval_strategy="steps", eval_steps=1, eval_prompts=1, eval_max_new_tokens=8,
        learning_rate=0.1,
    )  # fmt: skip
    trainer.train()
    compiled = trainer.state.log_history[-2]
    assert not any("forward" in vars(module) for module in trainer.head.model.modules()), "layers have their own again"
    assert compiled["eval_agreement"] == 1.0
    assert trainer.evaluate()["eval_consistency_loss"] == pytest.approx(compiled["eval_consistency_loss"], rel=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("in_one_piece", [False, True])
def test_a_batch_that_breaks_off_leaves_a_draft_only_adapter_off(tmp_path, in_one_piece, checkpointing):
    """PEFT's hooks outlive a forward that raises, and would put the adapter on for text."""
    trainer = trainer_of(
        tiny_model(), tmp_path, peft_config=lora(), adapter_scope="draft", activation_checkpointing=checkpointing
    )
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.fill_(0.3)
    model = trainer.head.model
    tokens = torch.tensor([[5, 6, 7]] * 4)
    before = model(tokens).logits
    batch = trainer.data_collator(packed(4))
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with trainer.noisy_tokens.in_one_piece() if in_one_piece else nullcontext():
        with pytest.raises(ZeroDivisionError):
            trainer.training_step(trainer.model, batch)
        handle.remove()
        assert torch.equal(model(tokens).logits, before)
        trainer.training_step(trainer.model, batch)
        trainer.compute_loss(trainer.model, batch).backward()  # outside a step
        assert torch.equal(model(tokens).logits, before)


def test_a_copy_of_a_draft_only_adapter_in_training_has_weights_of_its_own(tmp_path):
    trainer = trainer_of(tiny_model(), tmp_path, peft_config=lora(), adapter_scope="draft")
    with trainer.noisy_tokens.in_one_piece():
        copied = copy.deepcopy(trainer.model)
        layers = [module for module in copied.modules() if getattr(module, "lora_variant", None)]
        assert layers and all(layer.forward.__self__ is layer for layer in layers)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "drop modules_to_save"),
        ({"bias": "all"}, "drop bias"),
        ({"use_dora": True}, "drop use_dora"),
        ({"target_modules": ["q_proj", "lm_head"]}, "embeddings or the head"),
    ],
)
def test_a_draft_only_adapter_leaves_the_base_alone(tmp_path, settings, message):
    from peft import LoraConfig

    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | settings)
    with pytest.raises(ValueError, match=message):
        trainer_of(tiny_model(), tmp_path, adapter_scope="draft", peft_config=config)


def test_the_scope_of_an_adapter_that_is_there_must_be_its_own(tmp_path):
    from peft import PromptTuningConfig, get_peft_model

    plain = get_peft_model(tiny_model(), lora())
    with pytest.raises(ValueError, match="trains a draft-only adapter"):
        trainer_of(plain, tmp_path, adapter_scope="draft")
    with pytest.raises(ValueError, match="already has an adapter"):
        trainer_of(plain, tmp_path, peft_config=lora())
    drafting = trainer_of(tiny_model(), tmp_path, peft_config=lora(), adapter_scope="draft").model
    with pytest.raises(ValueError, match="learns with adapter_scope='draft' only"):
        trainer_of(drafting, tmp_path)
    trainer_of(drafting, tmp_path, adapter_scope="draft")
    with pytest.raises(ValueError, match="does not support virtual tokens"):
        trainer_of(tiny_model(), tmp_path, peft_config=PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_draft_only_adapter_learns_from_noisy_tokens_alone(tmp_path, checkpointing):
    """Its gradient is that of a loss whose text half comes from the base model."""
    trainer = trainer_of(
        tiny_model(), tmp_path, peft_config=lora(), adapter_scope="draft", activation_checkpointing=checkpointing
    )
    model = trainer.model
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    batch = trainer.data_collator(packed(3))
    loss, terms = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "lora_" in name)
    base = trainer_of(tiny_model(), tmp_path)
    _, base_terms = base.compute_loss(base.model, batch, return_outputs=True)
    assert float(terms.ar) == pytest.approx(float(base_terms.ar), rel=1e-5), "the text half is the base model's"
    assert float(terms.consistency) != pytest.approx(float(base_terms.consistency), rel=1e-3)


def test_another_tokenizer_is_refused(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"more{number}" for number in range(10)])
    with pytest.raises(ValueError, match="the tokenizer has 106 tokens"):
        trainer_of(tiny_model(), tmp_path, processing_class=tokenizer)
    with pytest.raises(ValueError, match="another tokenizer"):
        trainer_of(tiny_model(vocab_size=40), tmp_path)
    with pytest.raises(ValueError, match="has 16 positions"):
        trainer_of(tiny_model(max_position_embeddings=16), tmp_path)
