"""Random Llama checkpoints, made on the fly in a given folder. Same seed, same weights."""

import json
import math
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import llama

BASE = {
    "model_type": "llama",
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "intermediate_size": 320,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": 512,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    # None that a random model could draw.
    "eos_token_id": [],
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}


def build(config, dtype, seed):
    """A model whose logits are spread enough for greedy choices to be clear."""
    mx.random.seed(seed)
    model = llama.Model(llama.ModelArgs.from_dict(config))

    def draw(path, p):
        if p.ndim == 1 and "norm" in path:
            return 1.0 + 0.1 * mx.random.normal(p.shape)
        scale = 1.0 if "embed_tokens" in path else 2.0 / math.sqrt(p.shape[-1])
        return scale * mx.random.normal(p.shape)

    weights = [(k, draw(k, v).astype(dtype)) for k, v in tree_flatten(model.parameters())]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def save(folder, config, *, dtype=mx.float32, seed=0, bits=None, group_size=64, shards=1):
    """Writes a checkpoint as mlx-lm's converter does; `shards` > 1 makes an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(config)
    model = build(config, dtype, seed)
    if bits:
        nn.quantize(model, group_size=group_size, bits=bits)
        config["quantization"] = {"group_size": group_size, "bits": bits, "mode": "affine"}
    weights = dict(tree_flatten(model.parameters()))
    if shards == 1:
        mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    else:
        names = sorted(weights)
        weight_map = {}
        for i in range(shards):
            part = f"model-{i + 1:05}-of-{shards:05}.safetensors"
            chosen = names[i::shards]
            mx.save_safetensors(str(folder / part), {n: weights[n] for n in chosen})
            weight_map.update({n: part for n in chosen})
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder
