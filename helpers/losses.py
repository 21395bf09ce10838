"""The losses of the course's own trainers on a CPU: logits only where there is something to learn, what rows share computed once."""

from helpers import prefix
from helpers.recipes import LOSS_ROWS


def token_log_probs(hidden, weight, targets):
    """log p(target) of each token in float32, shape (n,), without ever holding all logits.

    hidden (n, width) and weight (vocabulary, width) in one dtype, targets (n,). The gradient for `hidden` is worked out
    beside the value, `LOSS_ROWS` tokens at a time: (one-hot - softmax) @ weight. The head's weight is frozen: it gets none.
    """
    import torch

    class LogProbs(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden):
            values, gradient = hidden.new_empty(len(hidden), dtype=torch.float32), torch.empty_like(hidden)
            parts = [t.split(LOSS_ROWS) for t in (hidden, targets, values, gradient)]
            for rows, target, value, out in zip(*parts, strict=True):
                logits = (rows @ weight.T).float()
                value.copy_(-torch.nn.functional.cross_entropy(logits, target, reduction="none"))
                if ctx.needs_input_grad[0]:
                    slope = -torch.softmax(logits, -1)
                    slope[torch.arange(len(target)), target] += 1
                    out.copy_(slope.to(weight.dtype) @ weight)
            ctx.save_for_backward(gradient)
            return values

        @staticmethod
        def backward(ctx, slope):
            return (ctx.saved_tensors[0] * slope[:, None]).to(hidden.dtype)

    return LogProbs.apply(hidden)


def cpu_trainer_class():
    """SFTTrainer with the same loss computed more cheaply on a CPU (a test holds the two equal).

    TRL's fused head works in float32 tiles and adds entropy metrics, made for Triton on a GPU; here the LM head runs
    on the supervised positions only, a few at a time: mean over completion tokens of -log p(token | what stands before it).
    """
    from torch.nn.functional import cross_entropy
    from trl import SFTTrainer

    class CpuSFTTrainer(SFTTrainer):
        share_prefix = False  # `fit` turns it on: what the rows begin with is read once

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            targets = inputs["labels"][:, 1:]  # (batch, tokens - 1); -100 where nothing is to be learnt
            supervised = targets != -100
            model = self.accelerator.unwrap_model(model)
            base = prefix.inner_model(model)
            count = supervised.sum() if num_items_in_batch is None else num_items_in_batch
            with self.accelerator.autocast():
                hidden = hidden_states(model, base, inputs["input_ids"], inputs["attention_mask"], self.share_prefix)[:, :-1][supervised]
                if base.lm_head.weight.requires_grad:  # full fine-tuning: the head learns too
                    loss = cross_entropy(base.lm_head(hidden).float(), targets[supervised], reduction="sum") / count
            if not base.lm_head.weight.requires_grad:
                loss = -token_log_probs(hidden, base.lm_head.weight, targets[supervised]).sum() / count
            return (loss, {}) if return_outputs else loss

    return CpuSFTTrainer


def hidden_states(model, base, ids, mask, share: bool = False):
    """The last hidden states (batch, tokens, width) of the token ids; prompt tuning's virtual tokens stand before them, unseen.

    `share`: what all rows begin with is read once (`prefix.hidden_states`).
    """
    import torch

    config = getattr(model, "active_peft_config", None)
    if config is None or not config.is_prompt_learning:
        if share and not getattr(base.model, "gradient_checkpointing", False):
            return prefix.hidden_states(base, ids, mask)
        return base.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
    embeddings = base.get_input_embeddings()(ids)
    prompt = model.get_prompt(len(ids)).to(embeddings.dtype)
    mask = torch.cat([mask.new_ones(prompt.shape[:2]), mask], 1)
    hidden = base.model(inputs_embeds=torch.cat([prompt, embeddings], 1), attention_mask=mask, use_cache=False).last_hidden_state
    return hidden[:, prompt.shape[1] :]
