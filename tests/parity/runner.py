"""Runs `exo-runner generate --json`, alone or as several ranks of a ring on loopback, once or for many models."""

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import sys
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


@functools.cache
def patience():
    """Environment for ranks that let go of their core while they wait: MLX's ring asks its sockets again and again, and
    more ranks than cores then keep each other from answering. Empty where there is no compiler or no such means."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or not compiler:
        return {}
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder) / "wait.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("wait.c"), "-ldl"],
                   check=True)
    return {"LD_PRELOAD": str(library)}


# What makes a process a rank of somebody's group.
GROUP_VARIABLES = ("MLX_RANK", "MLX_HOSTFILE", "MLX_IBV_DEVICES")


def own_environment():
    """This process's environment, outside any group."""
    return {key: value for key, value in os.environ.items() if key not in GROUP_VARIABLES}


def start(ranks, hosts_file, command, own=None, environment=None, **streams):
    """Processes of a ring on loopback, one for each rank; a rank on its own has no ring. `own` are arguments by rank,
    `environment` is added to this process's."""
    ports = free_ports(ranks)
    Path(hosts_file).write_text(json.dumps([[f"127.0.0.1:{p}"] for p in ports]))
    processes = []
    for rank in range(ranks):
        variables = own_environment() | (environment or {})
        if ranks > 1:
            variables |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts_file)}
            if rank == ranks - 1:
                wait_until_listening(ports[:-1], processes)
        processes.append(subprocess.Popen(
            command + (own[rank] if own else []), env=variables, text=True, **streams))
    return processes


def stop(processes):
    for p in processes:
        if p.poll() is None:
            p.kill()
        p.wait()


def arguments(model, prompt_ids, max_tokens, logprobs, extra):
    own = ["--model", str(model), "--json", "--prompt-ids", ",".join(map(str, prompt_ids)),
           "--max-tokens", str(max_tokens), *extra]
    return own if logprobs is None else own + ["--logprobs", str(logprobs)]


def layers_of(layers, ranks):
    return [["--layers", layers[rank]] if layers else [] for rank in range(ranks)]


def generate(model, prompt_ids, *, ranks=1, layers=None, max_tokens=16, logprobs=None, extra=(), bin=None):
    """The object that rank 0 prints. Raises with the output of all ranks if one fails or prints too much."""
    command = [str(binary(bin)), "generate", *arguments(model, prompt_ids, max_tokens, logprobs, extra)]
    with tempfile.TemporaryDirectory() as folder:
        processes = start(ranks, Path(folder) / "hosts.json", command, layers_of(layers, ranks),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            outputs = [p.communicate(timeout=TIMEOUT_S) for p in processes]
        finally:
            stop(processes)
    if any(p.returncode for p in processes) or any(out for out, _ in outputs[1:]):
        raise RuntimeError(f"{[p.returncode for p in processes]}: {outputs}")
    return json.loads(outputs[0][0])


class Ranks:
    """Ranks that answer for one model after the other, as starting them and meeting takes longer than answering."""

    def __init__(self, count):
        self.count = count
        self.processes = []
        self.folder = tempfile.TemporaryDirectory()

    def generate(self, model, prompt_ids, *, layers=None, max_tokens=16, logprobs=None, extra=()):
        """As the function; after an error the next call starts the ranks anew."""
        common = arguments(model, prompt_ids, max_tokens, logprobs, extra)
        own = layers_of(layers, self.count)
        try:
            if self.processes:
                for process, rest in zip(self.processes, own):
                    process.stdin.write(json.dumps(common + rest) + "\n")
                    process.stdin.flush()
            else:
                self.errors = open(Path(self.folder.name) / "errors", "w+")
                # A stalled rank ends all of them.
                command = [str(binary()), "generate", *common, "--more", "--stall-limit", str(TIMEOUT_S)]
                self.processes = start(
                    self.count, Path(self.folder.name) / "hosts.json", command, own, patience(),
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
            line = self.processes[0].stdout.readline()
            if not line:
                raise RuntimeError("no answer")
            return json.loads(line)
        except (OSError, RuntimeError) as error:
            processes, self.processes = self.processes, []
            stop(processes)
            self.errors.seek(0)
            codes = [p.returncode for p in processes]
            raise RuntimeError(f"{error}; {codes}: {self.errors.read()}") from error

    def close(self):
        stop(self.processes)
        self.folder.cleanup()
