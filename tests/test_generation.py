"""Generation, its shared prefix and its written out weights, on tiny random models: quick, and equal to transformers' and PEFT's own."""

import contextlib
import functools

import pytest
import torch

from helpers import dense, generation, prefix
from helpers.extract import ENDS, complete, extract_sql
from helpers.menu import SIZES

SHAPE = dict(zip(SIZES, (64, 96, 3, 4, 2, 16, 61), strict=True))
PROMPTS = [[5, 6, 7, 8, 9, 10, 11, 12, 13, *tail] for tail in ([20], [21, 22, 23], [24, 25], [20, 26, 27, 28, 29], [30, 31])]


class Words:
    """A tokenizer whose chats are token ids and whose texts are their numbers."""

    pad_token_id = 0

    def apply_chat_template(self, ids, **_):
        return {"input_ids": list(ids)}

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


@functools.cache
def tiny(kind: str = "llama"):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, eos_token_id=60, pad_token_id=0, bos_token_id=1)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def plain_loop(model, prompt, limit: int) -> str:
    """Greedy decoding with no cache at all."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(limit):
            token = int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
            if token == 60:
                break
            ids.append(token)
    return " ".join(map(str, ids[len(prompt) :]))


def adapted(method: str = "lora", **more):
    """The tiny model with an adapter that changes something."""
    import copy

    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **more)
    if method == "prompt":
        config = PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model = get_peft_model(copy.deepcopy(tiny()), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3)
    return model.eval()


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma", "mistral"])
def test_answers_are_those_of_a_loop_without_a_cache(kind):
    model = tiny(kind)
    expected = [plain_loop(model, p, 12) for p in PROMPTS]
    before = model.config._attn_implementation
    for size in (None, 1, 2):  # two at once: rows that end make room for others
        assert generation.generate(model, Words(), PROMPTS, 12, size) == expected
    assert generation.generate(model, Words(), PROMPTS[1:2], 12) == expected[1:2]
    assert generation.generate(model, Words(), [PROMPTS[0]] * 3, 12) == [expected[0]] * 3  # all the same prompt
    assert generation.generate(model, Words(), []) == []
    assert model.config._attn_implementation == before
    assert len(set(expected)) > 1


def test_prompts_with_nothing_in_common_are_answered_as_well():
    prompts = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]
    assert generation.generate(tiny(), Words(), prompts, 6) == [plain_loop(tiny(), p, 6) for p in prompts]


def test_many_prompts_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(generation, "READ_TOKENS", 4)
    assert generation.generate(tiny(), Words(), PROMPTS, 5) == [plain_loop(tiny(), p, 5) for p in PROMPTS]


def test_rows_at_once_follow_from_the_memory_for_their_cache(monkeypatch):
    seen = []
    kept = prefix.KeyValues
    monkeypatch.setattr(prefix, "KeyValues", lambda slots, room: seen.append((slots, room)) or kept(slots, room))
    generation.generate(tiny(), Words(), PROMPTS, 5)
    monkeypatch.setattr(generation, "CACHE_BYTES", 2 * 10 * 2 * 3 * 2 * 16 * 4)  # two rows of ten tokens, three layers, two heads
    generation.generate(tiny(), Words(), PROMPTS, 5)
    assert seen == [(5, 10), (2, 10)]


def test_the_shared_beginning_is_run_through_the_model_once():
    counted = []
    hook = tiny().model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: counted.append(inputs[0].shape[:2].numel()))
    with contextlib.closing(type("Hook", (), {"close": hook.remove})):
        generation.generate(tiny(), Words(), PROMPTS, 1)
    assert counted == [9, 25]  # 9 shared tokens; 5 rows of at most 5 own ones


def test_an_answer_ends_where_stop_says_so():
    whole = generation.generate(tiny(), Words(), PROMPTS, 12)
    cut = generation.generate(tiny(), Words(), PROMPTS, 12, stop=lambda text: len(text.split()) == 3)
    assert cut == [" ".join(answer.split()[:3]) for answer in whole] and cut != whole


def test_stop_is_asked_only_after_tokens_that_can_end_an_answer():
    looked_at = []
    generation.generate(tiny(), Words(), PROMPTS, 12, stop=lambda text: looked_at.append(text), stop_at="5")
    whole = [answer.split() for answer in generation.generate(tiny(), Words(), PROMPTS, 12)]
    expected = [" ".join(words[: i + 1]) for words in whole for i, word in enumerate(words) if "5" in word and i < 11]  # at the limit nobody asks
    assert sorted(looked_at) == sorted(expected) != []


def test_the_end_of_the_turn_ends_an_answer(monkeypatch):
    first = int(generation.generate(tiny(), Words(), PROMPTS[:1], 1)[0])
    monkeypatch.setattr(tiny().generation_config, "eos_token_id", [first, 60])
    assert generation.generate(tiny(), Words(), PROMPTS[:1], 12) == [""]


def test_log_probabilities_are_those_of_a_plain_pass_over_the_answers():
    """Of the answer's tokens and, where it ended by itself, the end of the turn (60): summed, in nats."""

    def plain(prompt, answer, limit):
        said = [int(word) for word in answer.split()]
        said += [60] if len(said) < limit else []
        ids = torch.tensor([[*prompt, *said]])
        with torch.no_grad():
            logits = tiny()(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        return float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum())

    for size in (None, 2):
        answers = generation.generate(tiny(), Words(), PROMPTS, 12, size, logps=(logps := []))
        assert logps == pytest.approx([plain(p, a, 12) for p, a in zip(PROMPTS, answers, strict=True)], abs=1e-4)
    assert answers == generation.generate(tiny(), Words(), PROMPTS, 12) and len(set(logps)) == len(PROMPTS)
    generation.generate(tiny(), Words(), [], logps=(none := []))
    assert none == []


