"""Asking a model many questions: greedy or sampled answers, in batches that share what all prompts begin with."""

import functools
import itertools
import time
from dataclasses import dataclass, field

from helpers import dense, prefix
from helpers.extract import ENDS, complete
from helpers.flights import SYSTEM_PROMPT, chat
from helpers.runtime import progress_bar

LONGEST, ROOM = 96, 16  # tokens of an answer; of one to a question whose reference is longer: those beyond the reference's
ROWS = 128  # at most at once
CACHE_BYTES = 1e9  # of keys and values at once on a CPU; on a GPU half of what is free
READ_TOKENS = 2048  # of prompts at once: more only takes memory


def generate(
    model, tokenizer, conversations, max_new_tokens: int = LONGEST, batch_size: int | None = None, progress: str = "", temperature: float = 0, stop=None, stop_at="", logps=None
) -> list[str]:
    """Answers to a list of chats (each a list of messages), in the order asked: greedy, or sampled at a `temperature`.

    What all prompts begin with (a schema, few-shot examples) is run through the model once, and one copy of its keys and
    values serves all rows (`prefix`). A row ends at the end of the turn, or where `stop`, a function of the text so far, says
    so (it is asked after tokens that hold one of the characters `stop_at`, "": after each); the next question then takes its place. `batch_size`: rows at once (None: as many as memory allows). In float32 the
    answers don't depend on it (tested); in 16 bits a near-tie can fall either way. `progress` names the bar (none if empty). `logps`: a
    list that gets each answer's log-probability in nats, the end of its turn included (of a row that `stop` ended: of its tokens).
    """
    import torch

    prompts = [tokenizer.apply_chat_template(c, add_generation_prompt=True, return_dict=True)["input_ids"] for c in conversations]
    answers, sure = [""] * len(prompts), [0.0] * len(prompts)
    if not prompts:
        return answers
    base = prefix.inner_model(model)
    may_end = functools.cache(lambda token: not stop_at or any(c in stop_at for c in _text(tokenizer, [token])))
    ended = stop and (lambda ids: may_end(ids[-1]) and stop(_text(tokenizer, ids)))
    with torch.inference_mode(), prefix.attention(base), dense.written_out(model), progress_bar(len(prompts), progress) as bar:
        for row in _Run(model, base, prompts, max_new_tokens, batch_size, temperature, logps is not None).answers(ended):
            answers[row.number], sure[row.number] = _text(tokenizer, row.answer).strip(), row.logp
            bar.update(1)
    if logps is not None:
        logps += sure
    return answers


