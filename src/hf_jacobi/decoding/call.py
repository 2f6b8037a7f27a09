"""The state of one `generate` call: its rows, the step that serves them, and what is given back."""

from __future__ import annotations

import torch

from .adaptive import Economy
from .batch import Row, account, propose
from .compat import pad_token_of
from .costs import CostCurve
from .draft_adapter import DraftAdapter
from .drafting import Draft
from .outputs import Outputs
from .stats import JacobiStats
from .step import Step
from .stopping import StopCheck
from .timing import curve_of
from .verify import Greedy, Gumbel, TokenChooser, usable
from .walk import Walk


class DecodeCall:
    """
    One call. Its arguments are those of `jacobi_decode`.

    Args:
        records: whether to keep every draft.
        drafts: whether the model's draft-only adapter, if it has one, takes part.
        row_names: under which names rows draw their noise; their numbers if left out.
    """

    def __init__(
        self,
        model,
        input_ids: torch.Tensor,
        processors,
        criteria,
        generation_config,
        config,
        model_kwargs: dict,
        *,
        records: bool = False,
        fills_cache: bool = False,
        streamer=None,
        drafts: bool = True,
        row_names: list[str] | None = None,
    ):
        rule = Greedy()
        if generation_config.do_sample:
            seed = int(torch.randint(2**62, (), device="cpu")) if config.seed is None else config.seed
            rule = Gumbel(seed, row_names or [str(number) for number in range(input_ids.shape[0])])
        chooser = TokenChooser(processors, rule)
        stop = StopCheck(criteria)
        self.step = Step(model, input_ids, generation_config, model_kwargs, chooser)
        self.step.draft_adapter = DraftAdapter.of(model) if drafts else None
        self.rows = _rows(self.step, config, stop.max_length, records)
        self.config = config
        self.economy: Economy | None = None
        pad_token = pad_token_of(generation_config) or 0
        self.outputs = Outputs(self.rows, generation_config, pad_token, streamer, records)
        self.walk = Walk(self.rows, chooser, stop, self.outputs, pad_token)
        self.stats = JacobiStats()
        self.keeps_home = self.outputs.as_dict or fills_cache

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self.rows)

    def prefill(self) -> None:
        """Runs the prompt, and commits the first token of every row."""
        drafts = [Draft(row.tokens[-1:] or [0]) for row in self.rows]
        self._commit(drafts, self.step.prefill(self.keeps_home))

    def advance(self) -> None:
        """Drafts, one forward, and the tokens that it brings."""
        drafts = propose(self.rows, self.economy)
        self._commit(drafts, self.step(drafts, [row.length - 1 for row in self.rows]))
        account(self.rows, self.economy, drafts)

    def weigh_costs(self, may_measure: bool) -> None:
        """After the prefill: lets drafts follow what forwards cost, as given, or as measured where that may be."""
        if self.config.adapts and not self.finished:
            given = self.config.position_cost
            measured = curve_of(self.step, self.rows, may_measure) if given is None else None
            curve = measured or CostCurve.of(given, len(self.rows))
            self.economy = Economy(curve, columns=2 if self.step.draft_adapter else 1)

    def _commit(self, drafts: list[Draft], predictions: list[list[int]]) -> None:
        copies, starts = self.step.copies, [row.length - 1 for row in self.rows]
        paths = self.walk(drafts, self.step.logits, predictions)
        predictions, positions = usable(predictions), 0
        for number, path in paths.items():
            draft, predicted = drafts[number], predictions[number]
            drafted = predicted[-copies:][: draft.chain_length] if copies else None
            self.step.keep_path(number, starts[number], path)
            self.rows[number].commit(draft, starts[number], path, predicted, drafted)
            positions += len(draft) + len(drafted or ())
        self.stats.count(sum(map(len, paths.values())), positions)

    def output(self, synced_gpus: bool):
        """What `generate` returns; `synced_gpus` as in `jacobi_decode`."""
        if self.keeps_home:
            if not self._settle() and synced_gpus:
                self.step.idle()  # in place of the forward that another process may need
            self.step.export(self.outputs.length - 1)
        return self.outputs.result(self.stats, self.step.home, self.step.device)

    def _settle(self) -> bool:
        """
        Caches what AR would have cached after the end of shorter rows, so that whoever goes on finds it whole.

        Returns:
            whether that took a forward: all rows may be of one length.
        """
        ends = [row.prompt_length + row.stats.new_tokens - 1 for row in self.rows]
        last = self.outputs.length - 1
        if min(ends) == last:
            return False
        self.step.copies = 0
        drafts = [Draft(tokens[end:last] or [0]) for tokens, end in zip(self.outputs.padded(), ends)]
        self.step.score(drafts, ends)
        return True


def _rows(step: Step, config, max_length: int | None, records: bool) -> list[Row]:
    """The rows of a batch, with what is known of their padding and of the positions that the model has."""
    prompts = step.input_ids.tolist()
    padding = [0] * len(prompts)
    if (valid := step.model_kwargs.get("attention_mask")) is not None:  # it covers a reused cache, too
        padding = (valid[:, valid.shape[1] - step.input_ids.shape[1] :] == 0).sum(1).tolist()
    table = getattr(step.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    rows = []
    for number, (tokens, end) in enumerate(zip(prompts, step.prompt_ends)):
        last = None if table is None else len(tokens) - 1 + table - 1 - end
        rows.append(Row(number, tokens, padding[number], config, max_length, last, records))
    return rows
