"""`enable` and `disable`, and the settings that are saved with a checkpoint."""

from __future__ import annotations

import ast
import copy
import functools
import gc
import itertools
import json
import subprocess
import sys
import types
import weakref

import pytest
import torch
from models import VOCABULARY, padded_prompts, tiny_model
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    pipeline,
)

import hf_jacobi
from hf_jacobi import JacobiConfig, JacobiOutput


GREEDY = {"max_new_tokens": 16, "do_sample": False}


def is_jacobi(model, **kwargs) -> bool:
    out = model.generate(**padded_prompts(1), **GREEDY, return_dict_in_generate=True, **kwargs)
    return isinstance(out, JacobiOutput)


def test_enable_is_for_this_model_only_and_disable_undoes_it():
    model, other = tiny_model(), tiny_model()
    assert hf_jacobi.enable(model) is model
    assert is_jacobi(model, decoding="jacobi")
    with pytest.raises(ValueError, match="decoding"):
        other.generate(**padded_prompts(1), **GREEDY, decoding="jacobi")
    assert hf_jacobi.disable(model) is model
    assert type(model) is LlamaForCausalLM
    with pytest.raises(ValueError, match="decoding"):
        model.generate(**padded_prompts(1), **GREEDY, decoding="jacobi")


def test_enable_without_a_model_is_for_the_process():
    model = tiny_model()
    hf_jacobi.enable()
    assert is_jacobi(model, decoding="jacobi") and not is_jacobi(model)
    hf_jacobi.enable(model)
    model.generation_config.decoding = "jacobi"
    assert is_jacobi(model) and not is_jacobi(model, decoding="ar")
    hf_jacobi.disable()
    assert is_jacobi(model), "a model that was enabled individually stays enabled"
    hf_jacobi.disable(model)
    assert not is_jacobi(model)


def test_a_model_that_is_enabled_can_be_copied_and_pickled(tmp_path):
    model = hf_jacobi.enable(tiny_model())
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert is_jacobi(loaded, decoding="jacobi")
    assert type(hf_jacobi.disable(loaded)) is LlamaForCausalLM


def test_an_enabled_model_is_freed_at_once():
    model = hf_jacobi.enable(tiny_model())
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


class Overriding(LlamaForCausalLM):
    """A model with its own `generate`, like Whisper."""

    def generate(self, input_ids=None, **kwargs):
        assert "assistant_model" not in kwargs, "only what was given is passed on"
        return super().generate(input_ids, **kwargs)


@pytest.mark.parametrize("enabled", ["model", "process", "both"])
def test_models_that_override_generate(enabled):
    model = tiny_model()
    model.__class__ = Overriding
    expected = model.generate(**padded_prompts(1), **GREEDY)
    if enabled != "model":
        hf_jacobi.enable()
    if enabled != "process":
        hf_jacobi.enable(model)
    assert torch.equal(model.generate(**padded_prompts(1), **GREEDY), expected)
    out = model.generate(**padded_prompts(1), **GREEDY, decoding="jacobi", return_dict_in_generate=True)
    assert isinstance(out, JacobiOutput) and torch.equal(out.sequences, expected)


# Wrappers of other libraries around `generate`, of the class or of a model


@pytest.fixture
def plain_generate():
    plain = GenerationMixin.generate
    yield plain
    hf_jacobi.disable()
    GenerationMixin.generate = plain


def trace_all_models(seen: list, named: bool):
    """What an instrumentation library does when it is imported."""
    inner = GenerationMixin.generate

    def traced(self, *args, **kwargs):
        seen.append(1)
        return inner(self, *args, **kwargs)

    GenerationMixin.generate = functools.wraps(inner)(traced) if named else traced


def ways(model) -> tuple:
    """How a model decodes by its generation config, and by each value of `decoding`."""
    model.generation_config.decoding = "jacobi"  # a model that is not enabled takes the argument for this setting
    return is_jacobi(model), is_jacobi(model, decoding="ar"), is_jacobi(model, decoding="jacobi")


@pytest.mark.parametrize("steps", [*itertools.product("edw", repeat=3), "ewewe", "ewdwe", "wewdd", "eewed"])
@pytest.mark.parametrize("named", [True, False])
def test_enable_and_disable_of_the_process_between_wrappers(plain_generate, steps, named):
    model, seen, on = tiny_model(), [], False
    for step in steps:
        on = step == "e" or (on and step != "d")
        {"e": hf_jacobi.enable, "d": hf_jacobi.disable, "w": lambda: trace_all_models(seen, named)}[step]()
    assert ways(model) == (on, False, on)
    assert len(seen) >= 3 * list(steps).count("w"), "wrappers see every call"
    hf_jacobi.disable()
    assert not is_jacobi(model, decoding="jacobi")
    if "w" not in steps:
        assert GenerationMixin.generate is plain_generate


