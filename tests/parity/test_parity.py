"""`exo-runner generate` against mlx-lm on the same weights, for what configurations and files can have."""

import random

import mlx.core as mx
import pytest

import compare
import reference
import runner
import tiny_models
from tiny_models import BASE, FAMILY, LLAMA3_ROPE

# One from the prompt, and 16 decode steps.
TOKENS = 17
PROMPT_LENGTHS = [1, 7, 40]
BUILT_IN = runner.ROOT / "manifests/models"

CASES = {
    "f32": dict(config=BASE),
    "f32-tied-llama3": dict(config=BASE | {
        "tie_word_embeddings": True, "rope_scaling": LLAMA3_ROPE, "num_key_value_heads": 4}),
    "f32-bias-linear-rope": dict(config=BASE | {
        "attention_bias": True, "mlp_bias": True, "head_dim": 64,
        "rope_scaling": {"type": "linear", "factor": 2.0}}),
    "f32-yarn": dict(config=BASE | {"rope_scaling": {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}),
    "f32-many-files": dict(config=BASE, shards=3),
    "4bit-overrides-many-files": dict(config=BASE, dtype=mx.bfloat16, bits=4, shards=2, predicate=lambda path, _: (
        {"group_size": 32, "bits": 8} if "down_proj" in path else "layers.1." not in path)),
    "bf16": dict(config=BASE, dtype=mx.bfloat16),
    "f16": dict(config=BASE, dtype=mx.float16),
    "4bit": dict(config=BASE, dtype=mx.bfloat16, bits=4),
    "4bit-tied": dict(config=BASE | {"tie_word_embeddings": True}, dtype=mx.bfloat16, bits=4),
    "8bit-f32": dict(config=BASE, bits=8, group_size=32),
}
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


def check(folder, model, prompt, **how):
    size = BASE["vocab_size"]
    found = runner.generate(folder, prompt, max_tokens=TOKENS, logprobs=size, **how)
    assert found["prompt_tokens"] == len(prompt)
    logprobs = [compare.dense(entry, size) for entry in found["logprobs"]]
    compare.check_same(compare.agreement(
        found["tokens"], logprobs, reference.answer(model, prompt, TOKENS)))


@pytest.mark.parametrize("case", CASES)
def test_same_as_mlx_lm_on_one_rank(models, case):
    folder, model = models(case)
    lengths = prompts(BASE["vocab_size"], case)
    # Packed products are slow on a CPU.
    for prompt in lengths if "bits" not in CASES[case] else lengths[1:2]:
        check(folder, model, prompt)


@pytest.mark.parametrize("case, layers", [
    ("f32", None),
    ("f32", ["0..1", "1..4"]),
    ("f32", ["0..1", "1..3", "3..4"]),
    ("f32-tied-llama3", None),
    ("bf16", None),
    ("4bit-overrides-many-files", ["0..3", "3..4"]),
    ("4bit-tied", None),
])
def test_same_as_mlx_lm_on_several_ranks(models, case, layers):
    folder, model = models(case)
    check(folder, model, prompts(BASE["vocab_size"], case)[2], ranks=len(layers or [0, 1]), layers=layers)


def test_sampled_tokens_are_the_same_on_any_number_of_ranks(models):
    folder, _ = models("f32")
    prompt = prompts(BASE["vocab_size"], 0)[1]
    how = dict(max_tokens=24, extra=["--temperature", "1.5", "--seed", "11"])
    alone = runner.generate(folder, prompt, **how)["tokens"]
    assert runner.generate(folder, prompt, **how)["tokens"] == alone
    assert runner.generate(folder, prompt, ranks=2, **how)["tokens"] == alone
    assert runner.generate(folder, prompt, ranks=3, **how)["tokens"] == alone
    team = how | {"extra": how["extra"] + ["--sharding", "tensor"]}
    assert runner.generate(folder, prompt, ranks=2, **team)["tokens"] == alone
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


def test_more_ranks_than_layers_are_refused(models):
    folder, _ = models("f32")
    with pytest.raises(RuntimeError, match="4 layers are too few for 5 ranks"):
        runner.generate(folder, [1, 2], ranks=5)


@pytest.mark.parametrize("layers, message", [
    (["0..1", "2..4"], "rank 1 of 2 holds layers 2..4 of hidden size 128, expected layers from 1 on"),
    (["0..2", "1..4"], "rank 1 of 2 holds layers 1..4"),
    (["0..1", "1..3"], "the ranks hold layers up to 3, the model has 4"),
    (["0..1", "1..5"], "a rank was given 1..5, but the model has 4 by its config.json"),
])
def test_layers_that_do_not_make_the_model_are_refused(models, layers, message):
    folder, _ = models("f32")
    with pytest.raises(RuntimeError, match=message):
        runner.generate(folder, [1, 2], ranks=2, layers=layers)


@pytest.fixture(scope="session")
def deep(tmp_path_factory):
    """As many layers as DeepSeek V3 has, which no small number of ranks divides."""
    folder = tmp_path_factory.mktemp("deep")
    config = FAMILY | {"num_hidden_layers": 61, "hidden_size": 64, "intermediate_size": 96}
    tiny_models.save(folder, config, seed=61)
    prompt = prompts(BASE["vocab_size"], 61)[1]
    return folder, prompt, runner.generate(folder, prompt, max_tokens=8, logprobs=20)


def test_61_layers_are_the_same_as_in_mlx_lm(deep):
    folder, prompt, _ = deep
    check(folder, reference.load(folder)[0], prompt)


@pytest.mark.parametrize("ranks, layers", [
    (2, None), (3, None), (4, None), (7, None), (3, ["0..30", "30..31", "31..61"]),
])
def test_61_layers_are_the_same_on_any_number_of_ranks(deep, ranks, layers):
    folder, prompt, alone = deep
    # More ranks than cores wait for each other.
    tokens = 8 if ranks < 7 else 4
    found = runner.generate(folder, prompt, max_tokens=tokens, logprobs=20, ranks=ranks, layers=layers)
    assert found["tokens"] == alone["tokens"][:tokens]
    # To the last bit: the same operations in the same order.
    assert found["logprobs"] == alone["logprobs"][:tokens]


@pytest.mark.parametrize("name", ["tiny", "tiny-4bit"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_built_in_models(name, ranks):
    from mlx_lm.utils import load_tokenizer

    folder = BUILT_IN / name
    if not (folder / "model.safetensors").exists():
        pytest.fail(f"{folder} has no weights")
    model, config = reference.load(folder)
    tokenizer = load_tokenizer(folder)
    questions = ["What is the capital of France?", "Count from 1 to 20.", "Spell the word river."]
    # Packed products are slow on a CPU.
    for question in questions if name == "tiny" and ranks == 1 else questions[:1]:
        message = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        # A trained model has no near ties: mlx-lm's own loop gives the same tokens, too.
        expect = reference.generate(model, prompt, max_tokens=TOKENS, stop=tokenizer.eos_token_ids)
        found = runner.generate(folder, prompt, max_tokens=TOKENS, ranks=ranks)
        assert found["tokens"] == expect["tokens"], f"gap of the reference: {expect['gap']}"
        assert found["text"] == tokenizer.decode(found["tokens"], skip_special_tokens=True)
