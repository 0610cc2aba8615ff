"""What mlx-lm itself answers."""

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model


def load(folder):
    from pathlib import Path

    model, config = load_model(Path(folder), lazy=False)
    return model, config


def generate(model, prompt_ids, *, max_tokens=16, stop=()):
    """Greedy tokens, the log-probabilities of the first step, and the gaps between the two best of each step."""
    tokens, first, gaps = [], None, []
    for token, logprobs in generate_step(mx.array(prompt_ids), model, max_tokens=max_tokens):
        logprobs = logprobs.astype(mx.float32)
        if first is None:
            first = logprobs
        two = mx.topk(logprobs, 2)
        gaps.append(abs((two[1] - two[0]).item()))
        if token in stop:
            break
        tokens.append(token)
    return {"tokens": tokens, "first": first, "gaps": gaps, "gap": min(gaps)}
