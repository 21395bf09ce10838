"""What all rows of a batch begin with, read once: attention over one shared copy of its keys and values.

Prompts begin alike (a system prompt, a schema, few-shot examples). What a token's keys and values are depends on the tokens
before it alone, so that one copy serves all rows, in answering (`KeyValues`) and in training (`hidden_states`). transformers
runs the model; only its attention is exchanged for `attend`, by the registry that the library has for it.
"""

import functools
import inspect
import itertools
from contextlib import contextmanager

NAME = "shared_prefix"  # in transformers' registry of attention functions
WORTH = 8  # a shorter one isn't taken apart in training


def shared_length(rows: list[list[int]]) -> int:
    """How many leading tokens all rows share; never a whole row, and 0 for a single one."""
    if len(rows) < 2:
        return 0
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(min(rows), max(rows), strict=False))
    return min(sum(1 for _ in same), min(map(len, rows)) - 1)


class KeyValues:
    """transformers' key/value cache for rows that share a prefix: one copy of that, and for each row room for its own tokens.

    Nothing is concatenated: a row's tokens are written where it has room, its first own one at 0. Per layer: the prefix'
    keys and values (key/value heads, tokens, width), the rows' (slots, heads, room, width).
    """

    def __init__(self, slots: int, room: int):
        self.slots, self.room, self.prefix, self.own = slots, room, {}, {}
        self.used = None  # the slots that are being read or continued; None: the prefix is being read
        self.starts = None  # (rows,): how many own tokens each of them has already; None: none, whole prompts are being read
        self.end = 0  # the longest row's own tokens, the new ones included

    def get_seq_length(self, layer: int = 0) -> int:
        return 0  # positions are always given

    def update(self, keys, values, layer: int, *_, **__):
        """Keeps the new keys and values, (rows, heads, new tokens, width); returns all own ones of the rows that are used."""
        if self.used is None:
            self.prefix[layer] = (keys[0], values[0])
            return keys, values
        if layer not in self.own:
            shape = (self.slots, keys.shape[1], self.room, keys.shape[3])
            self.own[layer] = (keys.new_zeros(shape), keys.new_zeros(shape))
        kept = [own[self.used] for own in self.own[layer]]
        for own, new in zip(kept, (keys, values), strict=True):
            if self.starts is None:
                own[:, :, : new.shape[2]] = new
            else:
                own[self.each, :, self.starts] = new[:, :, 0]
        return kept[0][:, :, : self.end], kept[1][:, :, : self.end]

    def read(self, slots: slice, width: int) -> None:
        """What the model is given next are whole prompts, `width` tokens with what pads them on the right, for free slots."""
        self.used, self.starts, self.end = slots, None, width

    def go_on(self, lengths) -> None:
        """What the model is given next is one token for each of the first rows, which have `lengths` (rows,) own tokens."""
        self.used, self.starts, self.end, self.each = slice(0, len(lengths)), lengths, int(lengths.max()) + 1, lengths.new_tensor(range(len(lengths)))
        self.hidden = (lengths.new_tensor(range(self.end)) > lengths[:, None])[:, None, None]  # (rows, 1, 1, own tokens)

    def move(self, source: int, target: int) -> None:
        """A row takes another one's slot."""
        for kept in self.own.values():
            for own in kept:
                own[target] = own[source]


def attend(module, queries, keys, values, mask, scaling, kept=None, shared=None, **_):
    """Attention with a shared prefix, as transformers calls it: queries (rows, heads, tokens, width) -> (rows, tokens, heads, width).

    `kept`: the KeyValues that the model answers with. `shared`: in training, the number of the prefix' tokens and of each row's (see `hidden_states`).
    """
    if shared:
        return _train(queries, keys, values, scaling, *shared), None
    prefix = kept.prefix.get(module.layer_idx) if kept.used is not None else None
    if kept.used is not None and kept.starts is not None:
        return _one_token(queries, keys, values, scaling, prefix, kept.hidden), None
    return _behind(queries, keys, values, scaling, prefix).transpose(1, 2), None


def _behind(queries, keys, values, scaling, prefix):
    """Causal attention of rows to the prefix (one copy, or none) and to themselves."""
    import torch

    rows, tokens = len(queries), queries.shape[2]
    if prefix is None:
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, scale=scaling, enable_gqa=True)
    keys, values = (torch.cat([ahead.expand(rows, -1, -1, -1), own], 2) for ahead, own in zip(prefix, (keys, values), strict=True))
    sees = torch.ones(tokens, keys.shape[2], dtype=torch.bool, device=queries.device).tril(keys.shape[2] - tokens)
    return torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=sees, scale=scaling, enable_gqa=True)


