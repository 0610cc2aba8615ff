"""Most memory that each rank has while it loads and runs a generated checkpoint, beside its share of the weights.

Prints one JSON object. The aim is 1.15 times the share and 300 MB; measures, asserts nothing.
"""

import argparse
import json
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np

import runner

# 2.1 GB in 16 bit, nearly all of it in layers.
CONFIG = {
    "model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 20, "intermediate_size": 5632,
    "num_attention_heads": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "vocab_size": 8000,
    "max_position_embeddings": 2048, "rope_theta": 10000.0, "tie_word_embeddings": False, "eos_token_id": [],
}
SPLITS = [(1, "pipeline"), (2, "pipeline"), (4, "pipeline"), (2, "tensor"), (4, "tensor")]


def tensors(config):
    """Names and shapes of a Llama's checkpoint."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    keys = width // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], width)
    for layer in range(config["num_hidden_layers"]):
        for name, shape in {
            "input_layernorm": (width,), "post_attention_layernorm": (width,),
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width),
            "self_attn.v_proj": (keys, width), "self_attn.o_proj": (width, width),
            "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
        }.items():
            yield f"model.layers.{layer}.{name}.weight", shape
    yield "model.norm.weight", (width,)
    yield "lm_head.weight", (config["vocab_size"], width)


def write(folder, config):
    """A checkpoint of small random bfloat16 numbers, made without any framework: it takes seconds."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    header, end = {}, 0
    for name, shape in tensors(config):
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    draw = np.random.default_rng(0)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, shape in tensors(config):
            bits = draw.integers(0, 1 << 16, int(np.prod(shape)), dtype=np.uint16)
            # Sign and fraction as drawn, the exponent that of 1/64 to 1/32.
            file.write(((bits & 0x807F) | 0x3C80).tobytes())


def ranks_of(folder, ranks, sharding, args):
    """For each rank the bytes of its weights and its peak resident bytes."""
    command = [str(runner.binary(args.bin)), "bench", "--model", str(folder), "--json", "--sharding", sharding,
               "--prompt-tokens", "4", "--max-tokens", "3", "--rounds", "1"]
    with tempfile.TemporaryDirectory() as place:
        hosts = Path(place) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in runner.free_ports(ranks)]))
        processes, reports = [], []
        for rank in range(ranks):
            environment = runner.own_environment()
            if ranks > 1:
                environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            processes.append(subprocess.Popen(command + ["--every-rank"], env=environment, text=True,
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        for process in processes:
            out, err = process.communicate()
            if process.returncode:
                raise RuntimeError(err)
            reports.append(json.loads(out))
    return [(report["weight_bytes"], report["peak_resident_bytes"]) for report in reports]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", help="folder of exo-runner (default: the newest under target)")
    args = parser.parse_args()
    result = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        write(folder, CONFIG)
        for ranks, sharding in SPLITS:
            result[f"{ranks} {sharding}"] = [
                {"share_mb": share >> 20, "peak_mb": peak >> 20,
                 "allowed_mb": int(share * 1.15 + 300e6) >> 20,
                 "within": peak <= share * 1.15 + 300e6}
                for share, peak in ranks_of(folder, ranks, sharding, args)]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
