#!/usr/bin/env bash
# Installs what only the tests need (mlx-lm, the openai and kubernetes clients, pytest) into .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

want=tests/requirements.txt
stamp=.venv/.tests-installed
cmp -s "$want" "$stamp" && exit 0
echo "installing the test clients into .venv"
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$want"
cp "$want" "$stamp"
