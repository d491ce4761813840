#!/usr/bin/env bash
# The quick tests with other versions of Python, torch, Pyro, ArviZ and NumPy, each in a new environment:
#
#     tests/versions.sh                 # all of them
#     tests/versions.sh oldest torch    # those
#
# "oldest" has the lower bound of each package in setup.cfg: what it promises is what passes here.
# "nightly", by its name alone, has torch and Pyro as they are developed.
# Environments are made in $VERSIONS, or a temporary folder, and are left there with a log; each
# takes up to 8 GB, and is used again where it is. Of the tests, $TESTS; on as many cores as $CORES.
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
folder=${VERSIONS:-$(mktemp -d)}
export PIP_DISABLE_PIP_VERSION_CHECK=1 OMP_NUM_THREADS=1 MPLBACKEND=Agg
names=("$@")
[ ${#names[@]} -gt 0 ] || names=(oldest newest arviz torch python313)

python_of() {
    case $1 in
    oldest | newest) echo python3.11 ;;
    arviz | torch | nightly) echo python3.12 ;;
    python313) echo python3.13 ;;
    *) echo "no environment is called $1" >&2 && exit 2 ;;
    esac
}
packages_of() {
    case $1 in
    oldest) lower_bounds ;;
    newest | python313) echo ".[cli]" ;;
    arviz) echo ".[cli] arviz>=1" ;;
    torch) echo ".[cli] torch==2.11.0" ;;
    nightly) echo ".[cli] --pre torch --extra-index-url https://download.pytorch.org/whl/nightly/cpu" \
        "pyro-ppl@git+https://github.com/pyro-ppl/pyro@dev" ;;
    esac
}
lower_bounds() { # of what the package needs, and of what the command does
    python3.11 -c '
import configparser, re
config = configparser.ConfigParser()
config.read("setup.cfg")
extras = config["options.extras_require"]
lines = [config["options"]["install_requires"], *(extras[name] for name in ("lightning", "data", "parquet", "scale", "cli"))]
print(*(f"{name}=={version}" for name, version in re.findall(r"^([\w-]+) >=([\d.]+)", "\n".join(lines), re.M)))'
}

printf '| environment | Python | torch | Pyro | ArviZ | NumPy | tests |\n|---|---|---|---|---|---|---|\n'
status=0
for name in "${names[@]}"; do
    python=$(python_of "$name") || exit 2
    bin=$folder/$name/bin
    tree=$folder/$name/tree
    [ -x "$bin/python" ] || "$python" -m venv "$folder/$name" || exit 1
    # shellcheck disable=SC2046
    "$bin/pip" install --quiet $(packages_of "$name") h5netcdf h5py hypothesis pytest pytest-xdist || exit 1
    "$bin/pip" install --quiet --no-deps --force-reinstall . || exit 1
    # what is installed is what is tested: the copy is for what tests read, and nothing is imported from there
    rm -rf "$tree" && mkdir "$tree"
    git ls-files -z | tar --null -T - -cf - | tar -xf - -C "$tree"
    cd "$tree"
    # but for those of the documentation, which is made with one set of versions
    # shellcheck disable=SC2086
    result=$(PYTHONSAFEPATH=1 "$bin/python" -m pytest -q -n "${CORES:-auto}" --dist loadfile -m "not slow" ${TESTS:-tests} \
        --ignore tests/test_pages.py --ignore tests/test_site.py --ignore tests/test_tutorials.py 2>&1 | tee "../log" | tail -1)
    if [[ $result != *passed* || $result == *failed* || $result == *error* ]]; then
        status=1
        grep -E '^(FAILED|ERROR|E  )' ../log >&2
    fi
    versions=$("$bin/python" -c "
import platform, torch, pyro, arviz, numpy
print(' | '.join(x.split('+')[0] for x in (platform.python_version(), torch.__version__, pyro.__version__, arviz.__version__, numpy.__version__)))" 2>/dev/null)
    printf '| %s | %s | %s |\n' "$name" "$versions" "$result"
    cd "$root"
done
exit $status
