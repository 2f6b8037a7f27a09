"""`generate(decoding="jacobi")`: the only place that touches transformers' `generate`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationMixin
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .compat import GENERATE_ARGUMENTS, cache_among, hook_alike, hook_less, inside_compiled, make_own
from .config import JacobiConfig
from .errors import UsageError
from .loop import jacobi_decode
from .support import refuse_other_caches


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    class GenerativeModel(PreTrainedModel, GenerationMixin):
        """A model of transformers that can generate."""


DECODINGS = ("ar", "jacobi")
_THEIRS = GenerationMixin.generate
_OURS: dict[Callable, Callable] = {}  # each function that `enable()` installed, with the one that it replaced
_enabled = False  # whether `enable()` is in force
# The model whose call is passing through wrappers of its `generate`, and how many wrappers remain: for a call that
# returns to us from a wrapper, the decoding has been chosen already.
_ON_ITS_WAY: ContextVar[tuple[object, int]] = ContextVar("hf_jacobi_on_its_way", default=(None, 0))


class JacobiGenerationMixin:
    """Adds `decoding`, `jacobi_config` and `output_trajectory` to the `generate` of the class it is mixed into."""

    def generate(
        self,
        *args,
        decoding: str | None = None,
        jacobi_config: JacobiConfig | dict | None = None,
        output_trajectory: bool | None = None,
        **kwargs,
    ):
        """
        `GenerationMixin.generate` with a choice of how text is decoded; every other argument is transformers' own.

        Args:
            decoding (`"ar"` or `"jacobi"`, *optional*):
                `"ar"` is transformers' own decoding. If omitted, the generation config decides; the default is `"ar"`.
            jacobi_config ([`JacobiConfig`] or `dict`, *optional*):
                Settings of Jacobi decoding. If omitted, those of the generation config (`jacobi`); a seed alone is
                added to those.
            output_trajectory (`bool`, *optional*):
                With `return_dict_in_generate=True`, also return every draft.

        Returns:
            What `generate` returns: `[B, L]` token ids, or with `return_dict_in_generate=True` a [`JacobiOutput`],
            transformers' `GenerateDecoderOnlyOutput` with `jacobi_stats` and `trajectory`.

        Raises:
            `ValueError`: an argument is out of range, or Jacobi decoding cannot serve the model or the mode.
        """
        own = {"decoding": decoding, "jacobi_config": jacobi_config, "output_trajectory": output_trajectory}
        is_enabled = isinstance(self, JacobiGenerationMixin)  # a wrapper can keep this method beyond `disable`
        wrappers = vars(self).get("_own_generates", ())
        model, left = _ON_ITS_WAY.get()
        on_its_way = model is self and not _given(own)
        left = left if on_its_way else len(wrappers)
        below = (
            super().generate  # type: ignore[misc]  # of the class that this is mixed into
            if is_enabled
            else functools.partial(type(self).generate, self)
        )
        plain = wrappers[left - 1] if left else below
        before = _ON_ITS_WAY.set((self, left - 1) if left else (None, 0))
        try:
            if on_its_way or not is_enabled:
                return plain(*args, **kwargs, **_given(own))
            return decode_by(plain, self, args, kwargs, **own)
        finally:
            _ON_ITS_WAY.reset(before)


def _given(own: dict) -> dict:
    return {name: value for name, value in own.items() if value is not None}


def _generate_of_process(plain):
    """The function by which `enable()` replaces `GenerationMixin.generate`, which was `plain`."""

    @functools.wraps(plain)
    def generate(self, *args, decoding=None, jacobi_config=None, output_trajectory=None, **kwargs):
        own = {"decoding": decoding, "jacobi_config": jacobi_config, "output_trajectory": output_trajectory}
        bound = functools.partial(plain, self)
        decided = isinstance(self, JacobiGenerationMixin) or (_ON_ITS_WAY.get()[0] is self and not _given(own))
        if decided or not _enabled:
            return bound(*args, **kwargs, **_given(own))
        make_own(self.generation_config)  # as in `enable`
        # Another library's wrapper may call the function that an earlier `enable()` installed.
        before = _ON_ITS_WAY.set((None, 0) if plain is _THEIRS else (self, 0))
        try:
            return decode_by(bound, self, args, kwargs, **own)
        finally:
            _ON_ITS_WAY.reset(before)

    _OURS[generate] = plain
    return generate


def decode_by(plain, model, args: tuple, kwargs: dict, decoding, jacobi_config, output_trajectory):
    """
    Runs `plain`, the original `generate`: as it is, or for Jacobi decoding with a `custom_generate`.

    Args:
        plain: the `generate` to call.
        model: the model that generates.
        args, kwargs: the arguments of the call.
        decoding, jacobi_config, output_trajectory: as in [`JacobiGenerationMixin.generate`].
    """
    of_call = args[1] if len(args) > 1 else kwargs.get("generation_config")
    if _decoding(decoding, kwargs, of_call, model) == "ar":
        if jacobi_config is not None or output_trajectory:
            raise UsageError(
                "`jacobi_config` and `output_trajectory` are for Jacobi decoding: pass decoding='jacobi' as well."
            )
        return plain(*args, **kwargs)
    kwargs = dict(zip(_positional(plain), args)) | kwargs
    _refuse_other_decoding(kwargs, of_call, model)
    config = _settings(jacobi_config, of_call, model)
    _switch_cache_on(kwargs, of_call, model)
    synced_gpus = kwargs.get("synced_gpus")
    bound: dict[str, Any] = {
        "jacobi_config": config,
        "output_trajectory": bool(output_trajectory),
        "streamer": kwargs.get("streamer"),
        "synced_gpus": _is_sharded(model) if synced_gpus is None else synced_gpus,
        "fills_cache": cache_among(kwargs) is not None,
    }
    _turn_stop_strings_into_a_criterion(model, kwargs)
    calls: list = []
    result = plain(**kwargs, custom_generate=functools.partial(jacobi_decode, **bound, calls=calls))
    if not calls:
        raise UsageError(
            f"the `generate` of {type(model).__name__} did not pass on the `custom_generate` of Jacobi decoding, so "
            "its text was decoded in another way: use decoding='ar'."
        )
    return result


def _decoding(decoding: str | None, kwargs: dict, of_call, model) -> str:
    """`"ar"` or `"jacobi"`: as the call says, else its generation config, else that of the model, else `"ar"`."""
    if decoding is None:
        decoding = "ar" if kwargs.get("custom_generate") else setting_of("decoding", of_call, model) or "ar"
    if decoding not in DECODINGS:
        raise UsageError(f"`decoding` must be one of {DECODINGS}, got {decoding!r}.")
    if "jacobi" in kwargs:
        raise UsageError(
            "`generate` takes settings as `jacobi_config`; `jacobi` is their name in a generation config."
        )
    return decoding


def _refuse_other_decoding(kwargs: dict, of_call, model) -> None:
    """Refuses arguments that ask for another way to decode."""
    if kwargs.get("custom_generate") is not None:
        raise UsageError("`custom_generate` and decoding='jacobi' are two ways to decode: pass only one of them.")
    if kwargs.get("assistant_model") is not None:
        raise UsageError("Jacobi decoding needs no draft model: drop `assistant_model`, or use decoding='ar'.")
    if (kwargs.get("cache_implementation") or setting_of("cache_implementation", of_call, model)) == "paged":
        raise UsageError(
            "cache_implementation='paged' asks for continuous batching, another way to decode: drop it, or use "
            "decoding='ar'."
        )
    refuse_other_caches(kwargs.get("cache_implementation"))  # before transformers makes the cache
    if kwargs.get("token_healing", setting_of("token_healing", of_call, model)):
        raise UsageError(
            "Jacobi decoding does not support token healing: drop token_healing=True, or use decoding='ar'."
        )


def _settings(jacobi_config: JacobiConfig | dict | None, of_call, model) -> JacobiConfig:
    """The settings of the call, else those of the generation config; a seed alone is added to the latter."""
    if jacobi_config is None or (isinstance(jacobi_config, dict) and set(jacobi_config) == {"seed"}):
        of_checkpoint = JacobiConfig.coerce(setting_of("jacobi", of_call, model))
        return dataclasses.replace(of_checkpoint, **(jacobi_config or {}))
    return JacobiConfig.coerce(jacobi_config)


def _switch_cache_on(kwargs: dict, of_call, model) -> None:
    """
    Sets `use_cache` unless the call itself says otherwise: `Trainer` leaves `use_cache=False` in the model's configs,
    which no user asked for.
    """
    refused = of_call is not None and of_call is not model.generation_config and of_call.use_cache is False
    if kwargs.get("use_cache") is not None or refused:
        return
    if of_call is None:
        kwargs["use_cache"] = True
    else:
        kwargs["generation_config"] = copy.deepcopy(of_call)
        kwargs["generation_config"].use_cache = True


def _positional(generate) -> list[str]:
    """The names of the positional arguments of a bound `generate`."""
    parameters = inspect.signature(generate).parameters
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        return list(GENERATE_ARGUMENTS)
    return list(parameters)


def _is_sharded(model) -> bool:
    """Whether processes share the model's weights, so that all of them must run the same forwards."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def setting_of(name: str, generation_config, model):
    """A setting in the generation config of the call, else in that of the model, else `None`."""
    for config in (generation_config, model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def _turn_stop_strings_into_a_criterion(model, kwargs: dict) -> None:
    """
    Replaces `stop_strings`, in the arguments or in a generation config, by a stopping criterion in the arguments.

    transformers builds this criterion itself, but not for a callable `custom_generate`: it drops the tokenizer then.
    """
    of_call = kwargs.get("generation_config")
    strings = kwargs.get("stop_strings") or setting_of("stop_strings", of_call, model)
    if strings is None:
        return
    if kwargs.get("tokenizer") is None:
        raise UsageError("`stop_strings` are compared as text: pass the model's tokenizer as `tokenizer` with them.")
    criterion = StopStringCriteria(tokenizer=kwargs["tokenizer"], stop_strings=strings)
    kwargs["stopping_criteria"] = StoppingCriteriaList([criterion, *(kwargs.get("stopping_criteria") or [])])
    if getattr(of_call, "stop_strings", None) is not None:
        kwargs["generation_config"] = copy.deepcopy(of_call)
        kwargs["generation_config"].stop_strings = None
    if model.generation_config.stop_strings is not None:
        kwargs["stop_strings"] = None  # an argument, even None, overrides the model's own
    else:
        kwargs.pop("stop_strings", None)


def enable(model=None):
    """
    Gives `generate` the arguments `decoding`, `jacobi_config` and `output_trajectory`.

    Calls that do not choose Jacobi decoding, by argument or by generation config, run transformers' own code.

    Args:
        model: a causal language model, or a wrapper of one (PEFT, `torch.compile`, DDP). `None` enables every model of
            the process.

    Returns:
        `model` itself.

    If another library has put a `generate` on the model itself, it stays in force and is called by ours.

    Raises:
        `TypeError`: `model` cannot generate.

    Example:

    ```python
    >>> model = hf_jacobi.enable(AutoModelForCausalLM.from_pretrained(path))
    >>> model.generate(**inputs, decoding="jacobi", max_new_tokens=256)
    ```
    """
    global _enabled
    if model is None:
        _enabled = True
        if GenerationMixin.generate not in _OURS:
            GenerationMixin.generate = _generate_of_process(GenerationMixin.generate)
        return None
    inner: Any = unwrap(model)
    hook_less(model)
    if not isinstance(inner, JacobiGenerationMixin):
        inner.__class__ = _enabled_class(type(inner))
    if _is_carried(vars(inner).get("generate")):
        inner._carried_generate = vars(inner).pop("generate")
    elif "generate" in vars(inner):
        inner._own_generates = (*vars(inner).get("_own_generates", ()), vars(inner).pop("generate"))
    make_own(inner.generation_config)
    return model


def disable(model=None):
    """
    Undoes `enable`: `disable(model)` undoes `enable(model)`, and `disable()` undoes `enable()`.

    Args:
        model: the model to disable. `None` disables the process; models that were enabled individually stay enabled.

    Returns:
        `model` itself.
    """
    global _enabled
    if model is None:
        _enabled = False  # inside another library's wrapper, our function stays and only passes calls on
        while GenerationMixin.generate in _OURS:
            GenerationMixin.generate = _OURS[GenerationMixin.generate]
        return None
    inner: Any = unwrap(model)
    hook_alike(model)
    if isinstance(inner, JacobiGenerationMixin):
        inner.__class__ = _disabled_class(type(inner))
    if (wrappers := vars(inner).get("_own_generates")) and "generate" not in vars(inner):
        *inner._own_generates, inner.generate = wrappers
    if "_carried_generate" in vars(inner):
        inner.generate = vars(inner).pop("_carried_generate")
    return model


def _disabled_class(cls: type) -> type:
    """A class without what `enable` added to it; later subclasses, such as FSDP2's, are kept."""
    if "_disabled_class" in vars(cls):
        return vars(cls)["_disabled_class"]
    if not hasattr(cls, "_disabled_class"):
        raise UsageError(
            f"{cls.__name__} itself inherits from JacobiGenerationMixin, which `disable` cannot undo: take a model of "
            "another class."
        )
    bases = tuple(_disabled_class(base) if hasattr(base, "_disabled_class") else base for base in cls.__bases__)
    names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, names)


