"""Collecting: every state equals a plain forward's, whatever the batch, the shards and the processes."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Image, IterableDataset, load_dataset
from models import VOCABULARY, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM, MambaConfig

import hf_jacobi
from hf_jacobi.decoding.errors import UsageError
from hf_jacobi.decoding.gumbel import GumbelNoise
from hf_jacobi.trajectories import TRAJECTORY_FEATURES, collect_trajectories, read_report
from hf_jacobi.trajectories.prompts import open_prompts


N = 8


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def texts(count: int, seed: int = 0) -> list[str]:
    """Prompts of different lengths for `tiny_tokenizer`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [3 + (5 * index) % 9 for index in range(count)]
    ids = [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in lengths]
    return [" ".join(f"w{token}" for token in row) for row in ids]


def collect(model, prompts, **settings):
    settings = {"block_size": N, "max_new_tokens": 30, "batch_size": 4, "progress": False} | settings
    return collect_trajectories(model, tiny_tokenizer(), prompts, **settings)


def check_against_oracle(model, row, choose=lambda logits, position: logits.argmax(-1)):
    """Each state is the result of one plain causal forward over prompt, text before the block, and previous state."""
    text = row["completion_ids"]
    assert len(row["trajectories"]) == -(-len(text) // row["block_size"])
    for number, states in enumerate(row["trajectories"]):
        start = number * row["block_size"]
        prefix = row["prompt_ids"] + text[:start]
        assert states[-1] == text[start : start + row["block_size"]]
        assert states.count(states[-1]) == 1, "the fixed point comes once"
        assert set(states[0]) <= set(row["prompt_ids"]) or len(states) == 1
        for state, following in itertools.pairwise(states):
            with torch.no_grad():
                logits = model(torch.tensor([prefix + state])).logits[0, len(prefix) - 1 : -1]
            predicted = [int(choose(logits[index], len(prefix) + index)) for index in range(len(state))]
            assert predicted == following


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma3", "llama4", "opt"])
def test_every_state_is_a_plain_forward_over_the_one_before(name):
    model = tiny_model(name)
    rows = collect(model, texts(6))
    assert len(rows) == 6
    assert [row["prompt_id"] for row in rows] == [str(number) for number in range(6)]
    for row in rows:
        check_against_oracle(model, row)


def test_the_text_is_that_of_generate():
    model = tiny_model()
    rows = collect(model, texts(5), repetition="keep")
    for row in rows:
        prompt = torch.tensor([row["prompt_ids"]])
        text = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False)
        assert row["completion_ids"] == text[0, prompt.shape[1] :].tolist()
        assert row["ended"] == (row["completion_ids"][-1] == 2)


def test_states_are_those_of_the_decode_loop(permuted_copy):
    """Another way to get them: decode in blocks and record every draft."""
    from hf_jacobi.decoding.call import DecodeCall
    from hf_jacobi.decoding.loop import run_to_end
    from hf_jacobi.trajectories.refine import Block, refine_blocks

    prompts = torch.randint(0, 64, (3, 20), generator=torch.Generator().manual_seed(3))
    config = hf_jacobi.JacobiConfig(block_size=N, window="block", draft_init="prompt", pool_size=0)
    output = permuted_copy.generate(
        prompts, decoding="jacobi", jacobi_config=config, max_new_tokens=37, do_sample=False,
        return_dict_in_generate=True, output_trajectory=True,
    )  # fmt: skip
    expected = [trajectory.blocks(N) for trajectory in output.trajectory]

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        one = hf_jacobi.JacobiConfig(block_size=1, pool_size=0)
        call = DecodeCall(model, input_ids, logits_processor, stopping_criteria, generation_config, one, model_kwargs)
        run_to_end(call)
        blocks = [
            [Block(row, 20 + N * number, states[-1], [states[0]]) for number, states in enumerate(trajectory)]
            for row, trajectory in enumerate(expected)
        ]
        refine_blocks(call.step, list(itertools.chain(*blocks)), positions_per_forward=64)
        return [[block.states for block in row] for row in blocks]

    assert permuted_copy.generate(prompts, custom_generate=decode, max_new_tokens=37, do_sample=False) == expected
    assert any(len(states) == 1 + 1 for trajectory in expected for states in trajectory), "whole blocks at once"


@pytest.mark.parametrize(
    "settings", [{"batch_size": 1}, {"batch_size": 16}, {"positions_per_forward": 1}, {"shard_size": 2}]
)
def test_the_data_set_does_not_depend_on_how_it_is_made(settings):
    model = tiny_model()
    expected = collect(model, texts(7))[:]
    assert collect(model, texts(7), **settings)[:] == expected