def _one_token(queries, keys, values, scaling, prefix, hidden):
    """Attention of one new token a row: the prefix is multiplied with all rows' queries at once and never repeated."""
    import torch

    rows, width, heads = len(queries), queries.shape[3], keys.shape[1]
    queries = queries.view(rows, heads, -1, width)  # (rows, key/value heads, queries of each, width)
    scores = (queries @ keys.transpose(2, 3)).masked_fill_(hidden, float("-inf"))
    if prefix is None:
        weights = (scores * scaling).softmax(-1, dtype=torch.float32).to(values.dtype)
        return (weights @ values).view(rows, 1, -1, width)
    ahead = (queries.transpose(0, 1).flatten(1, 2) @ prefix[0].transpose(1, 2)).unflatten(1, (rows, -1)).transpose(0, 1)
    weights = (torch.cat([ahead, scores], -1) * scaling).softmax(-1, dtype=torch.float32).to(values.dtype)
    ahead, weights = weights.tensor_split([prefix[0].shape[1]], -1)
    out = weights @ values
    out += (ahead.transpose(0, 1).flatten(1, 2) @ prefix[1]).unflatten(1, (rows, -1)).transpose(0, 1)
    return out.view(rows, 1, -1, width)


def _train(queries, keys, values, scaling, tokens: int, lengths: list[int]):
    """As `_behind`, of one sequence (1, heads, tokens, width) that holds the prefix' tokens, then each row's, `lengths` of them."""
    import torch

    groups = queries.shape[1] // keys.shape[1]

    def parts(states, repeat):
        states = states[0].repeat_interleave(repeat, 0)  # (heads, tokens, width)
        rows = states[:, tokens:].transpose(0, 1).split(lengths)
        return states[:, :tokens], torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).transpose(1, 2)

    (q, own_q), (k, own_k), (v, own_v) = parts(queries, 1), parts(keys, groups), parts(values, groups)

    def weighted(q, k, v):  # matmuls and a softmax: on a CPU quicker for short rows than torch's fused kernel
        hides = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).triu(k.shape[-2] - q.shape[-2] + 1)
        scores = (q @ k.transpose(-1, -2) * scaling).masked_fill(hides, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v

    own = weighted(own_q, *(torch.cat([ahead.expand(len(lengths), -1, -1, -1), mine], 2) for ahead, mine in ((k, own_k), (v, own_v))))
    return torch.cat([weighted(q, k, v), *(row[:, :length] for row, length in zip(own, lengths, strict=True))], 1).transpose(0, 1)[None]


@contextmanager
def attention(base):
    """Within a `with`, the causal model attends by `attend`."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before, base.config._attn_implementation = base.config._attn_implementation, NAME
    try:
        yield
    finally:
        base.config._attn_implementation = before


@functools.cache
def inner_model(model):
    """transformers' own model: itself, or what PEFT's stands around, the adapters in its layers."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def cache_argument(decoder: type) -> str:
    """What a decoder's forward calls its key/value cache: past_key_values, and from transformers 5.24 on cache."""
    return "past_key_values" if "past_key_values" in inspect.signature(decoder.forward).parameters else "cache"


def hidden_states(base, ids, mask):
    """The last hidden states (rows, tokens, width) of token ids (rows, tokens), padded on the right, in training.

    What all rows begin with is run through the model once, as the head of one sequence in which the rows follow without their
    padding; gradients flow into it from all rows. Equal to running each row whole (tested), with a quarter fewer tokens in the
    course's training. Where rows don't begin alike, or are padded on the left, each is run whole.
    """
    import torch

    lengths, width = mask.sum(1).tolist(), ids.shape[1]
    shared = min(int((ids == ids[0]).all(0).long().cumprod(0).sum()), min(lengths) - 1) if bool(mask[:, 0].all()) else 0
    if shared < WORTH or len(ids) < 2:
        return base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    own = [length - shared for length in lengths]
    line = torch.cat([ids[0, :shared], *(row[shared:length] for row, length in zip(ids, lengths, strict=True))])
    place = torch.arange(width, device=ids.device)
    places = torch.cat([place[:shared], *(place[shared:length] for length in lengths)])
    with attention(base):
        hidden = base.model(input_ids=line[None], position_ids=places[None], use_cache=False, shared=(shared, own)).last_hidden_state[0]
    rows = torch.nn.utils.rnn.pad_sequence([torch.cat([hidden[:shared], row]) for row in hidden[shared:].split(own)], batch_first=True)
    return torch.nn.functional.pad(rows, (0, 0, 0, width - rows.shape[1]))
