"""Most memory that each rank has while it loads and runs a generated checkpoint, beside its share of the weights.

Prints one JSON object. The aim is 1.15 times the share and 300 MB; measures, asserts nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import runner
import shapes

SPLITS = [(1, "pipeline"), (2, "pipeline"), (4, "pipeline"), (2, "tensor"), (4, "tensor")]


def ranks_of(folder, ranks, sharding, args):
    """For each rank the bytes of its weights and its peak resident bytes."""
    command = [str(runner.binary(args.bin)), "bench", "--model", str(folder), "--json", "--sharding", sharding,
               "--prompt-tokens", "32", "--max-tokens", "2", "--rounds", "1"]
    with tempfile.TemporaryDirectory() as place:
        hosts = Path(place) / "hosts.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{p}"] for p in runner.free_ports(ranks)]))
        processes, reports = [], []
        for rank in range(ranks):
            environment = {k: v for k, v in os.environ.items() if not k.startswith("MLX_")}
            if ranks > 1:
                environment |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": str(hosts)}
            processes.append(subprocess.Popen(command + ["--every-rank"], env=environment, text=True,
                                              stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        for process in processes:
            out, err = process.communicate()
            if process.returncode:
                raise RuntimeError(err)
            reports.append(json.loads(out))
    return [(report["weight_bytes"], report["peak_resident_bytes"]) for report in reports]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bin", help="folder of exo-runner (default: the newest under target)")
    parser.add_argument("--shape", default="1g-bf16", choices=shapes.SHAPES)
    parser.add_argument("--models", type=Path, help="where checkpoints are kept (default: nowhere)")
    args = parser.parse_args()
    result = {"shape": args.shape}
    with tempfile.TemporaryDirectory() as place:
        folder = (args.models or Path(place)) / args.shape
        # In a process of its own, so that its memory is given back.
        subprocess.run([sys.executable, shapes.__file__, args.shape, str(folder)], check=True,
                       stdout=subprocess.DEVNULL)
        for ranks, sharding in SPLITS:
            result[f"{ranks} {sharding}"] = [
                {"share_mb": share >> 20, "peak_mb": peak >> 20,
                 "allowed_mb": int(share * 1.15 + 300e6) >> 20,
                 "within": peak <= share * 1.15 + 300e6}
                for share, peak in ranks_of(folder, ranks, sharding, args)]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