def test_sampled_states_follow_the_noise_of_their_positions():
    model = tiny_model()
    settings = {"do_sample": True, "temperature": 1.3, "top_k": 20, "seed": 5}
    rows = collect(model, texts(5), **settings)
    assert rows[:] == collect(model, texts(5), batch_size=2, **settings)[:]
    assert rows["completion_ids"] != collect(model, texts(5), **settings | {"seed": 6})["completion_ids"]
    assert rows["completion_ids"] != collect(model, texts(5))["completion_ids"]
    for number, row in enumerate(rows):
        noise = GumbelNoise(5, [str(number)])

        def choose(logits, position, noise=noise):
            scores = logits / 1.3
            scores = scores.masked_fill(scores < scores.topk(20).values[-1], -float("inf"))
            keys = torch.from_numpy(noise.keys([0], np.array([[position]])))
            return noise.add_to(scores[None, None].clone(), keys).argmax()

        check_against_oracle(model, row, choose)


def test_the_first_guess_is_kept_and_drawn_by_the_seed():
    model = tiny_model()
    first = [[states[0] for states in row["trajectories"]] for row in collect(model, texts(3))]
    other = [[states[0] for states in row["trajectories"]] for row in collect(model, texts(3), seed=1)]
    assert first != other
    assert all(len(set(map(tuple, row))) > 1 for row in first), "blocks draw by themselves"


def test_first_guesses_may_come_out_of_the_vocabulary(tmp_path):
    model, settings = tiny_model(), {"seed": 3, "draft_init": "vocabulary"}
    once, again = (collect(model, texts(4), **settings, output_dir=folder) for folder in (None, tmp_path / "out"))
    assert once[:] == again[:]
    plain = collect(model, texts(4), seed=3)
    assert plain["completion_ids"] == once["completion_ids"], "the text is the model's own"
    drawn = {token for row in once for states in row["trajectories"] for token in states[0]}
    prompts = {token for row in once for token in row["prompt_ids"]}
    assert len(drawn - prompts) > 20
    with pytest.raises(ValueError, match="draft_init"):
        collect(model, texts(4), seed=3, output_dir=tmp_path / "out")


def test_model_and_its_generation_config_come_back_as_they_were():
    model = tiny_model().train()
    model.generation_config.repetition_penalty = 1.3
    with pytest.warns(UserWarning, match="repetition_penalty=1.3"):
        rows = collect(model, texts(2))
    assert model.training and model.generation_config.repetition_penalty == 1.3
    model.eval()
    for row in rows:
        check_against_oracle(model, row)


# Prompts


def test_prompts_of_every_shape_give_the_same_data(tmp_path):
    model = tiny_model()
    prompts = texts(4)
    rows = [{"prompt": text} for text in prompts]
    expected = collect(model, prompts)[:]
    Dataset.from_list(rows).to_parquet(tmp_path / "p.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "p.json").write_text(json.dumps(rows))
    (tmp_path / "p.txt").write_text("\n".join(prompts))
    for source in (Dataset.from_list(rows), IterableDataset.from_generator(lambda: iter(rows)), rows):
        assert collect(model, source)[:] == expected
    for name in ("p.parquet", "p.jsonl", "p.json", "p.txt", "saved"):
        assert collect(model, tmp_path / name)[:] == expected, name


def test_messages_go_through_the_chat_template_without_their_answer():
    model = tiny_model()
    chat = [{"role": "user", "content": "w7 w8"}]
    answered = [*chat, {"role": "assistant", "content": "w9"}]
    shared = [{"from": "human", "value": "w7 w8"}, {"from": "gpt", "value": "w9"}]
    rows = [{"messages": chat}, {"messages": answered}, {"prompt": chat}, {"conversations": shared}]
    for row in rows:
        assert collect(model, [row])["prompt_ids"] == [[1, 7, 8, 5]]
    assert collect(model, ["w7 w8"])["prompt_ids"] == [[7, 8]]
    assert collect(model, ["w7 w8"], as_chat=True)["prompt_ids"] == [[1, 7, 8, 5]]
    named = collect(model, [{"task_id": "HumanEval/0", "text": "w4", "question": "w3 w3"}], prompt_column="text")
    assert named["prompt_ids"] == [[4]] and named["prompt_id"] == ["HumanEval/0"]


def test_prompts_that_are_missing_are_counted(tmp_path):
    rows = collect(tiny_model(), ["w3 w4", None, " "], output_dir=tmp_path / "out")
    assert rows["prompt_id"] == ["0"] and read_report(tmp_path / "out").empty_prompts == 2
    mixed = tmp_path / "mixed.jsonl"
    lines = [{"messages": [{"role": "user", "content": "w3"}]}, {"prompt": "w4"}]
    mixed.write_text("\n".join(map(json.dumps, lines)))
    assert collect(tiny_model(), mixed)["prompt_ids"] == [[1, 3, 5], [4]]


def test_content_may_come_in_parts():
    parts = [{"type": "text", "text": "w3 "}, {"type": "text", "text": "w4"}]
    assert collect(tiny_model(), [{"messages": [{"role": "user", "content": parts}]}])["prompt_ids"] == [[1, 3, 4, 5]]
    with pytest.raises(ValueError, match="prompt 0: a message must be text or parts with a text"):
        collect(tiny_model(), [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}])


