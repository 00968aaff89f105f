#!/usr/bin/env bash
# The tests that need a GPU, then both benchmarks on it, each with a limit of its own.
#
#   bash benchmarks/gpu.sh [FOLDER]     logs and numbers go to FOLDER, by default runs/gpu
#
# PYTHON, WORKERS and the LIMIT_ variables (seconds; 0 leaves a part out) may be set. With LIMIT_SUITE the other
# tests of runs and models come last: what they train is placed on the GPU too, but they expect a CPU's bits.
# The status is 0 if all parts ended well.
set -u
cd "$(dirname "$0")/.." || exit 1
out=${1:-runs/gpu}
python=${PYTHON:-python3}
mkdir -p "$out"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
failed=()

part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    [ "$limit" -gt 0 ] || return 0
    timeout -s INT -k 15 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    [ $status -eq 0 ] || failed+=("$name ($status)")
    printf '== %s: status %d, %d s\n' "$name" $status $((SECONDS - began))
}

tests() { # NAME SECONDS MARKS FOLDERS...
    local name=$1 limit=$2 marks=$3
    shift 3
    part "$name" "$limit" "$python" -m pytest "$@" -m "$marks" -p no:cacheprovider -q --tb=short \
        -rfE --durations=8 -n "${WORKERS:-8}" --maxprocesses 16 --dist worksteal
    [ ! -f "$out/$name.log" ] || grep -E '^(FAILED|ERROR) |(passed|failed|error)[^:]* in ' "$out/$name.log" | cut -c1-300 | tail -n 60
}

"$python" - <<'PY'
import torch

print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU")
PY
tests tests "${LIMIT_TESTS:-240}" gpu tests/gpu
part text "${LIMIT_TEXT:-150}" "$python" benchmarks/text_vs_trl.py --device cuda --rounds 6 --json "$out/text.json"
[ ! -f "$out/text.log" ] || tail -n 80 "$out/text.log"
part diffusion "${LIMIT_DIFFUSION:-120}" "$python" benchmarks/diffusion_vs_diffusers.py --device cuda --rounds 10 --json "$out/diffusion.json"
[ ! -f "$out/diffusion.log" ] || tail -n 40 "$out/diffusion.log"
tests suite "${LIMIT_SUITE:-0}" 'not gpu and not slow and not network' tests/integration tests/unit/{train,models,text,diffusion,video}

if [ ${#failed[@]} -gt 0 ]; then
    printf 'not well: %s\n' "${failed[*]}"
    exit 1
fi