def test_a_wrapper_that_is_taken_off_again(plain_generate):
    model, seen = tiny_model(), []
    hf_jacobi.enable()
    before = GenerationMixin.generate
    trace_all_models(seen, True)
    hf_jacobi.enable()
    GenerationMixin.generate = before
    assert ways(model) == (True, False, True)


def wrap_model(model, style: str, seen: list) -> None:
    """What libraries for faster inference, or accelerate, put on a model."""
    plain = model.generate

    def method(self, *args, **kwargs):
        seen.append(1)
        return plain(*args, **kwargs)

    def through_class(*args, **kwargs):
        seen.append(1)
        return type(model).generate(model, *args, **kwargs)

    styles = {
        "method": types.MethodType(method, model),
        "function": functools.partial(method, model),
        "wraps": functools.wraps(plain)(lambda *args, **kwargs: method(model, *args, **kwargs)),
        "class": through_class,
    }
    model.generate = styles[style]


@pytest.mark.parametrize("steps", ["we", "ew", "wew", "ewe", "wwe", "wed", "ewd", "wewd", "ewed", "wede", "wewde"])
@pytest.mark.parametrize("style", ["method", "function", "wraps", "class"])
def test_a_model_with_a_generate_of_its_own(style, steps):
    model, seen, on = tiny_model(), [], False
    for step in steps:
        on = step == "e" or (on and step != "d")
        if step == "w":
            wrap_model(model, style, seen)
        else:
            (hf_jacobi.enable if step == "e" else hf_jacobi.disable)(model)
    assert ways(model) == (on, False, on)
    assert len(seen) >= 3, "their wrapper sees every call"
    hf_jacobi.disable(model)
    assert type(model) is LlamaForCausalLM and "generate" in vars(model)


def test_positional_arguments_go_through_wrappers(plain_generate):
    inputs = padded_prompts(1)["input_ids"]
    config = GenerationConfig(**GREEDY, eos_token_id=2, pad_token_id=0)
    expected = tiny_model().generate(inputs, config)
    trace_all_models([], False)
    hf_jacobi.enable()
    assert torch.equal(tiny_model().generate(inputs, config, decoding="jacobi"), expected)
    model = tiny_model()
    wrap_model(model, "method", [])
    assert torch.equal(hf_jacobi.enable(model).generate(inputs, config, decoding="jacobi"), expected)


def test_a_wrapper_that_decodes_by_itself_is_named():
    model = tiny_model()
    model.generate = lambda *args, **kwargs: torch.zeros(1, 1, dtype=torch.long)
    hf_jacobi.enable(model)
    with pytest.raises(ValueError, match="in another way: use decoding='ar'"):
        model.generate(**padded_prompts(1), decoding="jacobi")
    assert model.generate(**padded_prompts(1), decoding="ar").shape == (1, 1)


@pytest.mark.parametrize("order", ["enabled, sharded", "sharded, enabled"])
def test_disable_leaves_the_class_that_fsdp_puts_over_a_model(order):
    from torch.distributed.fsdp import FSDPModule

    model = tiny_model()
    for step in order.split(", "):
        if step == "enabled":
            hf_jacobi.enable(model)
        else:  # as `fully_shard` does
            model.__class__ = type(f"FSDP{type(model).__name__}", (FSDPModule, type(model)), {})
    assert is_jacobi(model, decoding="jacobi")
    hf_jacobi.disable(model)
    assert isinstance(model, FSDPModule) and isinstance(model, LlamaForCausalLM)
    assert not isinstance(model, hf_jacobi.JacobiGenerationMixin)
    assert type(model).__name__ == "FSDPLlamaForCausalLM"
    with pytest.raises(ValueError, match="decoding"):
        model.generate(**padded_prompts(1), **GREEDY, decoding="jacobi")


class ByHand(hf_jacobi.JacobiGenerationMixin, LlamaForCausalLM):
    """A class in which the user has used the mixin."""


def test_disable_says_what_it_cannot_undo():
    model = ByHand(tiny_model().config).eval()
    assert is_jacobi(hf_jacobi.enable(model), decoding="jacobi")
    with pytest.raises(hf_jacobi.UsageError, match="inherits from JacobiGenerationMixin"):
        hf_jacobi.disable(model)
    assert hf_jacobi.disable(other := tiny_model()) is other, "it was never enabled"


