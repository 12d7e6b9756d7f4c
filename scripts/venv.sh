#!/usr/bin/env bash
# Makes the virtual environment: PyTorch first (the CPU build where there is no NVIDIA GPU), then tunesmith itself.
# usage: scripts/venv.sh FOLDER EXTRAS     e.g. scripts/venv.sh .venv test,check
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
extras=${2:-}
python=${PYTHON:-python3}
stamp="$folder/.tunesmith-$(cat pyproject.toml constraints.txt | cksum | cut -d' ' -f1)-${extras//,/-}"
[ -e "$stamp" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "tunesmith needs Python 3.11 or newer; $python is $("$python" --version 2>&1). Set PYTHON=/path/to/python3.11" >&2
  exit 2
}
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
pip() { "$folder/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

torch=$(sed -n 's/^torch==//p' constraints.txt)
if ! "$folder/bin/python" -c "import torch, sys; sys.exit(torch.__version__.split('+')[0] != '$torch')" 2>/dev/null; then
  echo "installing PyTorch $torch ..." >&2
  if [ "$(uname -s)" != Linux ] || command -v nvidia-smi >/dev/null 2>&1; then
    pip install "torch==$torch"
  else
    # the registry's own Linux build brings gigabytes of CUDA; the CPU build has a local version of its own
    pip install "torch==$torch+cpu" 2>/dev/null ||
      pip install "torch==$torch+cpu" --index-url https://download.pytorch.org/whl/cpu
  fi
fi
echo "installing tunesmith${extras:+ [$extras]} ..." >&2
pip install --constraint constraints.txt --editable ".${extras:+[$extras]}"
rm -f "$folder"/.tunesmith-*
touch "$stamp"