def test_columns_that_are_no_prompts_are_not_read(tmp_path):
    rows = Dataset.from_dict({"prompt": ["w3"], "picture": [{"bytes": b"no picture", "path": None}]})
    assert len(collect(tiny_model(), rows.cast_column("picture", Image()))) == 1


@pytest.mark.parametrize("settings", [{"max_new_tokens": 256}, {"max_new_tokens": 300}])
def test_no_room_for_any_prompt_is_refused(settings):
    with pytest.raises(ValueError, match="leaves no room for a prompt"):
        collect(tiny_model(), texts(1), **settings)


def test_prompts_without_room_are_dropped_and_counted(tmp_path):
    model = tiny_model()  # 256 positions
    rows = collect(model, ["w3 " * 226, "w3 " * 227, "", "w3 w4 w5 w6"], output_dir=tmp_path / "out")
    assert rows["prompt_id"] == ["0", "3"]
    assert collect(model, ["w3 " * 9, "w3 " * 10], max_prompt_length=9)["prompt_id"] == ["0"]
    report = read_report(tmp_path / "out")
    assert (report.prompts, report.sequences, report.long_prompts, report.empty_prompts) == (4, 2, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [{"a": "w3"}]}, "none of the columns"),
        ({"prompts": [{"prompt": 3}]}, "text or a list of messages"),
        ({"prompts": {"train": []}}, "several splits"),
        ({"prompts": "prompts.docx"}, "docx"),
        ({"prompt_column": "b"}, "no column 'b'"),
        ({"block_size": 1}, "`block_size` must be at least 2"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"repetition": "mend"}, "`repetition` must be one of"),
        ({"temperature": 0.5}, "do_sample=True"),
    ],
)
def test_bad_input_is_refused(arguments, message, tmp_path):
    arguments = {"prompts": texts(1)} | arguments
    if arguments["prompts"] == "prompts.docx":
        arguments["prompts"] = tmp_path / "prompts.docx"
        arguments["prompts"].write_text("w3")
    with pytest.raises(ValueError, match=message):
        collect(tiny_model(), **arguments)


def test_a_missing_file_and_a_missing_template_are_named():
    with pytest.raises(OSError, match="no file or folder"):
        collect(tiny_model(), "nowhere.jsonl")
    with pytest.raises(ValueError, match="no chat template"):
        collect_trajectories(tiny_model(), tiny_tokenizer(template=False), ["w3"], 4, 8, as_chat=True)


def test_a_model_that_cannot_be_decoded_so_is_refused():
    config = MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2)
    with pytest.raises(ValueError, match="recurrent state"):
        collect(AutoModelForCausalLM.from_config(config), texts(1))


# On disk


def test_a_folder_is_what_datasets_loads_and_reports(tmp_path):
    model = tiny_model()
    rows = collect(model, texts(7), output_dir=tmp_path / "out", shard_size=3)
    assert rows[:] == collect(model, texts(7))[:]
    assert load_dataset(str(tmp_path / "out"), split="train")[:] == rows[:]
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == [
        f"trajectories-0000{number}.parquet" for number in range(3)
    ]
    report = read_report(tmp_path / "out")
    assert report.prompts == report.sequences == 7
    assert report.tokens == sum(map(len, rows["completion_ids"]))
    assert report.blocks == sum(map(len, rows["trajectories"]))
    assert report.states == sum(len(states) for row in rows["trajectories"] for states in row)
    assert report.blocks_per_second > 0 and "blocks per second" in report.table()


