"""Every architecture in its packed forms and splits against mlx-lm: same greedy tokens, same logits at every step.

Where all values are float32 (also between packed weights), and on one rank or in a pipeline also in 16 bits, exo-runner
does what mlx-lm does on one rank: all tokens must be the same, and all logits within a thousandth of their range.

In a tensor-parallel team with values in 16 bits each rank rounds its part of every sum, so that no team computes what
one rank does, mlx-lm's neither: exo-runner is compared with mlx-lm's own tensor parallel mode on as many ranks, fed the
same tokens. At each step the likeliest token must be the same, and all logits within a thousandth of their range. There
is one exception, the first step of teams of more than two: MLX's ring adds up the ranks' parts of an element in an order
that depends on where in the array it lies, and exo-runner sums only the prompt's last position behind the last layer.
That step may be off by what rounding did to mlx-lm (see compare.py), unless the prompt has one token. Against mlx-lm on
one rank, and against mlx-lm's own loop, which feeds the last token of a prompt alone, that is the bound of all steps.

Random weights make rounding count for much: no token stands out as in a trained model, and MLX's products with packed
weights on a CPU add up in the type of their input, in bfloat16 with 8 bits."""

import random
import shutil
from dataclasses import asdict, dataclass

import mlx.core as mx
import pytest

import compare
import reference
import report
import runner
import team
import tiny_models
from tiny_models import FAMILIES

# One from the prompt, and 16 decode steps.
TOKENS = 17
SEEDS = 3
PROMPT_LENGTHS = [40, 1, 7]

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
    # Two key and value heads, which two ranks each hold.
    ("llama", "f32", "tensor-4"),
    ("qwen3", "bf16", "alone"), ("llama", "bf16", "tensor-2"), ("mixtral", "mxfp4", "tensor-2"),
    ("qwen3_moe", "4bit-g32-bf16", "tensor-4"),
]
# With values in 16 bits there are as many key and value heads as ranks at most: mlx-lm, whose teams are the measure then,
# repeats none.
HEADS_16_BIT = {"num_attention_heads": 8, "num_key_value_heads": 4}


@dataclass(frozen=True)
class Case:
    family: str
    form: str
    split: str
    seed: int = 0

    def __str__(self):
        return f"{self.family}-{self.form}-{self.split}-{self.seed}"


def config_of(family, form):
    config = FAMILIES[family]
    few = config["num_key_value_heads"] < HEADS_16_BIT["num_key_value_heads"]
    return config | HEADS_16_BIT if rounded(form) and few else config


