"""A table of n-grams goes with its checkpoint, and whoever loads the checkpoint drafts from it."""

from __future__ import annotations

import json

import pytest
import torch
from checkpoints import change, checkpoint
from models import padded_prompts, tiny_model, tiny_tokenizer, trained_model
from peft import LoraConfig, get_peft_model

import hf_jacobi
from hf_jacobi import build_ngram_table
from hf_jacobi.cli.models import find
from hf_jacobi.decoding.config import write_settings
from hf_jacobi.decoding.ngram_table import TABLE
from hf_jacobi.hub.carried import CARRIED, rewrite_settings


SETTINGS = {"position_cost": 0.02, "ngram_table": TABLE}
GREEDY = {"max_new_tokens": 48, "do_sample": False, "eos_token_id": None}


def publish(model, folder, **settings):
    return hf_jacobi.publish(model, "someone/fast", tiny_tokenizer(), folder, dry_run=True, **settings)


def table_in(folder, model) -> None:
    """Builds a table of what a model writes for the prompt of the tests."""
    inputs = padded_prompts(1)
    text = hf_jacobi.enable(model).generate(**inputs, **GREEDY)[0, inputs["input_ids"].shape[1] :]
    build_ngram_table([{"prompt_ids": inputs["input_ids"][0].tolist(), "completion_ids": text.tolist()}], folder)


def forwards(model, **settings) -> int:
    out = model.generate(
        **padded_prompts(1), **GREEDY, decoding="jacobi", return_dict_in_generate=True, jacobi_config=settings or None
    )
    expected = model.generate(**padded_prompts(1), **GREEDY, decoding="ar")
    assert torch.equal(out.sequences, expected)
    return out.jacobi_stats.forwards


def adapter_in(folder, base):
    """Saves a draft-only adapter that names its base."""
    base.save_pretrained(folder.parent / "base")
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[-1])
    get_peft_model(base, config).save_pretrained(folder)
    change(folder / "adapter_config.json", base_model_name_or_path=str(folder.parent / "base"))
    change(folder / "generation_config.json", decoding="jacobi", jacobi=SETTINGS)


def test_it_is_published_with_a_folder_and_with_a_model_in_memory(tmp_path):
    source = checkpoint(tmp_path / "model")
    table_in(source, tiny_model())
    change(source / "generation_config.json", decoding="jacobi", jacobi=SETTINGS)
    publish(source, tmp_path / "pushed")
    assert (tmp_path / "pushed" / TABLE).read_bytes() == (source / TABLE).read_bytes()

    model = tiny_model()
    model.generation_config.decoding = "jacobi"
    model.generation_config.jacobi = SETTINGS | {"ngram_table": str(source)}
    publish(model, tmp_path / "from memory")
    assert (tmp_path / "from memory" / TABLE).read_bytes() == (source / TABLE).read_bytes()
    written = json.loads((tmp_path / "from memory" / "generation_config.json").read_text())
    assert written["jacobi"]["ngram_table"] == TABLE


def test_a_table_that_is_named_but_missing_is_said(tmp_path):
    source = checkpoint(tmp_path / "model")
    change(source / "generation_config.json", decoding="jacobi", jacobi=SETTINGS)
    lines: list[str] = []
    publish(source, tmp_path / "pushed", tell=lines.append)
    assert any(f"names {TABLE}, which the folder lacks" in line for line in lines)


def test_an_adapters_own_decoder_and_card_name_its_repository(tmp_path):
    adapter_in(tmp_path / "adapter", tiny_model())
    table_in(tmp_path / "adapter", tiny_model())
    publish(tmp_path / "adapter", tmp_path / "pushed")
    assert "'ngram_table': 'someone/fast'" in (tmp_path / "pushed" / CARRIED / "settings.py").read_text()
    assert '"ngram_table": "someone/fast"' in (tmp_path / "pushed" / "README.md").read_text()


@pytest.mark.parametrize("way", ["load_draft_adapter", "command"])
def test_an_adapter_drafts_from_the_table_beside_it(tmp_path, way):
    adapter_in(tmp_path / "adapter", trained_model())
    without = []
    for there in (False, True):
        if there:
            table_in(tmp_path / "adapter", trained_model())
        if way == "command":
            loaded = find(str(tmp_path / "base"), str(tmp_path / "adapter")).load()
            without.append(forwards(hf_jacobi.enable(loaded.model), **loaded.config.to_dict()))
        else:
            publish(tmp_path / "adapter", tmp_path / f"plain {there}", format="lora")
            without.append(forwards(hf_jacobi.load_draft_adapter(trained_model(), tmp_path / f"plain {there}")))
    assert 1.25 * without[1] < without[0]


def test_a_folder_whose_settings_name_a_table_elsewhere_is_published_with_it_and_without_the_path(tmp_path):
    source = checkpoint(tmp_path / "model")
    table_in(tmp_path / "secret", tiny_model())
    change(source / "generation_config.json", jacobi=SETTINGS | {"ngram_table": str(tmp_path / "secret")})
    publish(source, tmp_path / "pushed")
    assert (tmp_path / "pushed" / TABLE).read_bytes() == (tmp_path / "secret" / TABLE).read_bytes()
    texts = [file for file in (tmp_path / "pushed").rglob("*") if file.suffix in (".json", ".py", ".md")]
    assert texts and not [file for file in texts if "secret" in file.read_text()]
    change(source / "generation_config.json", jacobi=SETTINGS | {"ngram_table": str(tmp_path / "nowhere")})
    with pytest.raises(hf_jacobi.UsageError, match="where there is no table"):
        publish(source, tmp_path / "again")


def test_the_decoder_of_an_adapter_still_names_its_repository_after_it_was_tuned(tmp_path):
    adapter_in(tmp_path / "adapter", tiny_model())
    table_in(tmp_path / "adapter", tiny_model())
    folder = publish(tmp_path / "adapter", tmp_path / "pushed")
    assert rewrite_settings(tmp_path / "pushed", write_settings(tmp_path / "pushed", "jacobi", SETTINGS)), folder
    written = (tmp_path / "pushed" / CARRIED / "settings.py").read_text()
    assert "'ngram_table': 'someone/fast'" in written and "ADAPTER = 'someone/fast'" in written
