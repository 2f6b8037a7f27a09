"""
`custom_generate/generate.py` of a published checkpoint, by which transformers decodes it without this library.

`hf_jacobi.publish` copies this file, the modules of `hf_jacobi.decoding` that it needs and the settings into the
published folder; here it is only read. Its imports are those of that folder.
"""

from __future__ import annotations

import functools

from .mixin import decode_by, setting_of
from .settings import ADAPTER, DECODING, JACOBI


def generate(*args, model, decoding=None, jacobi_config=None, output_trajectory=None, **kwargs):
    """
    `model.generate` by Jacobi decoding; `decoding="ar"` is transformers' own.

    Args:
        args, kwargs: those of transformers' `generate`.
        model: passed by transformers. By keyword alone, since it is bound before the other arguments.
        decoding, jacobi_config, output_trajectory: as `hf_jacobi` describes them.
    """
    of_call = args[1] if len(args) > 1 else kwargs.get("generation_config")

    def setting(name, of_checkpoint):
        if not ADAPTER:
            return setting_of(name, of_call, model) or of_checkpoint
        own = of_call is not model.generation_config  # which is that of the base
        return (getattr(of_call, name, None) if own else None) or of_checkpoint

    if decoding is None:
        decoding = "ar" if kwargs.get("custom_generate") else setting("decoding", DECODING)
    if decoding == "jacobi" and jacobi_config is None:
        jacobi_config = setting("jacobi", JACOBI)
    plain = functools.partial(type(model).generate, model)
    return decode_by(plain, model, args, kwargs, decoding, jacobi_config, output_trajectory)
