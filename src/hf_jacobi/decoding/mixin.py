"""`generate(decoding="jacobi")`: the only place that touches transformers' `generate`."""

from __future__ import annotations

import copy
import functools
import types
from contextlib import contextmanager

import torch
from transformers import GenerationMixin
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.generation.utils import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .config import JacobiConfig
from .loop import jacobi_decode


DECODINGS = ("ar", "jacobi")
_transformers_generate = GenerationMixin.generate


class JacobiGenerationMixin:
    """Adds `decoding`, `jacobi_config` and `output_trajectory` to a model's `generate`."""

    @torch.no_grad()
    def generate(
        self,
        inputs=None,
        generation_config=None,
        logits_processor=None,
        stopping_criteria=None,
        prefix_allowed_tokens_fn=None,
        synced_gpus=None,
        assistant_model=None,
        streamer=None,
        negative_prompt_ids=None,
        negative_prompt_attention_mask=None,
        custom_generate=None,
        *,
        decoding: str | None = None,
        jacobi_config: JacobiConfig | dict | None = None,
        output_trajectory: bool | None = None,
        **kwargs,
    ):
        """
        `GenerationMixin.generate` with a choice of how text is decoded; every other argument is transformers' own.

        Args:
            decoding (`"ar"` or `"jacobi"`, *optional*):
                `"ar"` is transformers' own decoding. Left out, it is read from the generation config, and is `"ar"` if
                that says nothing.
            jacobi_config ([`JacobiConfig`] or `dict`, *optional*):
                Settings of Jacobi decoding. Left out, they are read from the generation config (`jacobi`).
            output_trajectory (`bool`, *optional*):
                With `return_dict_in_generate=True`, also return every draft.

        Returns:
            What `generate` returns: `[B, L]` token ids, or with `return_dict_in_generate=True` a [`JacobiOutput`],
            transformers' `GenerateDecoderOnlyOutput` with `jacobi_stats` and `trajectory`.

        Raises:
            `ValueError`: an argument is out of range, or Jacobi decoding cannot serve the model or the mode.
        """
        arguments = {
            "generation_config": generation_config,
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "prefix_allowed_tokens_fn": prefix_allowed_tokens_fn,
            "synced_gpus": synced_gpus,
            "assistant_model": assistant_model,
            "streamer": streamer,
            "negative_prompt_ids": negative_prompt_ids,
            "negative_prompt_attention_mask": negative_prompt_attention_mask,
            "custom_generate": custom_generate,
        }
        arguments = {name: value for name, value in arguments.items() if value is not None}
        plain = functools.partial(_plain_generate(self), self, inputs)
        if custom_generate is None or decoding is not None:
            decoding = decoding or _setting("decoding", generation_config, self) or "ar"
        if decoding not in (*DECODINGS, None):
            raise ValueError(f"`decoding` must be one of {DECODINGS}, got {decoding!r}.")
        if decoding != "jacobi":
            if jacobi_config is not None or output_trajectory:
                raise ValueError(
                    "`jacobi_config` and `output_trajectory` are for Jacobi decoding: pass decoding='jacobi' too."
                )
            return plain(**arguments, **kwargs)
        if custom_generate is not None:
            raise ValueError("`custom_generate` and decoding='jacobi' are two ways to decode: pass one of them.")
        if assistant_model is not None:
            raise ValueError("Jacobi decoding needs no draft model: drop `assistant_model`, or use decoding='ar'.")
        if jacobi_config is None:
            jacobi_config = _setting("jacobi", generation_config, self)
        bound = {
            "jacobi_config": JacobiConfig.coerce(jacobi_config),
            "output_trajectory": bool(output_trajectory),
            "streamer": streamer,
            "synced_gpus": _is_sharded(self) if synced_gpus is None else synced_gpus,
        }
        with _stop_strings_as_criterion(self, arguments, kwargs):
            arguments["custom_generate"] = functools.partial(jacobi_decode, **bound)
            return plain(**arguments, **kwargs)


def _is_sharded(model) -> bool:
    """Whether the processes of a group share the model's weights, so that all must run the same forwards."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def _setting(name: str, generation_config, model):
    """A setting of ours in the generation config of the call, else in that of the model."""
    for config in (generation_config, model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


@contextmanager
def _stop_strings_as_criterion(model, arguments: dict, kwargs: dict):
    """
    Turns `stop_strings` into a stopping criterion before transformers looks at them.

    transformers builds that criterion itself, but not for a callable `custom_generate`: it drops the tokenizer there.
    """
    own, of_call = model.generation_config, arguments.get("generation_config")
    strings = kwargs.pop("stop_strings", None) or _setting("stop_strings", of_call, model)
    if strings is None:
        yield
        return
    if kwargs.get("tokenizer") is None:
        raise ValueError("`stop_strings` are compared as text: pass the model's tokenizer as `tokenizer` with them.")
    criterion = StopStringCriteria(tokenizer=kwargs["tokenizer"], stop_strings=strings)
    arguments["stopping_criteria"] = StoppingCriteriaList([criterion, *arguments.get("stopping_criteria", [])])
    if of_call is not None:
        arguments["generation_config"] = _without_stop_strings(of_call)
    model.generation_config = _without_stop_strings(own)
    try:
        yield
    finally:
        model.generation_config = own


def _without_stop_strings(generation_config):
    changed = copy.deepcopy(generation_config)
    changed.stop_strings = None
    return changed


def _plain_generate(model):
    """The `generate` that the class of `model` has without this package."""
    for cls in type(model).__mro__:
        if cls is not JacobiGenerationMixin and "generate" in vars(cls):
            function = vars(cls)["generate"]
            return _transformers_generate if function is JacobiGenerationMixin.generate else function
    raise TypeError(f"{type(model).__name__} has no `generate`.")


def enable(model=None):
    """
    Gives `generate` the arguments `decoding`, `jacobi_config` and `output_trajectory`.

    Calls that do not ask for Jacobi decoding, by argument or by generation config, run transformers' own code.

    Args:
        model: a causal language model, or a wrapper of one (PEFT, `torch.compile`, DDP). `None`: every model of the
            process.

    Returns:
        `model`, as it was passed.

    Raises:
        `TypeError`: `model` cannot generate.

    Example:

    ```python
    >>> model = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(path))
    >>> model.generate(**inputs, decoding="jacobi", max_new_tokens=256)
    ```
    """
    if model is None:
        GenerationMixin.generate = JacobiGenerationMixin.generate
        return None
    inner = _unwrap(model)
    inner.generate = types.MethodType(JacobiGenerationMixin.generate, inner)
    # A config derived from the model's loses our keys when it is loaded again; one of its own keeps them.
    inner.generation_config._from_model_config = False
    return model


def disable(model=None):
    """
    Undoes `enable`: `disable(model)` what `enable(model)` did, `disable()` what `enable()` did.

    Args:
        model: the model to undo it for. `None`: the process; a model enabled by itself stays so.

    Returns:
        `model`, as it was passed.
    """
    if model is None:
        GenerationMixin.generate = _transformers_generate
        return None
    inner = _unwrap(model)
    vars(inner).pop("generate", None)
    return model


def _unwrap(model) -> GenerationMixin:
    """The model inside wrappers such as PEFT's, `torch.compile`'s or DDP's."""
    inner = model
    while not isinstance(inner, GenerationMixin):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), torch.nn.Module):
            inner = inner._orig_mod
        elif isinstance(getattr(inner, "module", None), torch.nn.Module):
            inner = inner.module
        else:
            raise TypeError(
                f"hf_jacobi.enable takes a transformers model that can generate, got {type(model).__name__}."
            )
    return inner
