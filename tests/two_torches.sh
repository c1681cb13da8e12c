#!/usr/bin/env bash
# One op library, several torch versions: bash tests/two_torches.sh 2.13.0 2.12.0
# Installs each torch in a virtual environment of its own, loads the library that `make setup` built with
# torch.ops.load_library (no Python of ours), and compares every op and its backward with plain torch.
set -euo pipefail
cd "$(dirname "$0")/.."

library=$PWD/flextron_ext/libflextron.so
if (($# < 1)); then
  echo "two_torches: versions must be named, for example: bash tests/two_torches.sh 2.13.0 2.12.0" >&2
  exit 2
fi
if [[ ! -f $library ]]; then
  echo "two_torches: $library must be built first: make setup" >&2
  exit 2
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cp "$library" tests/check_library.py "$work/" # a rebuild meanwhile would not be the same library

(cd "$work" && sha256sum libflextron.so)
for version in "$@"; do
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/python" -m pip --disable-pip-version-check --quiet install "torch==$version" numpy
  (cd "$work" && "$work/$version/bin/python" check_library.py ./libflextron.so)
  rm -rf "${work:?}/$version"
done
echo "the same library ran in torch $*"
