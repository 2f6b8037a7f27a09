"""The decode loop: draft -> forward -> accept -> commit."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .call import DecodeCall
from .compat import go_on, optimised_for_decoding
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
    Decodes a batch. transformers' `generate(custom_generate=...)` calls it after its own preparation.

    Args:
        model: the model.
        input_ids: `[B, P]`, left-padded.
        logits_processor, stopping_criteria, generation_config, model_kwargs: what `generate` prepared.
        jacobi_config: the settings.
        output_trajectory: whether to return every draft.
        streamer: receives the committed tokens, in the portions in which AR would put them.
        synced_gpus: whether to keep running forwards until every process of the group is done.
        fills_cache: whether the caller passed a cache, which must then also hold the new tokens.
        calls: a list that gets an entry, which shows the caller that this function was reached.

    Returns:
        `[B, L]` token ids, or with `return_dict_in_generate` a `JacobiOutput`.
    """
    if calls is not None:
        calls.append(model)
    if output_trajectory and not generation_config.return_dict_in_generate:
        raise UsageError(
            "`output_trajectory=True` returns drafts with the text: pass return_dict_in_generate=True as well."
        )
    refuse_unsupported(model, generation_config, input_ids.shape[1], model_kwargs, jacobi_config)
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
    adapter = call.step.draft_adapter
    with adapter.listening() if adapter else nullcontext():
        run_to_end(call, synced_gpus)
        return call.output(synced_gpus)


def run_to_end(call: DecodeCall, synced_gpus: bool = False) -> None:
    """Decodes until every row has finished; `synced_gpus` as in `jacobi_decode`."""
    call.step.repairs_drafts = not synced_gpus
    call.prefill()
    call.outputs.stream()
    call.may_measure = not synced_gpus
    call.weigh_costs()
    model = call.step.model
    with optimised_for_decoding(model):
        while go_on(model, call.finished, synced_gpus, call.step.device):
            if call.finished:
                call.step.idle()
                continue
            call.advance()
            call.outputs.stream()
    call.outputs.end_stream()
