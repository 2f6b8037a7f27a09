"""
Our names for what is private to transformers, PEFT, accelerate and torch, or differs between their versions.

No other file uses the private names. `tests/decoding/test_compat.py` asserts that each of them exists in the installed
packages, and says what is affected if one is gone.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import torch
import transformers
from torch.nn.modules.module import _has_any_global_hook
from transformers import AttentionInterface, CompileConfig, StaticCache
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL
from transformers.masking_utils import chunked_overlay as chunked_overlay
from transformers.masking_utils import sliding_window_overlay as sliding_window_overlay
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .errors import UsageError


# The oldest and the newest transformers that were tested; setup.py repeats the requirement that follows from them.
OLDEST_TESTED = "5.16"
NEWEST_TESTED = "5.24"


def release(version: str) -> tuple[int, int]:
    """Major and minor of a version: `(5, 24)` for `"5.24.1"`."""
    major, minor = re.findall(r"\d+", version)[:2]
    return int(major), int(minor)


def requirement() -> str:
    """
    The range of tested versions for pip. In a published folder, transformers itself checks the lower bound alone
    (`check_python_requirements`), so a newer version is not refused there; it causes a warning.
    """
    major, minor = release(NEWEST_TESTED)
    return f"transformers>={OLDEST_TESTED},<{major}.{minor + 1}"


@functools.cache
def warn_of_untested_version() -> None:
    """Warns, once per process, if the installed transformers is newer than the newest tested one."""
    installed = transformers.__version__
    if release(installed) > release(NEWEST_TESTED):
        warnings.warn(
            f"hf_jacobi was tested with transformers up to {NEWEST_TESTED}, but {installed} is installed: if "
            f"something goes wrong, install transformers {NEWEST_TESTED} or a newer hf_jacobi.",
            UserWarning,
            stacklevel=3,
        )


# The KV cache is an argument of forwards, a field of outputs and an entry of the arguments that `generate` prepares.
# transformers 5.24 changed its name; the old one is deprecated until 5.40.

OLD_CACHE = "past_key_values"
CACHE = "cache" if "cache" in GenerateDecoderOnlyOutput.__dataclass_fields__ else OLD_CACHE


def cache_of(outputs):
    """The cache in the output of a forward or of `generate`, or `None`."""
    return getattr(outputs, CACHE, None)


def cache_among(arguments: dict[str, Any]):
    """The cache among the arguments of `generate`, under its new or its old name, or `None`."""
    found = arguments.get(CACHE)
    return found if found is not None else arguments.get(OLD_CACHE)


def cache_argument(model) -> str | None:
    """
    The name under which a model's forward takes the cache, or `None` if it takes none. Code that comes with a
    checkpoint can be older than the installed transformers.
    """
    taken = inspect.signature(model.forward).parameters
    return next((name for name in (CACHE, OLD_CACHE) if name in taken), None)


def renamed_cache(arguments: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The arguments of a forward, with the cache under the name that this forward uses (`cache_argument`)."""
    if name is None or name == CACHE or CACHE not in arguments:
        return arguments
    return {name if key == CACHE else key: value for key, value in arguments.items()}


# What `generate` takes, prepares and does

# Its positional arguments, in order.
GENERATE_ARGUMENTS = (
    "inputs",
    "generation_config",
    "logits_processor",
    "stopping_criteria",
    "prefix_allowed_tokens_fn",
    "synced_gpus",
    "assistant_model",
    "streamer",
    "negative_prompt_ids",
    "negative_prompt_attention_mask",
    "custom_generate",
)


def prefill(model, input_ids: torch.Tensor, generation_config, model_kwargs: dict):
    """transformers' own prefill: the output of its forward (of the last one, if it processes the prompt in chunks)."""
    name, thread = cache_argument(model), threading.get_ident()
    if name == CACHE:
        return model._prefill(input_ids, generation_config, model_kwargs)

    def rename(module, arguments, keywords=None):  # another thread can call without keywords during registration
        return (arguments, renamed_cache(keywords, name)) if threading.get_ident() == thread else None

    handle = model.register_forward_pre_hook(rename, with_kwargs=True)
    try:
        return model._prefill(input_ids, generation_config, model_kwargs)
    finally:
        handle.remove()


