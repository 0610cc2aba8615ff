"""mlx-lm's own tensor parallel mode: what it answers on several ranks. Started as a program, this file is one rank."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_inplace, shard_linear

import reference
import runner


class Team:
    """Ranks of a ring on loopback that stay, as starting Python takes them longer than answering."""

    def __init__(self, ranks):
        self.folder = tempfile.TemporaryDirectory()
        self.processes = runner.start(
            ranks, Path(self.folder.name) / "hosts.json", [sys.executable, __file__], None, runner.patience(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def answer(self, model, prompt, forced):
        """What it would take after the prompt and after each of the `forced` tokens but the last."""
        path = str(Path(self.folder.name) / "logprobs.npy")
        request = {"model": str(model), "prompt": prompt, "forced": forced, "path": path}
        for process in self.processes:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        line = self.processes[0].stdout.readline()
        assert line, f"mlx-lm has failed: {[process.poll() for process in self.processes]}"
        return reference.Answer(json.loads(line), list(mx.load(path)))

    def close(self):
        runner.stop(self.processes)
        self.folder.cleanup()


def can_split(config, ranks):
    """Whether mlx-lm splits such a model over so many ranks: it repeats no key and value heads."""
    return config["num_key_value_heads"] % ranks == 0


class Summed(nn.Module):
    """A block whose result on each rank is one part of a sum."""

    def __init__(self, block, group):
        super().__init__()
        self.block, self.group = block, group

    def __call__(self, x):
        return mx.distributed.all_sum(self.block(x), group=self.group)


def shard_mixtral(model, group):
    """mlx-lm can't split this one: done as it does with qwen3_moe."""
    projections = {"q_proj": "all-to-sharded", "k_proj": "all-to-sharded", "v_proj": "all-to-sharded",
                   "o_proj": "sharded-to-all"}
    experts = {"gate_proj": "all-to-sharded", "up_proj": "all-to-sharded", "down_proj": "sharded-to-all"}
    for layer in model.layers:
        attention, block = layer.self_attn, layer.block_sparse_moe
        for name, way in projections.items():
            setattr(attention, name, shard_linear(getattr(attention, name), way, group=group))
        attention.num_heads //= group.size()
        attention.num_key_value_heads //= group.size()
        for name, way in experts.items():
            shard_inplace(getattr(block.switch_mlp, name), way, group=group)
        layer.block_sparse_moe = Summed(block, group)


def main():
    group = mx.distributed.init(strict=True, backend="ring")
    for line in sys.stdin:
        request = json.loads(line)
        model, config = reference.load(request["model"])
        if config["model_type"] == "mixtral":
            shard_mixtral(model, group)
        else:
            model.shard(group)
        mx.eval(model.parameters())
        forced = request["forced"]
        answer = reference.answer(model, request["prompt"], len(forced), forced=forced)
        mx.eval(answer.logprobs)
        if group.rank() == 0:
            mx.save(request["path"], mx.stack(answer.logprobs))
            print(json.dumps(answer.tokens), flush=True)


if __name__ == "__main__":
    main()
