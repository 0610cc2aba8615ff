"""`exo-runner generate` against mlx-lm on the same weights: same greedy tokens, same log-probabilities."""

import random

import mlx.core as mx
import pytest

import reference
import runner
import tiny_models
from tiny_models import BASE, LLAMA3_ROPE

TOKENS = 16  # generated per prompt
PROMPT_LENGTHS = [1, 7, 40]
BUILT_IN = runner.ROOT / "manifests/models"

CASES = {
    "f32": dict(config=BASE),
    "f32-tied-llama3": dict(config=BASE | {
        "tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE, "num_key_value_heads": 4}),
    "f32-bias-linear-rope": dict(config=BASE | {
        "attention_bias": True, "mlp_bias": True, "head_dim": 64,
        "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "f32-sharded-files": dict(config=BASE, shards=3),
    "bf16": dict(config=BASE, dtype=mx.bfloat16),
    "f16": dict(config=BASE, dtype=mx.float16),
    "4bit": dict(config=BASE, dtype=mx.bfloat16, bits=4),
    "4bit-tied": dict(config=BASE | {"tie_word_embeddings": True}, dtype=mx.bfloat16, bits=4),
    "8bit-f32": dict(config=BASE, bits=8, group_size=32),
}
# Largest difference of a log-probability, relative to their range. bfloat16 has 8 bits of mantissa.
TOLERANCE = {"f32": 1e-3, "8bit": 1e-3, "f16": 1e-2, "bf16": 4e-2, "4bit": 4e-2}


def prompts(vocab_size, seed):
    draw = random.Random(seed)
    return [[draw.randrange(vocab_size) for _ in range(n)] for n in PROMPT_LENGTHS]


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    made = {}

    def get(case):
        if case not in made:
            folder = tmp_path_factory.mktemp(case)
            tiny_models.save(folder, seed=len(case), **CASES[case])
            made[case] = folder, reference.load(folder)[0]
        return made[case]

    return get


def check(folder, model, prompt, tolerance, expect, **how):
    found = runner.generate(folder, prompt, max_tokens=TOKENS, logprobs=8, **how)
    assert found["tokens"] == expect["tokens"], f"gap of the reference: {expect['gap']}"
    assert found["prompt_tokens"] == len(prompt)
    first = expect["first"]
    span = (first.max() - first.min()).item()
    for entry in found["logprobs"][0]["top"] + [found["logprobs"][0]]:
        difference = abs(entry["logprob"] - first[entry["token"]].item())
        assert difference <= tolerance * span, (entry, difference, span)
    return found


@pytest.mark.parametrize("case", CASES)
def test_same_as_mlx_lm_on_one_rank(models, case):
    folder, model = models(case)
    for prompt in prompts(BASE["vocab_size"], case):
        expect = reference.generate(model, prompt, max_tokens=TOKENS)
        check(folder, model, prompt, TOLERANCE[case.split("-")[0]], expect)


@pytest.mark.parametrize("case, layers", [
    ("f32", None),
    ("f32", ["0..1", "1..4"]),
    ("f32", ["0..1", "1..3", "3..4"]),
    ("f32-tied-llama3", None),
    ("bf16", None),
    ("4bit", ["0..3", "3..4"]),
    ("4bit-tied", None),
])
def test_same_as_mlx_lm_on_several_ranks(models, case, layers):
    folder, model = models(case)
    ranks = len(layers or [0, 1])
    for prompt in prompts(BASE["vocab_size"], case):
        expect = reference.generate(model, prompt, max_tokens=TOKENS)
        tolerance = TOLERANCE[case.split("-")[0]]
        check(folder, model, prompt, tolerance, expect, ranks=ranks, layers=layers)


def test_sampled_tokens_are_the_same_on_any_number_of_ranks(models):
    folder, _ = models("f32")
    prompt = prompts(BASE["vocab_size"], 0)[1]
    how = dict(max_tokens=24, extra=["--temperature", "1.5", "--seed", "11"])
    alone = runner.generate(folder, prompt, **how)["tokens"]
    assert runner.generate(folder, prompt, **how)["tokens"] == alone
    assert runner.generate(folder, prompt, ranks=2, **how)["tokens"] == alone
    assert runner.generate(folder, prompt, ranks=3, **how)["tokens"] == alone
    other = how | {"extra": ["--temperature", "1.5", "--seed", "12"]}
    assert runner.generate(folder, prompt, **other)["tokens"] != alone


def test_stops_at_the_end_token_and_at_the_context(tmp_path):
    config = BASE | {"max_position_embeddings": 20}
    folder = tiny_models.save(tmp_path, config, seed=3)
    prompt = prompts(BASE["vocab_size"], 1)[1]
    full = runner.generate(folder, prompt, max_tokens=100)
    assert full["finish_reason"] == "length"
    assert len(full["tokens"]) == 20 - len(prompt) + 1
    stop = full["tokens"][5]
    before = full["tokens"].index(stop)
    tiny_models.save(tmp_path, config | {"eos_token_id": [stop]}, seed=3)
    for ranks in (1, 2):
        found = runner.generate(folder, prompt, max_tokens=100, ranks=ranks)
        assert found["finish_reason"] == "stop"
        assert found["tokens"] == full["tokens"][:before]


@pytest.mark.parametrize("name", ["tiny", "tiny-4bit"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_built_in_models(name, ranks):
    from mlx_lm.utils import load_tokenizer

    folder = BUILT_IN / name
    if not (folder / "model.safetensors").exists():
        pytest.fail(f"{folder} has no weights")
    model, config = reference.load(folder)
    tokenizer = load_tokenizer(folder)
    tolerance = TOLERANCE["bf16" if name == "tiny" else "4bit"]
    for question in ["What is the capital of France?", "Count from 1 to 20.", "Spell the word river."]:
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        expect = reference.generate(model, prompt, max_tokens=TOKENS, stop=tokenizer.eos_token_ids)
        found = check(folder, model, prompt, tolerance, expect, ranks=ranks)
        assert found["text"] == tokenizer.decode(found["tokens"], skip_special_tokens=True)
