#!/usr/bin/env python3
"""Starts a two-shard cluster on this machine with the built-in tiny model.

    deploy/demo.py run   stays in the foreground and says what to type next
    deploy/demo.py demo  asks one question, prints answer, shards and timings, shuts down

Needs the binaries (`make build`) and nothing but Python's standard library.
"""

import argparse
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

ROOT = pathlib.Path(__file__).resolve().parent.parent
MODELS = ROOT / "manifests" / "models"
SAMPLE = ROOT / "manifests" / "samples" / "tiny.yaml"
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
# From process start to the addresses; a laptop needs one second.
BANNER_LIMIT_S = 60
# How to choose a port: this script's flag, make's variable; and the usual one.
PORTS = {"gateway": ("--port", "PORT", 8080), "cluster API": ("--api-port", "API_PORT", 8443)}


def check_ports(ports):
    """Ends with one message that names each port that is taken, by whom, and how to choose."""
    taken = []
    for (what, (_, variable, _)), port in zip(PORTS.items(), ports):
        with socket.socket() as probe:
            # As exo does: a port whose last connections are still closing is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
                # macOS lets this one in beside a listener on all addresses.
                with socket.socket() as caller:
                    why = "somebody answers" if port and not caller.connect_ex(("127.0.0.1", port)) else None
            except OSError as error:
                why = error.strerror
        if why:
            taken.append(f"port {port} of the {what} can't be had ({why}{holder(port)}): "
                         f"choose another with `make run {variable}=N`")
    if taken:
        sys.exit("\n".join(taken))


def holder(port):
    """The process that listens on a port, where lsof can tell."""
    command = ["lsof", "-nP", f"-iTCP:{port}", "-sTCP:LISTEN", "-Fpc"]
    try:
        lines = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.split()
    except (OSError, subprocess.TimeoutExpired):
        return f"; `lsof -i:{port}` or `ss -ltnp` tells by whom"
    fields = {line[0]: line[1:] for line in lines}
    return f" by {fields['c']}, process {fields['p']}" if {"c", "p"} <= fields.keys() else ""


class Cluster:
    """Two `exo` processes: control plane with an agent, and a second agent that joins it."""

    def __init__(self, bin_dir, ports):
        self.bin = bin_dir
        self.home = pathlib.Path(tempfile.mkdtemp(prefix="exo-demo-"))
        self.ports = ports
        self.processes = []
        self.env = dict(os.environ, EXO_MODEL_PATH=str(MODELS))
        self.env.pop("EXO_HOME", None)

    def start(self):
        """Starts both; returns seconds from process start to the API answering."""
        begin = time.monotonic()
        port, api_port = self.ports
        first = self.spawn("mac-1", ["--port", str(port), "--api-port", str(api_port)])
        self.endpoints = self.wait_for_banner(first)
        seconds = time.monotonic() - begin
        peer = self.endpoints["cluster API"].removeprefix("https://").split()[0]
        self.spawn("mac-2", ["--no-control-plane", "--peers", peer])
        return seconds

    def spawn(self, name, args):
        command = [self.bin / "exo", "--name", name, "--listen", "127.0.0.1",
                   "--data-dir", self.home / name, *args]
        log = open(self.home / f"{name}.log", "wb")
        # A session of its own: Ctrl-C reaches this script alone, which then stops them in order.
        process = subprocess.Popen(command, env=self.env, stdout=subprocess.PIPE, stderr=log,
                                   text=True, start_new_session=True)
        self.processes.append((name, process))
        return process

    def wait_for_banner(self, process):
        """Reads the lines `  name   value` that exo prints when it answers."""
        endpoints = {}
        deadline = threading.Timer(BANNER_LIMIT_S, process.kill)
        deadline.start()
        try:
            for line in process.stdout:
                name, _, value = line.strip().partition("  ")
                endpoints[name] = value.strip()
                if name == "join":
                    return endpoints
        finally:
            deadline.cancel()
        status = process.wait()
        killed = status == -signal.SIGKILL
        cause = f"said nothing for {BANNER_LIMIT_S} s" if killed else "stopped at start"
        # It has been told: `stop` need not do so again.
        self.processes.clear()
        sys.exit(f"exo {cause}:\n{self.log('mac-1')}")

    def log(self, name):
        """The end of a node's log."""
        return (self.home / f"{name}.log").read_text(errors="replace")[-4000:]

    def exoctl(self, *args, **kwargs):
        command = [self.bin / "exoctl", "--kubeconfig", self.home / "mac-1" / "kubeconfig", *args]
        return subprocess.run(command, check=True, text=True, **kwargs)

    def stop(self):
        """Ends both, the agent first; returns whether all ended well."""
        clean = True
        for name, process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                code = process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            if code != 0:
                clean = False
                print(f"{name} ended with status {code}:\n{self.log(name)}", file=sys.stderr)
        shutil.rmtree(self.home, ignore_errors=True)
        return clean