def test_the_wrapper_of_peft_is_as_before_after_disable():
    model = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj"]))
    before = type(model.base_model)
    hf_jacobi.enable(hf_jacobi.enable(model))
    assert copy.deepcopy(model).base_model.__class__ is before, "copies are PEFT's own"
    hf_jacobi.disable(model)
    assert type(model.base_model) is before


def test_enable_refuses_what_cannot_generate():
    with pytest.raises(TypeError, match="Linear"):
        hf_jacobi.enable(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("setting", [JacobiConfig(block_size=5, max_blocks=2), {"block_size": 5, "max_blocks": 2}])
def test_settings_travel_with_the_checkpoint(tmp_path, setting):
    model = hf_jacobi.enable(tiny_model())
    model.generation_config.decoding = "jacobi"
    model.generation_config.jacobi = setting
    expected = model.generate(**padded_prompts(1), **GREEDY, return_dict_in_generate=True)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is LlamaForCausalLM
    assert loaded.generation_config.decoding == "jacobi"
    assert not is_jacobi(loaded), "a model that was not enabled runs transformers' own code"
    hf_jacobi.enable(loaded)
    out = loaded.generate(**padded_prompts(1), **GREEDY, return_dict_in_generate=True)
    assert isinstance(out, JacobiOutput) and torch.equal(out.sequences, expected.sequences)
    assert out.jacobi_stats == expected.jacobi_stats, "decodes with the settings it was saved with"
    assert not is_jacobi(loaded, decoding="ar")


def test_settings_are_read_from_the_generation_config_of_the_call():
    model = hf_jacobi.enable(tiny_model())
    config = GenerationConfig(max_new_tokens=16, do_sample=False, return_dict_in_generate=True, eos_token_id=2)
    config.decoding, config.jacobi = "jacobi", {"block_size": 1, "pool_size": 0}
    out = model.generate(**padded_prompts(1), generation_config=config)
    assert isinstance(out, JacobiOutput) and out.jacobi_stats.tokens_per_forward == 1
    own = model.generate(**padded_prompts(1), generation_config=config, jacobi_config={"block_size": 8})
    assert own.jacobi_stats.positions > out.jacobi_stats.positions, "an argument of the call takes precedence"


def test_a_model_that_a_trainer_left_without_cache(tmp_path):
    model = tiny_model()
    expected = model.generate(**padded_prompts(2), max_new_tokens=8)
    model.config.use_cache = model.generation_config.use_cache = False  # as `Trainer.train` leaves it
    model.save_pretrained(tmp_path)
    for left in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        output = hf_jacobi.enable(left).generate(**padded_prompts(2), max_new_tokens=8, decoding="jacobi")
        assert output.tolist() == expected.tolist()
        assert left.config.use_cache is False, "the model does not change"
        for config in (left.generation_config, GenerationConfig(max_new_tokens=8)):
            left.generate(**padded_prompts(2), generation_config=config, max_new_tokens=8, decoding="jacobi")


def test_a_model_that_a_trainer_left_in_autocast():
    model = tiny_model()
    model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)  # as `Trainer(bf16=True)` leaves it
    output = hf_jacobi.enable(model).generate(**padded_prompts(3), max_new_tokens=40, decoding="jacobi")
    assert output.shape[1] > padded_prompts(3)["input_ids"].shape[1]


@pytest.mark.parametrize("enabled", ["inner", "wrapper", "process"])
def test_peft_models(enabled):
    inner = tiny_model()
    if enabled == "inner":
        hf_jacobi.enable(inner)
    wrapped = get_peft_model(inner, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    if enabled == "wrapper":
        assert hf_jacobi.enable(wrapped) is wrapped
    if enabled == "process":
        hf_jacobi.enable()
    inputs = padded_prompts(3)
    expected = wrapped.generate(**inputs, **GREEDY)
    out = wrapped.generate(**inputs, **GREEDY, decoding="jacobi", return_dict_in_generate=True)
    assert isinstance(out, JacobiOutput) and torch.equal(out.sequences, expected)
    with wrapped.disable_adapter():
        base = wrapped.generate(**inputs, **GREEDY, decoding="jacobi")
        assert torch.equal(base, wrapped.generate(**inputs, **GREEDY)) and not torch.equal(base, expected)


def test_text_generation_pipeline():
    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(VOCABULARY)}, unk_token="w3"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="w0", eos_token="w2", padding_side="left")
    generator = pipeline("text-generation", model=hf_jacobi.enable(tiny_model()), tokenizer=tokenizer)
    for prompts in ("w5", ["w5", "w6", "w7"]):
        expected = generator(prompts, **GREEDY)
        assert generator(prompts, **GREEDY, decoding="jacobi") == expected
        assert generator(prompts, **GREEDY, decoding="jacobi", jacobi_config=JacobiConfig(block_size=4)) == expected


