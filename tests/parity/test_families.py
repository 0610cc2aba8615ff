"""Every architecture in its packed forms and splits against mlx-lm: same greedy tokens, same log-probabilities."""

import random
from dataclasses import dataclass

import mlx.core as mx
import pytest

import reference
import runner
import tiny_models
from tiny_models import FAMILIES

TOKENS = 16
PROMPT_LENGTHS = [40, 1, 7]
# Rounded types differ in the order of their sums: where the reference itself has two tokens this close, relative to
# the range of its log-probabilities, either may follow, and the comparison ends. A sum may also tip the choice of an
# expert, which changes more than rounding does. (bfloat16 in a team: each rank's part of a sum is rounded; differences
# of 0.014 of the range were seen at the first token.)
TIE = {"f32": 0.0, "bf16": 0.02, "f16": 0.002}
TIE_OF_EXPERTS = 0.05

FORMS = {
    "f32": dict(),
    "bf16": dict(dtype=mx.bfloat16),
    "f16": dict(dtype=mx.float16),
    **{f"{bits}bit-g{group}": dict(bits=bits, group_size=group)
       for bits in (2, 3, 4, 6, 8) for group in (32, 64, 128)},
    "4bit-g32-bf16": dict(dtype=mx.bfloat16, bits=4, group_size=32),
    "mxfp4": dict(bits=4, group_size=32, mode="mxfp4", dtype=mx.bfloat16),
    "mixed": dict(bits=4, group_size=32, predicate=lambda path, _: (
        {"group_size": 64, "bits": 8} if "layers.0" in path and "_proj" in path
        else "lm_head" not in path)),
    "published": dict(as_published=True),
    "published-4bit": dict(as_published=True, bits=4, group_size=32),
}
# Ranks and, for a pipeline, their layers.
SPLITS = {
    "alone": (1, None),
    "pipeline-2": (2, ["0..1", "1..3"]),
    "pipeline-3": (3, None),
    "tensor-2": (2, "tensor"),
    "tensor-4": (4, "tensor"),
}
# One rank in several forms, and each family split in two ways.
SAMPLE = [
    *((family, "f32", "alone") for family in FAMILIES),
    *((family, "f32", split) for family in FAMILIES for split in ("pipeline-2", "tensor-2")),
    *(("llama", form, "alone") for form in ("2bit-g64", "3bit-g32", "6bit-g128", "mxfp4", "mixed")),
    ("qwen2", "4bit-g32", "tensor-2"), ("qwen3", "8bit-g32", "alone"),
    ("qwen3_moe", "4bit-g32", "alone"), ("qwen3_moe", "published", "alone"),
    ("qwen3_moe", "mxfp4", "tensor-2"), ("mixtral", "published", "tensor-2"),
    ("mixtral", "4bit-g32", "alone"), ("mixtral", "published-4bit", "alone"),
    ("deepseek_v3", "published", "alone"), ("deepseek_v3", "published", "tensor-2"),
    ("deepseek_v3", "published-4bit", "alone"), ("deepseek_v3", "4bit-g32", "tensor-2"),
    ("deepseek_v3", "f32", "tensor-4"), ("kimi_k2", "4bit-g32-bf16", "pipeline-2"),
    ("qwen3", "bf16", "alone"), ("llama", "bf16", "tensor-2"),
]


@dataclass(frozen=True)
class Case:
    family: str
    form: str
    split: str

    def __str__(self):
        return f"{self.family}-{self.form}-{self.split}"


