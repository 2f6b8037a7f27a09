"""The decode loop: draft -> forward -> accept -> commit."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .call import DecodeCall
from .compat import go_on
from .config import JacobiConfig
from .errors import UsageError
from .support import refuse_unsupported


def jacobi_decode(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    *,
    jacobi_config: JacobiConfig,
    output_trajectory: bool = False,
    streamer=None,
    synced_gpus: bool = False,
    fills_cache: bool = False,
    calls: list | None = None,
    **model_kwargs,
):
    """
    Decodes a batch, as `generate(custom_generate=...)` of transformers calls it after its own preparations.

    Args:
        model: the model.
        input_ids: `[B, P]`, left-padded.
        logits_processor, stopping_criteria, generation_config, model_kwargs: what `generate` prepared.
        jacobi_config: the settings.
        output_trajectory: whether to return every draft.
        streamer: gets the committed tokens, in the portions in which AR would put them.
        synced_gpus: whether to go on running forwards until every process of the group is done.
        fills_cache: whether the caller passed a cache, which is to hold the new tokens, too.
        calls: gets an entry, by which the caller sees that it came to this.

    Returns:
        `[B, L]` token ids, or with `return_dict_in_generate` a `JacobiOutput`.
    """
    if calls is not None:
        calls.append(model)
    if output_trajectory and not generation_config.return_dict_in_generate:
        raise UsageError("`output_trajectory=True` returns drafts beside text: pass return_dict_in_generate=True too.")
    refuse_unsupported(model, generation_config, input_ids.shape[1], model_kwargs)
    call = DecodeCall(
        model,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        jacobi_config,
        model_kwargs,
        records=output_trajectory,
        fills_cache=fills_cache,
        streamer=streamer,
    )
    with call.step.draft_adapter.listening() if call.step.draft_adapter else nullcontext():
        run_to_end(call, synced_gpus)
        return call.output(synced_gpus)


def run_to_end(call: DecodeCall, synced_gpus: bool = False) -> None:
    """Decodes until every row has finished; `synced_gpus` as in `jacobi_decode`."""
    call.step.mends_drafts = not synced_gpus
    call.prefill()
    call.outputs.stream()
    call.weigh_costs(may_measure=not synced_gpus)
    while go_on(call.step.model, call.finished, synced_gpus, call.step.device):
        if call.finished:
            call.step.idle()
            continue
        call.advance()
        call.outputs.stream()
    call.outputs.end_stream()
