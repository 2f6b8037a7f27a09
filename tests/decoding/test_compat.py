"""Private names of other libraries occur in one file only, exist in the installed versions, and are not deprecated."""

from __future__ import annotations

import ast
import inspect
import logging
import re
import warnings
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from datasets import Dataset
from deprecations import OwnUseOfDeprecated, find_own_use
from models import padded_prompts, tiny_model
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)
from transformers.dynamic_module_utils import check_python_requirements
from transformers.modeling_outputs import CausalLMOutputWithPast

import hf_jacobi
from hf_jacobi.decoding import compat


SOURCE = Path(hf_jacobi.__file__).parent
ROOT = Path(__file__).parents[2]


def adapted():
    """A layer with a draft-only adapter."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], alora_invocation_tokens=[-1])
    return get_peft_model(tiny_model(), config).base_model.model.model.layers[0].self_attn.q_proj


def prepared():
    """A generation config that `generate` prepared."""
    seen = []
    tiny_model().generate(
        **padded_prompts(1), custom_generate=lambda *_, generation_config, **__: seen.append(generation_config)
    )
    return seen[0]


def checkpointing_layer():
    """The layer that `caches_in_checkpoints` needs; before 5.24 it lacks the name, so training uses one forward."""
    layer = import_module("transformers.modeling_layers").GradientCheckpointingLayer
    known = hasattr(layer, "_can_checkpoint_with_cache")
    assert known or not compat.caches_in_checkpoints(tiny_model())
    return layer if known else SimpleNamespace(_can_checkpoint_with_cache=False)


def hooked():
    from accelerate.hooks import ModelHook, add_hook_to_module

    return add_hook_to_module(torch.nn.Linear(1, 1), ModelHook())


def member(owner: str):
    module, _, name = owner.rpartition(".")
    return lambda: getattr(import_module(module), name)


# Each name of compat.py: where it must exist, and what is affected if it is gone.
NAMES = [
    ("_prefill", member("transformers.GenerationMixin"), "the prefill of all decoding"),
    ("_sample", member("transformers.GenerationMixin"), "refusing models with a decoding loop of their own"),
    (
        "_update_model_kwargs_for_generation",
        member("transformers.GenerationMixin"),
        "refusing models that carry more than a cache",
    ),
    (
        "MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL",
        lambda: import_module("transformers.generation.utils"),
        "refusing arguments with an entry for each token of the prompt",
    ),
    ("_optimize_model_for_decode", member("transformers.GenerationMixin"), "mixtures of experts on a GPU"),
    ("_has_unfinished_sequences", member("transformers.GenerationMixin"), "the end of decoding on several processes"),
    ("_supports_default_dynamic_cache", member("transformers.GenerationMixin"), "refusing models with a state"),
    ("_is_stateful", lambda: PreTrainedModel, "refusing models with a state, in decoding, training and publishing"),
    ("_supports_attention_backend", lambda: PreTrainedModel, "training without a dense mask"),
    ("_pad_token_tensor", prepared, "padding of rows that ended"),
    ("_from_model_config", GenerationConfig, "saved checkpoints that decode by Jacobi decoding"),
    (
        "ALL_ATTENTION_FUNCTIONS",
        lambda: import_module("transformers.modeling_utils"),
        "attention that copies no keys and values",
    ),
    (
        "sdpa_attention_forward",
        lambda: import_module("transformers.integrations.sdpa_attention"),
        "attention that copies no keys and values",
    ),
    ("_attn_implementation", LlamaConfig, "masks, and refusing an attention that takes none"),
    ("_name_or_path", LlamaConfig, "the base model in model cards"),
    ("_instances", member("tqdm.tqdm"), "errors after a progress bar"),
    ("_fingerprint", lambda: Dataset.from_dict({"prompt": ["w5"]}), "which data a recipe was begun with"),
    ("_VALID_DICT_FIELDS", lambda: TrainingArguments, "jacobi_config and model_init_kwargs on the command line"),
    ("_compile_all_devices", member("transformers.CompileConfig"), "compiled prompt lookup on a CPU"),
    ("_prepare_inputs", lambda: Trainer, "evaluation during training"),
    ("_orig_mod", lambda: torch.compile(torch.nn.Linear(1, 1)), "enabling a compiled model"),
    ("_compiled_call_impl", lambda: torch.nn.Module(), "compile_layers"),
    ("_forward_pre_hooks", lambda: torch.nn.Module(), "adapters after a broken forward"),
    (
        "_forward_pre_hooks_with_kwargs",
        lambda: torch.nn.Module(),
        "adapters after a broken forward",
    ),
    ("_forward_hooks", lambda: torch.nn.Module(), "hooks of layers below a draft-only adapter"),
    (
        "_has_any_global_hook",
        lambda: import_module("torch.nn.modules.module"),
        "hooks of all modules, with a draft-only adapter",
    ),
    ("_hf_hook", hooked, "draft-only adapters of models whose weights are offloaded"),
    ("lora_variant", adapted, "draft-only adapters"),
    ("alora_invocation_tokens", member("peft.LoraConfig"), "draft-only adapters"),
    ("sliding_window_overlay", lambda: import_module("transformers.masking_utils"), "models with a sliding window"),
    ("chunked_overlay", lambda: import_module("transformers.masking_utils"), "models with chunked attention"),
    ("GradientCheckpointingLayer", lambda: import_module("transformers.modeling_layers"), "compile_layers"),
    ("_can_checkpoint_with_cache", checkpointing_layer, "draft-only training that saves memory"),
    ("CONFIG_MAPPING", lambda: import_module("transformers.models.auto.configuration_auto"), "publishing"),
    ("MODEL_FOR_CAUSAL_LM_MAPPING", lambda: import_module("transformers.models.auto.modeling_auto"), "publishing"),
]
# Names that occur only in the source of a function.
IN_SOURCE = [
    (
        "_peft_gradient_checkpointing_forward_hooks",
        "peft.tuners.lora.model",
        "adapters after a broken forward",
    ),
    ("alora_offsets", "peft.tuners.lora.model", "draft-only adapters"),
    ("_enable_peft_forward_hooks", "peft.tuners.lora.model", "draft-only adapters in several threads"),
    ("alora_offsets", "peft.tuners.lora.layer", "draft-only adapters"),
    ("_is_accelerate_prepared", "accelerate.accelerator", "training after an evaluation, on several processes"),
    ("_models", "accelerate.accelerator", "training after an evaluation, on several processes"),
    ("load_balancing_loss_func", "transformers.models.mixtral.modeling_mixtral", "the router loss of mixtures"),
]
if not hasattr(Trainer, "loss_is_scaled_for_ga"):
    IN_SOURCE += [
        (name, "transformers.trainer", "losses under gradient accumulation")
        for name in ("model_accepts_loss_kwargs", "compute_loss_func")
    ]
# Names that do not look private, but differ between versions or are poorly documented.
OTHERS_TERMS = {"past_key_values", "cache_params", "lora_variant", "alora_offsets", "alora_invocation_tokens"}
OTHERS_TERMS |= {"load_balancing_loss_func"}
PUBLIC_MODULES = {
    "transformers",
    "transformers.cache_utils",
    "transformers.generation",
    "transformers.generation.streamers",
    "transformers.integrations",
    "transformers.utils",
    "peft",
    "accelerate",
    "accelerate.utils",
}
# lm-evaluation-harness expects subclasses to override the first; the second is public in spite of its name.
HOOKS_OF_OTHERS = {"_model_generate", "_replace"}


@pytest.mark.parametrize(("name", "owner", "affected"), NAMES, ids=[entry[0] for entry in NAMES])
def test_a_private_name_exists(name, owner, affected):
    assert hasattr(owner(), name), f"{name} is gone from what is installed; affected: {affected}"


@pytest.mark.parametrize(("name", "module", "affected"), IN_SOURCE)
def test_a_private_name_stands_in_the_source(name, module, affected):
    source = inspect.getsource(import_module(module))
    assert name in source, f"{name} is gone from {module}; affected: {affected}"


# Each name of serving/compat.py, by its module of `transformers.cli.serving` and its class there. Without the extra
# `serve` these modules cannot be imported, so their source is read. They affect only `hf-jacobi serve` and `chat`.
OF_THE_SERVER = [
    ("server", "build_server", ()),
    ("model_manager", "ModelManager", ("process_model_name", "load_model_and_processor", "load_model_streaming")),
    ("model_manager", "ModelManager", ("shutdown", "force_model")),
    ("chat_completion", "ChatCompletionHandler", ("handle_request", "_streaming", "_build_chunk_sse")),
    ("completion", "CompletionHandler", ("handle_request", "_streaming", "_build_chunk_sse")),
    ("response", "ResponseHandler", ("handle_request", "_streaming")),
    ("utils", "BaseHandler", ("_validate_request", "_build_generation_config", "generation_state", "model_manager")),
    ("utils", "GenerationState", ("get_manager",)),
    ("utils", "GenerateManager", ("generate_streaming", "generate_non_streaming", "submit", "async_submit")),
    ("utils", "DirectStreamer", ("_enqueue", "_cancelled", "total_tokens", "cancel", "_tokenizer")),
    ("utils", "ReasoningText", ()),
    ("utils", "_GenerationCancelled", ()),
    ("utils", "_StreamError", ()),
]


@pytest.mark.parametrize(("module", "owner", "members"), OF_THE_SERVER)
def test_a_private_name_of_the_server_stands_in_its_source(module, owner, members):
    source = (Path(transformers.__file__).parent / "cli" / "serving" / f"{module}.py").read_text(encoding="utf-8")
    trees = [node for node in ast.parse(source).body if getattr(node, "name", None) == owner]
    assert trees, f"{owner} is gone from transformers.cli.serving.{module}; affected: hf-jacobi serve"
    missing = [name for name in members if not re.search(rf"\b{name}\b", ast.unparse(trees[0]))]
    assert not missing, f"{missing} are gone from {owner}; affected: hf-jacobi serve"


def test_every_private_name_of_the_servers_compat_is_looked_for():
    file = SOURCE / "serving" / "compat.py"
    known = {name for _, owner, members in OF_THE_SERVER for name in (owner, *members)}
    assert private_names(file) | imported_inside(file) <= known


def test_every_private_name_of_compat_is_looked_for():
    found = private_names(SOURCE / "decoding" / "compat.py") | imported_inside(SOURCE / "decoding" / "compat.py")
    known = {entry[0] for entry in NAMES + IN_SOURCE} | {"past_key_values"}
    assert found <= known, f"compat.py names {sorted(found - known)}, which no test looks for"
    assert {entry[0] for entry in NAMES} <= found, "a name that compat.py no longer has"


def test_the_arguments_of_generate_that_need_no_name():
    parameters = inspect.signature(transformers.GenerationMixin.generate).parameters
    positional = [name for name, one in parameters.items() if one.kind is one.POSITIONAL_OR_KEYWORD]
    assert positional == ["self", *compat.GENERATE_ARGUMENTS]


def own_names() -> set[str]:
    """The names that the package itself defines: functions, classes, attributes of `self` and of classes."""
    names = set()
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                names.add(node.attr)
    return names | {
        "_disabled_class",
        "_carried_generate",
        "_own_generates",
    }  # attributes that we add to enabled classes and models


def private_names(file: Path) -> set[str]:
    """Names in a file that look private or are in `OTHERS_TERMS`: used, passed, imported or in strings."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
        elif isinstance(node, ast.arg) or (isinstance(node, ast.keyword) and node.arg):
            found.add(node.arg)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= {alias.name for alias in node.names}
    private = {name for name in found if re.fullmatch(r"_[A-Za-z]\w*", name)}
    return private | (found & OTHERS_TERMS)


