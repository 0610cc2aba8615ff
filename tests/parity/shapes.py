"""Random checkpoints in the shapes of real models, for measuring: `shapes.py NAME FOLDER`. Same name, same weights."""

import argparse
import time
from pathlib import Path

import mlx.core as mx

import tiny_models

# The shape of the built-in model, and one where the weights outweigh the host's work.
TINY = {
    "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 8, "intermediate_size": 704,
    "num_attention_heads": 8, "num_key_value_heads": 4, "rms_norm_eps": 1e-5, "vocab_size": 1024,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False,
    "eos_token_id": [],
}
SMALL = TINY | {"hidden_size": 768, "num_hidden_layers": 12, "intermediate_size": 2048,
                "num_attention_heads": 12, "vocab_size": 32000}
LLAMA_ROPE = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 8192}
# Llama 3.2 1B, 3.1 8B, and 3.1 70B with a quarter of its layers.
LLAMA_1B = TINY | {
    "hidden_size": 2048, "num_hidden_layers": 16, "intermediate_size": 8192, "head_dim": 64,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "rope_theta": 500000.0, "rope_scaling": LLAMA_ROPE,
    "tie_word_embeddings": True}
LLAMA_8B = LLAMA_1B | {
    "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336, "head_dim": 128,
    "rope_scaling": LLAMA_ROPE | {"factor": 8.0}, "tie_word_embeddings": False}
LLAMA_70B_CUT = LLAMA_8B | {"hidden_size": 8192, "num_hidden_layers": 20, "intermediate_size": 28672,
                            "num_attention_heads": 64}
SHAPES = {
    "tiny-bf16": dict(config=TINY, dtype=mx.bfloat16),
    "tiny-4bit": dict(config=TINY, dtype=mx.bfloat16, bits=4),
    "tiny-f32": dict(config=TINY),
    "134m-bf16": dict(config=SMALL, dtype=mx.bfloat16),
    "134m-4bit": dict(config=SMALL, dtype=mx.bfloat16, bits=4),
    "1b-bf16": dict(config=LLAMA_1B, dtype=mx.bfloat16),
    "1b-4bit": dict(config=LLAMA_1B, dtype=mx.bfloat16, bits=4),
    "8b-bf16": dict(config=LLAMA_8B, dtype=mx.bfloat16),
    "8b-4bit": dict(config=LLAMA_8B, dtype=mx.bfloat16, bits=4),
    "70b-cut-bf16": dict(config=LLAMA_70B_CUT, dtype=mx.bfloat16),
}


def save(name, folder):
    """Does nothing where a finished checkpoint is already."""
    folder = Path(folder)
    if not (folder / "config.json").exists():
        tiny_models.save(folder, seed=1, **SHAPES[name])
        mx.clear_cache()
    return folder


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    start = time.perf_counter()
    save(args.name, args.folder)
    size = sum(f.stat().st_size for f in args.folder.iterdir())
    print(f"{args.name}: {size / 1e9:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
