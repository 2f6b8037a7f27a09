"""`hf-jacobi demo` with a tiny checkpoint, and with the miniature."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from models import VOCABULARY, tiny_model
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_jacobi import cli
from hf_jacobi.cli import demo as demo_command
from hf_jacobi.cli.demo import Follower, SideBySide, is_trained, print_report, remarks
from hf_jacobi.cli.models import MINIATURE
from hf_jacobi.decoding import timing
from hf_jacobi.decoding.config import write_settings
from hf_jacobi.decoding.costs import CostCurve


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_model("olmo").save_pretrained(folder)
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2").save_pretrained(folder)
    return str(folder)


def demo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "import sys; from hf_jacobi.cli import main; sys.exit(main(sys.argv[1:]))"]
    return subprocess.run([*command, "demo", *arguments], capture_output=True, text=True)


def test_json_prints_only_the_comparison(checkpoint):
    done = demo("--model", checkpoint, "--prompt", "w5 w6", "--max-new-tokens", "20", "--json")
    assert done.returncode == 0, done.stderr
    assert "warn" not in done.stderr.lower()
    report = json.loads(done.stdout)
    assert report["identical"] is True
    assert report["ar"]["texts"] == report["jacobi"]["texts"] and report["ar"]["texts"][0]
    assert report["ar"]["forwards"] == report["ar"]["new_tokens"] == report["jacobi"]["new_tokens"]
    assert report["jacobi"]["forwards"] <= report["ar"]["forwards"]
    assert report["speedup"] > 0 and report["prompts"] == ["w5 w6"]


def test_output_to_a_pipe_is_plain_text(checkpoint, capsys):
    assert (
        cli.main(["demo", "--model", checkpoint, "--prompt", "w5", "--max-new-tokens", "12", "--block-size", "4"]) == 0
    )
    out = capsys.readouterr().out
    assert "autoregressive" in out and "Jacobi" in out and "Texts identical: yes" in out
    assert "\x1b[" not in out, "no terminal codes in a pipe"
    ar, jacobi = out.split("--- Jacobi ---")[0].split("---\n")[1], out.split("--- Jacobi ---\n")[1]
    assert jacobi.startswith(ar.strip()) and ar.endswith("[cut at 12 tokens; --max-new-tokens changes that]\n\n")
    assert "Prompt: w5" in out and "[prompt 1]" not in out


@pytest.mark.parametrize("draft_only", [True, False])
def test_an_adapter(checkpoint, tmp_path, capsys, draft_only):
    base = AutoModelForCausalLM.from_pretrained(checkpoint)
    scope = {"alora_invocation_tokens": [-1]} if draft_only else {}
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **scope)
    adapted = get_peft_model(base, config)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    adapted.save_pretrained(tmp_path)
    settings = {"decoding": "jacobi", "jacobi": {"block_size": 5}}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    command = ["demo", "--model", checkpoint, "--prompt", "w5 w6", "--max-new-tokens", "20", "--json"]
    assert cli.main([*command, "--adapter", str(tmp_path), "--pool-size", "2"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["identical"] and report["adapter"] == tmp_path.name
    assert (report["jacobi_config"]["block_size"], report["jacobi_config"]["pool_size"]) == (5, 2)
    assert cli.main(command) == 0
    without = json.loads(capsys.readouterr().out)
    assert without["adapter"] is None
    assert (without["ar"]["texts"] == report["ar"]["texts"]) == draft_only, "a LoRA for all tokens changes the text"
    assert cli.main([*command, "--adapter", checkpoint]) == 2
    assert cli.main([*command, "--adapter", str(tmp_path), "--trained"]) == 2


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (LoraConfig(r=4, target_modules="all-linear", alora_invocation_tokens=[5, 6]), "neither"),
        (PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "neither"),
        (LoraConfig(r=4, target_modules="all-linear"), "not for this model"),
    ],
)
def test_unsupported_adapters_are_refused(checkpoint, tmp_path, capsys, config, said):
    get_peft_model(tiny_model("gpt2" if "model" in said else "olmo"), config).save_pretrained(tmp_path)
    command = ["demo", "--model", checkpoint, "--prompt", "w5 w6", "--adapter", str(tmp_path)]
    assert cli.main(command) == 2
    assert said in capsys.readouterr().err


def test_several_prompts_are_answered_in_turn(checkpoint, capsys):
    command = ["demo", "--model", checkpoint, "--max-new-tokens", "12"]
    singly = []
    for prompt in ("w5", "w7 w8"):
        assert cli.main([*command, "--prompt", prompt, "--json"]) == 0
        singly.append(json.loads(capsys.readouterr().out))
    assert cli.main([*command, "--prompt", "w5", "--prompt", "w7 w8", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for decoding in ("ar", "jacobi"):
        assert report[decoding]["texts"] == [one[decoding]["texts"][0] for one in singly]
        assert report[decoding]["forwards"] == sum(one[decoding]["forwards"] for one in singly)
    assert cli.main([*command, "--prompt", "w5", "--prompt", "w7 w8"]) == 0
    out = capsys.readouterr().out
    assert "Prompt 1: w5\n" in out and "Prompt 2: w7 w8\n" in out
    cut = "\n[cut at 12 tokens; --max-new-tokens changes that]"
    one, two = (text + cut * (len(text.split()) == 12) for text in report["ar"]["texts"])
    assert out.count(f"---\n[prompt 1]\n{one}\n\n[prompt 2]\n{two}\n") == 2


def test_an_end_token_at_the_limit_is_not_a_cut():
    shown = []
    tokenizer = SimpleNamespace(decode=lambda tokens, **settings: f"{len(tokens)}")
    follower = Follower(tokenizer, lambda text, *_: shown.append(text), 2, {7}, True)
    for tokens in ([5, 7], [5, 6], [7]):
        for one in ([1, 2], tokens):
            follower.put(torch.tensor(one))
        follower.end()
    cut = "\n[cut at 2 tokens; --max-new-tokens changes that]"
    assert shown[-1] == f"[prompt 1]\n2\n\n[prompt 2]\n2{cut}\n\n[prompt 3]\n1"


def test_the_measurement_of_costs_is_not_in_the_seconds(checkpoint, monkeypatch, capsys):
    happened = []
    plain_write = demo_command.write

    def measure(*arguments):
        happened.append("measured")
        return CostCurve(((1, 1.0), (16, 99.0)))  # so high that it is measured again

    def write(*arguments, **settings):
        happened.append("warm-up" if "stop" in settings else "timed")
        return plain_write(*arguments, **settings)

    monkeypatch.setattr(timing, "measure", measure)
    monkeypatch.setattr(demo_command, "write", write)
    command = ["demo", "--model", checkpoint, "--prompt", "w5", "--prompt", "w6", "--max-new-tokens", "40"]
    assert cli.main(command) == 0
    assert happened == ["warm-up", *["warm-up", "measured"] * timing.ATTEMPTS, "timed", "timed"]
    assert "The seconds do not include a warm-up" in capsys.readouterr().out


def test_by_default_the_miniature_decodes_many_tokens_per_forward(capsys):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert cli.main(["demo", "--json"]) == 0
    assert torch.get_num_threads() == 2
    torch.set_num_threads(threads)
    report = json.loads(capsys.readouterr().out)
    assert report["threads"] == 1, "two threads are slower on a busy machine"
    assert report["model"] == "the miniature" and report["trained"] and len(report["prompts"]) == 4
    assert report["identical"] and report["jacobi"]["tokens_per_forward"] > 3
    assert report["longest"] < report["max_new_tokens"]
    assert cli.main(["demo", "--json", "--model", str(MINIATURE)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["prompts"] == report["prompts"] and again["jacobi"]["texts"] == report["jacobi"]["texts"]
    assert cli.main(["demo", "--base", "--trained"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_a_checkpoint_decodes_with_its_own_settings(checkpoint, tmp_path, capsys):
    shutil.copytree(checkpoint, tmp_path / "tuned")
    write_settings(tmp_path / "tuned", jacobi={"block_size": 5, "pool_size": 1})
    command = ["demo", "--model", str(tmp_path / "tuned"), "--prompt", "w5", "--max-new-tokens", "8", "--json"]
    assert cli.main([*command, "--pool-size", "0"]) == 0
    config = json.loads(capsys.readouterr().out)["jacobi_config"]
    assert (config["block_size"], config["pool_size"]) == (5, 0)


def test_a_model_counts_as_trained_because_of_its_note_not_its_settings(checkpoint, tmp_path):
    assert is_trained(MINIATURE) and is_trained(str(MINIATURE))
    shutil.copytree(checkpoint, tmp_path / "tuned")
    write_settings(tmp_path / "tuned", "jacobi", jacobi={"block_size": 5})
    assert not is_trained(tmp_path / "tuned") and not is_trained(None)


def test_the_panels_show_the_newest_lines(monkeypatch):
    monkeypatch.setattr("rich.console.Console", partial(Console, file=io.StringIO(), width=80, height=24))
    screen = SideBySide()
    screen.content["ar"] = ("\n".join(f"line {number}" for number in range(60)), 60, 1.0)
    for whole, first in ((False, 39), (True, 0)):
        file = io.StringIO()
        Console(file=file, width=80, height=24).print(screen._draw(whole))
        seen = file.getvalue()
        assert f"line {first} " in seen and f"line {first - 1} " not in seen
        assert "line 59 " in seen and "60 tokens, 1.0 s" in seen
        assert whole or seen.count("\n") < 24


@pytest.mark.parametrize("gain", [1.2, 6.0])
@pytest.mark.parametrize("identical", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_the_comparison_fits_80_columns(monkeypatch, capsys, trained, identical, gain):
    monkeypatch.setenv("COLUMNS", "80")
    figures = {"new_tokens": 123456, "forwards": 123456, "seconds": 1234.56, "tokens_per_second": 12345.6}
    report = {
        "ar": figures | {"tokens_per_forward": 1.0},
        "jacobi": figures | {"tokens_per_forward": gain},
        "speedup": gain / 2,
        "trained": trained,
        "identical": identical,
        "longest": 128,
        "max_new_tokens": 128,
        "dtype": "bfloat16",
        "device": "NVIDIA H100 80GB HBM3",
        "threads": 128,
        "torch": "2.13.0+cu130",
    }
    print_report(report)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    table = [" ".join(line.split()) for line in lines]
    assert f"Jacobi 123456 123456 {gain:.2f} 1234.56 12345.6 {gain / 2:.2f}x" in table
    assert " ".join(remarks(report).split()) in " ".join(table)
    assert bool(remarks(report)) == (gain == 1.2 or not identical)


@pytest.mark.parametrize(
    ("speedup", "said"), [(0.9, "is slower here"), (0.996, "gains nothing here"), (1.1, "gains little here")]
)
def test_the_remark_on_an_untrained_model_follows_the_measurement(speedup, said):
    jacobi = {"new_tokens": 99, "tokens_per_forward": 1.2}
    assert said in remarks({"identical": True, "trained": False, "speedup": speedup, "jacobi": jacobi})
    fast = {"identical": True, "trained": False, "speedup": speedup, "jacobi": jacobi | {"tokens_per_forward": 2.0}}
    assert ("hf-jacobi tune" in remarks(fast)) == (speedup < 1)


def test_prompts_fit_80_columns(checkpoint, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    prompt = " ".join(["w5", "w6"] * 50)
    assert cli.main(["demo", "--model", checkpoint, "--prompt", prompt, "--max-new-tokens", "4"]) == 0
    asked = capsys.readouterr().out.partition("Prompt: ")[2].partition("\n\n")[0]
    assert " ".join(asked.split()) == prompt and max(map(len, asked.splitlines())) <= 80


def test_invalid_input_is_reported_in_a_sentence(checkpoint, capsys):
    assert cli.main(["demo", "--model", checkpoint + "-missing"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    assert cli.main(["demo", "--model", checkpoint, "--pool-size", "-1"]) == 2
    assert "pool_size" in capsys.readouterr().err
    assert cli.main(["demo", "--model", checkpoint, "--prompt", ""]) == 2
    assert "prompt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["demo", "--max-new-tokens", "0"])
