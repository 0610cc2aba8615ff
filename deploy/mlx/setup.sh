#!/usr/bin/env bash
# Makes MLX linkable for this checkout: `deploy/mlx/setup.sh [--parity] [--force]`.
#
# Linux: a virtual environment with MLX's wheel (.venv), mlx-c as a static library with Rust bindings (.mlx),
# and .cargo/config.toml, which tells Cargo to use them in place of mlx-sys's own build script.
# macOS: mlx-sys builds MLX itself; the tools that it needs are checked.
# Both: protoc, which the client of etcd is built with, from a wheel; .cargo/config.toml names it.
# --parity adds mlx-lm to the virtual environment. A run with nothing to do takes milliseconds.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=$root/.venv
out=$root/.mlx
config=$root/.cargo/config.toml

say() { printf 'mlx set-up: %s\n' "$*" >&2; }
fail() { printf 'mlx set-up failed: %s\n' "$*" >&2; exit 1; }

parity=0 force=0
for arg in "$@"; do
  case $arg in
    --parity) parity=1 ;;
    --force) force=1 ;;
    *) fail "unknown argument '$arg' (known: --parity, --force)" ;;
  esac
done

need() { # need COMMAND HOW_TO_GET_IT
  command -v "$1" >/dev/null 2>&1 || fail "'$1' was not found. $2"
}

setup_macos() {
  need xcode-select "Install Xcode from the App Store, then: sudo xcode-select --install"
  xcode-select -p >/dev/null 2>&1 ||
    fail "Xcode's command line tools are not selected. Run: xcode-select --install"
  xcrun --find metal >/dev/null 2>&1 ||
    fail "the Metal compiler is missing. Install Xcode, then: xcodebuild -downloadComponent MetalToolchain"
  need cmake "Install it: brew install cmake"
  need cargo "Install Rust: https://rustup.rs"
  make_venv
  if [ ! -x "$out/bin/protoc" ]; then
    "$venv/bin/pip" install --quiet --disable-pip-version-check "$(grep '^grpcio-tools==' "$here/requirements.txt")" ||
      fail "pip could not install grpcio-tools (network or package index unreachable?)"
    write_protoc
  fi
  write_config ""
  if [ "$parity" = 1 ]; then
    install_requirements "$here/requirements-parity.txt"
  fi
}

make_venv() {
  local python=${PYTHON:-python3}
  need "$python" "Install Python 3.10 or newer (Debian, Ubuntu: apt install python3 python3-venv)"
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    fail "'$python' is older than Python 3.10, which MLX needs. Set PYTHON to a newer one"
  [ -x "$venv/bin/pip" ] && "$venv/bin/python" -c '' 2>/dev/null && return
  say "making $venv"
  "$python" -m venv --clear "$venv" ||
    fail "'$python -m venv' failed. Debian, Ubuntu: apt install python3-venv"
}

install_requirements() {
  say "installing $(basename "$1")"
  "$venv/bin/pip" install --quiet --disable-pip-version-check -r "$1" ||
    fail "pip could not install $1 (network or package index unreachable?)"
}

# The folder of the mlx-sys crate that Cargo.lock names.
mlx_sys_source() {
  local metadata
  metadata=$(cd "$root" && cargo metadata --format-version 1 --locked) ||
    fail "'cargo metadata' failed, see above"
  "$venv/bin/python" -c '
import json, os, sys
found = [p for p in json.load(sys.stdin)["packages"] if p["name"] == "mlx-sys"]
print(os.path.dirname(found[0]["manifest_path"]) if found else "")' <<<"$metadata"
}

# Most of the time goes into MLX's headers: two large units read them twice, not 27 times.
build_mlx_c() { # build_mlx_c MLX_C_SOURCE
  say "building mlx-c"
  rm -rf "$out/build"
  mkdir -p "$out/build" "$out/lib"
  local log=$out/build.log
  {
    "$venv/bin/cmake" -S "$1" -B "$out/build" -G Ninja \
      -DCMAKE_MAKE_PROGRAM="$venv/bin/ninja" -DCMAKE_BUILD_TYPE=Release -DMLX_C_BUILD_EXAMPLES=OFF \
      -DMLX_C_USE_SYSTEM_MLX=ON -DMLX_DIR="$out/mlx/share/cmake/MLX" \
      -DCMAKE_UNITY_BUILD=ON -DCMAKE_UNITY_BUILD_BATCH_SIZE=14 \
      -DCMAKE_CXX_FLAGS="-include $here/shim.h -I$out/mlx/include" &&
      "$venv/bin/cmake" --build "$out/build" --target mlxc
  } >"$log" 2>&1 || { tail -n 30 "$log" >&2; fail "mlx-c did not build; the whole log is $log"; }
  mv "$out/build/libmlxc.a" "$out/lib/libmlxc.a"
  rm -rf "$out/build"
}