def go_on(model, finished: bool, synced_gpus: bool, device: torch.device) -> bool:
    """Whether another forward is needed, here or in another process that shares the model's weights."""
    return model._has_unfinished_sequences(finished, synced_gpus, device=device)


def optimised_for_decoding(model) -> AbstractContextManager:
    """
    While this is open, a mixture of experts runs in the way that transformers uses for decoding. On a GPU it differs
    from the way for a prompt.
    """
    return model._optimize_model_for_decode()


def pad_token_of(generation_config) -> int | None:
    """The padding token of a generation config that `generate` prepared."""
    pad = generation_config._pad_token_tensor
    return None if pad is None else int(pad)


# Marks a generation config that was derived from the model's config, also in the file; it loses our keys on loading.
DERIVED = "_from_model_config"


def make_own(generation_config) -> None:
    """Makes a generation config independent, so that it keeps `decoding` and `jacobi` when saved and loaded."""
    setattr(generation_config, DERIVED, False)


# What a model is


def _is_own(model, hook: str) -> bool:
    """Whether a model, or its class, replaces a method of transformers' `GenerationMixin`."""
    return getattr(getattr(model, hook), "__func__", None) is not vars(transformers.GenerationMixin)[hook]


# Models of transformers that change how arguments pass from step to step, and the arguments that they change: without
# those, the change is harmless. PaliGemma's new token types are for a mask that our mask replaces.
HARMLESS_WITHOUT = {
    "PaliGemmaForConditionalGeneration": (),
    "MllamaForConditionalGeneration": ("pixel_values", "cross_attention_mask"),
}


def carries_state(model, model_kwargs: dict[str, Any]) -> bool:
    """Whether a model may pass a state of its own from step to step, which drafts would never see."""
    hook = "_update_model_kwargs_for_generation"
    if not _is_own(model, hook):
        return False
    method = getattr(model, hook)
    owner = getattr(method, "__qualname__", "").partition(".")[0]
    if owner not in HARMLESS_WITHOUT or not method.__module__.startswith("transformers.models."):
        return True
    return any(model_kwargs.get(name) is not None for name in HARMLESS_WITHOUT[owner])


def samples_by_itself(model) -> bool:
    """Whether a model has its own decoding loop, as speech models do."""
    return _is_own(model, "_sample")


def _quantises_together(module: torch.nn.Module) -> bool:
    """Whether the way a layer rounds a token can depend on the other tokens of a forward."""
    weight = getattr(module, "weight", None)
    if type(module).__name__ == "Linear8bitLt":  # bitsandbytes, which selects columns by all tokens of a forward
        return getattr(getattr(module, "state", None), "threshold", 0) > 0
    if getattr(weight, "act_quant_kwargs", None) is not None:  # torchao
        return getattr(weight, "act_quant_scale", None) is None
    if type(weight).__name__ == "LinearActivationQuantizedTensor":  # older torchao
        return True
    return type(module).__module__.startswith(
        ("torch.ao.nn.quantized.dynamic", "torch.ao.nn.intrinsic.quantized.dynamic")
    )


_LOOKED_AT: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def warn_of_activations(model: torch.nn.Module) -> None:
    """Warns, once per model, if its layers quantise the activations of a whole forward together."""
    if model in _LOOKED_AT:
        return
    _LOOKED_AT.add(model)
    kinds = {type(module).__name__ for module in model.modules() if _quantises_together(module)}
    if kinds:
        warnings.warn(
            f"layers of this model ({', '.join(sorted(kinds))}) quantise activations dynamically, so that a token "
            "depends on the drafts scored beside it: the text may differ from that of decoding='ar'.",
            UserWarning,
            stacklevel=3,
        )


# Arguments that `generate` itself passes from step to step, or to the first forward alone.
STEP_ARGUMENTS = {
    CACHE,
    "attention_mask",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "inputs_embeds",
    *MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL,
}


def is_stateful(model) -> bool:
    """Whether a model, or a class of models, keeps a state that cannot be rolled back."""
    return bool(getattr(model, "_is_stateful", False))


def makes_dynamic_cache(model) -> bool:
    """Whether `generate` makes a `DynamicCache` for a model."""
    return model._supports_default_dynamic_cache()


def attention_of(config) -> str:
    """The attention that a (text) config names: `"sdpa"`, `"eager"`, ..."""
    return config._attn_implementation


