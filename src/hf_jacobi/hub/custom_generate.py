"""
`custom_generate/generate.py` of a published checkpoint, through which transformers decodes it without `hf_jacobi`.

`hf_jacobi.publish` copies this file, the modules of `hf_jacobi.decoding` that it needs, and the settings into the
published folder, where its imports resolve. Nothing imports it in `hf_jacobi` itself.
"""

from __future__ import annotations

import functools
from typing import Any

from .mixin import decode_by, setting_of
from .settings import ADAPTER, DECODING, JACOBI


def generate(
    *args: Any,
    model: Any,
    decoding: str | None = None,
    jacobi_config: Any = None,
    output_trajectory: bool | None = None,
    **kwargs: Any,
) -> Any:
    """
    `model.generate` with Jacobi decoding; `decoding="ar"` runs transformers' own decoding.

    Args:
        args, kwargs: the arguments of transformers' `generate`.
        model: passed by transformers. Keyword-only, because transformers binds it before the other arguments.
        decoding, jacobi_config, output_trajectory: as in `hf_jacobi`.
    """
    of_call = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def setting(name: str, of_checkpoint: Any) -> Any:
        if not ADAPTER:
            return setting_of(name, of_call, model) or of_checkpoint
        own = of_call is not model.generation_config  # the model's own config is that of the base
        return (getattr(of_call, name, None) if own else None) or of_checkpoint

    if decoding is None:
        decoding = "ar" if kwargs.get("custom_generate") else setting("decoding", DECODING)
    if decoding == "jacobi" and jacobi_config is None:
        jacobi_config = setting("jacobi", JACOBI)
    plain = functools.partial(type(model).generate, model)
    return decode_by(plain, model, args, kwargs, decoding, jacobi_config, output_trajectory)