def _text(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@dataclass
class _Row:
    """A question that is being answered: its place in the list, its own tokens in the cache, its answer so far."""

    number: int
    length: int
    answer: list[int] = field(default_factory=list)
    logp: float = 0.0  # of the answer so far, in nats


class _Run:
    """One call's state. `prompts`: token ids of each; what they share is read when the run is made."""

    def __init__(self, model, base, prompts, limit: int, batch_size: int | None, temperature: float, sure: bool = False):
        import torch

        self.base, self.prompts, self.limit, self.temperature, self.device = base, prompts, limit, temperature, base.device
        ends = base.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self.shared = prefix.shared_length(prompts)
        room = max(map(len, prompts)) - self.shared + limit
        slots = min(len(prompts), batch_size or max(1, min(ROWS, int(self._cache_bytes() // (room * self._token_bytes())))))
        self.kept, self.last = prefix.KeyValues(slots, room), torch.zeros(slots, dtype=torch.long, device=self.device)
        self.sure = torch.zeros(slots, device=self.device) if sure else None  # each row's last token's log-probability
        virtual = self._virtual(model)
        self.before = self.shared + (0 if virtual is None else virtual.shape[1])  # positions that stand before every row's own tokens
        if self.before:
            said = base.get_input_embeddings()(torch.tensor([prompts[0][: self.shared]], dtype=torch.long, device=self.device))
            said = said if virtual is None else torch.cat([virtual.to(said.dtype), said], 1)
            self._forward(torch.arange(self.before, device=self.device)[None], inputs_embeds=said)

    def _token_bytes(self) -> int:
        config = self.base.config
        return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.base.dtype.itemsize

    def _cache_bytes(self) -> float:
        import torch

        return torch.cuda.mem_get_info()[0] / 2 if self.device.type == "cuda" else CACHE_BYTES

    def _virtual(self, model):
        """Prompt tuning's embeddings (1, virtual tokens, width), which stand before every prompt; None without."""
        config = getattr(model, "active_peft_config", None)
        return model.get_prompt(1) if config is not None and config.is_prompt_learning else None

    def _forward(self, places, **inputs):
        """The last hidden states (rows, tokens, width) of new tokens at the positions `places`."""
        cache = {prefix.cache_argument(type(self.base.model)): self.kept}
        return self.base.model(position_ids=places, use_cache=True, kept=self.kept, **cache, **inputs)[0]

    def _choose(self, hidden, places) -> None:
        """The next token of the rows at `places` from their last hidden states, (rows, width)."""
        import torch

        head, hidden = self.base.lm_head, hidden.contiguous()  # of a strided slice torch's CPU matmul copies the head's weights once a row
        if hidden.device.type == "cpu" and head.weight.dtype == hidden.dtype == torch.float32 and head.bias is None and len(hidden) > 1:
            logits = (head.weight @ hidden.T).T  # vocabulary first: up to half again as quick in float32
        else:
            logits = head(hidden)
        self.last[places] = (logits.float() / self.temperature).softmax(-1).multinomial(1)[:, 0] if self.temperature else logits.argmax(-1)
        if self.sure is not None:
            logits = logits.float()
            self.sure[places] = logits.gather(1, self.last[places, None])[:, 0] - logits.logsumexp(-1)

    def answers(self, stop):
        """Yields rows as they end. `stop`: whether an answer is complete by its token ids; None: only at its end."""
        waiting = sorted(range(len(self.prompts)), key=lambda i: len(self.prompts[i]))  # like lengths together: little is padding
        rows: list[_Row] = []
        while waiting or rows:
            free, first = self.kept.slots - len(rows), 0
            if waiting and (not rows or free >= self.kept.slots / 4):  # several at once: each reading takes all weights through the processor
                first = len(rows)
                while waiting and len(rows) < self.kept.slots:
                    group = self._group(waiting, self.kept.slots - len(rows))
                    rows += self._read([_Row(i, len(self.prompts[i]) - self.shared) for i in group], len(rows))
            else:
                self._step(rows)
            chosen = self.last[first : len(rows)].tolist()
            sure = self.sure[first : len(rows)].tolist() if self.sure is not None else [0.0] * len(chosen)
            for place in range(len(rows) - 1, first - 1, -1):
                row, token = rows[place], chosen[place - first]
                row.logp += sure[place - first]
                if token not in self.ends:
                    row.answer.append(token)
                    if len(row.answer) < self.limit and not (stop and stop(row.answer)):
                        continue
                yield row
                if place < len(rows) - 1:  # the last row, looked at already, takes its place
                    self.kept.move(len(rows) - 1, place)
                    rows[place], self.last[place] = rows[-1], self.last[len(rows) - 1]
                rows.pop()

    def _group(self, waiting: list[int], free: int) -> list[int]:
        """The questions to be read next: as many as there are slots, within READ_TOKENS."""
        tokens = itertools.accumulate(len(self.prompts[i]) - self.shared for i in waiting[:free])
        count = max(1, sum(1 for total in tokens if total <= READ_TOKENS))
        group, waiting[:count] = waiting[:count], []
        return group

    def _read(self, rows: list[_Row], first: int) -> list[_Row]:
        """Reads whole prompts into the slots from `first` on, and chooses each one's first token."""
        import torch

        own = [self.prompts[row.number][self.shared :] for row in rows]
        width = max(map(len, own))
        ids = torch.tensor([ids + [0] * (width - len(ids)) for ids in own], device=self.device)
        self.kept.read(slice(first, first + len(rows)), width)
        hidden = self._forward(self.before + torch.arange(width, device=self.device)[None], input_ids=ids)
        last = torch.tensor([len(ids) - 1 for ids in own], device=self.device)
        self._choose(hidden[torch.arange(len(rows), device=self.device), last], slice(first, first + len(rows)))
        return rows

    def _step(self, rows: list[_Row]) -> None:
        """One more token for each row."""
        import torch

        lengths = torch.tensor([row.length for row in rows], device=self.device)
        self.kept.go_on(lengths)
        hidden = self._forward((self.before + lengths)[:, None], input_ids=self.last[: len(rows), None])
        self._choose(hidden[:, 0], slice(0, len(rows)))
        for row in rows:
            row.length += 1


def longest(questions, tokenizer) -> int:
    """How many tokens an answer to one of these may have: `LONGEST`, or `ROOM` more than the longest reference."""
    references = [q.get("sql") or "" for q in questions]
    return max([LONGEST, *(len(tokenizer(sql)["input_ids"]) + ROOM for sql in references if len(sql) > LONGEST)])


def ask(model, tokenizer, questions, system: str = SYSTEM_PROMPT, shots=None, progress: str = "", **kwargs) -> tuple[list[str], float]:
    """Answers to a split's questions and the seconds it took. `shots` maps a question to its few-shot rows.

    An answer may have `LONGEST` tokens, and more where a reference has (`max_new_tokens` says otherwise).
    """
    start = time.perf_counter()
    kwargs.setdefault("max_new_tokens", longest(questions, tokenizer))
    chats = [chat(q["question"], system, shots(q["question"]) if shots else ()) for q in questions]
    return generate(model, tokenizer, chats, progress=progress, stop=complete, stop_at=ENDS, **kwargs), time.perf_counter() - start