@contextmanager
def attending_by(model, attention: str) -> Iterator[None]:
    """
    While this is open, the text layers of a model run a registered attention, whether or not the model allows it. This
    includes layers with a copy of the configuration, such as those that PEFT's `layer_replication` makes.
    """
    text = model.config.get_text_config(decoder=True)
    configs = {id(text): text}
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if type(config) is type(text) and config._attn_implementation == text._attn_implementation:
            configs[id(config)] = config
    before = text._attn_implementation
    try:
        for config in configs.values():
            config._attn_implementation = attention
        yield
    finally:
        for config in configs.values():
            config._attn_implementation = before


CHECKPOINTING = "gradient_checkpointing"  # of a module, whether it computes activations again


def _checkpointing(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [module for module in model.modules() if getattr(module, CHECKPOINTING, False) is True]


def is_checkpointing(model: torch.nn.Module) -> bool:
    """Whether a model computes activations again in the backward pass (gradient checkpointing)."""
    return bool(_checkpointing(model))


@contextmanager
def without_checkpointing(model: torch.nn.Module) -> Iterator[None]:
    """
    While this is open, activations are kept. Checkpointing is useless without gradients, and with an adapter that
    applies to some tokens only, PEFT would prepare for a backward pass that never comes.
    """
    modules = _checkpointing(model)
    for module in modules:
        setattr(module, CHECKPOINTING, False)
    try:
        yield
    finally:
        for module in modules:
            setattr(module, CHECKPOINTING, True)


CACHED_CHECKPOINT = (
    "_can_checkpoint_with_cache"  # of a layer, whether it keeps its cache when checkpointed; since 5.24
)


def caches_in_checkpoints(model: torch.nn.Module) -> bool:
    """Whether the layers of a model can keep their cache under gradient checkpointing."""
    layers = decoder_layers(model)
    return bool(layers) and all(hasattr(layer, CACHED_CHECKPOINT) for layer in layers)


@contextmanager
def caching_in_checkpoints(model: torch.nn.Module) -> Iterator[None]:
    """While this is open, checkpointed layers keep a cache that their forward does not change."""
    layers = decoder_layers(model) if is_checkpointing(model) else []
    for layer in layers:
        setattr(layer, CACHED_CHECKPOINT, True)
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, CACHED_CHECKPOINT)


def looks_attention_up(model) -> bool:
    """Whether a model looks its attention up in transformers' registry, so that a registered function reaches it."""
    return model._supports_attention_backend


def registered_attention(name: str) -> Callable:
    """The attention function registered under a name."""
    return ALL_ATTENTION_FUNCTIONS[name]


def own_attention() -> Callable:
    """transformers' own `sdpa`, whatever is registered under that name."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


def register_attention(name: str, function: Callable) -> None:
    """Registers an attention function under a name."""
    AttentionInterface.register(name, function)


def flash_kernel() -> Callable | None:
    """The function of the flash-attn package that attends to a cache; `None` if it is not installed."""
    try:
        from flash_attn import flash_attn_with_kvcache
    except ImportError:
        return None
    return flash_attn_with_kvcache


def name_of(model) -> str:
    """The folder or the Hub name that a model was loaded from, else an empty string."""
    return model.config._name_or_path


LOADED_FROM = "_name_or_path"  # its key in a saved config


def decoder_layers(model) -> list[torch.nn.Module]:
    """The layers of a decoder, which gradient checkpointing treats one by one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def attention_layers(decoder: torch.nn.Module) -> list[Any]:
    """The modules of a decoder whose keys and values go into layer `layer_idx` of a cache."""
    return [module for module in decoder.modules() if isinstance(getattr(module, "layer_idx", None), int)]


def has_only_cpu() -> bool:
    """Whether no other device was found; torch does not count a TPU as an accelerator."""
    from transformers.utils import is_torch_xla_available

    return not torch.accelerator.is_available() and not is_torch_xla_available()