write_bindings() { # write_bindings MLX_C_SOURCE
  say "writing Rust bindings"
  mkdir -p "$out/bindings"
  # libclang's wheel has no headers of its own, the compiler's serve.
  local clang include
  clang=$("$venv/bin/python" -c 'import clang, os; print(os.path.join(os.path.dirname(clang.__file__), "native"))')
  include=$("${CC:-cc}" -print-file-name=include)
  (cd "$root" && LIBCLANG_PATH=$clang cargo run --quiet --locked -p exo-mlx-bindings -- \
    "$1" "$here/shim.h" "$out/bindings/new" "-I$include") || fail "the bindings could not be written"
  # Same text, same time stamp: Cargo then rebuilds nothing.
  if cmp -s "$out/bindings/new" "$out/bindings/bindings.rs"; then
    rm "$out/bindings/new"
  else
    mv "$out/bindings/new" "$out/bindings/bindings.rs"
  fi
}

# protoc as the wheel has it: inside a Python module.
write_protoc() {
  mkdir -p "$out/bin"
  printf '#!/bin/sh\nexec "%s" -m grpc_tools.protoc "$@"\n' "$venv/bin/python" >"$out/bin/protoc"
  chmod +x "$out/bin/protoc"
}

mlx_override() {
  local host
  host=$(rustc -vV | sed -n 's/^host: //p')
  cat <<CONFIG
# Takes the place of mlx-sys's build script.
[target.$host.mlx]
rustc-link-search = ["native=$out/lib", "native=$out/mlx/lib"]
rustc-link-lib = ["static=mlxc", "mlx", "stdc++"]
rustc-env = { OUT_DIR = "$out/bindings" }
lib_dir = "$out/mlx/lib"

CONFIG
}

write_config() { # write_config TABLES
  local new
  mkdir -p "$(dirname "$config")"
  new=$(cat <<CONFIG
# Written by deploy/mlx/setup.sh.
$1
[env]
PROTOC = "$out/bin/protoc"
CONFIG
  )
  if [ -e "$config" ] && ! grep -q 'Written by deploy/mlx/setup.sh' "$config"; then
    fail "$config exists and was not written by this script; move it away or add to it: $new"
  fi
  [ -e "$config" ] && [ "$new" = "$(cat "$config")" ] || printf '%s\n' "$new" >"$config"
}

setup_linux() {
  need cargo "Install Rust: https://rustup.rs"
  need "${CC:-cc}" "Install a C compiler (Debian, Ubuntu: apt install build-essential)"
  need "${CXX:-c++}" "Install a C++20 compiler (Debian, Ubuntu: apt install build-essential)"
  make_venv
  install_requirements "$here/requirements.txt"
  local packages source
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  [ -e "$packages/mlx/lib/libmlx.so" ] || fail "$packages/mlx/lib/libmlx.so is missing: mlx-cpu has no wheel here"
  # A stable name, so that binaries and config.toml do not hold Python's version.
  ln -sfn "$packages/mlx" "$out/mlx"
  source=$(mlx_sys_source)
  [ -n "$source" ] || fail "Cargo.lock names no mlx-sys"
  build_mlx_c "$source/src/mlx-c"
  write_bindings "$source/src/mlx-c"
  write_protoc
  write_config "$(mlx_override)"
}

# What the result depends on: these files, the crate's version, the place, the compiler's choice.
inputs() {
  cat "$here"/{setup.sh,shim.h,requirements.txt,bindings/src/main.rs}
  grep -A 1 '^name = "mlx-sys"$' "$root/Cargo.lock" || true
  echo "$root ${CC:-} ${CXX:-} ${PYTHON:-}"
}

mkdir -p "$out"
if [ "$(uname -s)" = Darwin ]; then
  setup_macos
  exit 0
fi

# Two runs at once: the second waits, then finds the work done.
exec 9>"$out/lock"
command -v flock >/dev/null 2>&1 && flock 9

want=$(inputs | cksum)
if [ "$force" = 1 ] || [ "$(cat "$out/stamp" 2>/dev/null)" != "$want" ] ||
  [ ! -e "$out/mlx/lib/libmlx.so" ] || [ ! -e "$out/lib/libmlxc.a" ] ||
  [ ! -e "$out/bindings/bindings.rs" ] || [ ! -e "$config" ] || [ ! -x "$out/bin/protoc" ]; then
  rm -f "$out/stamp"
  setup_linux
  printf '%s\n' "$want" >"$out/stamp"
  say "done"
fi

if [ "$parity" = 1 ]; then
  want=$(cksum <"$here/requirements-parity.txt")
  if [ "$(cat "$venv/parity-stamp" 2>/dev/null)" != "$want" ]; then
    install_requirements "$here/requirements-parity.txt"
    printf '%s\n' "$want" >"$venv/parity-stamp"
  fi
fi
