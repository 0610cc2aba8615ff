"""Decode and prefill speed of exo-runner beside mlx-lm's on this machine, in turn, on the same random weights.

Prints one JSON object. `tokens` says what was run, the same for both; `ratio` is ours over mlx-lm's, of the medians.
`prefill_tokens_per_s` is the prompt's alone, with nothing begun behind it; `first_token_ms` is what a client waits,
which with mlx-lm includes handing over the second step; `decode_tokens_per_s` counts from the second token to the last,
as mlx-lm has begun the second step before the first token is there and exo-runner has not. `step_ms` is what a decode
step costs the host: `build` for making the graph, `submit` for handing it to the device, which includes waiting for a
device that takes no more yet; `host_cpu` is what both took of the processor, as long as a driver that waits sleeps.

The two take turns, mlx-lm first in every second one, each behind a warm-up of its own. mlx-lm runs as its own
stream_generate does, with what it sets on macOS. Its weights stay in memory while exo-runner has its turn: there must
be room for both. Measures, asserts nothing.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit
from mlx_lm.models.cache import make_prompt_cache

import reference
import runner
import shapes

CPU_SHAPES = "tiny-bf16,tiny-4bit,tiny-f32,134m-bf16,134m-4bit"
GPU_SHAPES = "1b-bf16,8b-bf16,8b-4bit"
# What is run where the arguments do not say. A CPU needs about a second for each token of the packed 134m shape,
# also of a prompt: MLX multiplies packed matrices there one row at a time.
CPU_TOKENS = {"prompt_tokens": 64, "max_tokens": 64, "rounds": 2}
CPU_TOKENS_OF = {"134m-4bit": {"prompt_tokens": 8, "max_tokens": 8, "rounds": 1}}
GPU_TOKENS = {"prompt_tokens": 256, "max_tokens": 256, "rounds": 2}
# Before the first round of a turn, as in exo-runner's bench.
WARM_UP_TOKENS = 16


def mlx_lm_speed(model, prompt, max_tokens):
    """Seconds to the first token and of the prompt alone, and tokens per second from the second to the last."""
    start = time.perf_counter()
    times = []
    for _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
        times.append(time.perf_counter())
    # One more step was begun behind the last token.
    mx.synchronize(generation_stream)
    prefill = time.perf_counter()
    # With no token to give it begins no step behind the prompt, and waits for that.
    for _ in generate_step(mx.array(prompt), model, max_tokens=0):
        raise RuntimeError("mlx-lm drew a token that was not asked for")
    return {"first_token_s": times[0] - start, "prefill_s": time.perf_counter() - prefill,
            "decode": (len(times) - 2) / (times[-1] - times[1])}


def mlx_lm_host(model, prompt, steps):
    """Mean milliseconds of a decode step's parts, in generate_step's own order of work."""
    cache = make_prompt_cache(model)
    spent = {"build": 0.0, "submit": 0.0, "wait": 0.0, "host_cpu": 0.0}

    def step(tokens):
        logits = model(tokens[None], cache=cache)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return mx.argmax(logprobs, axis=-1), logprobs

    with mx.stream(generation_stream):
        token, logprobs = step(mx.array(prompt))
        mx.async_eval(token, logprobs)
        mx.eval(token)
        # The first finds the device idle, and is left out.
        for count in range(steps + 1):
            if count == 1:
                spent = dict.fromkeys(spent, 0.0)
            computed = time.thread_time()
            marks = [time.perf_counter()]
            following, logprobs = step(token)
            marks.append(time.perf_counter())
            mx.async_eval(following, logprobs)
            marks.append(time.perf_counter())
            spent["host_cpu"] += (time.thread_time() - computed) * 1e3 / steps
            token.item()
            marks.append(time.perf_counter())
            for part, (a, b) in zip(spent, zip(marks, marks[1:])):
                spent[part] += (b - a) * 1e3 / steps
            token = following
        mx.eval(token)
    return spent


def mlx_lm_turn(model, prompt, args):
    """Its rounds, and its host's part."""
    with wired_limit(model, [generation_stream]):
        mlx_lm_speed(model, prompt, min(args.max_tokens, WARM_UP_TOKENS))
        rounds = [mlx_lm_speed(model, prompt, args.max_tokens) for _ in range(args.rounds)]
        host = mlx_lm_host(model, prompt, args.max_tokens - 2)
    mx.clear_cache()
    return rounds, host


