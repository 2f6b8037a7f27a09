"""The state of one `generate` call: its sequences, their cache, and how their tokens are chosen and stopped."""

from __future__ import annotations

import numpy as np
import torch

from .acceptance import TokenChooser
from .attention import AttentionMask
from .batch import Row
from .compat import CACHE, cache_argument, cache_of, pad_token_of, prefill, renamed_cache
from .draft_adapter import DraftAdapter
from .drafting import Draft
from .gumbel import GumbelNoise
from .layout import Layout
from .slot_cache import SlotCache
from .stats import JacobiOutput, JacobiStats
from .stopping import StopCheck


MOVES = 16  # accepted tokens that are moved into place in one step are laid out in multiples of this


class DecodeCall:
    """
    One call. Its arguments are those of `jacobi_decode`; `records` says whether to keep every draft, `row_keys` under
    which names rows draw their noise.

    Rows are served one by one, each accepting as many tokens as it can. Where a processor, a stopping criterion or the
    absence of an end-of-sequence token makes rows depend on each other, all rows form one group that moves in step.
    """

    def __init__(
        self,
        model,
        input_ids,
        processors,
        criteria,
        generation_config,
        config,
        model_kwargs,
        records=False,
        fills_cache=False,
        row_keys=None,
    ):
        self.model = model
        self.input_ids = input_ids
        self.device = input_ids.device
        self.cache_name = cache_argument(model)
        self.generation_config = generation_config
        self.model_kwargs = model_kwargs
        seed = config.seed
        if generation_config.do_sample and seed is None:
            seed = int(torch.randint(2**62, ()))
        names = row_keys or [str(row) for row in range(input_ids.shape[0])]
        self.chooser = TokenChooser(processors, GumbelNoise(seed, names) if generation_config.do_sample else None)
        self.stop = StopCheck(criteria)
        self.pad_token = pad_token_of(generation_config) or 0
        padding = [0] * input_ids.shape[0]
        if (valid := model_kwargs.get("attention_mask")) is not None:  # it covers a reused cache, too
            padding = (valid[:, valid.shape[1] - input_ids.shape[1] :] == 0).sum(1).tolist()
        table = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        self.prompt_ends = model_kwargs["position_ids"][:, -1].expand(input_ids.shape[0]).tolist()
        self.rows = []
        for row, tokens in enumerate(input_ids.tolist()):
            last_index = None if table is None else len(tokens) - 1 + table - 1 - self.prompt_ends[row]
            self.rows.append(Row(row, tokens, padding[row], config, self.stop.max_length, last_index, records))
        self.pads_ended_rows = self.stop.has_eos or len(self.rows) == 1
        by_row = self.chooser.is_row_wise and self.stop.is_row_wise and self.pads_ended_rows
        self.groups = [[row] for row in self.rows] if by_row else [self.rows]
        self.records = records
        self.keeps_home = generation_config.return_dict_in_generate or fills_cache
        self.draft_adapter = DraftAdapter.of(model)
        self.copies = 0  # columns at the end of the newest forward that the draft-only adapter served
        self.stats = JacobiStats()
        self.layouts: dict[tuple[int, int], Layout] = {}
        self.slot_numbers = torch.arange(0, device=self.device)
        self.streamed = input_ids.shape[1]
        self.shown_scores: tuple[torch.Tensor, ...] = ()
        self.wants_scores = generation_config.return_dict_in_generate and generation_config.output_scores
        self.wants_logits = generation_config.return_dict_in_generate and generation_config.output_logits

    @property
    def finished(self) -> bool:
        return all(row.finished for row in self.rows)

    def prefill(self) -> None:
        """Runs the prompt through transformers' own prefill, takes its cache over, and commits the first token."""
        kwargs = self.model_kwargs
        outputs = prefill(self.model, self.input_ids, self.generation_config, kwargs)
        self.home = cache_of(outputs)
        length = self.home.get_seq_length()
        self.cache = SlotCache.from_prefill(self.home, length, self.keeps_home)
        self.slot_shift = length - self.input_ids.shape[1]
        self.offsets = [position - (length - 1) for position in self.prompt_ends]
        mask = kwargs.get("attention_mask")
        self.key_valid = None if mask is None or bool(mask.all()) else mask.bool().to(self.device)
        left_padding = torch.zeros(len(self.rows), dtype=torch.long, device=self.device)
        if self.key_valid is not None:
            left_padding = (self.key_valid.cumsum(1) == 0).sum(1)
        self.mask = AttentionMask(self.model.config.get_text_config(decoder=True), self.model.dtype, left_padding)
        keys = None
        if self.chooser.noise is not None:
            positions = np.array([[row.position] for row in self.rows])
            keys = torch.from_numpy(self.chooser.noise.keys([row.number for row in self.rows], positions))
            keys = keys.to(self.device)
        drafts = [Draft(row.tokens[-1:] or [0]) for row in self.rows]
        self.accept(drafts, outputs.logits[:, -1:].to(self.device), keys)

    def propose(self) -> list[Draft]:
        """What every row tries next; a finished row goes along with one token that leads nowhere."""
        return [row.propose() for row in self.rows]

    def forward(self, drafts: list[Draft]) -> torch.Tensor:
        """Scores all drafts in one forward: logits `[B, Q, V]`. Their keys and values lie in the cache after it."""
        starts = [row.length - 1 + self.slot_shift for row in self.rows]
        if self.draft_adapter is None:
            return self._score(drafts, starts)
        self.copies = max(draft.chain_length for draft in drafts)
        with self.draft_adapter.on(self.copies):
            return self._score(drafts, starts, self.copies)

    def _score(self, drafts: list[Draft], starts: list[int], copies: int = 0) -> torch.Tensor:
        """Lays out, uploads and runs one step."""
        width = max(map(len, drafts)) + copies
        moves = -(-len(self.cache.moves) // MOVES) * MOVES
        shape = (width, moves)
        if shape not in self.layouts:
            self.layouts[shape] = Layout(len(self.rows), width, moves, self.device)
        layout = self.layout = self.layouts[shape]
        layout.fill(drafts, starts, self.offsets, copies)
        if moves:
            layout.host["moves"][:] = 0  # what is left over moves a slot to where it is
            layout.host["moves"][:, : len(self.cache.moves)] = np.array(self.cache.moves).T
        if self.chooser.noise is not None:
            targets = layout.host["positions"] + 1
            layout.host["keys"][:] = self.chooser.noise.keys([row.number for row in self.rows], targets)
        layout.upload()
        self.cache.move(layout.moves)
        self.cache.place(layout.slots, starts[0] if layout.uniform else None, layout.end)
        index = self._slots(layout.end)
        mask = layout.visible(index, self.key_valid)
        if mask is not None:
            mask = self.mask(mask, layout.places, layout.key_places(index) if self.mask.reads_places else None)
        return self.run(layout.ids, layout.positions, mask, self.cache)

    def _slots(self, count: int) -> torch.Tensor:
        """`[count]`, the numbers of the first slots."""
        if count > len(self.slot_numbers):
            self.slot_numbers = torch.arange(2 * count, device=self.device)
        return self.slot_numbers[:count]

    def run(self, input_ids: torch.Tensor, position_ids: torch.Tensor, mask, cache: SlotCache) -> torch.Tensor:
        """
        One forward: logits `[B, Q, V]` of `input_ids` and `position_ids` `[B, Q]`, whose keys and values go where
        `cache` was told to `place` them; `mask` as `AttentionMask` makes it, or `None`.
        """
        inputs = self.model.prepare_inputs_for_generation(
            input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **self._other_kwargs(input_ids.shape[1]),
        )
        return self.model(**renamed_cache(inputs, self.cache_name), return_dict=True).logits.to(self.device)

    def _other_kwargs(self, width: int) -> dict:
        """What else the caller gave the model; token types of new tokens are those that AR would give them."""
        ours = (CACHE, "position_ids", "attention_mask", "inputs_embeds", "logits_to_keep")
        others = {name: value for name, value in self.model_kwargs.items() if name not in ours}
        for name in ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids"):
            if others.get(name) is not None:
                newest = others[name][:, -1:].expand(-1, width)
                others[name] = newest if name == "token_type_ids" else torch.zeros_like(newest)
        return others

    def accept(self, drafts: list[Draft], logits: torch.Tensor, keys: torch.Tensor | None) -> None:
        """Commits, per row, the longest path of its draft that the model would have written, and one token more."""
        starts = [row.length - 1 for row in self.rows]
        predictions = self.chooser.predict(logits, keys).tolist()  # where a step waits for the device
        unfinished = [not row.finished for row in self.rows]
        paths: list[list[int]] = [[] for _ in self.rows]
        for group in self.groups:
            self._walk(group, drafts, logits, predictions, paths)
        positions = 0
        for row, draft, path, start in zip(self.rows, drafts, paths, starts):
            if unfinished[row.number]:
                self.cache.keep_path(row.number, start + self.slot_shift, path)
                predicted = predictions[row.number]
                drafted = predicted[-self.copies :][: draft.chain_length] if self.copies else None
                row.commit(draft, start, path, predicted, drafted)
                positions += len(draft) + len(drafted or ())
        self.stats.count(sum(map(len, paths)), positions)
        self.copies = 0

    def _walk(self, group: list[Row], drafts, logits, predictions, paths) -> None:
        """
        Appends tokens to the rows of a group, one position at a time, until a row's token is not in its draft.

        Processors and stopping criteria see every position once, in order, with the text that it would have had.
        """
        live = [row for row in group if not row.finished]
        nodes = {row.number: 0 for row in live}
        while live:
            if self.chooser.reads_context:
                tokens = self._choose(group, logits, nodes)
            else:
                tokens = {row.number: predictions[row.number][nodes[row.number]] for row in live}
                self._record(live, logits, nodes)
            for row in group:
                if row.finished and len(group) > 1:
                    row.tokens.append(self.pad_token)
            for row in live:
                row.tokens.append(tokens[row.number])
                paths[row.number].append(nodes[row.number])
            rows = group if len(group) > 1 else live
            for row, stop in zip(rows, self.stop([row.tokens for row in rows], self.device, self._scores_so_far())):
                row.stopped = row.stopped or stop
            over = all(row.stopped for row in group)
            for row in live:
                row.finished = over or (row.stopped and self.pads_ended_rows)
            live = [row for row in live if not row.finished]
            children = {
                row.number: drafts[row.number].children[nodes[row.number]].get(tokens[row.number]) for row in live
            }
            if None in children.values():
                return
            nodes |= children

    def _choose(self, group: list[Row], logits, nodes: dict[int, int]) -> dict[int, int]:
        """Lets every processor see the text so far, and chooses the next token of each row of a group."""
        rows = [row.number for row in group]
        input_ids = torch.tensor([row.tokens for row in group], dtype=torch.long, device=self.device)
        raw = logits[rows, [nodes.get(row, 0) for row in rows]]
        tokens, scores = self.chooser.choose(input_ids, raw, rows, [row.position for row in group])
        self._keep(group, raw, scores)
        return dict(zip(rows, tokens))

    def _record(self, live: list[Row], logits, nodes: dict[int, int]) -> None:
        if self.wants_scores or self.wants_logits:
            raw = logits[[row.number for row in live], [nodes[row.number] for row in live]]
            self._keep(live, raw, self.chooser.scores(raw))

    def _keep(self, rows: list[Row], raw: torch.Tensor, scores: torch.Tensor) -> None:
        for row, row_logits, row_scores in zip(rows, raw, scores):
            if not row.finished:
                if self.wants_logits:
                    row.logits.append(row_logits.float().clone())
                if self.wants_scores:
                    row.scores.append(row_scores.clone())

    def _scores_so_far(self) -> tuple[torch.Tensor, ...] | None:
        """What AR passes to criteria of the user's as `scores`; they are asked about all rows at once."""
        if self.stop.is_row_wise or not self.wants_scores:
            return None
        rows = [row.scores for row in self.rows]
        self.shown_scores += self._columns(rows, len(self.shown_scores))
        return self.shown_scores

    def _columns(self, rows: list[list[torch.Tensor]], first: int = 0) -> tuple[torch.Tensor, ...]:
        """Per position from `first` on `[B, V]`; zeros where a row had ended."""
        like = next(row[0] for row in rows if row)
        nothing = torch.zeros_like(like)
        length = max(map(len, rows))
        return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]) for i in range(first, length))

    def stream(self, streamer) -> None:
        """Puts every position that all rows have reached, one `[B]` tensor each, as AR does."""
        if streamer is None:
            return
        reached = min((row.length for row in self.rows if not row.finished), default=None)
        if reached is None:
            reached = max(row.length for row in self.rows)
        for position in range(self.streamed, reached):
            tokens = [row.tokens[position] if position < row.length else self.pad_token for row in self.rows]
            streamer.put(torch.tensor(tokens))
        self.streamed = reached

    def idle_forward(self) -> None:
        """A forward without use, for the other processes of a sharded model that are not done yet."""
        self.model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)

    def output(self, synced_gpus: bool):
        """Pads the rows to one length and returns them, with what else the caller asked for."""
        length = max(row.length for row in self.rows)
        if self.keeps_home:
            if not self._settle(length) and synced_gpus:
                self.idle_forward()  # in place of the forward that another process may need
            self.cache.export(self.home, length - 1 + self.slot_shift)
        padded = [row.tokens + [self.pad_token] * (length - row.length) for row in self.rows]
        sequences = torch.tensor(padded, dtype=torch.long, device=self.device)
        if not self.generation_config.return_dict_in_generate:
            return sequences
        self.stats.per_sequence = [row.stats for row in self.rows]
        self.stats.recycled_tokens = sum(row.stats.recycled_tokens for row in self.rows)
        self.stats.blocks_spawned = sum(row.stats.blocks_spawned for row in self.rows)
        return JacobiOutput(
            sequences=sequences,
            scores=self._columns([row.scores for row in self.rows]) if self.wants_scores else None,
            logits=self._columns([row.logits for row in self.rows]) if self.wants_logits else None,
            jacobi_stats=self.stats,
            trajectory=[row.trajectory for row in self.rows] if self.records else None,
            **{CACHE: self.home},
        )

    def _settle(self, length: int) -> bool:
        """
        Caches what AR would have cached behind the end of shorter rows, so that whoever goes on finds it whole.

        Returns:
            whether that took a forward: all rows may be of one length.
        """
        ends = [row.prompt_length + row.stats.new_tokens - 1 for row in self.rows]
        if min(ends) == length - 1:
            return False
        padded = [row.tokens + [self.pad_token] * (length - row.length) for row in self.rows]
        drafts = [Draft(tokens[end : length - 1] or [0]) for tokens, end in zip(padded, ends)]
        self._score(drafts, [end + self.slot_shift for end in ends])
        return True
