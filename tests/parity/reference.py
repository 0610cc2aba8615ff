"""What mlx-lm itself answers."""

from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model


def load(folder):
    model, config = load_model(Path(folder), lazy=False)
    return model, config


def generate(model, prompt_ids, *, max_tokens=16, stop=()):
    """Greedy tokens of mlx-lm's own loop, the log-probabilities of the first step, and the gaps between the two best
    of each step."""
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


@dataclass
class Answer:
    """Greedy tokens, and the log-probabilities of the whole vocabulary before each, in float32."""

    tokens: list
    logprobs: list


def answer(model, prompt_ids, max_tokens, *, forced=None, last_alone=False):
    """The prompt is fed at once, as exo-runner does. mlx-lm's own loop feeds its last token alone: so does this with
    `last_alone`. `forced` tokens are fed instead of the likeliest."""
    cache = make_prompt_cache(model)
    prompt = mx.array(prompt_ids)[None]
    if last_alone and prompt.size > 1:
        mx.eval(model(prompt[:, :-1], cache=cache))
        prompt = prompt[:, -1:]
    found = Answer([], [])
    for step in range(max_tokens):
        logits = model(prompt, cache=cache)[0, -1].astype(mx.float32)
        found.logprobs.append(logits - mx.logsumexp(logits))
        found.tokens.append(mx.argmax(logits).item())
        prompt = mx.array([[forced[step] if forced else found.tokens[-1]]])
    return found
