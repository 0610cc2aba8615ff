"""Runs `exo-runner generate --json`, alone or as several ranks of a ring on loopback."""

import json
import os
import socket
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


def binary(folder=None):
    candidates = [Path(folder)] if folder else [ROOT / "target/debug", ROOT / "target/release"]
    found = [c / "exo-runner" for c in candidates if (c / "exo-runner").exists()]
    if not found:
        raise FileNotFoundError(f"no exo-runner in {candidates}: cargo build -p exo-runner")
    return max(found, key=lambda p: p.stat().st_mtime)


def free_ports(count):
    """Ports that were free a moment ago; all are held until the last is known."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


def generate(model, prompt_ids, *, ranks=1, layers=None, max_tokens=16, logprobs=None, extra=(), bin=None):
    """The object that rank 0 prints. Raises with the output of all ranks if one fails or prints too much."""
    command = [str(binary(bin)), "generate", "--model", str(model), "--json",
               "--prompt-ids", ",".join(map(str, prompt_ids)), "--max-tokens", str(max_tokens), *extra]
    if logprobs is not None:
        command += ["--logprobs", str(logprobs)]
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in free_ports(ranks)]))
        processes = []
        for rank in range(ranks):
            environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_")}
            if ranks > 1:
                environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            own = ["--layers", layers[rank]] if layers else []
            processes.append(subprocess.Popen(command + own, env=environment, text=True,
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        try:
            outputs = [p.communicate(timeout=TIMEOUT_S) for p in processes]
        finally:
            for p in processes:
                if p.poll() is None:
                    p.kill()
    if any(p.returncode for p in processes) or any(out for out, _ in outputs[1:]):
        raise RuntimeError(f"{[p.returncode for p in processes]}: {outputs}")
    return json.loads(outputs[0][0])
