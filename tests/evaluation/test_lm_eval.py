"""A local task of lm-evaluation-harness, scored with AR and with Jacobi decoding."""

import json
from pathlib import Path

import pytest
import torch
from models import VOCABULARY, tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_jacobi import JacobiConfig, cli
from hf_jacobi.hub.card import checked


pytest.importorskip("lm_eval", reason="needs lm-eval: the extra 'harness'")
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


def test_settings_of_a_call_override_those_of_the_checkpoint(place):
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


def command_of(place: Path, *options: str, model: str = "model") -> list[str]:
    (place / "continue_words.jsonl").write_text(json.dumps({"question": QUESTIONS[0], "answer": "?"}) + "\n")
    return ["eval", str(place / model), "--tasks", "continue_words", "--include_path", str(place), *options]


def test_publish_accepts_the_evaluation_and_no_file_contains_a_path(place, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    files = [tmp_path / "evaluation.json", tmp_path / "found.json"]
    options = ["--evaluation", str(files[0]), "--output", str(files[1])]
    gen_kwargs = "block_size=6,do_sample=true,temperature=0.5"
    assert cli.main(command_of(place, *options, "--gen-kwargs", gen_kwargs)) == 0
    evaluation = json.loads(files[0].read_text())
    assert evaluation["measured_on"].endswith("; do_sample=True, temperature=0.5"), "how it was sampled"
    assert checked(evaluation) == evaluation and evaluation["model"] == "model"
    assert evaluation["settings"] == {"decoding": "jacobi", "jacobi": JacobiConfig(block_size=6).to_dict()}
    (row,) = evaluation["results"]
    assert (row["dataset"], row["decoding"]) == ("continue_words", "Jacobi")
    assert set(row["metrics"]) == {"exact_match", "tokens_per_forward"}
    assert not [file for file in files if str(place) in file.read_text()]


def test_an_adapters_folder_is_scored_as_the_adapter_on_its_base_model(place, monkeypatch):
    from peft import LoraConfig, get_peft_model

    from hf_jacobi.cli import eval as command
    from hf_jacobi.evaluation import lm_eval

    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", alora_invocation_tokens=[-1])
    adapter = get_peft_model(tiny_model("olmo"), config)
    adapter.peft_config["default"].base_model_name_or_path = str(place / "model")
    adapter.save_pretrained(place / "adapter")
    settings = {"decoding": "jacobi", "jacobi": {"block_size": 5}}
    (place / "adapter" / "generation_config.json").write_text(json.dumps(settings))
    made = []

    class Kept(lm_eval.JacobiLM):
        def __init__(self, *arguments, **others):
            super().__init__(*arguments, **others)
            made.append(self)

    monkeypatch.setattr(lm_eval, "JacobiLM", Kept)
    written = []
    monkeypatch.setattr(command, "write_json", lambda file, content: written.append(content))
    evaluation = ["--evaluation", str(place / "e.json")]
    assert cli.main(command_of(place, *evaluation, model="adapter")) == 0
    assert cli.main(command_of(place, *evaluation, "--adapter", str(place / "adapter"))) == 0
    assert written[0] == written[1] and written[0]["model"] == "adapter"
    assert written[0]["settings"]["jacobi"] == JacobiConfig(block_size=5).to_dict()
    assert [type(one.model).__name__.startswith("Peft") for one in made] == [True, True]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "continue_word"], "there is no task continue_word (near: continue_words"),
        (["--tasks", "continue_words, typo"], "there is no task typo"),
        (["--tasks", " , "], "names no task"),
        (["--include_path", "none"], "there is no folder none"),
        (["--gen_kwargs", "decoding=beam"], "decoding must be one of"),
        (["--gen_kwargs", "blocksize=4"], "blocksize: neither a setting"),
        (["--gen_kwargs", "block_size=many"], "`block_size` must be a whole number"),
        (["--gen_kwargs", "decoding=ar,block_size=4"], "need decoding=jacobi"),
        (["--output", "/"], "is a folder"),
        (["--evaluation", "/"], "is a folder"),
    ],
)
def test_mistakes_are_reported_before_the_model_is_loaded(place, monkeypatch, capsys, options, said):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    assert cli.main(command_of(place, *options)) == 2
    assert said in capsys.readouterr().err


def test_missing_data_is_reported_before_the_model_is_loaded(place, monkeypatch, capsys):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", pytest.fail)
    command = command_of(place)
    (place / "continue_words.jsonl").unlink()
    assert cli.main(command) == 2
    assert "continue_words.jsonl" in capsys.readouterr().err


def test_an_error_starts_on_its_own_line(place, monkeypatch, capsys):
    from hf_jacobi.decoding.errors import UsageError
    from hf_jacobi.evaluation.lm_eval import JacobiLM

    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))

    def refuse(*arguments, **settings):
        raise UsageError("this cannot be decoded.")

    monkeypatch.setattr(JacobiLM, "_model_generate", refuse)
    assert cli.main(command_of(place)) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "hf-jacobi eval: this cannot be decoded." in lines