def test_finished_work_is_not_done_again_and_other_work_is_refused(tmp_path, monkeypatch):
    model, folder = tiny_model(), tmp_path / "out"
    rows = collect(model, texts(4), output_dir=folder, shard_size=2)[:]
    stamp = [path.stat().st_mtime_ns for path in sorted(folder.glob("*.parquet"))]
    assert collect(model, texts(4), output_dir=folder, shard_size=2, batch_size=1)[:] == rows
    assert [path.stat().st_mtime_ns for path in sorted(folder.glob("*.parquet"))] == stamp
    more = collect(model, texts(6), output_dir=folder, shard_size=2)
    assert len(more) == 6 and more[:4] == rows
    with pytest.raises(ValueError, match=r"begun with other settings \(max_new_tokens 30, now 20"):
        collect(model, texts(4), output_dir=folder, shard_size=2, max_new_tokens=20)
    with pytest.raises(ValueError, match="weights"):
        collect(tiny_model(seed=1), texts(4), output_dir=folder, shard_size=2)
    with pytest.raises(ValueError, match="made from other data"):
        collect(model, texts(4, seed=9), output_dir=folder, shard_size=2)


def test_a_data_set_may_grow_but_not_shrink(tmp_path):
    model, folder = tiny_model(), tmp_path / "out"
    collect(model, texts(3), output_dir=folder, shard_size=2)
    assert collect(model, texts(7), output_dir=folder, shard_size=2)[:] == collect(model, texts(7))[:]
    with pytest.raises(ValueError, match="begun with more data than is given now"):
        collect(model, texts(4), output_dir=folder, shard_size=2)


def test_settings_that_made_nothing_bind_nobody(tmp_path):
    with pytest.raises(ValueError, match="no column"):
        collect(tiny_model(), texts(1), output_dir=tmp_path / "out", prompt_column="b")
    assert len(collect(tiny_model(), texts(1), output_dir=tmp_path / "out")) == 1


def test_what_decides_the_text_is_part_of_the_settings(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))
    collect(model, texts(1), output_dir=tmp_path / "adapter")
    with model.disable_adapter(), pytest.raises(ValueError, match=r"'adapters': \['default'\].*now.*'adapters': \[\]"):
        collect(model, texts(1), output_dir=tmp_path / "adapter")
    base = tiny_model()
    collect(base, texts(1), output_dir=tmp_path / "out")
    base.generation_config.eos_token_id = 7
    with pytest.raises(ValueError, match="generation_config"):
        collect(base, texts(1), output_dir=tmp_path / "out")


def test_virtual_tokens_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ValueError, match="virtual tokens"):
        collect(peft.get_peft_model(tiny_model(), config), texts(1))


def test_one_run_at_a_time_and_broken_files_by_name(tmp_path):
    from hf_jacobi.trajectories.shards import ShardFolder

    folder = tmp_path / "out"
    collect(tiny_model(), texts(4), output_dir=folder, shard_size=2)
    running = ShardFolder(
        folder, "trajectories", TRAJECTORY_FEATURES, json.loads((folder / ".hf_jacobi.json").read_text())
    )
    with running.locked(), pytest.raises(ValueError, match="another run is at work"):
        collect(tiny_model(), texts(4), output_dir=folder, shard_size=2)
    path = folder / "trajectories-00001.parquet"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"trajectories-00001\.parquet is broken"):
        collect(tiny_model(), texts(4), output_dir=folder, shard_size=2)
    path.unlink()
    assert len(collect(tiny_model(), texts(4), output_dir=folder, shard_size=2)) == 4


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    Dataset.from_list([{"a": 1}]).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="other work"):
        collect(tiny_model(), texts(1), output_dir=tmp_path)


def test_completions_that_are_all_dropped_are_an_error_too():
    with pytest.raises(UsageError, match=r"no completion was kept \(2 prompts, 2 cut at max_new_tokens\)"):
        collect(tiny_model(), texts(2), overlong="drop", max_new_tokens=1)


def ending_at_once(firsts: list[int]):
    """A model whose text is empty if it begins with one of these tokens."""
    model = tiny_model()
    model.generation_config.eos_token_id = [2, *firsts]
    return model


