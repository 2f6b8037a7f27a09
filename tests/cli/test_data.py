"""`hf-jacobi collect` and `hf-jacobi pack`, from prompts to training rows."""

import json
import re

import pytest
from datasets import load_dataset
from models import tiny_model, tiny_tokenizer

from hf_jacobi.cli import main


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_from_prompts_to_training_rows(checkpoint, tmp_path, capsys):
    prompts = tmp_path / "prompts.jsonl"
    rows = [{"id": f"p{i}", "messages": [{"role": "user", "content": f"w{i + 3} w9"}]} for i in range(5)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    collect = ["collect", "--model", str(checkpoint), "--dataset", str(prompts), "--output-dir", str(tmp_path / "t")]
    assert main([*collect, "--block-size", "8", "--max-new-tokens", "24", "--max-prompts", "4"]) == 0
    shown = capsys.readouterr().out
    cut = int(re.search(r"\n  cut at max_new_tokens +(\d)\n", shown)[1])
    note = f"\n{cut} of 4 completions were cut at 24 tokens; --max-new-tokens changes that.\n"
    assert "completions kept  " in shown and (note in shown) == (cut > 2)
    assert main([*collect[:-1], str(tmp_path / "short"), "--max-new-tokens", "2"]) == 0
    assert "\n5 of 5 completions were cut at 2 tokens; " in capsys.readouterr().out
    trajectories = load_dataset(str(tmp_path / "t"), split="train")
    assert trajectories["prompt_id"] == ["p0", "p1", "p2", "p3"]

    pack = ["pack", "--trajectories", str(tmp_path / "t"), "--output-dir", str(tmp_path / "p"), "--window-size", "2"]
    plot = []
    if _has_matplotlib():
        plot = ["--plot", str(tmp_path / "noise.png")]
    assert main([*pack, *plot]) == 0
    shown = capsys.readouterr().out
    assert "noisy blocks" in shown and "smaller --window-size" not in shown
    wide = [*pack[:4], str(tmp_path / "wide"), "--window-size", "16"]
    assert main(wide) == 0
    assert capsys.readouterr().out.startswith("No text has more than 3 blocks")
    cut = [*pack[:4], str(tmp_path / "cut"), "--window-size", "2", "--max-length", "24"]
    assert main(cut) == 0
    assert "\nNo text has more than 1 block," in capsys.readouterr().out
    packed = load_dataset(str(tmp_path / "p"), split="train")
    assert len(packed) == 4
    assert bool(plot) == (tmp_path / "noise.png").exists()


def test_missing_data_is_reported_in_a_sentence(checkpoint, tmp_path, capsys):
    collect = ["collect", "--model", str(checkpoint), "--output-dir", str(tmp_path / "t"), "--dataset"]
    assert main([*collect, "no.jsonl"]) == 2
    assert "there is no file or folder no.jsonl" in capsys.readouterr().err
    assert main(["pack", "--trajectories", str(tmp_path / "no"), "--output-dir", str(tmp_path / "p")]) == 2


def _has_matplotlib() -> bool:
    try:
        import matplotlib

        matplotlib.use("Agg")
        return True
    except ImportError:
        return False


def test_training_from_the_command_line(checkpoint, tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl")
    from datasets import Dataset
    from packed_rows import packed

    from hf_jacobi.training import JacobiForcingTrainer
    from hf_jacobi.trajectories.packing import PACKED_FEATURES

    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    Dataset.from_list(packed(6), features=PACKED_FEATURES).to_parquet(tmp_path / "packed.parquet")
    config = tmp_path / "config.yaml"
    config.write_text("learning_rate: 0.001\nar_loss_weight: 3.0\n")
    command = [
        "train", "--model_name_or_path", str(checkpoint), "--train_dataset", str(tmp_path / "packed.parquet"),
        "--eval_rows", "2", "--output_dir", str(tmp_path / "out"), "--max_steps", "2", "--use_cpu", "--report_to",
        "none", "--config", str(config), "--eval_max_new_tokens", "8", "--jacobi_config", '{"block_size": 6}',
        "--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj", "--adapter_scope", "draft",
    ]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert re.search(r"\ntraining loss \d+\.\d+\n", shown)
    assert re.search(r"\nevaluation: loss \S+, tokens per forward \d\.\d\d, agreement .* 100\.0%\n", shown)
    assert f"`hf-jacobi bench {tmp_path / 'out'}`" in shown.splitlines()[-1]
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert written["decoding"] == "jacobi" and written["jacobi"]["block_size"] == 6
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["alora_invocation_tokens"] == [-1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| ar_loss_weight | 3.0 |" in card and "tokens per forward" in card
    asked = []
    train = JacobiForcingTrainer.train
    monkeypatch.setattr(
        JacobiForcingTrainer,
        "train",
        lambda self, resume_from_checkpoint: (
            asked.append(resume_from_checkpoint) or train(self, resume_from_checkpoint)
        ),
    )
    assert main([*command, "--max_steps", "3", "--resume_from_checkpoint", "true"]) == 0
    assert asked == [True] and (tmp_path / "out" / "checkpoint-3").exists()
    with pytest.raises(SystemExit, match="2"):
        main(["train", "--train_dataset", "no.parquet", "--output_dir", str(tmp_path / "o"), "--use_cpu"])
    assert "--model_name_or_path" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["collect", "--nonsense", "--dataset", "x", "--output-dir", "y"])


def test_completions_are_packed_with_noise_from_a_tokenizer(tmp_path, capsys):
    def run(*options):
        places = ["--trajectories", str(tmp_path / "c.jsonl"), "--output-dir", str(tmp_path / "p")]
        code = main(["pack", *places, *options])
        return code, capsys.readouterr()

    rows = [{"prompt_ids": [5, 6], "completion_ids": list(range(10, 40))} for _ in range(3)]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    tokenizer = ["--tokenizer", str(tmp_path / "tokenizer"), "--block-size", "8", "--noisy-copies", "2"]
    for options, said in (
        (["--noise", "uniform"], "name their --tokenizer"),
        (["--noise", "uniform", *tokenizer, "--window-size", "4"], "--window-size cannot be used with --noise"),
        (["--block-size", "8"], "--block-size can only be used with --noise"),
        (["--noise", "uniform", "--tokenizer", str(tmp_path / "no")], "no"),
    ):
        code, printed = run(*options)
        assert code == 2 and said in printed.err
    code, printed = run("--noise", "uniform", *tokenizer)
    assert code == 0 and re.search(r"noisy tokens +180\n", printed.out)