def runs(family, form, split):
    """Whether a combination exists."""
    settings, config = FORMS[form], FAMILIES[family]
    if form == "published-4bit" and family == "qwen3_moe":
        return False  # mlx-lm stacks dense experts only
    if settings.get("as_published") and family not in ("qwen3_moe", "mixtral", "deepseek_v3", "kimi_k2"):
        return False  # the same as the dense form
    packed = settings.get("bits") and settings["group_size"]
    if has_experts(family) and settings.get("dtype") and not packed:
        return False  # MLX multiplies gathered matrices of float32 only on a CPU
    if packed and split.startswith("tensor"):
        ranks = SPLITS[split][0]
        inner = [config["intermediate_size"], config.get("moe_intermediate_size", 256)]
        heads = config.get("v_head_dim") or config.get("head_dim") or 32
        sizes = inner + [config["num_attention_heads"] * heads]
        if form == "mixed":
            packed = 64
        return all(size // ranks % packed == 0 for size in sizes)
    return True


def cases(full):
    chosen = SAMPLE
    if full:
        chosen = [(a, b, c) for a in FAMILIES for b in FORMS for c in SPLITS if runs(a, b, c)]
    return [Case(*case) for case in chosen]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Folder, prompts and the reference's answers; the last is kept, as cases come family by family."""
    made = {}

    def get(family, form, full):
        key = family, form
        if key not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{form}")
            tiny_models.save(folder, FAMILIES[family], seed=len(family) + len(form), **FORMS[form])
            model, _ = reference.load(folder)
            draw = random.Random(family)
            lengths = PROMPT_LENGTHS if full else PROMPT_LENGTHS[:1]
            prompts = [[draw.randrange(512) for _ in range(n)] for n in lengths]
            made[key] = folder, [
                (p, reference.generate(model, p, max_tokens=TOKENS)) for p in prompts]
        return made[key]

    return get


def has_experts(family):
    return "num_experts_per_tok" in FAMILIES[family]


def tie(family, form):
    dtype = FORMS[form].get("dtype", mx.float32)
    if has_experts(family) and dtype != mx.float32:
        return TIE_OF_EXPERTS
    return TIE[{mx.bfloat16: "bf16", mx.float16: "f16"}.get(dtype, "f32")]


def tolerance(form):
    """Of a log-probability, relative to their range."""
    dtype = FORMS[form].get("dtype", mx.float32)
    return {mx.bfloat16: 4e-2, mx.float16: 1e-2}.get(dtype, 1e-3)


def test_same_as_mlx_lm(checkpoints, family_case, request):
    case = family_case
    folder, answers = checkpoints(case.family, case.form, request.config.getoption("full"))
    ranks, layers = SPLITS[case.split]
    how = dict(ranks=ranks, layers=layers)
    if layers == "tensor":
        how = dict(ranks=ranks, extra=["--sharding", "tensor"])
    for prompt, expect in answers:
        found = runner.generate(folder, prompt, max_tokens=TOKENS, logprobs=8, **how)
        first = expect["first"]
        span = (first.max() - first.min()).item()
        for entry in found["logprobs"][0]["top"] + [found["logprobs"][0]]:
            difference = abs(entry["logprob"] - first[entry["token"]].item())
            assert difference <= tolerance(case.form) * span, (entry, difference, span)
        for step, (ours, theirs) in enumerate(zip(found["tokens"], expect["tokens"], strict=True)):
            if ours != theirs:
                gap = expect["gaps"][step] / span
                assert gap <= tie(case.family, case.form), f"step {step}: {ours}, not {theirs}; gap {gap}"
                break


@pytest.mark.parametrize("change, form, ranks, message", [
    ({}, {}, 3, "'model.layers.0.self_attn.q_proj' can't be split over 3 ranks: "
                "4 attention heads do not divide by 3"),
    ({"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32}, {}, 2,
     "3 key and value heads do not divide by 2"),
    ({}, dict(bits=4, group_size=128), 2,
     "64 of 128 inputs each do not divide by the quantization's groups of 128"),
])
def test_a_split_that_is_impossible_says_why(tmp_path, change, form, ranks, message):
    tiny_models.save(tmp_path, tiny_models.FAMILY | change, **form)
    with pytest.raises(RuntimeError, match=message):
        runner.generate(tmp_path, [1, 2], ranks=ranks, extra=["--sharding", "tensor"])


def test_sampled_tokens_are_the_same_however_the_model_is_split(tmp_path):
    tiny_models.save(tmp_path, FAMILIES["qwen3_moe"], seed=1)
    how = dict(max_tokens=24, extra=["--temperature", "1.5", "--seed", "11"])
    alone = runner.generate(tmp_path, [5, 6, 7], **how)["tokens"]
    how["extra"] += ["--sharding", "tensor"]
    assert runner.generate(tmp_path, [5, 6, 7], ranks=2, **how)["tokens"] == alone
