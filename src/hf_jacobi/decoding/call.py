"""The state of one `generate` call: its rows, the step that serves them, and its outputs."""

from __future__ import annotations

from contextlib import nullcontext

import torch

from .adaptive import Economy
from .batch import Row, account, propose
from .compat import pad_token_of
from .costs import CostCurve
from .draft_adapter import DraftAdapter
from .drafting import Draft
from .ngram_table import table_for
from .outputs import Outputs
from .shapes import GrowingShapes
from .stats import JacobiStats
from .step import Step
from .stopping import StopCheck
from .timing import Watch, curves_of
from .verify import AcceptanceRule, Greedy, Gumbel, TokenChooser, usable
from .walk import Walk


class DecodeCall:
    """
    One call. The arguments not listed here are those of `jacobi_decode`.

    Args:
        records: whether to keep every draft.
        drafts: whether the model's draft-only adapter, if any, takes part.
        row_names: the names under which rows draw their noise; by default their numbers.
        leaves: whether finished rows can leave the forwards, after which the cache no longer holds them.
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
        leaves: bool = True,
    ):
        rule: AcceptanceRule = Greedy()
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
        self.watch: Watch | None = None
        pad_token = pad_token_of(generation_config) or 0
        self.outputs = Outputs(self.rows, generation_config, pad_token, streamer, records)
        self.walk = Walk(self.rows, chooser, stop, self.outputs, pad_token)
        self.stats = JacobiStats()
        self.keeps_home = self.outputs.as_dict or fills_cache
        self.may_measure = True
        self.in_flight = self.rows  # the rows that forwards still serve, by place
        self.keeps_all_rows = self.keeps_home or not self.walk.by_row or not leaves

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self.rows)

    @property
    def most_nodes(self) -> int:
        """The largest number of nodes of a draft, including those that a draft-only adapter serves."""
        config = self.config
        chain = config.max_blocks * config.size
        recycled = config.pool_size * max(config.ngram_size, config.size)
        return chain + recycled + (chain if self.step.draft_adapter else 0)

    def prefill(self) -> None:
        """Runs the prompt, and commits the first token of every row."""
        drafts = [Draft(row.tokens[-1:] or [0]) for row in self.rows]
        self.keeps_all_rows |= self.step.is_static
        lengths = [row.max_length if row.max_length is not None else row.length for row in self.rows]
        self._commit(drafts, self.step.prefill(self.keeps_home, max(lengths), self.most_nodes))

    def advance(self) -> None:
        """Drafts, runs one forward, and commits the accepted tokens."""
        self._let_rows_leave()
        drafts, self.step.adapter_drafts = propose(self.in_flight, self.economy)
        with self.watch.forward(self.step, max(map(len, drafts))) if self.watch else nullcontext():
            predictions = self.step(drafts, [row.length - 1 for row in self.in_flight])
        self._commit(drafts, predictions)
        account(self.in_flight, self.economy, drafts, self.step.copies > 0)

    def weigh_costs(self) -> None:
        """Adapts drafts to what forwards over the rows in flight cost: as given, as measured, or by default."""
        if not self.config.adapts or self.finished:
            return
        if (given := self.config.position_cost) is not None:
            curve = CostCurve.of(given, len(self.in_flight))
            with_adapter = curve if self.step.draft_adapter else None
        else:
            curve, with_adapter = curves_of(self.step, self.in_flight, self.may_measure)
            if self.may_measure:
                self._watch(curve)
        if self.economy is None:
            self.economy = Economy(curve, with_adapter, width=self.step.shapes.width)
        else:
            self.economy.follow(curve, with_adapter)

    def _watch(self, curve: CostCurve) -> None:
        """Times the forwards from here on, and pads them where that takes no longer by a measured `curve`."""
        self.watch = Watch(self.step, self.in_flight)
        if isinstance(self.step.shapes, GrowingShapes) and self.step.device.type == "cpu":
            self.step.shapes.plateaus = curve.plateaus

    def _commit(self, drafts: list[Draft], predictions: list[list[int]]) -> None:
        copies, starts = self.step.copies, [row.length - 1 for row in self.in_flight]
        paths = self.walk(drafts, self.step.logits, predictions)
        predictions, positions = usable(predictions), 0
        for number, path in paths.items():
            row = self.rows[number]
            draft, predicted, start = drafts[row.place], predictions[row.place], starts[row.place]
            drafted = predicted[-copies:][: draft.chain_length] if copies else None
            self.step.keep_path(row.place, start, path)
            row.commit(draft, start, path, predicted, drafted)
            positions += len(draft) + len(drafted or ())
        self.stats.count(sum(map(len, paths.values())), positions)

    def _let_rows_leave(self) -> None:
        """
        Drops finished rows from the next forwards once they are half of the rows. This copies the cache of the others,
        which one or two forwards repay.
        """
        live = [row for row in self.in_flight if not row.finished]
        if self.keeps_all_rows or not live or 2 * len(live) > len(self.in_flight):
            return
        length = max(row.length for row in live) - 1
        self.step = self.step.of_rows([row.place for row in live], length + self.step.slot_shift)
        self.in_flight = live
        for place, row in enumerate(live):
            row.place = place
        self.weigh_costs()

    def output(self, synced_gpus: bool):
        """What `generate` returns; `synced_gpus` as in `jacobi_decode`."""
        if self.keeps_home:
            if not self._settle() and synced_gpus:
                self.step.idle()  # another process may run a forward here
            self.step.export(self.outputs.length - 1)
        self.step.release()
        return self.outputs.result(self.stats, self.step.home, self.step.device)

    def _settle(self) -> bool:
        """
        Caches what AR would have cached after the end of shorter rows, so that the caller can continue from the cache.

        Returns:
            whether this took a forward; it takes none if all rows have the same length.
        """
        ends = [row.prompt_length + row.stats.new_tokens - 1 for row in self.rows]
        last = self.outputs.length - 1
        if min(ends) == last:
            return False
        self.step.copies = 0
        longest = last - min(ends)
        piece = self.most_nodes if self.step.is_static else longest
        with self.step.as_written():  # nothing is compiled for its widths
            for done in range(0, longest, piece):
                starts = [min(end + done, last) for end in ends]
                texts = [tokens[start:last][:piece] for tokens, start in zip(self.outputs.padded(), starts)]
                self.step.score([Draft(text or [0]) for text in texts], starts)
        return True


def _rows(step: Step, config, max_length: int | None, records: bool) -> list[Row]:
    """The rows of a batch, with their padding and the last position that the model has."""
    prompts = step.input_ids.tolist()
    padding = [0] * len(prompts)
    if (valid := step.model_kwargs.get("attention_mask")) is not None:  # also covers a reused cache
        padding = (valid[:, valid.shape[1] - step.input_ids.shape[1] :] == 0).sum(1).tolist()
    text = step.model.config.get_text_config(decoder=True)
    length, vocabulary = (getattr(text, name, None) for name in ("max_position_embeddings", "vocab_size"))
    table = table_for(step.model, config.ngram_table)
    rows = []
    for number, (tokens, end) in enumerate(zip(prompts, step.prompt_ends)):
        last = None if length is None else len(tokens) - 1 + length - 1 - end
        rows.append(Row(number, tokens, padding[number], config, max_length, last, records, vocabulary, table))
    return rows
