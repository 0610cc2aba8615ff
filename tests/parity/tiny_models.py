"""Random checkpoints of every architecture, made on the fly in a given folder. Same seed, same weights."""

import json
import math
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes, quantize_model

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


# Sizes that split over four ranks, also in groups of 32.
FAMILY = BASE | {"num_hidden_layers": 3, "intermediate_size": 256}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
LATENT = {
    "q_lora_rank": 64, "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32,
    "v_head_dim": 32, "num_key_value_heads": 4, "n_routed_experts": 8, "n_shared_experts": 1,
    "routed_scaling_factor": 2.5, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
    "first_k_dense_replace": 1,
}
DEEPSEEK_ROPE = {
    "type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 256,
}
FAMILIES = {
    "llama": FAMILY | {"rope_scaling": LLAMA3_ROPE},
    "mistral": FAMILY | {"model_type": "mistral", "head_dim": 64, "sliding_window": None},
    "qwen2": FAMILY | {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": FAMILY | {"model_type": "qwen3", "head_dim": 64},
    "qwen3_moe": FAMILY | MOE | {
        "model_type": "qwen3_moe", "head_dim": 64, "num_experts": 8, "decoder_sparse_step": 1,
        "mlp_only_layers": [1]},
    "mixtral": FAMILY | {
        "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": FAMILY | MOE | LATENT | {
        "model_type": "deepseek_v3", "n_group": 4, "topk_group": 2, "rope_scaling": DEEPSEEK_ROPE},
    "kimi_k2": FAMILY | MOE | LATENT | {
        "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "q_lora_rank": None},
}


def build(config, dtype, seed):
    """A model whose logits are spread enough for greedy choices to be clear."""
    mx.random.seed(seed)
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))

    def draw(path, p):
        if p.ndim == 1 and "norm" in path:
            return 1.0 + 0.1 * mx.random.normal(p.shape)
        scale = 1.0 if "embed_tokens" in path else 2.0 / math.sqrt(p.shape[-1])
        if "e_score_correction_bias" in path:
            scale = 0.1
        return scale * mx.random.normal(p.shape)

    weights = [(k, draw(k, v).astype(dtype)) for k, v in tree_flatten(model.parameters())]
    model.load_weights(weights)
    mx.eval(model.parameters())
    return model


def published(config, weights):
    """Dense weights under the names that Hugging Face has: single experts, keys and values in one matrix."""
    single = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    found = {}
    for name, w in weights.items():
        if ".switch_mlp." in name:
            block, _, rest = name.partition(".switch_mlp.")
            part = rest.removesuffix(".weight")
            part = single[part] if config["model_type"] == "mixtral" else part
            found |= {f"{block}.experts.{i}.{part}.weight": w[i] for i in range(w.shape[0])}
        elif name.endswith("embed_q.weight"):
            values = weights[name.replace("embed_q", "unembed_out")]
            both = mx.concatenate([w.swapaxes(-1, -2), values], axis=1)
            found[name.replace("embed_q", "kv_b_proj")] = mx.contiguous(both.flatten(0, 1))
        elif not name.endswith("unembed_out.weight"):
            found[name] = w
    return found


def quantize_published(config, weights, bits, group_size):
    """As older converters did: every matrix but the router's on its own."""
    found = {}
    for name, w in weights.items():
        if w.ndim != 2 or name.endswith("mlp.gate.weight"):
            found[name] = w
            continue
        path = name.removesuffix(".weight")
        parts = mx.quantize(w, group_size=group_size, bits=bits)
        found |= {f"{path}.{n}": part for n, part in zip(["weight", "scales", "biases"], parts)}
    config["quantization"] = {"group_size": group_size, "bits": bits}
    return found


def save(folder, config, *, dtype=mx.float32, seed=0, bits=None, group_size=64, mode="affine",
         shards=1, predicate=None, as_published=False):
    """Writes a checkpoint as mlx-lm's converter does, or as it was published; `shards` > 1 makes an index."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(config)
    model = build(config, dtype, seed)
    if as_published:
        weights = published(config, dict(tree_flatten(model.parameters())))
        if bits:
            weights = quantize_published(config, weights, bits, group_size)
    else:
        if bits:
            model, config = quantize_model(
                model, config, group_size, bits, mode=mode, quant_predicate=predicate)
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