def causal_lm_of(model_type: str) -> type | None:
    """transformers' own causal language model of a type, such as `"llama"`; `None` if it has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if model_type not in CONFIG_MAPPING:
        return None
    found: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(CONFIG_MAPPING[model_type], None)  # never a tuple in this mapping
    return found


def compiles_assisted_decoding(model) -> bool:
    """
    Whether transformers itself compiles assisted decoding of a model with a static cache: since 5.24, except on a CPU,
    if every layer keeps all tokens.
    """
    static = StaticCache(config=model.config, max_cache_len=sys.maxsize)  # allocates nothing before its first use
    return model.device.type != "cpu" and all(getattr(layer, "is_croppable", False) for layer in static.layers)


def compile_here() -> CompileConfig:
    """transformers' settings for compiled forwards, which by default it does not compile on a CPU."""
    config = CompileConfig()
    config._compile_all_devices = True  # type: ignore[assignment]  # declared as None
    return config


def compile_settings(config: CompileConfig | None) -> dict[str, Any]:
    """
    The arguments of `torch.compile` in a compile config. Shapes are always fixed. Modes in which torch itself captures
    CUDA graphs are replaced, since those need a cache that never moves; here steps are captured from outside.
    """
    settings = {} if config is None else config.to_dict()
    uncaptured: dict[Any, str | None] = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}
    mode = settings.get("mode")
    return settings | {"dynamic": False, "mode": uncaptured.get(mode, mode)}


def can_compile(model, generation_config) -> bool:
    """Whether the forward of a model can be compiled: transformers' own rule, but also on a CPU."""
    if generation_config.disable_compile or model.device.type not in ("cpu", "cuda", "xpu"):
        return False
    quantizer = getattr(model, "hf_quantizer", None)
    devices = set(getattr(model, "hf_device_map", {}).values())
    return (quantizer is None or quantizer.is_compileable) and len(devices) < 2 and not has_weights_elsewhere(model)


@contextmanager
def explains_failed_compile() -> Iterator[None]:
    """Turns the error that torch raises without a working compiler into one sentence."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except Exception as error:
        causes = [error, error.__cause__, getattr(error, "inner_exception", None)]
        if any(isinstance(cause, (InvalidCxxCompiler, CppCompileError)) for cause in causes):
            raise UsageError(
                "cache_implementation='static' compiles the model's forward, which needs a C++ compiler, and none "
                "that works was found: install one (such as g++), or pass disable_compile=True."
            ) from error
        raise


def end_progress_bars() -> None:
    """Ends the line of every open progress bar, so that an error begins on a new line."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


# The trainer


Arguments = TypeVar("Arguments", bound="transformers.TrainingArguments")


def parsed_as_dict(*names: str) -> Callable[[type[Arguments]], type[Arguments]]:
    """A decorator for subclasses of `TrainingArguments`, which then parse these arguments as JSON if they are text."""

    def decorate(cls: type[Arguments]) -> type[Arguments]:
        cls._VALID_DICT_FIELDS = [*cls._VALID_DICT_FIELDS, *names]
        return cls

    return decorate


def fingerprint_of(data) -> str | None:
    """The fingerprint by which `datasets` identifies a data set; `None` for other data."""
    return getattr(data, "_fingerprint", None)


def name_checkpointing(args) -> None:
    """
    Copies `activation_checkpointing` of training arguments to `gradient_checkpointing`, its only name in transformers
    before 5.23.
    """
    if not hasattr(transformers.TrainingArguments, "activation_checkpointing"):
        if args.activation_checkpointing is not None:
            args.gradient_checkpointing = args.activation_checkpointing
        args.activation_checkpointing = args.gradient_checkpointing


def leave_loss_as_it_is(trainer) -> None:
    """
    Gives `loss_is_scaled_for_ga` of a trainer its meaning in transformers before 5.19, which does not have it: the
    trainer's `compute_loss` divides by the counts of all micro-batches.
    """
    if not hasattr(transformers.Trainer, "loss_is_scaled_for_ga"):
        trainer.model_accepts_loss_kwargs = False
        trainer.compute_loss_func = trainer.compute_loss


def forget_preparation(trainer) -> None:
    """
    Makes a trainer wrap its model when it trains. On several processes, transformers (5.16 to 5.24) mistakes a model
    that it prepared for evaluation for a wrapped one, and each process would train by itself.
    """
    if trainer.model_wrapped is trainer.model:
        vars(trainer.model).pop("_is_accelerate_prepared", None)
        trainer.accelerator._models[:] = [model for model in trainer.accelerator._models if model is not trainer.model]