def imported_inside(file: Path) -> set[str]:
    """The names that a file imports from modules that are not public."""
    return {
        alias.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and not node.level
        if node.module.split(".")[0] in ("transformers", "peft", "accelerate") and node.module not in PUBLIC_MODULES
        for alias in node.names
    }


def test_no_other_file_names_what_is_private():
    own = own_names()
    named = {
        f"{file.relative_to(SOURCE)}: {name}"
        for file in SOURCE.rglob("*.py")
        if file.name != "compat.py"
        for name in (private_names(file) - own - HOOKS_OF_OTHERS) | imported_inside(file)
    }
    assert not named, "put it into decoding/compat.py"


def test_no_other_file_asks_for_a_version():
    """Other files may record a version beside figures, but only compat.py makes decisions by it."""
    compared = []
    for file in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Compare) and "__version__" in ast.dump(node):
                compared.append(f"{file.relative_to(SOURCE)}:{node.lineno}")
    assert not compared


def test_no_private_method_of_the_trainer_is_replaced():
    ours = {name for name in vars(hf_jacobi.JacobiForcingTrainer) if re.match(r"_[a-z]", name)}
    assert not {name for name in ours if hasattr(Trainer, name)}


# The range of versions


def test_the_tested_range_is_said_alike_everywhere():
    required = compat.requirement()
    assert f'"{required}"' in (ROOT / "setup.py").read_text()
    newest = re.search(r"^transformers==(\d+\.\d+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
    assert newest == compat.NEWEST_TESTED
    assert f"{compat.OLDEST_TESTED} to {compat.NEWEST_TESTED}" in (ROOT / "README.md").read_text()
    weekly = (ROOT / ".github" / "workflows" / "transformers.yml").read_text()
    assert f'"{compat.OLDEST_TESTED}.0"' in weekly and f'"{compat.NEWEST_TESTED}.0"' in weekly


@pytest.mark.parametrize(("installed", "refused"), [("5.16.0", False), ("5.99.0", False), ("5.15.3", True)])
def test_a_published_folder_is_not_refused_by_a_newer_transformers(tmp_path, monkeypatch, installed, refused):
    (tmp_path / "requirements.txt").write_text(compat.requirement() + "\n")
    monkeypatch.setattr("importlib.metadata.version", lambda name: installed)
    if refused:
        with pytest.raises(ImportError, match=r"installed: 5\.15\.3"):
            check_python_requirements(tmp_path)
    else:
        check_python_requirements(tmp_path)


def test_a_newer_transformers_is_warned_of_once_and_not_refused(monkeypatch):
    compat.warn_of_untested_version.cache_clear()
    model = hf_jacobi.enable(tiny_model())
    settings = {"max_new_tokens": 4, "do_sample": False}
    monkeypatch.setattr(compat.transformers, "__version__", "5.99.0.dev0")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        texts = [model.generate(**padded_prompts(2), **settings, decoding="jacobi") for _ in range(2)]
        model.generate(**padded_prompts(2), **settings, decoding="ar")
    compat.warn_of_untested_version.cache_clear()
    ours = [str(warning.message) for warning in caught if "hf_jacobi" in str(warning.message)]
    assert len(ours) == 1 and compat.NEWEST_TESTED in ours[0] and "5.99.0.dev0" in ours[0]
    assert torch.equal(texts[0], texts[1])


def test_a_tested_transformers_is_not_warned_of():
    compat.warn_of_untested_version.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compat.warn_of_untested_version()
    assert compat.release("5.24.1") == (5, 24)


# The name of the cache


class OldCode(LlamaForCausalLM):
    """Code of a checkpoint that calls the cache `past_key_values`."""

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
    ):
        cache = {compat.CACHE: past_key_values}
        outputs = self.model(input_ids, attention_mask, position_ids, **cache, use_cache=use_cache)
        logits = self.lm_head(outputs.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, **{compat.CACHE: compat.cache_of(outputs)})


