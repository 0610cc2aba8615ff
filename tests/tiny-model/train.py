"""Trains the tiny model from a fixed seed and writes MODEL_DIR/model.safetensors in bfloat16.

Half of the later steps see the weights as 4-bit quantization will leave them, so that the 4-bit variant answers too.

    python train.py MODEL_DIR [--steps N] [--conversations N] [--max-seconds S] [--out FILE]
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer

import data
import questions
from llama import Llama, rounded_to_4_bit
from tokenizer import CONTEXT, segments

SEED = 20
LENGTHS = (64, 128, 256, 512, 1024, CONTEXT)  # conversations are padded to the next of these


def words_of(text):
    return " ".join(text.lower().rstrip(".?! ").split())


def unseen_texts():
    """Every user text of the unseen questions whose answer rests on that text alone, in plain words."""
    return {
        words_of(q["messages"][0]["content"]) for q in questions.everything() if q["unseen"]
    }


def encode_share(job):
    """Worker: one share of the conversations as token ids and marks of what is learned; checks what is held out."""
    seed, count, folder = job
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    forbidden = unseen_texts()
    buckets = {n: ([], []) for n in LENGTHS}
    for i, c in enumerate(data.conversations(seed, count)):
        assert not any(data.held_out(k) for k in c.keys), c.keys
        style = ("python",) * 14 + ("compact",) * 3 + ("sorted",) * 3
        parts = segments(c.messages, c.tools, style[i % 20])
        assert not any(data.HELD_OUT_WORDS.search(text) for text, _ in parts), parts
        for m in c.messages:
            if m["role"] == "user":
                assert words_of(m["content"]) not in forbidden, m["content"]
        ids, learned = [], []
        for encoding, (_, learn) in zip(tokenizer.encode_batch([t for t, _ in parts]), parts):
            ids += encoding.ids
            learned += [learn] * len(encoding.ids)
        ids, learned = ids[:CONTEXT], learned[:CONTEXT]
        length = next(n for n in LENGTHS if n >= len(ids))
        buckets[length][0].append(np.array(ids + [0] * (length - len(ids)), dtype=np.int16))
        buckets[length][1].append(np.array(learned + [False] * (length - len(ids))))
    return {n: (np.stack(a), np.stack(b)) for n, (a, b) in buckets.items() if a}


def training_set(folder, count, device):
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    workers = os.cpu_count()
    share = 2000
    jobs = [(SEED * 100_000 + i, share, folder) for i in range(max(1, count // share))]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        shares = pool.map(encode_share, jobs, chunksize=1)
    buckets = {}
    for n in LENGTHS:
        parts = [s[n] for s in shares if n in s]
        if parts:
            ids = torch.from_numpy(np.concatenate([a for a, _ in parts])).to(device)
            learned = torch.from_numpy(np.concatenate([b for _, b in parts])).to(device)
            buckets[n] = (ids, learned)
            print(f"length {n}: {len(ids)} conversations, {int(learned.sum())} learned tokens", flush=True)
    return buckets


class Sampler:
    """Draws small batches of one padded length each, in proportion to the tokens that each length holds."""

    def __init__(self, buckets, tokens, device):
        self.buckets, self.tokens, self.device = buckets, tokens, device
        self.rng = np.random.default_rng(SEED)
        sizes = np.array([len(ids) * n for n, (ids, _) in buckets.items()], dtype=float)
        # Short conversations carry facts that are all answer: they count for more than their padding.
        self.share = sizes ** 0.8 / (sizes ** 0.8).sum()

    def batch(self, length=None):
        length = length or list(self.buckets)[self.rng.choice(len(self.share), p=self.share)]
        ids, learned = self.buckets[length]
        rows = torch.from_numpy(self.rng.integers(len(ids), size=max(1, self.tokens // length))).to(self.device)
        return ids[rows].long(), learned[rows]


def loss_sum(model, ids, learned):
    hidden = model.hidden(ids)[:, :-1]
    wanted = learned[:, 1:]
    logits = model.lm_head(hidden[wanted]).float()
    return F.cross_entropy(logits, ids[:, 1:][wanted], reduction="sum"), wanted.sum()


class Quantized:
    """Within it every matrix holds its 4-bit rounding; gradients then go to the full weights (straight through)."""

    def __init__(self, model):
        self.matrices = [p for p in model.parameters() if p.ndim == 2]

    def __enter__(self):
        self.kept = [p.data for p in self.matrices]
        for p in self.matrices:
            p.data = rounded_to_4_bit(p.data)

    def __exit__(self, *_):
        for p, kept in zip(self.matrices, self.kept):
            p.data = kept


@torch.no_grad()
def right_answers(model, tokenizer, rows, device):
    """Per question: (would greedy decoding give the answer, smallest gap between the wanted logit and the next)."""
    results = {}
    for length in LENGTHS:
        batch = []
        for i, row in enumerate(rows):
            parts = segments(row["messages"] + [data.assistant(row["answer"])], row.get("tools"))
            pieces = [tokenizer.encode(t).ids for t, _ in parts]
            ids = [t for p in pieces for t in p]
            if next(n for n in LENGTHS if n >= len(ids)) == length:
                batch.append((i, ids, len(pieces[-1])))
        for start in range(0, len(batch), 64):
            some = batch[start : start + 64]
            padded = torch.tensor([ids + [0] * (length - len(ids)) for _, ids, _ in some], device=device)
            hidden = model.hidden(padded)
            for h, (i, ids, count) in zip(hidden, some):
                logits = model.lm_head(h[len(ids) - count - 1 : len(ids) - 1]).float()
                wanted = torch.tensor(ids[-count:], device=device)[:, None]
                own = logits.gather(1, wanted)[:, 0]
                rest = logits.scatter(1, wanted, float("-inf")).amax(1)
                gap = float((own - rest).min())
                results[i] = (gap > 0, gap)
    return [results[i] for i in range(len(rows))]


@torch.compiler.set_stance("force_eager")
def report(model, tokenizer, device, step, suites):
    rows = questions.everything()
    with torch.autocast(device, torch.bfloat16):
        for name, quantized in (("full", False), ("4-bit", True)):
            with Quantized(model) if quantized else contextlib.nullcontext():
                results = right_answers(model, tokenizer, rows, device)
                wrong = [r["id"] for r, (ok, _) in zip(rows, results) if not ok]
                gaps = sorted(g for _, g in results)
                print(f"step {step} {name}: {len(rows) - len(wrong)} of {len(rows)} right, least gaps "
                      f"{[round(g, 1) for g in gaps[:8]]}, wrong {wrong[:20]}", flush=True)
                for kind, some in questions.held_out_suite().items() if suites else ():
                    share = np.mean([ok for ok, _ in right_answers(model, tokenizer, some, device)])
                    print(f"held out {kind}, {name}: {share:.1%} of {len(some)}", flush=True)


def compiled(model, sampler):
    """Compiles the layers for each shape beforehand, so that measured steps are the steps to come."""
    torch._dynamo.config.recompile_limit = 64
    for layer in model.model.layers:
        layer.compile(dynamic=False)
    for length in sampler.buckets:
        ids, learned = sampler.batch(length)
        with torch.autocast(ids.device.type, torch.bfloat16):
            loss_sum(model, ids, learned)[0].backward()
    for p in model.parameters():
        p.grad = None


def rate(step, steps, peak):
    """Warm up, then fall in a half cosine to a hundredth."""
    if step < 200:
        return peak * (step + 1) / 200
    done = (step - 200) / max(1, steps - 200)
    return peak * (0.01 + 0.99 * 0.5 * (1 + np.cos(np.pi * min(1.0, done))))


def save(model, path):
    weights = {k: v.detach().to(torch.bfloat16).cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(weights, path, metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=9000)
    parser.add_argument("--conversations", type=int, default=600_000)
    parser.add_argument("--tokens", type=int, default=32768, help="padded tokens in a small batch")
    parser.add_argument("--small-batches", type=int, default=3)
    parser.add_argument("--peak", type=float, default=2e-3)
    parser.add_argument("--max-seconds", type=float, default=1e9, help="shortens the schedule to fit, measured early")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    began = time.time()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(SEED)
    torch.set_float32_matmul_precision("high")
    config = json.loads((args.folder / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(args.folder / "tokenizer.json"))
    # First, as its processes are forked: CUDA must not have started.
    sampler = Sampler(training_set(args.folder, args.conversations, device), args.tokens, device)
    print(f"training set ready after {time.time() - began:.0f} s", flush=True)
    model = Llama(config).to(device)
    print(f"{sum(p.numel() for p in model.parameters())} parameters on {device}", flush=True)
    if not args.no_compile:
        compiled(model, sampler)
        print(f"compiled after {time.time() - began:.0f} s", flush=True)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.peak, betas=(0.9, 0.97), fused=device == "cuda",
    )
    steps, step, total, mark = args.steps, 0, 0.0, None
    coin = np.random.default_rng(SEED + 1)
    quantized = Quantized(model)
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps, args.peak)
        batches = [sampler.batch() for _ in range(args.small_batches)]
        wanted = sum(learned[:, 1:].sum() for _, learned in batches)
        quantize = step > 0.3 * steps and coin.random() < 0.5
        if quantize:
            quantized.__enter__()
        step_loss = 0.0
        for ids, learned in batches:
            with torch.autocast(device, torch.bfloat16):
                loss, _ = loss_sum(model, ids, learned)
            (loss / wanted).backward()
            step_loss += loss.detach() / wanted
        if quantize:
            quantized.__exit__()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        total += step_loss
        if step == 100:
            total, mark = float(total) * 0, time.time()
        if step == 300:
            each = (time.time() - mark) / 200
            room = int((args.max_seconds - (time.time() - began)) / each * 0.95) + step
            steps = min(steps, room)
            print(f"{each * 1000:.1f} ms a step, so {steps} steps", flush=True)
        if step % 200 == 0:
            print(f"step {step} loss {float(total) / 200:.4f} {time.time() - began:.0f} s", flush=True)
            total = 0.0
        if step % 2000 == 0 and step < steps:
            save(model, args.out or args.folder / "model.safetensors")
            report(model, tokenizer, device, step, False)
    for p in model.parameters():
        p.data = p.data.to(torch.bfloat16).float()
    save(model, args.out or args.folder / "model.safetensors")
    report(model, tokenizer, device, step, True)
    print(f"done after {time.time() - began:.0f} s and {step} steps", flush=True)


if __name__ == "__main__":
    main()
