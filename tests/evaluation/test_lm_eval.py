"""A local task of lm-evaluation-harness, scored by AR and by Jacobi decoding."""

import json
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_jacobi import cli


pytest.importorskip("lm_eval", reason="needs lm-eval: pip install 'hf_jacobi[harness]'")
pytestmark = pytest.mark.harness
TASK = Path(__file__).parent / "tasks" / "continue_words.yaml"
QUESTIONS = [f"w{n} w{n + 1} w{n}" for n in range(5, 11)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint whose words are w0, w1, ..., and the task with its data."""
    folder = tmp_path_factory.mktemp("lm_eval")
    tiny_model("olmo").save_pretrained(folder / "model")
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2")
    tokenizer.save_pretrained(folder / "model")
    (folder / TASK.name).write_text(TASK.read_text().replace("PLACE", str(folder)))
    return folder


def ask(place: Path, answers: list[str], **options) -> dict:
    rows = [{"question": question, "answer": answer} for question, answer in zip(QUESTIONS, answers)]
    (place / "continue_words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = place / "found.json"
    command = ["eval", str(place / "model"), "--tasks", "continue_words", "--include_path", str(place)]
    command += [part for name, value in options.items() for part in (f"--{name}", str(value))]
    assert cli.main([*command, "--output", str(output)]) == 0
    return json.loads(output.read_text())


def texts(found: dict) -> list[str]:
    samples = sorted(found["samples"]["continue_words"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in samples]


def test_scores_and_texts_are_those_of_ar(place, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    first = ask(place, ["?"] * len(QUESTIONS), gen_kwargs="decoding=ar")
    written = texts(first)
    assert first["tokens_per_forward"] == 1.0 and any(len(text.split()) < 24 for text in written)
    answers = [text if number % 2 else "?" for number, text in enumerate(written)]
    for gen_kwargs, batch_size in (("block_size=6", 1), ("decoding=jacobi,max_blocks=2", 3)):
        found = ask(place, answers, gen_kwargs=gen_kwargs, batch_size=batch_size)
        assert texts(found) == written
        assert found["results"]["continue_words"]["exact_match,none"] == 0.5
    assert found["tokens_per_forward"] >= 1.0
    assert "tokens per forward" in capsys.readouterr().out


def test_settings_of_a_call_are_laid_over_those_of_the_checkpoint(place):
    from hf_jacobi.evaluation.lm_eval import JacobiLM

    model = JacobiLM(pretrained=str(place / "model"), device="cpu")
    model.model.generation_config.jacobi = {"pool_size": 0, "draft_init": "prompt"}
    asked = {}
    own = type(model.model).generate

    def generate(*args, **kwargs):
        asked.update(kwargs)
        return own(model.model, *args, **kwargs)

    model.model.generate = generate
    context = torch.tensor([[5, 6, 7]])
    model._model_generate(context, 8, [], attention_mask=torch.ones_like(context), block_size=6)
    config = asked["jacobi_config"]
    assert (config.block_size, config.pool_size, config.draft_init) == (6, 0, "prompt")
