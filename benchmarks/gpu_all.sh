#!/usr/bin/env bash
# Everything that needs a GPU, in one command and without a network: build, tests, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu_all.sh                         # the default stages, within twelve minutes
#   benchmarks/gpu_all.sh install info ops train  # only these, in this order (or STAGES="install info ops train")
#
# Stages: install, info, cuda_tests, memcheck, racecheck, ops, train, all_tests; by name only: scaling, reuse,
# surgery, ops_compiled, train_compiled, train_checkpoint. Each has a time limit. One that fails or runs out of time does not stop the next,
# but makes the exit code 1. Output goes to log.txt, the outcomes to summary.txt (printed last), results beside them:
# 8 files for the default stages.
#
# Environment:
#   OUT                 output folder (default benchmarks/results)
#   PYTHON              interpreter with torch (default python3); a relative path starts at the repository
#   DEVICE              cuda (default), or cpu to try the script out on tiny shapes
#   LIMIT_<stage>       seconds for a stage, as in LIMIT_train=300
#   SANITIZER_KEYWORDS  which CUDA tests compute-sanitizer runs, for pytest -k
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
OUT=$(realpath -m "${OUT:-$root/benchmarks/results}")
cd "$root" || exit 2

export OUT
export PYTHON=${PYTHON:-python3}
export DEVICE=${DEVICE:-cuda}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
DEFAULT_STAGES="install info cuda_tests memcheck racecheck ops train all_tests"

# --- stages: each is a function whose exit code is its verdict --------------------------------------------------------

install() { "$PYTHON" -m pip install --no-build-isolation --no-deps -e .; }

info() {
    "$PYTHON" -m mapsurgery info || return
    "$PYTHON" -m pip list 2>/dev/null | grep -iE '^(torch|timm|transformers|peft|triton|numpy|pytest) '
    if [[ $DEVICE == cuda ]]; then
        nvidia-smi || return
        # Without the native kernels the rest would measure the wrong thing.
        "$PYTHON" -c 'import mapsurgery as m, sys; sys.exit(None if m.native_info().cuda else "no native CUDA kernels")'
    fi
}

cuda_tests() {
    # Without a GPU these tests are skipped, which pytest counts as success.
    if [[ $DEVICE == cuda ]]; then
        "$PYTHON" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU")' || return
    fi
    "$PYTHON" -m pytest -q -m cuda -p no:cacheprovider --durations=5 tests
}

all_tests() { "$PYTHON" -m pytest -q --maxfail=20 -p no:cacheprovider --durations=10 tests; }

# Two subjects: the operators on tiny shapes (each compared with the reference in float64), and some of the tests.
sanitize() {
    local sanitizer rc=0
    sanitizer=$(command -v compute-sanitizer || find /usr/local/cuda*/bin -name compute-sanitizer 2>/dev/null | head -1)
    if [[ -z $sanitizer ]]; then
        echo "compute-sanitizer was not found: nothing was checked"
        return 1
    fi
    local -a check=("$sanitizer" --tool "$1" --error-exitcode 99 --print-limit 20)
    local scratch
    scratch=$(mktemp -d)
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    # An access out of bounds goes unseen inside the large blocks of torch's allocator, so that is switched off; CUDA
    # graphs need it, and are left out.
    "${check[@]}" "$PYTHON" benchmarks/ops.py --device cuda --size tiny --repeats 1 \
        --min-ms 0 --no-graphs --implementations op --out "$scratch" || rc=$?
    rm -rf "$scratch"
    "${check[@]}" "$PYTHON" -m pytest -q -x -p no:cacheprovider -m cuda \
        -k "${SANITIZER_KEYWORDS:-lowrank or scales or linear or conv or merge}" tests || rc=$?
    return "$rc"
}

memcheck() { sanitize memcheck; }

racecheck() { sanitize racecheck; }

bench_ops() {
    local -a shapes=(--size large --dtype bf16 fp32)
    [[ $DEVICE == cpu ]] && shapes=(--size tiny --repeats 2 --min-ms 1)
    "$PYTHON" benchmarks/ops.py --device "$DEVICE" --out "$OUT" "${shapes[@]}" "$@"
}

