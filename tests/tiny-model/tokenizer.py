"""Trains the tokenizer and writes every file of the model folder but the weights. Deterministic, on a CPU, seconds.

Owns the text form of a conversation for training (`segments`), which must equal what the chat template writes.

    python tokenizer.py MODEL_DIR
"""

import itertools
import json
import random
import sys
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

import data

SEED = 7
VOCABULARY = 1280  # a multiple of 64 (quantization groups) that four ranks can split
CONTEXT = 2048
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 512,  # 4 ranks x 128: a rank's slice still fills whole groups of 64
    "max_position_embeddings": CONTEXT,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 8,
    "num_hidden_layers": 8,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": VOCABULARY,
}
GENERATION = {"bos_token_id": 0, "eos_token_id": [2, 0], "pad_token_id": 0, "do_sample": False}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# Marks that belong to the text, so they survive when special tokens are left out of an answer.
MARKS = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
TEMPLATE = (Path(__file__).parent / "chat_template.jinja").read_text().rstrip("\n")
# One digit, a word with its space, a run of marks with its space, spaces that no word takes.
PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def dumps(value, style):
    """JSON as Python's default ("python", what the template's `tojson` writes), compact, or with sorted keys."""
    if style == "compact":
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return json.dumps(value, ensure_ascii=False, sort_keys=style == "sorted")


def call_text(calls):
    return "\n".join(
        "<tool_call>\n" + json.dumps({"name": c["function"]["name"], "arguments": c["function"]["arguments"]},
                                     ensure_ascii=False) + "\n</tool_call>"
        for c in calls
    )


def answer_text(message):
    return call_text(message["tool_calls"]) if message.get("tool_calls") else message["content"]


def segments(messages, tools, style="python"):
    """The conversation as [(text, is it learned)]. Cuts lie where an answer begins and ends."""
    parts, text = [], ""
    messages = list(messages)
    if tools:
        text = "<|im_start|>system\n"
        if messages[0]["role"] == "system":
            text += messages.pop(0)["content"] + "\n\n"
        text += "# Tools\nTo use a tool, answer with its name and arguments:\n"
        text += '<tool_call>\n{"name": NAME, "arguments": OBJECT}\n</tool_call>\n<tools>\n'
        text += "".join(dumps(tool, style) + "\n" for tool in tools) + "</tools><|im_end|>\n"
    for message in messages:
        text += f"<|im_start|>{message['role']}\n"
        if message["role"] == "assistant":
            parts += [(text, False), (answer_text(message) + "<|im_end|>", True)]
            text = "\n"
        else:
            text += message["content"] + "<|im_end|>\n"
    return parts


def train(count=30000):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(MARKS), special_tokens=SPECIAL, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    texts = (
        text
        for c in itertools.islice(data.conversations(SEED, count), count)
        for text, _ in segments(c.messages, c.tools)
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(m, normalized=False, special=False) for m in MARKS])
    assert tokenizer.get_vocab_size() == VOCABULARY, tokenizer.get_vocab_size()
    return tokenizer


def write(folder, name, value):
    (folder / name).write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def check_template(folder):
    """The template writes what training reads, and cutting it into segments changes no token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for c in itertools.islice(data.conversations(SEED + 1, 3000), 3000):
        parts = segments(c.messages, c.tools)
        whole = "".join(text for text, _ in parts) + "\n"
        rendered = tokenizer.apply_chat_template(c.messages, tools=c.tools or None, tokenize=False)
        assert rendered == whole, f"{rendered!r}\n{whole!r}"
        ids = [i for text, _ in parts for i in tokenizer.encode(text, add_special_tokens=False)]
        assert ids == tokenizer.encode(whole)[:-1], whole
        assert tokenizer.decode(ids) == whole[:-1]


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(SEED)
    train().save(str(folder / "tokenizer.json"))
    write(folder, "config.json", CONFIG)
    write(folder, "generation_config.json", GENERATION)
    write(folder, "tokenizer_config.json", {
        "bos_token": SPECIAL[0], "eos_token": SPECIAL[2], "pad_token": SPECIAL[0], "add_bos_token": False,
        "clean_up_tokenization_spaces": False, "model_max_length": CONTEXT,
        "tokenizer_class": "PreTrainedTokenizerFast",
    })
    (folder / "chat_template.jinja").write_text(TEMPLATE + "\n")
    check_template(folder)
    print("tokenizer written:", folder)


if __name__ == "__main__":
    main()