def test_a_seed_alone_leaves_the_other_settings_of_the_checkpoint():
    model = hf_jacobi.enable(tiny_model())
    model.generation_config.jacobi = {"block_size": 3, "pool_size": 0}

    def positions(**settings):
        call = {"max_new_tokens": 16, "do_sample": True, "return_dict_in_generate": True, "decoding": "jacobi"}
        return model.generate(**padded_prompts(1), **call, **settings).jacobi_stats.positions

    seeded = positions(jacobi_config={"seed": 7})
    assert seeded == positions(jacobi_config={"seed": 7, "block_size": 3, "pool_size": 0})
    assert seeded != positions(jacobi_config={"seed": 7, "block_size": 8, "pool_size": 0})


def test_settings_by_the_name_of_the_generation_config_are_refused():
    model = hf_jacobi.enable(tiny_model())
    model.generation_config.jacobi = {"block_size": 3}
    with pytest.raises(ValueError, match="as `jacobi_config`"):
        model.generate(**padded_prompts(1), decoding="jacobi", jacobi={"block_size": 2})


def test_a_generation_config_of_the_call_is_enough_and_stays_as_it_is(caplog):
    model = hf_jacobi.enable(tiny_model())
    config = GenerationConfig(**GREEDY, return_dict_in_generate=True)
    before = config.to_dict()
    with caplog.at_level("WARNING", logger="transformers"):
        out = model.generate(**padded_prompts(1), generation_config=config, decoding="jacobi")
    assert isinstance(out, JacobiOutput) and config.to_dict() == before
    assert "use_cache" not in caplog.text


def test_settings_travel_from_a_process_where_all_models_are_enabled(tmp_path):
    hf_jacobi.enable()
    try:
        model = tiny_model()
        model.generation_config.decoding = "jacobi"
        assert is_jacobi(model)
        model.save_pretrained(tmp_path)
        assert is_jacobi(AutoModelForCausalLM.from_pretrained(tmp_path))
    finally:
        hf_jacobi.disable()


def test_bad_arguments_are_refused():
    model, inputs = hf_jacobi.enable(tiny_model()), padded_prompts(1)
    with pytest.raises(ValueError, match=r"decoding.*'jacoby'"):
        model.generate(**inputs, decoding="jacoby")
    with pytest.raises(ValueError, match="decoding='jacobi'"):
        model.generate(**inputs, jacobi_config=JacobiConfig())
    with pytest.raises(ValueError, match="decoding='jacobi'"):
        model.generate(**inputs, decoding="ar", output_trajectory=True)
    with pytest.raises(ValueError, match="assistant_model"):
        model.generate(**inputs, decoding="jacobi", assistant_model=tiny_model())
    with pytest.raises(ValueError, match="return_dict_in_generate"):
        model.generate(**inputs, decoding="jacobi", output_trajectory=True)
    with pytest.raises(ValueError, match="custom_generate"):
        model.generate(**inputs, decoding="jacobi", custom_generate=lambda *_: None)
    with pytest.raises(ValueError, match="block_sise"):
        model.generate(**inputs, decoding="jacobi", jacobi_config={"block_sise": 8})
    with pytest.raises(ValueError, match="model_kwargs"):
        model.generate(**inputs, decoding="jacobi", max_new_token=8)


def test_custom_generate_of_the_user_still_works():
    model = hf_jacobi.enable(tiny_model())
    model.generation_config.decoding = "jacobi"

    def first_token(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
        return input_ids[:, :1]

    assert model.generate(**padded_prompts(2), custom_generate=first_token).shape == (2, 1)


def test_importing_the_package_imports_nothing_heavier_than_transformers_and_torch():
    def packages(statement):
        code = f"import sys; {statement}; print({{name.partition('.')[0] for name in sys.modules}})"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return ast.literal_eval(out.stdout)

    without = packages(
        "import torch; from transformers import GenerationMixin; import transformers.generation.streamers"
    )
    assert packages("import hf_jacobi.decoding") - without == {"hf_jacobi"}
