"""Decode and prefill speed of exo-runner beside mlx-lm's on this machine, in turn, on the same random weights.

Prints one JSON object; `ratio` is ours over mlx-lm's, of the medians. Measures, asserts nothing.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step

import reference
import runner
import tiny_models

# The shape of the built-in model, and one where the weights outweigh the host's work.
TINY = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704,
    "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 1024,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False,
}
SMALL = TINY | {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048,
                "num_attention_heads": 12, "vocab_size": 32000}
SHAPES = {
    "tiny-bf16": dict(config=TINY, dtype=mx.bfloat16),
    "tiny-4bit": dict(config=TINY, dtype=mx.bfloat16, bits=4),
    "tiny-f32": dict(config=TINY),
    "134m-4bit": dict(config=SMALL, dtype=mx.bfloat16, bits=4),
}


def mlx_lm_speed(model, prompt, max_tokens):
    """Seconds to the first token, and tokens per second from the first to the last."""
    start = time.perf_counter()
    times = []
    for _ in generate_step(mx.array(prompt), model, max_tokens=max_tokens):
        times.append(time.perf_counter())
    return times[0] - start, (len(times) - 1) / (times[-1] - times[0])


def our_speed(folder, prompt, max_tokens, bin):
    found = runner.generate(folder, prompt, max_tokens=max_tokens, bin=bin)
    assert len(found["tokens"]) == max_tokens, "the random model must not stop early"
    return found["time_to_first_token_s"], found["decode_tokens_per_s"]


def measure(name, folder, args):
    tiny_models.save(folder, seed=1, **SHAPES[name])
    model, _ = reference.load(folder)
    draw = random.Random(0)
    prompt = [draw.randrange(1000) for _ in range(args.prompt_tokens)]
    mlx_lm_speed(model, prompt, 16)
    ours, theirs = [], []
    for _ in range(args.rounds):
        theirs.append(mlx_lm_speed(model, prompt, args.max_tokens))
        ours.append(our_speed(folder, prompt, args.max_tokens, args.bin))

    def compare(pick):
        a, b = (statistics.median(map(pick, side)) for side in (ours, theirs))
        return {"exo": round(a, 1), "mlx_lm": round(b, 1), "ratio": round(a / b, 3)}

    return {
        "decode_tokens_per_s": compare(lambda run: run[1]),
        "prefill_tokens_per_s": compare(lambda run: args.prompt_tokens / run[0]),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", help="folder of exo-runner (default: the newest under target)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--shapes", default=",".join(SHAPES), help="comma-separated: %(default)s")
    args = parser.parse_args()
    result = {"binary": str(runner.binary(args.bin)), "device": str(mx.default_device())}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.shapes.split(","):
            result[name] = measure(name, Path(folder) / name, args)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