def ask(base, question):
    """Streams one answer; returns text, seconds to the first token, tokens and seconds in all."""
    body = {"model": "tiny", "stream": True, "temperature": 0,
            "messages": [{"role": "user", "content": question}],
            "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"{base}/chat/completions", json.dumps(body).encode(),
        {"Content-Type": "application/json", "Authorization": "Bearer any-key"})
    begin, first, text, tokens = time.monotonic(), None, "", 0
    with urllib.request.urlopen(request, timeout=60) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if chunk.get("usage"):
                tokens = chunk["usage"]["completion_tokens"]
            for choice in chunk.get("choices", []):
                piece = choice["delta"].get("content") or ""
                if piece and first is None:
                    first = time.monotonic() - begin
                text += piece
    return text, first, tokens, time.monotonic() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=["run", "demo"])
    parser.add_argument("--bin", type=pathlib.Path, default=ROOT / "target" / "release")
    for what, (flag, _, usual) in PORTS.items():
        parser.add_argument(flag, type=int, help=f"{what} [run: {usual}; demo: any free one]")
    args = parser.parse_args()
    if not (args.bin / "exo").exists():
        sys.exit(f"{args.bin / 'exo'} is missing: run `make build` first")
    serve = args.mode == "run"
    given = (args.port, args.api_port)
    usual = [usual if serve else 0 for _, _, usual in PORTS.values()]
    ports = [default if port is None else port for port, default in zip(given, usual)]
    check_ports(ports)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cluster = Cluster(args.bin.resolve(), ports)
    clean, interrupted = False, False
    try:
        up = cluster.start()
        begin = time.monotonic()
        cluster.exoctl("apply", "-f", SAMPLE, "--wait")
        ready = time.monotonic() - begin
        cluster.exoctl("get", "shards")
        base = cluster.endpoints["OpenAI API"]
        if serve:
            instructions(cluster, base)
            wait_until_stopped(cluster)
        else:
            text, first, tokens, total = ask(base, QUESTION)
            print(f"\nQ: {QUESTION}\nA: {text}\n")
            print(f"start to API answering  {up:.2f} s")
            print(f"apply to Ready          {ready:.2f} s")
            print(f"time to first token     {first * 1000:.0f} ms" if first else "no token came")
            print(f"answer                  {tokens} tokens in {total * 1000:.0f} ms")
            clean = text.strip() == ANSWER
            if not clean:
                print(f"the answer should be: {ANSWER}", file=sys.stderr)
    except KeyboardInterrupt:
        # How `run` is meant to end; a demo is cut short by it.
        clean = interrupted = True
        print()
    except subprocess.CalledProcessError as error:
        print(f"{error}\n{cluster.log('mac-1')}\n{cluster.log('mac-2')}", file=sys.stderr)
    finally:
        stopped = cluster.stop()
    if interrupted and not serve:
        sys.exit(130)
    sys.exit(0 if clean and stopped else 1)


def instructions(cluster, base):
    exoctl = f"{cluster.bin / 'exoctl'} --kubeconfig {cluster.home / 'mac-1' / 'kubeconfig'}"
    question = {"model": "tiny", "messages": [{"role": "user", "content": QUESTION}]}
    print(f"\nType in another terminal:\n\n"
          f"  curl {base}/chat/completions -H 'Content-Type: application/json' \\\n"
          f"    -d '{json.dumps(question)}'\n\n"
          f"  {exoctl} get shards\n\n"
          f"Ctrl-C stops everything.", flush=True)


def wait_until_stopped(cluster):
    """Returns when mac-1 has ended. mac-2 may be killed and started again, to see what happens."""
    (_, first), (name, second) = cluster.processes
    told = False
    while first.poll() is None:
        if second.poll() is not None and not told:
            command = " ".join(str(word) for word in second.args)
            print(f"\n{name} ended with status {second.returncode}. To start it again:\n\n"
                  f"  EXO_MODEL_PATH={MODELS} {command}\n", file=sys.stderr)
            cluster.processes.remove((name, second))
            told = True
        time.sleep(0.5)
    print(f"mac-1 stopped:\n{cluster.log('mac-1')}", file=sys.stderr)


if __name__ == "__main__":
    main()
