"""Runs `exo-runner generate --json`, alone or as several ranks of a ring on loopback."""

import json
import os
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120


def binary(folder=None):
    folder = folder or os.environ.get("EXO_BIN_DIR")
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


def wait_until_listening(ports, processes):
    """The last rank connects first, and a rank that finds nobody tries again after a second only."""
    table, listening = Path("/proc/net/tcp"), "0A"
    deadline = time.monotonic() + TIMEOUT_S
    while table.exists() and time.monotonic() < deadline and not any(p.poll() for p in processes):
        rows = [line.split() for line in table.read_text().splitlines()[1:]]
        if set(ports) <= {int(row[1].split(":")[1], 16) for row in rows if row[3] == listening}:
            return
        time.sleep(0.005)


def generate(model, prompt_ids, *, ranks=1, layers=None, max_tokens=16, logprobs=None, extra=(), bin=None):
    """The object that rank 0 prints. Raises with the output of all ranks if one fails or prints too much."""
    command = [str(binary(bin)), "generate", "--model", str(model), "--json",
               "--prompt-ids", ",".join(map(str, prompt_ids)), "--max-tokens", str(max_tokens), *extra]
    if logprobs is not None:
        command += ["--logprobs", str(logprobs)]
    with tempfile.TemporaryDirectory() as folder:
        hosts = Path(folder) / "hosts.json"
        ports = free_ports(ranks)
        hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in ports]))
        processes = []
        try:
            for rank in range(ranks):
                environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_")}
                if ranks > 1:
                    environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
                    if rank == ranks - 1:
                        wait_until_listening(ports[:-1], processes)
                own = ["--layers", layers[rank]] if layers else []
                processes.append(subprocess.Popen(command + own, env=environment, text=True,
                                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE))
            outputs = [p.communicate(timeout=TIMEOUT_S) for p in processes]
        finally:
            for p in processes:
                if p.poll() is None:
                    p.kill()
    if any(p.returncode for p in processes) or any(out for out, _ in outputs[1:]):
        raise RuntimeError(f"{[p.returncode for p in processes]}: {outputs}")
    return json.loads(outputs[0][0])
