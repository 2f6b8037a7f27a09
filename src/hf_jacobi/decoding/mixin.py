"""`generate(decoding="jacobi")`: the only place that touches transformers' `generate`."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
from contextvars import ContextVar

import torch
from transformers import GenerationMixin
from transformers.generation import StoppingCriteriaList, StopStringCriteria
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from .compat import GENERATE_ARGUMENTS, cache_among, hook_alike, hook_less, inside_compiled, make_own
from .config import JacobiConfig
from .errors import UsageError
from .loop import jacobi_decode


DECODINGS = ("ar", "jacobi")
_THEIRS = GenerationMixin.generate
_OURS: dict = {}  # each function that `enable()` put in its place, with what was there before
_enabled = False  # whether `enable()` holds
# Of which model a call is on its way through wrappers of its `generate`, and how many of those are left: what comes
# back to us out of one was decided before.
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
                `"ar"` is transformers' own decoding. Left out, it is read from the generation config, and is `"ar"` if
                that says nothing.
            jacobi_config ([`JacobiConfig`] or `dict`, *optional*):
                Settings of Jacobi decoding. Left out, those of the generation config (`jacobi`); a seed alone is added
                to those.
            output_trajectory (`bool`, *optional*):
                With `return_dict_in_generate=True`, also return every draft.

        Returns:
            What `generate` returns: `[B, L]` token ids, or with `return_dict_in_generate=True` a [`JacobiOutput`],
            transformers' `GenerateDecoderOnlyOutput` with `jacobi_stats` and `trajectory`.

        Raises:
            `ValueError`: an argument is out of range, or Jacobi decoding cannot serve the model or the mode.
        """
        own = {"decoding": decoding, "jacobi_config": jacobi_config, "output_trajectory": output_trajectory}
        is_enabled = isinstance(self, JacobiGenerationMixin)  # a wrapper may hold this method longer than `disable`
        wrappers = vars(self).get("_own_generates", ())
        model, left = _ON_ITS_WAY.get()
        on_its_way = model is self and not _given(own)
        left = left if on_its_way else len(wrappers)
        below = super().generate if is_enabled else functools.partial(type(self).generate, self)
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
    """What `enable()` puts in the place of `GenerationMixin.generate`, which was `plain`."""

    @functools.wraps(plain)
    def generate(self, *args, decoding=None, jacobi_config=None, output_trajectory=None, **kwargs):
        own = {"decoding": decoding, "jacobi_config": jacobi_config, "output_trajectory": output_trajectory}
        bound = functools.partial(plain, self)
        decided = isinstance(self, JacobiGenerationMixin) or (_ON_ITS_WAY.get()[0] is self and not _given(own))
        if decided or not _enabled:
            return bound(*args, **kwargs, **_given(own))
        make_own(self.generation_config)  # as in `enable`
        # Another library's wrapper may lead to what an earlier `enable()` put there.
        before = _ON_ITS_WAY.set((None, 0) if plain is _THEIRS else (self, 0))
        try:
            return decode_by(bound, self, args, kwargs, **own)
        finally:
            _ON_ITS_WAY.reset(before)

    _OURS[generate] = plain
    return generate


def decode_by(plain, model, args: tuple, kwargs: dict, decoding, jacobi_config, output_trajectory):
    """
    Decides between `plain`, the `generate` that was there before, and Jacobi decoding through its door.

    Args:
        plain: what is called with the arguments, for Jacobi decoding with a `custom_generate` among them.
        model: the one that generates.
        args, kwargs: the arguments of the call.
        decoding, jacobi_config, output_trajectory: as in [`JacobiGenerationMixin.generate`].
    """
    of_call = args[1] if len(args) > 1 else kwargs.get("generation_config")
    if decoding is None:
        decoding = "ar" if kwargs.get("custom_generate") else setting_of("decoding", of_call, model) or "ar"
    if decoding not in DECODINGS:
        raise UsageError(f"`decoding` must be one of {DECODINGS}, got {decoding!r}.")
    if "jacobi" in kwargs:
        raise UsageError(
            "`generate` takes settings as `jacobi_config`; `jacobi` is their name in a generation config."
        )
    if decoding == "ar":
        if jacobi_config is not None or output_trajectory:
            raise UsageError(
                "`jacobi_config` and `output_trajectory` are for Jacobi decoding: pass decoding='jacobi' too."
            )
        return plain(*args, **kwargs)
    kwargs = dict(zip(_positional(plain), args)) | kwargs
    if kwargs.get("custom_generate") is not None:
        raise UsageError("`custom_generate` and decoding='jacobi' are two ways to decode: pass one of them.")
    if kwargs.get("assistant_model") is not None:
        raise UsageError("Jacobi decoding needs no draft model: drop `assistant_model`, or use decoding='ar'.")
    if (kwargs.get("cache_implementation") or setting_of("cache_implementation", of_call, model)) == "paged":
        raise UsageError(
            "cache_implementation='paged' asks for continuous batching, another way to decode: drop it, or use "
            "decoding='ar'."
        )
    if kwargs.get("token_healing", setting_of("token_healing", of_call, model)):
        raise UsageError(
            "Jacobi decoding does not support token healing: drop token_healing=True, or use decoding='ar'."
        )
    if jacobi_config is None or (isinstance(jacobi_config, dict) and set(jacobi_config) == {"seed"}):
        of_checkpoint = JacobiConfig.coerce(setting_of("jacobi", of_call, model))
        jacobi_config = dataclasses.replace(of_checkpoint, **(jacobi_config or {}))
    asked = of_call is not None and of_call is not model.generation_config and of_call.use_cache is False
    if kwargs.get("use_cache") is None and not asked:
        # `Trainer` leaves use_cache=False in the model's configs, which nobody asked for.
        if of_call is None:
            kwargs["use_cache"] = True
        else:
            kwargs["generation_config"] = of_call = copy.deepcopy(of_call)
            of_call.use_cache = True
    synced_gpus = kwargs.get("synced_gpus")
    bound = {
        "jacobi_config": JacobiConfig.coerce(jacobi_config),
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
            f"the `generate` of {type(model).__name__} did not hand on the `custom_generate` of Jacobi decoding, so "
            "its text came about in another way: use decoding='ar'."
        )
    return result


