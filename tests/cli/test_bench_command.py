"""`hf-jacobi bench` with a tiny checkpoint, and the options that commands share."""

import argparse
import json
from pathlib import Path

import pytest
from models import tiny_model, tiny_tokenizer

import hf_jacobi
from hf_jacobi import cli
from hf_jacobi.cli.options import Prompts, add_prompts, check_places, write
from hf_jacobi.decoding.errors import MissingFile


@pytest.fixture
def checkpoint(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_bench_writes_figures_a_table_and_a_picture(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"w5 w{n} w7"}) + "\n" for n in range(6, 9)))
    command = ["bench", checkpoint, "--prompts", str(tmp_path / "prompts.jsonl"), "--max-new-tokens", "8"]
    command += ["--batch-sizes", "1", "3", "--config", '{"block_size": 4}', "--attention", "eager"]
    command += ["--output", str(tmp_path / "bench.json"), "--plot", str(tmp_path / "bench.png")]
    assert cli.main(command) == 0
    report = json.loads((tmp_path / "bench.json").read_text())
    assert [row["batch_size"] for row in report["results"]] == [1, 1, 1, 3, 3]
    assert report["setup"]["attention"] == "eager"
    assert (tmp_path / "bench.png").stat().st_size > 1000
    out = capsys.readouterr().out
    assert "batches of 3" in out and "\nJacobi, block_size=4 " in out
    assert max(map(len, out.partition("one at a time")[2].splitlines())) <= 80


def test_bad_settings_are_refused_before_the_model_is_loaded(capsys):
    for text, message in (("{", "Expecting"), ('{"block": 3}', "unknown settings"), ("3", "JacobiConfig or a dict")):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", "nowhere", "--config", text])
        assert message in capsys.readouterr().err