@pytest.mark.parametrize("as_chat", [True, False])
@pytest.mark.parametrize("template", [True, False])
def test_no_completions_are_an_error_that_names_the_way_out_and_leave_no_file(tmp_path, template, as_chat):
    if as_chat and not template:
        return
    prompts = ["w3", "w4", " "]
    model, tokenizer = ending_at_once(list(range(3, VOCABULARY))), tiny_tokenizer(template=template)
    settings = {"block_size": 4, "max_new_tokens": 8, "output_dir": tmp_path / "out", "progress": False}
    for _ in range(2):
        with pytest.raises(UsageError, match=r"kept \(3 prompts, 1 without text, 2 only an end token\)") as caught:
            collect_trajectories(model, tokenizer, prompts, as_chat=as_chat, **settings)
        assert ("(--as-chat)" in str(caught.value)) == (template and not as_chat)
    with pytest.raises(UsageError, match="out holds no completions"):
        open_prompts(tmp_path / "out")
    assert len(collect_trajectories(tiny_model(), tokenizer, prompts, **settings)) == 2, "the folder can be used"


def test_messages_and_tokens_are_not_advised_to_be_chat():
    model = ending_at_once(list(range(3, VOCABULARY)))
    for row in ({"messages": [{"role": "user", "content": "w3"}]}, {"messages": '[{"content": "w3"}]'}, [3, 4]):
        with pytest.raises(UsageError, match=r"only an end token\)\.$"):
            collect(model, [row])


def test_completions_of_which_most_are_empty_are_warned_of(recwarn):
    firsts = [text[0] for text in collect(tiny_model(), texts(4))["completion_ids"]]
    assert len(set(firsts)) == 4 and not recwarn
    collect(ending_at_once(firsts[:2]), texts(4), repetition="keep")
    assert not recwarn, "half"
    with pytest.warns(UserWarning, match=r"3 of 4 completions hold only an end token; the prompts are plain text"):
        assert len(collect(ending_at_once(firsts[:3]), texts(4))) == 1
    with pytest.warns(UserWarning, match="3 of 4 completions hold only an end token"):
        assert len(collect(ending_at_once(firsts[:3]), texts(4), empty="keep")) == 4


SCRIPT = """
import sys, time
sys.path[:0] = {path!r}
import torch; torch.set_num_threads(1)
from models import tiny_model, tiny_tokenizer
import hf_jacobi.trajectories.collector as collector
from hf_jacobi.trajectories import collect_trajectories
slow = collector.Collector._complete
done = []
def complete(self, batch, counts):
    time.sleep({pause})
    done.extend(prompt.number for prompt in batch)
    return slow(self, batch, counts)
collector.Collector._complete = complete
prompts = open({prompts!r}).read().splitlines()
rows = collect_trajectories(tiny_model(), tiny_tokenizer(), prompts, 8, 30, 2, {out!r}, shard_size=2, progress=False)
print(f"rows {{len(rows)}} made {{sorted(done)}}", flush=True)
from hf_jacobi.trajectories.collect import process_state
process_state().destroy_process_group()
"""


def script(tmp_path: Path, out: str, pause: float = 0.0) -> list[str]:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(texts(12)))
    path = [str(Path(__file__).parents[1]), str(Path(hf_jacobi.__file__).parents[1])]
    file = tmp_path / f"{out}.py"
    file.write_text(SCRIPT.format(path=path, prompts=str(prompts), out=str(tmp_path / out), pause=pause))
    return [str(file)]


def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | {"HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}


def test_killed_in_the_middle_it_goes_on_where_it_stopped(tmp_path):
    command = [sys.executable, *script(tmp_path, "out", pause=0.5)]
    process = subprocess.Popen(command, env=environment(tmp_path))
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # inside the next shard
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert 2 <= len(before) < 6
    (tmp_path / "out" / ".trajectories-00004.parquet.1.tmp").write_bytes(b"half a file")

    expected = collect(tiny_model(), texts(12))[:]
    rows = collect(tiny_model(), texts(12), output_dir=tmp_path / "out", shard_size=2)
    assert rows[:] == expected
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.parquet")}
    assert len(after) == 6 and before.items() <= after.items()
    assert not list((tmp_path / "out").glob(".*.tmp"))


@pytest.mark.multiprocess
def test_two_processes_share_the_work(tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    run = subprocess.run(
        [*launch, *script(tmp_path, "shared")], env=environment(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    shares = ["rows 12 made [0, 1, 4, 5, 8, 9]", "rows 12 made [2, 3, 6, 7, 10, 11]"]
    assert sorted(line for line in run.stdout.splitlines() if "rows" in line) == shares
    assert load_dataset(str(tmp_path / "shared"), split="train")[:] == collect(tiny_model(), texts(12))[:]


def test_padding_of_the_batch_is_not_part_of_the_prompt():
    rows = collect(tiny_model(), texts(6))
    assert [row.split() for row in texts(6)] == [[f"w{token}" for token in row] for row in rows["prompt_ids"]]