def test_a_sampled_answers_log_probability_is_the_models_own():
    torch.manual_seed(0)
    (answer,) = generation.generate(tiny(), Words(), PROMPTS[:1], 1, temperature=2.0, logps=(logps := []))
    with torch.no_grad():
        plain = tiny()(input_ids=torch.tensor(PROMPTS[:1])).logits[0, -1].log_softmax(-1)
    assert logps[0] == pytest.approx(float(plain[int(answer)]), abs=1e-5)


def test_prompt_tunings_virtual_tokens_stand_before_every_prompt():
    model = adapted("prompt")
    embed = model.get_base_model().get_input_embeddings()

    def loop(prompt, limit):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(limit):
                both = torch.cat([model.get_prompt(1), embed(torch.tensor([ids]))], 1)
                ids.append(int(model.get_base_model()(inputs_embeds=both, use_cache=False).logits[0, -1].argmax()))
        return " ".join(map(str, ids[len(prompt) :]))

    assert generation.generate(model, Words(), PROMPTS, 4) == [loop(p, 4) for p in PROMPTS]


def test_shared_length():
    assert prefix.shared_length(PROMPTS) == 9
    assert prefix.shared_length([[1, 2, 3], [1, 2, 3]]) == 2  # never a whole prompt
    assert prefix.shared_length([[1, 2], [1, 2, 3]]) == 1
    assert prefix.shared_length([[1, 2, 3]]) == prefix.shared_length([]) == 0


# ---------------------------------------------------------------- training


