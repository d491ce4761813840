#!/usr/bin/env bash
# What counts on a machine with a GPU, in under 8 minutes: a part of the tests, and one table.
#
#     bash tests/device.sh [DEVICE] [WHEELS] [OUT]
#
# DEVICE is cuda or cpu; WHEELS a folder with the wheels that the machine's Python lacks (Pyro, ArviZ,
# pytest and what they need), for machines that reach no index; OUT a folder for the results.
set -uo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda} wheels=${2:-} out=${3:-run/device}
mkdir -p "$out"

python -m venv --system-site-packages "$out/venv"
export PATH="$PWD/$out/venv/bin:$PATH" OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} MPLBACKEND=Agg
from=${wheels:+--no-index --find-links $wheels}
pip install --quiet $from --no-build-isolation --editable ".[test]" || exit 1
python -c "import torch, pyro; print('torch', torch.__version__, 'pyro', pyro.__version__)"

timeout 180 python -m pytest -q -n 4 --dist loadfile --device "$device" -m "not slow" \
    -p no:cacheprovider tests/terms tests/elbo tests/distributions tests/capture tests/surgery \
    tests/sequences > "$out/tests.txt" 2>&1
echo "tests: $(tail -n 1 "$out/tests.txt")"
grep -E "^(FAILED|ERROR)" "$out/tests.txt" | head -n 40

timeout 270 python tests/benchmarks/device.py --device "$device" --seconds "${SECONDS_EACH:-8}" \
    | tee "$out/table.md"