def router_loss_of(model) -> Callable | None:
    """
    The function by which a mixture of experts computes its router loss from the router's logits (a tuple, `[B * L,
    experts]` for each layer), the number of experts, the experts per token and a mask `[B, L]`. `None` for models
    without such a function.
    """
    function = getattr(sys.modules.get(type(model).__module__), "load_balancing_loss_func", None)
    if function is None:
        return None
    taken = list(inspect.signature(function).parameters)
    return function if taken == ["gate_logits", "num_experts", "top_k", "attention_mask"] else None


@contextmanager
def without_router_logits(model) -> Iterator[None]:
    """
    While this is open, a mixture of experts computes no router loss. In transformers the loss fails during decoding,
    when the mask has more tokens than the forward.
    """
    config = model.config.get_text_config(decoder=True)
    asked = getattr(config, "output_router_logits", None)
    if asked:
        config.output_router_logits = False
    try:
        yield
    finally:
        if asked:
            config.output_router_logits = asked


def on_device(trainer, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch on the device of a trainer's model."""
    return trainer._prepare_inputs(inputs)


# torch and accelerate


def inside_compiled(module) -> torch.nn.Module | None:
    """The module inside a result of `torch.compile`, or `None` for other modules."""
    inner = getattr(module, "_orig_mod", None)
    return inner if isinstance(inner, torch.nn.Module) else None


def undo_compile(module: torch.nn.Module) -> None:
    """Undoes `module.compile()`."""
    module._compiled_call_impl = None


@contextmanager
def not_compiled(model: torch.nn.Module) -> Iterator[None]:
    """While this is open, modules that were compiled in place run uncompiled."""
    compiled = {module: module._compiled_call_impl for module in model.modules() if module._compiled_call_impl}
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in compiled.items():
            module._compiled_call_impl = call


def has_weights_elsewhere(module: torch.nn.Module) -> bool:
    """Whether accelerate loads the weights of a module, or of a part of it, when that module's forward is called."""
    return any(hasattr(part, "_hf_hook") for part in module.modules())


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module does anything besides its class's own forward."""
    own = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return bool(own) or _has_any_global_hook()


# PEFT's activated LoRA, which draft-only adapters use. Its layers have the attribute `VARIANT` and take the argument
# `OFFSETS`: for each row, how many tokens at its end the adapter applies to.

INVOCATION = "alora_invocation_tokens"
OFFSETS = "alora_offsets"
VARIANT = "lora_variant"


def adapters_in_force(model: torch.nn.Module) -> tuple:
    """The PEFT adapters that each layer applies."""
    names = ("active_adapters", "disable_adapters", "merged_adapters")
    layers = [module for module in model.modules() if hasattr(module, "merged_adapters")]
    return tuple(str([getattr(layer, name, None) for name in names]) for layer in layers)


def forget_offsets(model: torch.nn.Module) -> None:
    """Removes the hooks that PEFT leaves when a forward fails, which would keep the adapter on."""
    for module in model.modules():
        for handle in vars(module).pop("_peft_gradient_checkpointing_forward_hooks", []):
            handle.remove()
        for number, hook in list(module._forward_pre_hooks.items()):
            if OFFSETS in getattr(hook, "keywords", {}):
                del module._forward_pre_hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)


@functools.cache
def _hooking_less(cls: type) -> type:
    class HookingLess(cls):
        before = cls

        def _enable_peft_forward_hooks(self, *args, **kwargs):
            if not any(kwargs.get(OFFSETS) or ()):
                kwargs.pop(OFFSETS, None)
            return super()._enable_peft_forward_hooks(*args, **kwargs)

        def __reduce_ex__(self, protocol):
            return object.__new__, (cls,), self.__dict__

    HookingLess.__name__, HookingLess.__qualname__, HookingLess.__module__ = (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    return HookingLess


def hook_less(model) -> None:
    """
    Stops PEFT from telling every layer, in each call of its wrapper, that an activated LoRA applies to no token. Its
    hooks for this would also affect the calls of other threads, whose batches can have another size.
    """
    tuner: Any = getattr(model, "base_model", None)
    if hasattr(type(tuner), "_enable_peft_forward_hooks") and not hasattr(type(tuner), "before"):
        cls: Any = type(tuner)
        tuner.__class__ = _hooking_less(cls)


def hook_alike(model) -> None:
    """Undoes `hook_less`."""
    tuner: Any = getattr(model, "base_model", None)
    if "before" in vars(type(tuner)):
        tuner.__class__ = type(tuner).before