def _positional(generate) -> list[str]:
    """The names of the arguments of a bound `generate` that may go without one."""
    parameters = inspect.signature(generate).parameters
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters.values()):
        return list(GENERATE_ARGUMENTS)
    return list(parameters)


def _is_sharded(model) -> bool:
    """Whether the processes of a group share the model's weights, so that all must run the same forwards."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1 and (is_deepspeed_zero3_enabled() or is_fsdp_managed_module(model))


def setting_of(name: str, generation_config, model):
    """A setting of ours in the generation config of the call, else in that of the model, else `None`."""
    for config in (generation_config, model.generation_config):
        value = getattr(config, name, None)
        if value is not None:
            return value
    return None


def _turn_stop_strings_into_a_criterion(model, kwargs: dict) -> None:
    """
    Replaces `stop_strings`, wherever they stand, by a stopping criterion in the arguments of the call.

    transformers builds that criterion itself, but not for a callable `custom_generate`: it drops the tokenizer there.
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
        kwargs["stop_strings"] = None  # an argument, even None, comes before the model's own
    else:
        kwargs.pop("stop_strings", None)


def enable(model=None):
    """
    Gives `generate` the arguments `decoding`, `jacobi_config` and `output_trajectory`.

    Calls that do not ask for Jacobi decoding, by argument or by generation config, run transformers' own code.

    Args:
        model: a causal language model, or a wrapper of one (PEFT, `torch.compile`, DDP). `None`: every model of the
            process.

    Returns:
        `model`, as it was passed.

    A `generate` that another library put on the model itself stays in force: ours comes before it.

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
    inner = unwrap(model)
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
    Undoes `enable`: `disable(model)` what `enable(model)` did, `disable()` what `enable()` did.

    Args:
        model: the model to undo it for. `None`: the process; a model enabled by itself stays so.

    Returns:
        `model`, as it was passed.
    """
    global _enabled
    if model is None:
        _enabled = False  # under another library's wrapper ours stays, and hands on what it gets
        while GenerationMixin.generate in _OURS:
            GenerationMixin.generate = _OURS[GenerationMixin.generate]
        return None
    inner = unwrap(model)
    hook_alike(model)
    if isinstance(inner, JacobiGenerationMixin):
        inner.__class__ = _disabled_class(type(inner))
    if (wrappers := vars(inner).get("_own_generates")) and "generate" not in vars(inner):
        *inner._own_generates, inner.generate = wrappers
    if "_carried_generate" in vars(inner):
        inner.generate = vars(inner).pop("_carried_generate")
    return model


def _disabled_class(cls: type) -> type:
    """A class without what `enable` put into it; a class that was put over that since, as FSDP2 does, stays."""
    if "_disabled_class" in vars(cls):
        return cls._disabled_class
    if not hasattr(cls, "_disabled_class"):
        raise UsageError(f"{cls.__name__} inherits from JacobiGenerationMixin by itself, which `disable` cannot undo.")
    bases = tuple(_disabled_class(base) if hasattr(base, "_disabled_class") else base for base in cls.__bases__)
    names = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls)(cls.__name__, bases, names)


def _is_carried(generate) -> bool:
    """Whether it is what transformers binds to a model that `publish` published: that decoder, not this one."""
    function = getattr(generate, "func", None)
    return getattr(function, "__module__", "").endswith(".custom_generate.generate") and (
        "JACOBI" in function.__globals__
    )


@functools.cache
def _enabled_class(cls: type) -> type:
    """
    The class of an enabled model: `cls` with `JacobiGenerationMixin` before it, under its own name.

    A class of its own, rather than an attribute of the model, leaves no reference cycle that would keep the weights
    of a deleted model in memory; the name is what transformers writes into `config.json`.
    """
    names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    names |= {"_disabled_class": cls, "__reduce_ex__": _reduce_enabled}
    return type(cls.__name__, (JacobiGenerationMixin, cls), names)


def _reduce_enabled(model, protocol):
    """Pickles an enabled model as one of its own class that is enabled when it is loaded."""
    return _new_enabled, (type(model)._disabled_class,), model.__dict__


def _new_enabled(cls: type):
    enabled = _enabled_class(cls)
    return enabled.__new__(enabled)


def unwrap(model) -> GenerationMixin:
    """The model inside wrappers such as PEFT's, `torch.compile`'s or DDP's."""
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
    return inner