def runs(family, form, split):
    """Whether a combination exists."""
    settings, config = FORMS[form], config_of(family, form)
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
        heads = config["num_attention_heads"]
        each = config.get("v_head_dim") or config.get("head_dim") or config["hidden_size"] // heads
        sizes = inner + [heads * each]
        if form == "mixed":
            packed = 64
        return all(size // ranks % packed == 0 for size in sizes)
    return True


def cases(full):
    if not full:
        # Cases of one checkpoint follow each other.
        return sorted((Case(*case) for case in SAMPLE), key=lambda case: (case.family, case.form))
    return [Case(family, form, split, seed) for family in FAMILIES for form in FORMS
            for seed in range(SEEDS) for split in SPLITS if runs(family, form, split)]


class Checkpoint:
    """A random model, a prompt, and what mlx-lm makes of it."""

    def __init__(self, folder, case):
        self.folder = folder
        # Every seed has weights and a prompt of its own, the same in every run.
        seed = 1000 * case.seed + len(case.family) + len(case.form)
        tiny_models.save(folder, config_of(case.family, case.form), seed=seed, **FORMS[case.form])
        draw = random.Random(f"{case.family} {case.seed}")
        self.prompt = [draw.randrange(512) for _ in range(PROMPT_LENGTHS[case.seed])]
        model, _ = reference.load(folder)
        self.answer = reference.answer(model, self.prompt, TOKENS)
        self.own_loop = reference.answer(model, self.prompt, TOKENS, last_alone=True)
        # How far mlx-lm agrees with itself.
        self.both_ways = compare.agreement(
            self.own_loop.tokens, self.own_loop.logprobs, self.answer)
        self.noise = self.own_noise = 0.0
        if rounded(case.form):
            exact, _ = reference.load(folder)
            exact.set_dtype(mx.float32)
            self.noise = self.of(exact, self.answer)
            self.own_noise = self.of(exact, self.own_loop)

    def of(self, exact, answer):
        same = reference.answer(exact, self.prompt, TOKENS, forced=answer.tokens)
        return compare.noise(answer, same)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """The checkpoint of a case. The last one is kept: cases come in that order."""
    made = {}

    def get(case):
        key = case.family, case.form, case.seed
        if key not in made:
            for old in made.values():
                shutil.rmtree(old.folder)
            made.clear()
            made[key] = Checkpoint(tmp_path_factory.mktemp("model"), case)
        return made[key]

    return get


@pytest.fixture(scope="session")
def results(request):
    """What was found, printed at the end, and written as it comes where `--results` says."""
    path = request.config.getoption("results")
    with report.Results(path) as found:
        request.config.stash[RESULTS] = found
        yield found


RESULTS = pytest.StashKey()


def by_count(make):
    """What `make` makes for so many ranks, when first asked for."""
    made = {}

    def get(count):
        if count not in made:
            made[count] = make(count)
        return made[count]

    yield get
    for one in made.values():
        one.close()


@pytest.fixture(scope="session")
def runners():
    """exo-runner on several ranks."""
    yield from by_count(runner.Ranks)


@pytest.fixture(scope="session")
def teams():
    """mlx-lm on several ranks."""
    yield from by_count(team.Team)


def rounded(form):
    """Whether values between the layers are in 16 bits."""
    return FORMS[form].get("dtype", mx.float32) != mx.float32


def has_experts(family):
    return "num_experts_per_tok" in FAMILIES[family]


@dataclass
class Found:
    """How far exo-runner agrees with mlx-lm."""

    same: compare.Agreement  # on one rank
    own_loop: compare.Agreement  # and with mlx-lm's own loop
    team: list  # at each step with mlx-lm's team; empty where that is not the measure


def find(case, made, runners, teams):
    ranks, layers = SPLITS[case.split]
    how = dict(layers=layers)
    if layers == "tensor":
        how = dict(extra=["--sharding", "tensor"])
    config = config_of(case.family, case.form)
    size = config["vocab_size"]
    answer = runners(ranks).generate(made.folder, made.prompt, max_tokens=TOKENS, logprobs=size, **how)
    tokens = answer["tokens"]
    logprobs = [compare.dense(entry, size) for entry in answer["logprobs"]]
    as_team = []
    if rounded(case.form) and layers == "tensor":
        assert team.can_split(config, ranks), "mlx-lm's team is the measure"
        expect = teams(ranks).answer(made.folder, made.prompt, tokens)
        as_team = compare.each_step(tokens, logprobs, expect)
    return Found(compare.agreement(tokens, logprobs, made.answer),
                 compare.agreement(tokens, logprobs, made.own_loop), as_team)


def check(case, made, found):
    if not found.team:
        compare.check_same(found.same)
    else:
        compare.check_rounded(found.same, made.noise)
        first, *others = found.team
        for step in others:
            compare.check_same(step)
        if SPLITS[case.split][0] > 2 and len(made.prompt) > 1:
            compare.check_rounded(first, made.noise)
        else:
            compare.check_same(first)
    if rounded(case.form):
        compare.check_rounded(found.own_loop, made.own_noise)
    else:
        compare.check_same(found.own_loop)


def test_same_as_mlx_lm(checkpoints, runners, teams, results, family_case):
    made = checkpoints(family_case)
    with results.case(family_case, made) as row:
        found = find(family_case, made, runners, teams)
        row |= asdict(found)
        check(family_case, made, found)


PACKED_128 = dict(bits=4, group_size=128)


@pytest.mark.parametrize("family, change, form, ranks, message", [
    ("llama", {}, {}, 3, "'model.layers.0.self_attn.q_proj' can't be split over 3 ranks: "
                         "4 attention heads do not divide by 3"),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 32}, {}, 2,
     "3 key and value heads do not divide by 2"),
    ("qwen2", {"intermediate_size": 129}, {}, 2, "129 inner features of the MLP do not divide by 2"),
    ("qwen3_moe", {"moe_intermediate_size": 129}, {}, 2,
     "129 inner features of an expert do not divide by 2"),
    ("mixtral", {}, PACKED_128, 4,
     "inputs each do not divide by the quantization's groups of 128"),
    ("llama", {}, PACKED_128, 2,
     "64 of 128 inputs each do not divide by the quantization's groups of 128"),
    ("deepseek_v3", {}, {}, 3, "4 attention heads do not divide by 3"),
    ("kimi_k2", {}, dict(bits=4, group_size=32, mode="mxfp4", dtype=mx.bfloat16), 3,
     "can't be split over 3 ranks: 4 attention heads do not divide by 3"),
])
def test_a_split_that_is_impossible_says_why(tmp_path, family, change, form, ranks, message):
    tiny_models.save(tmp_path, FAMILIES[family] | change, **form)
    with pytest.raises(RuntimeError, match=message):
        runner.generate(tmp_path, [1, 2], ranks=ranks, extra=["--sharding", "tensor"])


def test_sampled_tokens_are_the_same_however_the_model_is_split(tmp_path):
    tiny_models.save(tmp_path, FAMILIES["qwen3_moe"], seed=1)
    how = dict(max_tokens=24, extra=["--temperature", "1.5", "--seed", "11"])
    alone = runner.generate(tmp_path, [5, 6, 7], **how)["tokens"]
    how["extra"] += ["--sharding", "tensor"]
    assert runner.generate(tmp_path, [5, 6, 7], ranks=2, **how)["tokens"] == alone
