"""The prompts for SmolLM2, and the card of its adapter."""

import json
import re
import sys
from argparse import Namespace
from collections import Counter

import pytest
import torch
from card_table import metadata_of, table_of
from models import tiny_tokenizer, trained_model
from peft import LoraConfig, PeftModel, get_peft_model

import hf_jacobi
from benchmarks.smollm2 import guesses, texts
from benchmarks.smollm2.evaluate import OUT_OF_DOMAIN, OWN, SAME, TRAINED, measure
from benchmarks.smollm2.prompts import HELD_OUT, KINDS, TOPICS, TRAIN, is_held_out, prompts
from benchmarks.smollm2.ship import CARD, card, narrowed
from benchmarks.smollm2.train import widened
from benchmarks.smollm2.whole import WAYS, is_solved, problems, quality
from hf_jacobi.cli.models import DEMO_ADAPTER, encode
from hf_jacobi.evaluation.prompts import CHAT
from hf_jacobi.hub.card import EVALUATION


def test_what_is_held_out_is_asked_for_nowhere_in_training():
    train, held_out = prompts(held_out=False), prompts(held_out=True)
    for rows, most in ((train, TRAIN), (held_out, HELD_OUT)):
        counts = Counter(row["kind"] for row in rows)
        assert counts.keys() == KINDS.keys() and max(counts.values()) == most and min(counts.values()) >= 10
    texts = [{row["messages"][0]["content"] for row in rows} for rows in (train, held_out)]
    assert len(texts[0]) == len(train) and len(texts[1]) == len(held_out) and not texts[0] & texts[1]
    assert not set(CHAT) & (texts[0] | texts[1])
    held_out_topics = [topic for topic in TOPICS if is_held_out(topic)]
    assert held_out_topics
    asked = [row["messages"][0]["content"] for row in train if row["kind"] == "instructions"]
    endings = [f" {topic}{end}" for topic in held_out_topics for end in ("?", ".", " in simple", " important")]
    assert not [prompt for prompt in asked for ending in endings if ending in prompt]


@pytest.mark.parametrize("read", [table_of, metadata_of])
def test_the_figures_on_the_card_are_those_that_were_measured(read):
    measured = json.loads((DEMO_ADAPTER / EVALUATION).read_text())["results"]
    expected = {(row["dataset"], row["decoding"]): row["metrics"] for row in measured}
    shown = read(CARD.read_text())
    assert shown.keys() == expected.keys() and len(shown) > 20
    for row, metrics in shown.items():
        assert metrics == pytest.approx(expected[row], rel=1e-3)


@pytest.mark.parametrize(
    ("scope", "settings", "rows"),
    [({"alora_invocation_tokens": [-1]}, {"block_size": 4}, {SAME}), ({}, {}, {OWN})],
    ids=["draft-only", "for all tokens"],
)
def test_an_adapter_is_compared_with_the_model_it_was_trained_from(tmp_path, scope, settings, rows):
    trained_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **scope)
    model = get_peft_model(trained_model(), lora)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "generation_config.json").write_text(json.dumps({"jacobi": settings}))
    held_out = tmp_path / "held_out.jsonl"
    held_out.write_text(json.dumps({"kind": "code", "messages": [{"role": "user", "content": "w1 w2 w3"}]}) + "\n")
    found = measure(
        Namespace(
            model=str(tmp_path / "base"),
            dtype="float32",
            trained=tmp_path / "adapter",
            held_out=held_out,
            prompts=1,
            max_new_tokens=16,
        )
    )
    by_row = {(row["dataset"], row["decoding"]): row["metrics"] for row in found["results"]}
    assert found["draft_only"] == bool(scope)
    kinds = {"code, held out", "in domain, held out", OUT_OF_DOMAIN}
    decodings = {"AR", "prompt lookup", "Jacobi, before, default", TRAINED} | rows
    assert set(by_row) == {(kind, way) for kind in kinds for way in decodings} | {("all texts above", "AR")}
    assert by_row["code, held out", TRAINED]["exact"] == 1
    assert by_row["code, held out", TRAINED]["tokens_per_forward"] > 1 or not settings
    both = by_row["all texts above", "AR"]
    assert (both["perplexity_before"] == both["perplexity_after"]) == bool(scope)


