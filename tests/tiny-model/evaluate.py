"""Asks a model folder every question and compares the greedy answers: with mlx-lm, or with transformers.

Shares no code with training: the prompt comes from the folder's own chat template.

    python evaluate.py MODEL_DIR [--with mlx|transformers] [--dtype bfloat16|float32]
    python evaluate.py MODEL_DIR --annotate > questions.json
        takes the candidates of questions.py that the model answers with a gap of at least LEAST_GAP (transformers,
        float32), and adds prompt_tokens (how many), answer_tokens (ids, without the end) and gap
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# Rounding differs between devices and frameworks by a few hundredths of a logit; below this a question is fragile.
LEAST_GAP = 2.0


class Mlx:
    def __init__(self, folder, dtype):
        import mlx.core as mx
        import mlx_lm

        mx.set_default_device(mx.cpu)
        self.mx, self.lm = mx, mlx_lm
        self.model, self.tokenizer = mlx_lm.load(folder)
        if dtype == "float32":
            self.model.set_dtype(mx.float32)

    def answer(self, prompt, limit):
        return self.lm.generate(self.model, self.tokenizer, prompt=prompt, max_tokens=limit)

    def logits(self, ids):
        import numpy as np

        return np.array(self.model(self.mx.array([ids]))[0].astype(self.mx.float32))


class Transformers:
    def __init__(self, folder, dtype):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.torch = torch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    def answer(self, prompt, limit):
        with self.torch.no_grad():
            ids = self.torch.tensor([prompt])
            whole = self.model.generate(ids, attention_mask=self.torch.ones_like(ids), max_new_tokens=limit, do_sample=False)
        return self.tokenizer.decode(whole[0, len(prompt) :], skip_special_tokens=True)

    def logits(self, ids):
        with self.torch.no_grad():
            return self.model(self.torch.tensor([ids])).logits[0].float().numpy()


def prompt_ids(tokenizer, row):
    text = tokenizer.apply_chat_template(
        row["messages"], tools=row.get("tools"), add_generation_prompt=True, tokenize=False
    )
    return tokenizer.encode(text, add_special_tokens=False)


def gap(engine, prompt, answer, end):
    """Smallest distance from the right token's logit to the next best, over the answer and its end."""
    import numpy as np

    wanted = answer + [end]
    logits = engine.logits(prompt + answer)[len(prompt) - 1 :]
    own = logits[np.arange(len(wanted)), wanted]
    logits[np.arange(len(wanted)), wanted] = -np.inf
    return float((own - logits.max(1)).min())


def annotate(folder):
    import questions

    engine = Transformers(folder, "float32")
    tokenizer = engine.tokenizer
    kept, dropped = [], []
    for row in questions.everything():
        prompt = prompt_ids(tokenizer, row)
        answer = tokenizer.encode(row["answer"], add_special_tokens=False)
        least = gap(engine, prompt, answer, tokenizer.convert_tokens_to_ids("<|im_end|>"))
        del row["keys"]
        row.update(prompt_tokens=len(prompt), answer_tokens=answer, gap=round(least, 2))
        (kept if least >= LEAST_GAP else dropped).append(row)
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in kept)
    sys.stdout.write(f"[\n{lines}\n]\n")
    print(f"kept {len(kept)} ({sum(r['unseen'] for r in kept)} unseen), left out:", file=sys.stderr)
    for row in dropped:
        print(f"  {row['id']} {row['answer']!r} unseen={row['unseen']} gap {row['gap']}", file=sys.stderr)


def evaluate(engine, rows, with_gaps):
    right, unseen_right, wrong, gaps = 0, 0, [], []
    for row in rows:
        prompt = prompt_ids(engine.tokenizer, row)
        assert len(prompt) == row["prompt_tokens"], f"{row['id']}: {len(prompt)} prompt tokens"
        got = engine.answer(prompt, len(row["answer_tokens"]) + 8)
        if with_gaps:
            end = engine.tokenizer.convert_tokens_to_ids("<|im_end|>")
            gaps.append((gap(engine, prompt, row["answer_tokens"], end), row["id"]))
        if got == row["answer"]:
            right += 1
            unseen_right += row["unseen"]
        else:
            wrong.append((row["id"], row["answer"], got))
    for case in wrong:
        print("wrong:", *map(repr, case))
    print(f"{right} of {len(rows)} right ({unseen_right} of {sum(r['unseen'] for r in rows)} unseen)")
    if with_gaps:
        print("smallest gaps:", ", ".join(f"{g:.2f} {i}" for g, i in sorted(gaps)[:5]))
    return right == len(rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--with", dest="framework", choices=("mlx", "transformers"), default="mlx")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--annotate", action="store_true")
    parser.add_argument("--gaps", action="store_true", help="also measure the gaps (slow with mlx on a CPU)")
    args = parser.parse_args()
    if args.annotate:
        annotate(args.folder)
        return
    rows = json.loads((Path(__file__).parent / "questions.json").read_text())
    began = time.time()
    engine = (Mlx if args.framework == "mlx" else Transformers)(args.folder, args.dtype)
    good = evaluate(engine, rows, args.gaps)
    print(f"{args.framework} {args.dtype} {args.folder}: {time.time() - began:.0f} s")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
