"""mlx-lm's own tensor parallel mode: what it answers on several ranks. Started as a program, this file is one rank."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

import reference
import runner


class Team:
    """Ranks of a ring on loopback that stay, as starting Python takes them longer than answering."""

    def __init__(self, ranks):
        self.folder = tempfile.TemporaryDirectory()
        hosts = Path(self.folder.name) / "hosts.json"
        ports = runner.free_ports(ranks)
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        self.processes = []
        for rank in range(ranks):
            environment = os.environ | {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            if rank == ranks - 1:
                runner.wait_until_listening(ports[:-1], self.processes)
            self.processes.append(subprocess.Popen(
                [sys.executable, __file__], env=environment, text=True, stdin=subprocess.PIPE,
                stdout=subprocess.PIPE if rank == 0 else subprocess.DEVNULL))

    def answer(self, model, prompt, max_tokens):
        path = str(Path(self.folder.name) / "logprobs.npy")
        request = {"model": str(model), "prompt": prompt, "max_tokens": max_tokens, "path": path}
        for process in self.processes:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        line = self.processes[0].stdout.readline()
        assert line, f"mlx-lm has failed: {[process.poll() for process in self.processes]}"
        return reference.Answer(json.loads(line), list(mx.load(path)))

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()
        self.folder.cleanup()


def can_split(config, ranks):
    """Whether mlx-lm splits such a model over so many ranks: it repeats no key and value heads, and some models not
    at all."""
    return config["model_type"] != "mixtral" and config["num_key_value_heads"] % ranks == 0


def main():
    group = mx.distributed.init(strict=True, backend="ring")
    for line in sys.stdin:
        request = json.loads(line)
        model, _ = reference.load(request["model"])
        model.shard(group)
        mx.eval(model.parameters())
        answer = reference.answer(model, request["prompt"], request["max_tokens"])
        mx.eval(answer.logprobs)
        if group.rank() == 0:
            mx.save(request["path"], mx.stack(answer.logprobs))
            print(json.dumps(answer.tokens), flush=True)


if __name__ == "__main__":
    main()