def test_a_table_of_the_models_answers_guesses_them(tmp_path, monkeypatch, capsys):
    trained_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    asked = [{"kind": "code", "messages": [{"role": "user", "content": f"w{one} w2"}]} for one in range(3)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    written = tmp_path / "texts.jsonl"
    command = ["x", str(tmp_path / "prompts.jsonl"), str(written), "--model", str(tmp_path / "model")]
    for most in ("2", "3"):  # interrupted, and run again
        options = ["--max-prompts", most, "--batch-size", "2", "--max-new-tokens", "24"]
        monkeypatch.setattr(sys, "argv", [*command, *options])
        texts.main()
    rows = [json.loads(line) for line in written.read_text().splitlines()]
    assert len(rows) == 3
    model, tokenizer = hf_jacobi.enable(trained_model()), tiny_tokenizer()
    for row, question in zip(rows, asked):
        inputs = encode(tokenizer, question["messages"][0]["content"], "cpu")
        assert row["prompt_ids"] == inputs["input_ids"][0].tolist()
        expected = model.generate(**inputs, do_sample=False, max_new_tokens=24)[0, len(row["prompt_ids"]) :]
        assert row["completion_ids"] == expected.tolist()
    table = hf_jacobi.build_ngram_table(rows, tmp_path / "table").parent
    monkeypatch.setattr(sys, "argv", ["x", str(written), str(table)])
    guesses.main()
    own, tabled = (float(share) for share in re.findall(r"all ([\d.]+)%", capsys.readouterr().out))
    assert tabled > 80 and tabled > own


def test_the_card_is_up_to_date():
    assert CARD.read_text() == card()


def test_what_ships_is_small():
    assert sum(path.stat().st_size for path in DEMO_ADAPTER.iterdir()) < 16e6


def test_arithmetic_problems_are_scored_by_the_last_number_of_the_answer():
    asked = problems(30)
    assert asked == problems(30) and len({question for question, _ in asked}) == 30
    question, answer = asked[2]
    a, b = map(int, re.findall(r"\d+", question))
    assert answer == a * b and is_solved(f"{a} times {b} is 1,{answer}? No: {answer}.", answer)
    assert not is_solved(f"{answer} or {answer + 1}", answer) and not is_solved("I cannot say.", answer)


def test_a_model_keeps_all_of_its_own_text_and_less_of_anothers():
    model, tokenizer, questions = hf_jacobi.enable(trained_model()), tiny_tokenizer(), ["a b c d", "b c d e"]
    own = quality(model, tokenizer, questions, 24, 2)
    assert own["agreement"] == 1.0 and all(own[name]["identical"] == 1.0 for name in WAYS)
    assert all(own[name]["tokens_per_forward"] >= 1.0 for name in WAYS)
    assert own["perplexity"] < quality(model, tokenizer, questions, 24, 2, [[5] * 24] * 2)["perplexity"]
    assert quality(model, tokenizer, questions, 24, 2, [[5] * 24] * 2)["agreement"] < 1.0


def test_a_widened_adapter_predicts_the_same(tmp_path):
    base = trained_model()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02)
    model.save_pretrained(tmp_path / "narrow")
    ids = torch.tensor([[3, 4, 5, 6]])
    expected = model(ids).logits
    wide = PeftModel.from_pretrained(trained_model(), widened(tmp_path / "narrow", 6, tmp_path / "wide"))
    torch.testing.assert_close(wide(ids).logits, expected)
    assert not torch.allclose(expected, trained_model()(ids).logits)
    ranks = {weight.shape[0] for name, weight in wide.named_parameters() if "lora_A" in name}
    assert ranks == {6}


def test_a_narrowed_adapter_is_the_nearest_of_its_rank():
    draw = torch.Generator().manual_seed(0)
    down, up = torch.randn(6, 20, generator=draw), torch.randn(30, 6, generator=draw)
    found = narrowed({"x.lora_A.weight": down, "x.lora_B.weight": up}, 4)
    assert {name: tuple(weight.shape) for name, weight in found.items()} == {
        "x.lora_A.weight": (4, 20),
        "x.lora_B.weight": (30, 4),
    }
    lost = up @ down - found["x.lora_B.weight"] @ found["x.lora_A.weight"]
    assert lost.norm() == pytest.approx(torch.linalg.svdvals(up @ down)[4:].norm().item(), rel=1e-4)
    same = narrowed({"x.lora_A.weight": down, "x.lora_B.weight": up}, 6)
    torch.testing.assert_close(same["x.lora_B.weight"] @ same["x.lora_A.weight"], up @ down)
