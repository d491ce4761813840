#!/usr/bin/env bash
# The quick tests with other versions of Python, torch, Pyro, ArviZ and NumPy, each in a new environment:
#
#     tests/versions.sh                 # all of them
#     tests/versions.sh oldest torch    # those
#
# What setup.cfg promises is what passes here. Environments are made in $VERSIONS, or a temporary folder.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
folder=${VERSIONS:-$(mktemp -d)}
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 MPLBACKEND=Agg
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(oldest newest arviz torch)

python_of() { case $1 in oldest | newest) echo python3.11 ;; *) echo python3.12 ;; esac; }
packages_of() {
    case $1 in
    oldest) echo torch==2.6.0 pyro-ppl==1.9.1 arviz==0.20.0 numpy==1.26.4 scipy==1.11.4 \
        matplotlib==3.8.4 xarray==2024.10.0 tqdm==4.66.1 opt_einsum==3.3.0 ;;
    newest) echo torch pyro-ppl arviz numpy scipy matplotlib xarray ;;
    arviz) echo torch pyro-ppl "arviz>=1" ;;
    torch) echo torch==2.11.0 pyro-ppl arviz ;;
    *) echo "no environment is called $1" >&2 && exit 2 ;;
    esac
}

printf '| environment | Python | torch | Pyro | ArviZ | NumPy | tests |\n|---|---|---|---|---|---|---|\n'
status=0
for name in "${names[@]}"; do
    packages=$(packages_of "$name") || exit 2
    bin=$folder/$name/bin
    "$(python_of "$name")" -m venv "$folder/$name" || exit 1
    # shellcheck disable=SC2086
    "$bin/pip" install --quiet $packages h5netcdf hypothesis pytest pytest-xdist || exit 1
    "$bin/pip" install --quiet --no-deps . || exit 1
    # away from the source, so that what is installed is what is tested
    rm -rf "$folder/$name/tree" && mkdir "$folder/$name/tree"
    cp -R tests pyproject.toml README.md setup.cfg "$folder/$name/tree"
    cd "$folder/$name/tree"
    result=$("$bin/python" -m pytest -q -n auto --dist loadfile -m "not slow" tests 2>&1 | tee log | tail -1)
    [[ $result == *failed* || $result == *error* ]] && status=1
    versions=$("$bin/python" -c "
import platform, torch, pyro, arviz, numpy
print(' | '.join(x.split('+')[0] for x in (platform.python_version(), torch.__version__, pyro.__version__, arviz.__version__, numpy.__version__)))" 2>/dev/null)
    printf '| %s | %s | %s |\n' "$name" "$versions" "$result"
    cd "$root"
done
exit $status