def loss_and_gradients(model, share: bool, rows=PROMPTS):
    """Of the sum over all tokens' log-probabilities, padded on the right."""
    width = max(map(len, rows)) + 2  # two columns of nothing but padding
    ids = torch.tensor([r + [0] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    model.zero_grad()
    base = model.get_base_model()
    hidden = prefix.hidden_states(base, ids, mask) if share else base.model(input_ids=ids, attention_mask=mask, use_cache=False)[0]
    assert hidden.shape == (*ids.shape, 64)
    logs = base.lm_head(hidden)[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    logs.sum().backward()
    return logs.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_a_shared_beginning_changes_neither_loss_nor_gradients_in_training():
    model, counted = adapted(), []
    hook = model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda module, inputs, output: counted.append(inputs[0].shape[:2].numel()))
    (logs, gradients), (expected, wanted) = loss_and_gradients(model, True), loss_and_gradients(model, False)
    hook.remove()
    torch.testing.assert_close(logs, expected)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm()
    assert counted == [9 + 1 + 3 + 2 + 5 + 2, 5 * 16]


def test_rows_without_a_common_beginning_are_run_whole():
    model = adapted()
    rows = [[7, 8, 9], [10, 11], [12, 13, 14, 15]]
    (logs, _), (expected, _) = loss_and_gradients(model, True, rows), loss_and_gradients(model, False, rows)
    assert logs.equal(expected)


# ---------------------------------------------------------------- written out weights


def test_an_adapter_written_into_the_weights_answers_the_same_and_is_gone_afterwards():
    model = adapted()
    ids = torch.tensor([PROMPTS[3]])
    with torch.no_grad():
        beside = model(ids).logits
        with dense.written_out(model):
            layer = model.get_base_model().model.layers[0].mlp.up_proj
            assert isinstance(layer.forward, dense._Linear)
            torch.testing.assert_close(model(ids).logits, beside)
            with dense.written_out(model):  # a second time changes nothing
                pass
            assert isinstance(layer.forward, dense._Linear)
        assert "forward" not in vars(layer) and model(ids).logits.equal(beside)
        with model.disable_adapter():
            bare = model(ids).logits
            with dense.written_out(model):
                torch.testing.assert_close(model(ids).logits, bare)
    assert not bare.allclose(beside)


def test_nothing_is_written_out_where_it_would_not_fit_or_not_pay(monkeypatch):
    model = adapted()
    assert dense.wanted(model)
    monkeypatch.setattr(dense, "FREE", 0)
    assert not dense.wanted(model)
    monkeypatch.undo()
    assert not dense.wanted(tiny().to(torch.bfloat16))
    tiny.cache_clear()


def test_what_stops_within_leaves_the_layers_as_they_were():
    model = adapted()
    for within in (dense.written_out, dense.training):
        with pytest.raises(KeyboardInterrupt), within(model):
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), prefix.attention(model.get_base_model()):
        raise KeyboardInterrupt
    assert not any("forward" in vars(m) for m in model.modules()) and model.get_base_model().config._attn_implementation != prefix.NAME


@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_dropout": 0.5}, {"use_rslora": True}])
def test_training_layers_give_the_same_loss_and_gradients(more):
    model = adapted(**more)  # in eval mode, where dropout is off; with DoRA and dropout PEFT's own forward is kept
    expected, wanted = loss_and_gradients(model, False)
    with dense.training(model):
        logs, gradients = loss_and_gradients(model, False)
    torch.testing.assert_close(logs, expected)
    for name, gradient in gradients.items():
        assert (gradient - wanted[name]).norm() <= 1e-4 * wanted[name].norm()


def test_training_layers_follow_the_active_adapter_and_its_being_off():
    model = adapted()
    with torch.no_grad():
        on = model(torch.tensor([PROMPTS[0]])).logits
        with dense.training(model), model.disable_adapter():
            off = model(torch.tensor([PROMPTS[0]])).logits
        with model.disable_adapter():
            assert off.equal(model(torch.tensor([PROMPTS[0]])).logits)
        model.add_adapter("ref", model.peft_config["default"])
        with dense.training(model):
            torch.testing.assert_close(model(torch.tensor([PROMPTS[0]])).logits, on)
            model.set_adapter("ref")  # B is 0: as if it were off
            torch.testing.assert_close(model(torch.tensor([PROMPTS[0]])).logits, off)


# ---------------------------------------------------------------- the end of a query


@pytest.mark.parametrize(
    ("answer", "done"),
    [
        ("SELECT 1;", False),  # a fence may follow
        ("SELECT 1", False),
        ("SELECT 1\n\nThis counts", False),  # a fence may follow
        ("```sql\nSELECT 1\n```", True),
        ("```sql\nSELECT 1;", True),
        ("```sql\nSELECT 1\n\nFROM", False),  # a blank line in the midst of it
        ("```sql\nSELECT 1\n\nThis", False),  # as yet a word that could become one of SQL's
        ("```sql\nSELECT 1\n\nThis is\n", True),
        ("```sql\nSELECT 1 -- it's; so", False),
        ("```sql\nSELECT 1 AS \"a;", False),  # the name may be closed on this line
        ("```sql\nSELECT 1 AS \"a;\n", True),
        ("```sql\nWITH t AS (SELECT 1)\n\n", False),
        ("```sql\nSELECT ';'", False),
        ("SELECT 'a;", False),
        ("```\nSELECT 'it''s;' FROM flights;", True),
        ("SELECT 'it''s;' FROM flights;", False),
        ("```sql\nWITH x AS (SELECT 1) SELECT 2; more", True),
        ("```sql\nWITH x (SELECT 1;", False),  # ") AS" would make it the beginning
        ("The flights data can't answer that.", False),
        ("", False),
    ],
)
def test_when_an_answers_query_is_complete(answer, done):
    assert complete(answer) is done
    if done:  # whatever is added
        for more in ("", "\n", ";", " FROM flights", "'", "\n\nSELECT 2;", "`", "```", ") AS (SELECT 3)", "\n```\nSELECT 4\n```"):
            assert extract_sql(answer + more) == extract_sql(answer)


def test_an_answer_becomes_complete_only_at_an_ending():
    for answer in ("```\nSELECT ';' ; x", "```sql\nSELECT 'a\n\nb'\n``` x", "```WITH t AS (SELECT 1)\n\nSELECT 2\n\nSo it\nis", "Use ```\nSELECT 1;", "```sql\nSELECT 1```"):
        done = [complete(answer[:i]) for i in range(len(answer) + 1)]
        assert True in done and all(answer[i - 1] in ENDS for i in range(1, len(done)) if done[i] and not done[i - 1]), answer


def test_a_closing_fence_alone_takes_the_query_away_so_nothing_stops_before_it():
    """As the base model does it: the rule takes what follows the fence, which is nothing."""
    answer = "SELECT AVG(arr_delay) FROM flights WHERE month = 2;\n```"
    assert extract_sql(answer) == "" != extract_sql(answer[:-4]) and not any(complete(answer[:i]) for i in range(len(answer)))


def test_in_16_bits_answers_and_losses_are_near_the_plain_ones():
    import copy

    from peft import LoraConfig, get_peft_model

    model = copy.deepcopy(tiny()).to(torch.bfloat16)
    answers = generation.generate(model, Words(), PROMPTS, 6)
    assert generation.generate(model, Words(), PROMPTS, 6, batch_size=5) == answers and all(len(a.split()) == 6 for a in answers)
    assert answers[0].split()[0] == plain_loop(model, PROMPTS[0], 1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"), autocast_adapter_dtype=True)
    with torch.autocast("cpu", torch.bfloat16), dense.training(model):
        (logs, gradients), (expected, _) = loss_and_gradients(model, True), loss_and_gradients(model, False)
    torch.testing.assert_close(logs, expected, rtol=0.1, atol=0.1)
    assert all(g.isfinite().all() for g in gradients.values())