def _is_carried(generate) -> bool:
    """Whether it is the `generate` that transformers binds to a published checkpoint: its own copy of the decoder."""
    function: Any = getattr(generate, "func", None)
    return getattr(function, "__module__", "").endswith(".custom_generate.generate") and (
        "JACOBI" in function.__globals__
    )


@functools.cache
def _enabled_class(cls: type) -> type:
    """
    The class of an enabled model: a subclass of `JacobiGenerationMixin` and `cls` that has the name of `cls`.

    A class, unlike an attribute of the model, makes no reference cycle that would keep the weights of a deleted model
    in memory. transformers writes its name into `config.json`.
    """
    names: dict[str, Any] = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    names |= {"_disabled_class": cls, "__reduce_ex__": _reduce_enabled}
    return type(cls.__name__, (JacobiGenerationMixin, cls), names)


def _reduce_enabled(model, protocol):
    """Pickles an enabled model by its original class; loading enables it again."""
    return _new_enabled, (type(model)._disabled_class,), model.__dict__


def _new_enabled(cls: type):
    enabled: Any = _enabled_class(cls)
    return enabled.__new__(enabled)


def unwrap(model) -> GenerativeModel:
    """
    The model inside wrappers such as PEFT's, `torch.compile`'s or DDP's.

    Raises:
        `TypeError`: it is not a model of transformers that can generate.
    """
    inner = model
    while not isinstance(inner, GenerationMixin):
        if hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        elif (compiled := inside_compiled(inner)) is not None:
            inner = compiled
        elif isinstance(getattr(inner, "module", None), torch.nn.Module):
            inner = inner.module
        else:
            raise TypeError(
                f"hf_jacobi.enable takes a transformers model that can generate, got {type(model).__name__}."
            )
    return cast("GenerativeModel", inner)  # every GenerationMixin of transformers is a PreTrainedModel