def test_errors_at_the_end_are_found_at_the_start(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n \n")
    assert cli.main(["bench", checkpoint, "--prompts", str(tmp_path / "prompts.txt")]) == 2
    assert "holds no prompt" in capsys.readouterr().err
    assert cli.main(["bench", checkpoint, "--plot", str(tmp_path / "bench.xyz")]) == 2
    assert "bench.xyz does not name a format" in capsys.readouterr().err


def test_blank_lines_are_skipped_and_text_can_be_a_users_message(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("w5 w6\n\nw7\n")
    parser = argparse.ArgumentParser()
    add_prompts(parser, count=4)
    read = ["--prompts", str(tmp_path / "prompts.txt")]
    tokenizer = tiny_tokenizer()
    assert Prompts(parser.parse_args(read)).encode(tokenizer) == [
        tokenizer(text)["input_ids"] for text in ("w5 w6", "w7")
    ]
    assert "plain text, without the model's chat template; --as-chat applies it." in capsys.readouterr().err
    chat = Prompts(parser.parse_args([*read, "--as-chat"])).encode(tokenizer)
    assert not capsys.readouterr().err
    message = [{"role": "user", "content": "w7"}]
    assert chat[1] == list(tokenizer.apply_chat_template(message, add_generation_prompt=True)["input_ids"])


def test_publish_accepts_the_evaluation(checkpoint, tmp_path):
    """It holds the figures of the checkpoint's own settings, and these settings."""
    from hf_jacobi.decoding.config import write_settings
    from hf_jacobi.hub.card import checked, render_card

    settings = write_settings(Path(checkpoint), "jacobi", {"block_size": 5})
    file = Path(checkpoint) / "evaluation.json"
    command = ["bench", checkpoint, "--count", "4", "--batch-sizes", "1", "2", "--max-new-tokens", "8"]
    assert cli.main([*command, "--evaluation", str(file), "--output", str(tmp_path / "bench.json")]) == 0
    evaluation, report = (json.loads(one.read_text()) for one in (file, tmp_path / "bench.json"))
    assert evaluation["settings"] == settings and evaluation["model"] == "model"
    assert checked(evaluation) == evaluation
    rows = {(row["dataset"], row["decoding"]): row["metrics"] for row in evaluation["results"]}
    one, two = "short questions", "short questions, batches of 2"
    assert set(rows) == {(one, "AR"), (one, "prompt lookup"), (one, "Jacobi"), (two, "AR"), (two, "Jacobi")}
    own = next(row for row in report["results"] if row["decoding"] == "Jacobi, the checkpoint's")
    assert rows[one, "Jacobi"]["tokens_per_second"] == own["tokens_per_second"]
    assert "4 prompts, at most 8 new tokens" in evaluation["measured_on"] and "float32" in evaluation["measured_on"]
    target = tmp_path / "pushed"
    hf_jacobi.publish(checkpoint, "someone/model", output_dir=target, dry_run=True)
    note = {"kind": "model", "base_model": None, "settings": {}, "figures": {}, "dataset": None} | settings
    table = render_card("someone/model", note, evaluation).partition("## Measured")[2].partition("##")[0]
    assert table.strip() and table in (target / "README.md").read_text()
    assert cli.main([*command, "--evaluation", str(file), "--config", "{}"]) == 2, (
        "--config would measure other settings"
    )


def test_without_own_settings_the_evaluation_uses_those_that_push_writes(checkpoint, tmp_path):
    command = ["bench", checkpoint, "--count", "1", "--max-new-tokens", "8", f"--evaluation={tmp_path / 'e.json'}"]
    assert cli.main(command) == 0
    evaluation = json.loads((tmp_path / "e.json").read_text())
    assert evaluation["settings"] == {"decoding": "jacobi", "jacobi": hf_jacobi.JacobiConfig().to_dict()}


def test_reports_contain_names_but_no_paths(checkpoint, tmp_path, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("w5 w6\n")
    command = ["bench", checkpoint, "--prompts", str(tmp_path / "prompts.txt"), "--max-new-tokens", "4"]
    files = [tmp_path / name for name in ("bench.json", "evaluation.json")]
    assert cli.main([*command, "--output", str(files[0]), "--evaluation", str(files[1])]) == 0
    assert cli.main(["demo", "--model", checkpoint, "--prompt", "w5 w6", "--max-new-tokens", "4", "--json"]) == 0
    written = [*(file.read_text() for file in files), capsys.readouterr().out.rpartition("\n{")[2]]
    assert not [text for text in written if str(tmp_path) in text]
    assert '"model": "model"' in written[0]


def test_unreadable_and_unwritable_files_are_reported_before_the_model_is_loaded(
    checkpoint, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    (tmp_path / "file").write_text("")
    (tmp_path / "two.txt").write_text("w5\nw6\n")
    (tmp_path / "rows.jsonl").write_text('{"query": "w5"}\n')
    for options, said in (
        (["--output", str(tmp_path)], "is a folder"),
        (["--evaluation", str(tmp_path)], "is a folder"),
        (["--output", str(tmp_path / "x"), "--evaluation", f"{tmp_path}/./x"], "is named for two files"),
        (["--plot", str(tmp_path / "file" / "x.png")], "cannot be written"),
        (["--output", str(tmp_path / "file" / "deep" / "x.json")], "cannot be written"),
        (["--prompts", "none.jsonl"], "there is no file or folder none.jsonl"),
        (["--prompts", ""], "is empty"),
        (["--prompts", str(tmp_path / "two.txt"), "--batch-sizes", "3"], "there are 2 prompts"),
        (["--prompts", str(tmp_path / "rows.jsonl")], "looks like a prompt"),
        (["--prompts", str(tmp_path / "rows.jsonl"), "--prompt-column", "question"], "no column 'question'"),
    ):
        assert cli.main(["bench", checkpoint, *options]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write to")
def test_output_files_are_tried_by_writing():
    with pytest.raises(MissingFile, match="cannot be written"):
        check_places(Path("/proc/x.json"))


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "bench.json"
    for before in (None, "old"):
        if before:
            file.write_text(before)

        def full(*arguments):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            with pytest.raises(OSError, match="No space"):
                write(file, "new")
        assert [one.name for one in tmp_path.iterdir()] == ["bench.json"] * bool(before)
        assert not before or file.read_text() == before


def test_an_output_file_can_be_a_link_a_pipe_or_a_device(tmp_path, capfd):
    (tmp_path / "there").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "there").read_text() == "new"
    for device in (Path("/dev/null"), Path("/dev/stdout")):
        check_places(device)
        write(device, "{}")
    assert Path("/dev/null").is_char_device() and capfd.readouterr().out == "{}"


def test_a_tilde_is_expanded_also_after_an_equals_sign(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = ["bench", "~/model", "--count", "1", "--max-new-tokens", "4", "--output=~/x.json", "--plot=~/x.PNG"]
    assert cli.main(command) == 0
    assert (tmp_path / "x.json").exists() and (tmp_path / "x.PNG").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "~").exists()


def test_a_note_says_that_there_are_fewer_prompts_than_requested(tmp_path, capsys):
    (tmp_path / "prompts.jsonl").write_text('{"query": "w5 w6"}\n{"query": "w7"}\n')
    parser = argparse.ArgumentParser()
    add_prompts(parser, count=4)
    file = ["--prompts", str(tmp_path / "prompts.jsonl"), "--prompt-column", "query"]
    for typed, found, said in (
        (["--count", "100"], 40, "there are 40 prompts, not 100"),
        ([*file, "--count", "3"], 2, "prompts.jsonl: there are 2 prompts, not 3"),
        ([*file, "--count", "2"], 2, ""),
        (file, 2, ""),
        ([], 4, ""),
    ):
        assert len(Prompts(parser.parse_args(typed)).encode(tiny_tokenizer())) == found
        assert said in capsys.readouterr().err or not said


@pytest.mark.parametrize("command", ["bench", "tune", "demo", "collect"])
def test_options_are_accepted_with_hyphens_and_with_underscores(command, capsys):
    needed = {"collect": ["--dataset", "d", "--output_dir", "o"]}.get(command, [])
    for option in ("--max-new-tokens", "--max_new_tokens", "--max_new", "--max-new"):
        for typed in ([option, "0"], [f"{option}=0"]):
            with pytest.raises(SystemExit, match="2"):
                cli.main([command, *needed, *typed])
            assert "argument --max-new-tokens: must be at least 1, got 0" in capsys.readouterr().err


def test_options_of_eval_are_accepted_with_hyphens(capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["eval", "model", "--tasks", "gsm8k", "--batch-size", "0"])
    assert "argument --batch_size: must be at least 1" in capsys.readouterr().err