def our_speed(folder, args):
    """One process, whose rounds follow each other."""
    command = [str(runner.binary(args.bin)), "bench", "--model", str(folder), "--json",
               "--prompt-tokens", str(args.prompt_tokens), "--max-tokens", str(args.max_tokens),
               "--rounds", str(args.rounds)]
    done = subprocess.run(command, env=runner.own_environment(), text=True, capture_output=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout)


def measure(name, folder, args):
    shapes.save(name, folder)
    loading = time.perf_counter()
    model, _ = reference.load(folder)
    loading = time.perf_counter() - loading
    draw = random.Random(0)
    prompt = [draw.randrange(1000) for _ in range(args.prompt_tokens)]
    ours, theirs, host = [], [], []
    for turn in range(args.turns):
        print(f"{name}: turn {turn + 1} of {args.turns}", file=sys.stderr, flush=True)
        if turn % 2:
            ours.append(our_speed(folder, args))
        rounds, parts_of_step = mlx_lm_turn(model, prompt, args)
        theirs += rounds
        host.append(parts_of_step)
        if not turn % 2:
            ours.append(our_speed(folder, args))
    runs = [report["runs"][0] for report in ours]

    def compare(a, b):
        a, b = statistics.median(a), statistics.median(b)
        return {"exo": float(f"{a:.4g}"), "mlx_lm": float(f"{b:.4g}"), "ratio": round(a / b, 3)}

    def parts(steps):
        return {p: round(statistics.median(s[p] for s in steps), 3) for p in ("build", "submit", "wait", "host_cpu")}

    return {
        "tokens": {"prompt": args.prompt_tokens, "answer": args.max_tokens, "rounds": args.rounds,
                   "turns": args.turns},
        "decode_tokens_per_s": compare(
            [run["decode_tokens_per_s"] for run in runs], [run["decode"] for run in theirs]),
        "prefill_tokens_per_s": compare(
            [run["prefill_tokens_per_s"] for run in runs],
            [args.prompt_tokens / run["prefill_s"] for run in theirs]),
        "first_token_ms": compare(
            [run["time_to_first_token_s"] * 1e3 for run in runs],
            [run["first_token_s"] * 1e3 for run in theirs]),
        "step_ms": {"exo": parts([run["step_ms"] for run in runs]), "mlx_lm": parts(host)},
        "load_s": {"exo": round(min(report["load_s"] for report in ours), 2), "mlx_lm": round(loading, 2)},
        "peak_memory_mb": {"exo": max(report["peak_memory_bytes"] for report in ours) >> 20,
                           "mlx_lm": mx.get_peak_memory() >> 20},
    }


def with_tokens(name, args, gpu):
    """The arguments for one shape."""
    tokens = GPU_TOKENS if gpu else CPU_TOKENS | CPU_TOKENS_OF.get(name, {})
    given = {key: value for key, value in vars(args).items() if value is not None}
    return argparse.Namespace(**(vars(args) | tokens | given))


def main():
    gpu = mx.default_device() == mx.Device(mx.gpu)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", help="folder of exo-runner (default: the newest under target)")
    parser.add_argument("--turns", type=int, default=3, help="changes between the two (default: %(default)s)")
    default, others = (GPU_TOKENS, {}) if gpu else (CPU_TOKENS, CPU_TOKENS_OF)
    for option, text in [
        ("--rounds", "rounds per turn"),
        ("--prompt-tokens", "length of the prompt"),
        ("--max-tokens", "tokens to generate, at least 3"),
    ]:
        key = option[2:].replace("-", "_")
        known = "; ".join([str(default[key])] + [f"{own[key]} for {name}" for name, own in others.items()])
        parser.add_argument(option, type=int, help=f"{text} (default: {known})")
    parser.add_argument("--shapes", default=GPU_SHAPES if gpu else CPU_SHAPES,
                        help="comma-separated: %(default)s; known: " + ", ".join(shapes.SHAPES))
    parser.add_argument("--models", type=Path, help="where checkpoints are kept (default: nowhere)")
    args = parser.parse_args()
    result = {"binary": str(runner.binary(args.bin)), "device": str(mx.default_device())}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.shapes.split(","):
            mx.reset_peak_memory()
            where = (args.models or Path(folder)) / name
            result[name] = measure(name, where, with_tokens(name, args, gpu))
            print(f"{name}: {json.dumps(result[name])}", file=sys.stderr, flush=True)
            mx.clear_cache()
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
