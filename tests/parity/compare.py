"""How far two answers agree, and how far they have to."""

from dataclasses import dataclass

import mlx.core as mx

from reference import Answer

# Largest difference of a logit, relative to their range, where both sides compute in the same way.
TOLERANCE = 1e-3
# Greedy tokens that must be the same, also where rounding may differ.
TOKENS_MIN = 12


@dataclass
class Agreement:
    equal: int  # tokens up to the first that differs
    steps: int
    difference: float  # the largest of a log-probability, as long as both have fed the same, relative to the range
    gap: float  # between both choices at the first that differs, in the eyes of the reference; 0 if none differs

    def __str__(self):
        text = f"{self.equal} of {self.steps} tokens, logits within {self.difference:.2e}"
        return text + (f", then a gap of {self.gap:.2e}" if self.gap else "")


def span(logprobs):
    return (logprobs.max() - logprobs.min()).item()


def dense(entry, size):
    """The log-probabilities of the whole vocabulary by id, of one token that exo-runner reports."""
    values = [0.0] * size
    assert len(entry["top"]) == size, "all must be reported"
    for one in entry["top"]:
        values[one["token"]] = one["logprob"]
    return mx.array(values)


def agreement(tokens, logprobs, expect):
    """Of `tokens`, and of the log-probabilities before each, with an `Answer`."""
    found = Agreement(0, len(expect.tokens), 0.0, 0.0)
    for ours, own, theirs, reference in zip(
            tokens, logprobs, expect.tokens, expect.logprobs, strict=True):
        difference = mx.abs(own - reference).max().item() / span(reference)
        found.difference = max(found.difference, difference)
        if ours != theirs:
            found.gap = (reference[theirs] - reference[ours]).item() / span(reference)
            break
        found.equal += 1
    return found


def each_step(tokens, logprobs, expect):
    """An agreement for each step on its own; `expect` was fed the same tokens before it."""
    steps = zip(tokens, logprobs, expect.tokens, expect.logprobs, strict=True)
    return [agreement([ours], [own], Answer([theirs], [reference])) for ours, own, theirs, reference in steps]


def noise(expect, exact):
    """How far the reference's own rounding has moved its log-probabilities, relative to their range: the largest
    difference from those of the same weights in float32."""
    return max(mx.abs(a - b).max().item() / span(b)
               for a, b in zip(expect.logprobs, exact.logprobs, strict=True))


def check_same(found):
    assert found.difference <= TOLERANCE, found
    assert found.equal == found.steps, found


def check_rounded(found, noise):
    """Where sums are rounded at other places, both sides may be off by what rounding makes of the exact result: two
    tokens closer than both together are a tie."""
    assert found.difference <= 2 * noise, (found, noise)
    if found.equal < TOKENS_MIN:
        assert found.gap <= 2 * noise, (found, noise)