def test_a_model_with_code_from_before_the_renaming_decodes():
    model = tiny_model()
    old = OldCode(model.config).eval()
    old.load_state_dict(model.state_dict())
    settings = {"max_new_tokens": 24, "do_sample": False}
    inputs = padded_prompts(3)
    expected = model.generate(**inputs, **settings)
    output = hf_jacobi.enable(old).generate(**inputs, **settings, decoding="jacobi", return_dict_in_generate=True)
    assert torch.equal(output.sequences, expected)
    assert output.jacobi_stats.tokens_per_forward > 1.05
    assert compat.cache_argument(old) == "past_key_values"
    assert compat.cache_argument(model) == compat.CACHE


@pytest.mark.parametrize("name", sorted({compat.CACHE, compat.OLD_CACHE}))
def test_a_cache_may_be_passed_by_either_name(name):
    model = hf_jacobi.enable(tiny_model())
    cache = DynamicCache(config=model.config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        text = model.generate(**padded_prompts(1), **{name: cache}, max_new_tokens=9, decoding="jacobi")
    assert cache.get_seq_length() == text.shape[1] - 1
    assert torch.equal(text, model.generate(**padded_prompts(1), max_new_tokens=9, decoding="ar"))


def test_the_output_carries_the_cache_under_the_names_of_ar():
    model = hf_jacobi.enable(tiny_model())
    settings = {"max_new_tokens": 9, "do_sample": False, "return_dict_in_generate": True}
    ar, jacobi = (model.generate(**padded_prompts(1), **settings, decoding=way) for way in ("ar", "jacobi"))
    for name in ("cache", "past_key_values"):
        if hasattr(ar, name):
            assert getattr(ar, name).get_seq_length() == getattr(jacobi, name).get_seq_length()
            assert jacobi[name] is getattr(jacobi, name)
    assert list(ar.keys()) == [key for key in jacobi if key != "jacobi_stats"]


# Our own use of what is deprecated


def call_from_ours(statement: str, names: dict):
    """Runs a statement as if it were in a file of the package."""
    exec(compile(statement, str(SOURCE / "made_up.py"), "exec"), names)


def test_our_use_of_what_is_deprecated_fails():
    model = tiny_model()
    tokens = padded_prompts(1)["input_ids"]
    warned = compile(
        "import warnings\ndef warn(): warnings.warn('x is deprecated', FutureWarning)",
        str(Path(transformers.__file__).parent / "made_up.py"),
        "exec",
    )
    theirs: dict = {}
    exec(warned, theirs)
    with pytest.raises(OwnUseOfDeprecated, match=r"made_up\.py:1: x is deprecated"):
        call_from_ours("warn()", theirs)
    with pytest.warns(FutureWarning, match="x is deprecated"):
        theirs["warn"]()
    with pytest.raises(OwnUseOfDeprecated):
        call_from_ours("logger.warning_once('x is deprecated')", {"logger": logging.getLogger("transformers.made_up")})
    if compat.CACHE != compat.OLD_CACHE:
        with pytest.raises(OwnUseOfDeprecated, match="past_key_values"):
            call_from_ours("model(tokens, past_key_values=None)", {"model": model, "tokens": tokens})
    assert find_own_use(1) is None
