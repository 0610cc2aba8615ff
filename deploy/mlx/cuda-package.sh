#!/usr/bin/env bash
# Packs what a Linux machine with an NVIDIA GPU needs: `deploy/mlx/cuda-package.sh BINARIES OUT`.
#
# BINARIES is a folder with release builds of exo, exoctl and exo-runner. The result, OUT/exo-cuda.tar.gz, holds them,
# MLX's library for CUDA 13 with the headers that it compiles kernels with, and `install`, which fetches NVIDIA's own
# libraries (they are large, and many machines have them).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
binaries=${1:?usage: cuda-package.sh BINARIES OUT}
out=${2:?usage: cuda-package.sh BINARIES OUT}
pip=${PIP:-$root/.venv/bin/pip}
version=$(sed -n 's/^mlx==//p' "$here/requirements.txt")

say() { printf 'cuda package: %s\n' "$*" >&2; }
fail() { printf 'cuda package failed: %s\n' "$*" >&2; exit 1; }

[ "$(uname -sm)" = "Linux x86_64" ] || fail "it is made on Linux on x86-64, not on $(uname -sm)"
for name in exo exoctl exo-runner; do
  [ -x "$binaries/$name" ] || fail "$binaries/$name is missing: make build"
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
package=$work/exo-cuda
mkdir -p "$package/bin" "$package/libexec" "$package/lib" "$out"

say "fetching mlx-cuda-13 $version"
"$pip" download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
  --platform manylinux_2_35_x86_64 -d "$work/wheel" "mlx-cuda-13==$version" ||
  fail "pip could not fetch mlx-cuda-13==$version"
python3 -m zipfile -e "$work"/wheel/*.whl "$package/lib"
sed -n 's/^Requires-Dist: //p' "$package"/lib/*.dist-info/METADATA >"$package/nvidia.txt"
rm -rf "$package"/lib/*.dist-info "$package/lib/mlx/share"

cp "$binaries/exo" "$binaries/exoctl" "$package/bin/"
cp "$binaries/exo-runner" "$package/libexec/"
cp "$root/LICENSE" "$package/"

# `exo` starts the `exo-runner` beside it.
cat >"$package/bin/exo-runner" <<'SCRIPT'
#!/bin/sh
# Runs exo-runner with MLX for CUDA. EXO_CUDA_LIBS names another folder of NVIDIA's Python packages ("…/nvidia").
here=$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)
nvidia=${EXO_CUDA_LIBS:-$here/lib/nvidia}
path=$here/lib/mlx/lib
for folder in "$nvidia"/*/lib; do path=$path:$folder; done
[ -d "$nvidia/cu13" ] && export CUDA_HOME="${CUDA_HOME:-$nvidia/cu13}"
export LD_LIBRARY_PATH="$path${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
exec "$here/libexec/exo-runner" "$@"
SCRIPT

cat >"$package/install" <<'SCRIPT'
#!/bin/sh
# Fetches NVIDIA's libraries (some 2 GB) into lib/. Not needed where EXO_CUDA_LIBS names a folder that has them.
set -eu
here=$(cd "$(dirname "$(readlink -f "$0")")" && pwd)
exec "${PYTHON:-python3}" -m pip install --quiet --target "$here/lib" -r "$here/nvidia.txt"
SCRIPT
chmod +x "$package/bin/exo-runner" "$package/install"

say "packing"
tar -C "$work" -czf "$out/exo-cuda.tar.gz" exo-cuda
say "done: $out/exo-cuda.tar.gz ($(du -h "$out/exo-cuda.tar.gz" | cut -f1))"