bench_train() {
    local -a models=(--models vit_base llama_8b resnet50)
    [[ $DEVICE == cpu ]] && models=(--models vit_test llama_test --repeats 2)
    "$PYTHON" benchmarks/train_step.py --device "$DEVICE" --out "$OUT" "${models[@]}" "$@"
}

ops() { bench_ops --repeats 5 --implementations op autograd reference base; }

ops_compiled() {
    bench_ops --repeats 5 --dtype bf16 --implementations op reference compiled --tag compiled \
        --operators lowrank_norm map_linear effective_weight merge_
}

train() { bench_train --repeats 9 --dtype bf16 autocast-bf16; }

train_compiled() { bench_train --repeats 9 --dtype bf16 --methods frozen lora-bf16 lora map --compile --tag compiled; }

scaling() {
    local -a shapes=(--dtype bf16 --repeats 15 --point-seconds 4)
    [[ $DEVICE == cpu ]] && shapes=(--size tiny --repeats 2 --min-ms 0)
    "$PYTHON" benchmarks/scaling.py --device "$DEVICE" --out "$OUT" --plots "$OUT" "${shapes[@]}"
}

reuse() {
    local -a shapes=(--widths 1024 4096 --tokens 256 --layers 32)
    [[ $DEVICE == cpu ]] && shapes=(--widths 16 --ranks 2 --tokens 2 --layers 1 --repeats 2 --min-ms 0)
    "$PYTHON" benchmarks/reuse_norms.py --device "$DEVICE" --out "$OUT" "${shapes[@]}"
}

surgery() {
    local size=8b
    [[ $DEVICE == cpu ]] && size=small
    "$PYTHON" benchmarks/surgery.py --device "$DEVICE" --out "$OUT" --size "$size"
}

train_checkpoint() { bench_train --repeats 9 --dtype bf16 --checkpoint --tag checkpoint; }

# Seconds; the default stages together stay under 720.
limit_of() {
    local name=LIMIT_$1
    case $1 in
        install) echo "${!name:-140}" ;;
        info) echo "${!name:-20}" ;;
        cuda_tests) echo "${!name:-180}" ;;  # some build the C++ example and export to it
        memcheck | racecheck) echo "${!name:-70}" ;;
        surgery) echo "${!name:-120}" ;;
        ops | train) echo "${!name:-100}" ;;
        all_tests) echo "${!name:-30}" ;;
        scaling | reuse | ops_compiled | train_compiled | train_checkpoint) echo "${!name:-250}" ;;
        *) return 1 ;;
    esac
}

# --- running them -----------------------------------------------------------------------------------------------------

# timeout runs programs, not functions: the script calls itself for one stage.
if [[ ${1:-} == --stage ]]; then
    "$2"
    exit
fi

read -ra chosen <<<"${*:-${STAGES:-$DEFAULT_STAGES}}"
for stage in "${chosen[@]}"; do
    limit_of "$stage" >/dev/null || { echo "no stage is called '$stage'; see the head of $0" >&2; exit 2; }
done

mkdir -p "$OUT" || exit 2
: >"$OUT/log.txt"
: >"$OUT/summary.txt"
failed=0
for stage in "${chosen[@]}"; do
    limit=$(limit_of "$stage")
    echo "=== $stage (at most $limit s)" | tee -a "$OUT/log.txt"
    start=$SECONDS
    timeout --kill-after=5 "$limit" "$root/benchmarks/gpu_all.sh" --stage "$stage" 2>&1 | tee -a "$OUT/log.txt"
    code=${PIPESTATUS[0]}
    case $code in
        0) outcome=ok ;;
        124 | 137) outcome="OUT OF TIME" ;;
        *) outcome=FAILED ;;
    esac
    [[ $code -eq 0 ]] || failed=1
    printf '%-17s %-12s exit code %3d  %4d s of %d\n' "$stage" "$outcome" "$code" $((SECONDS - start)) "$limit" \
        >>"$OUT/summary.txt"
done
echo "=== summary"
cat "$OUT/summary.txt"
exit "$failed"
