#!/usr/bin/env bash
# Everything that needs a GPU, without a network: build, tests, fuzzing, compute-sanitizer, benchmarks.
#
#   benchmarks/gpu_all.sh                       # all of it: `first`, then `second`; at most 800 s
#   benchmarks/gpu_all.sh first                 # what is worth most; at most 400 s
#   benchmarks/gpu_all.sh second                # the rest; at most 400 s
#   benchmarks/gpu_all.sh install kernels train # only these stages, in this order
#
# first:  install info kernels fuzz products launches train
# second: install failed cuda_tests memcheck racecheck compiled ops
# by name only: slow_tests all_tests scaling reuse surgery ops_compiled train_checkpoint
#
# Each stage has a time limit, is interrupted there so that it prints what failed, and leaves what it had written. One
# that fails or runs out of time does not stop the next, but makes the exit code 1; Ctrl-C stops it and all that would
# follow. Output goes to log.txt, the outcomes to summary.txt (printed last), the names of failed tests to failed.json,
# results beside them.
#
# Environment:
#   OUT              output folder (default benchmarks/results)
#   PACK=1           results in one file, results.tar.gz
#   PYTHON           interpreter with torch (default python3); a relative path starts at the repository
#   PREBUILT=1       use the libraries that lie in mapsurgery/, built elsewhere, if they work (the C++ example's tests
#                    need mapsurgery/share beside them)
#   FAILED           failed.json of another run, for the stage `failed` (default: the last run's here)
#   DEVICE           cuda (default), or cpu to try the script out on tiny shapes
#   LIMIT_<stage>    seconds for a stage, as in LIMIT_train=300
#   TOTAL            seconds for all stages together (default 400 for each of `first` and `second`, else no limit)
#   FUZZ_SEED        another number, other random calls (default 1)
#   JOBS             processes that tests are spread over, where pytest-xdist is installed (default 8)
set -uo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || exit 2
OUT=$(realpath -m "${OUT:-$root/benchmarks/results}")
[[ -n ${FAILED:-} ]] && FAILED=$(realpath -m "$FAILED")
cd "$root" || exit 2

export OUT
export PYTHON=${PYTHON:-python3}
export DEVICE=${DEVICE:-cuda}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
FIRST="install info kernels fuzz products launches train"
SECOND="install failed cuda_tests memcheck racecheck compiled ops"
results=${RESULTS:-$OUT} # where the stages write

# --- stages: each is a function whose exit code is its verdict --------------------------------------------------------

# The native library of the device runs, and computes what the definition does.
works() {
    "$PYTHON" - "$DEVICE" <<'PY'
import sys, torch, mapsurgery
from mapsurgery.ops import operators
info, device = mapsurgery.native_info(), sys.argv[1]
if not getattr(info, device):
    sys.exit(f"no native {device} library: {info.error}")
x, W, A, B, one = (torch.randn(*shape, device=device) for shape in ((5, 40), (30, 40), (4, 40), (30, 4), (1,)))
found, wanted = (
    (scales := ops.map_scales(A, B, one, one, W.norm().reshape(1), 0.1, True), ops.lowrank_linear(x, W, None, A, B, *scales[:2]))
    for ops in (torch.ops.mapsurgery, operators)
)
torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)
PY
}

install() {
    if [[ ${PREBUILT:-} == 1 ]] && works; then
        echo "the libraries in mapsurgery/ work and are used as they are"
        return
    fi
    "$PYTHON" -m pip install --no-build-isolation --no-deps -e . && works
}

info() {
    "$PYTHON" -m mapsurgery info || return
    "$PYTHON" -c 'import importlib.metadata as m
for name in "torch timm transformers peft triton numpy pytest".split(): print(name, m.version(name))'
    [[ $DEVICE == cpu ]] || nvidia-smi
}

# pytest over several processes, which pytest-xdist deals out test by test (load) or file by file (loadfile); stops after 50
# failures, and remembers what failed for the stage `failed`.
run_tests() {
    local -a spread=()
    "$PYTHON" -c 'import xdist' 2>/dev/null && spread=(-n "${JOBS:-8}" --dist "$1")
    shift
    "$PYTHON" -m pytest -q --maxfail=50 --durations=5 "${spread[@]}" "$@"
    local code=$?
    cp .pytest_cache/v/cache/lastfailed "$OUT/failed.json" 2>/dev/null || echo '{}' >"$OUT/failed.json"
    return "$code"
}

# Without a GPU the tests that need one are skipped, which pytest counts as success.
has_gpu() { "$PYTHON" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else "torch sees no GPU")'; }

KERNEL_TESTS=(tests/test_native_kernels.py tests/test_ops.py)
SLOW_TESTS=(tests/test_compile.py tests/test_cpp_example.py)

kernels() {
    rm -f .pytest_cache/v/cache/lastfailed
    if [[ $DEVICE == cpu ]]; then
        run_tests load -m "not cuda" -k "single_dimensions" "${KERNEL_TESTS[@]}"
    else
        has_gpu && run_tests load -m cuda "${KERNEL_TESTS[@]}"
    fi
}

failed() {
    if ! grep -qs true .pytest_cache/v/cache/lastfailed; then
        echo "no test failed before"
        return
    fi
    run_tests loadfile --lf --lfnf none --tb long tests
}

cuda_tests() {
    local -a others
    mapfile -t others < <(printf '%s\n' tests/test_*.py | grep -vxF "$(printf '%s\n' "${KERNEL_TESTS[@]}" "${SLOW_TESTS[@]}")")
    if [[ $DEVICE == cpu ]]; then
        run_tests load -m "not cuda" -k "single_dimensions" tests/test_native_kernels.py
        return
    fi
    has_gpu && run_tests load -m cuda "${others[@]}"
}

# Each builds or compiles once for the whole file.
slow_tests() {
    if [[ $DEVICE == cpu ]]; then
        run_tests load -m "not cuda" -k "single_dimensions" tests/test_native_kernels.py
        return
    fi
    has_gpu && run_tests loadfile -m cuda "${SLOW_TESTS[@]}"
}

all_tests() { run_tests load tests; }

KINDS=(scales linear conv weight)

fuzz() { "$PYTHON" tests/cuda_on_cpu/fuzz.py --device "$DEVICE" --seconds 12 --seed "${FUZZ_SEED:-1}" --kinds "${KINDS[@]}"; }

# The project's own kernels, on random shapes of every operator. An access out of bounds goes unseen inside the large
# blocks of torch's allocator, so that is switched off.
sanitize() {
    local sanitizer tool=$1
    shift
    if [[ $DEVICE == cpu ]]; then
        echo "compute-sanitizer checks GPUs: nothing was checked"
        return
    fi
    sanitizer=$(command -v compute-sanitizer || find /usr/local/cuda*/bin -name compute-sanitizer 2>/dev/null | head -1)
    if [[ -z $sanitizer ]]; then
        echo "compute-sanitizer was not found: nothing was checked"
        return 1
    fi
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --tool "$tool" --kernel-name kns=mapsurgery --error-exitcode 99 \
        --print-limit 20 "$PYTHON" tests/cuda_on_cpu/fuzz.py --device cuda --seconds 15 --seed 2 \
        --kinds "${KINDS[@]}" "$@"
}

memcheck() { sanitize memcheck; }

# On an H100 racecheck itself breaks down inside a convolution of cuDNN.
racecheck() { sanitize racecheck --without-cudnn; }

# Benchmarks: what runs on a GPU, and after -- what a CPU tries the script out with.
bench() {
    local name=$1
    shift
    local -a cuda=() cpu=()
    while [[ $# -gt 0 && $1 != -- ]]; do
        cuda+=("$1")
        shift
    done
    cpu=("${@:2}")
    [[ $DEVICE == cpu ]] && cuda=("${cpu[@]}")
    "$PYTHON" "benchmarks/$name.py" --device "$DEVICE" --out "$results" "${cuda[@]}"
}

products() { bench products --repeats 7 -- --tokens 4 --widths 16 8 --repeats 1; }

launches() { bench launches -- --width 64 --tokens 8; }

TINY_STEPS=(--models vit_test llama_test:1x2 --methods frozen lora map --repeats 2)

# Two tokens and not one: alone, a token attends to itself whatever the query is, and q_proj learns nothing.
train() {
    bench train_step --dtype bf16 --methods frozen lora-bf16 lora dora map --repeats 9 \
        --models vit_base:64 llama_8b:1x2 llama_8b:1x64 llama_8b:8x1024 resnet50 -- "${TINY_STEPS[@]}"
}

compiled() {
    bench train_step --dtype bf16 --methods frozen lora-bf16 map --repeats 7 --compile --tag compiled \
        --models vit_base:64 llama_8b:1x64 -- "${TINY_STEPS[@]}"
}

train_checkpoint() {
    bench train_step --dtype bf16 --repeats 9 --checkpoint --tag checkpoint --models vit_base llama_8b -- "${TINY_STEPS[@]}"
}

TINY_OPS=(--size tiny --repeats 2 --min-ms 1 --implementations op autograd base)

# Also replayed from CUDA graphs.
ops() { bench ops --dtype bf16 --repeats 5 --implementations op autograd base -- "${TINY_OPS[@]}"; }

ops_compiled() {
    bench ops --dtype bf16 --repeats 5 --implementations op reference compiled --tag compiled \
        --operators map_scales map_linear effective_weight merge_ -- "${TINY_OPS[@]}"
}

scaling() {
    bench scaling --plots "$results" --dtype bf16 --repeats 15 --point-seconds 4 -- \
        --plots "$results" --size tiny --repeats 2 --min-ms 0
}

reuse() {
    bench reuse_norms --widths 1024 4096 --tokens 256 --layers 32 -- \
        --widths 16 --ranks 2 --tokens 2 --layers 1 --repeats 2 --min-ms 0
}

surgery() { bench surgery --size 8b -- --size small; }

# Seconds. `first` and `second` stay within 400 each.
limit_of() {
    local name=LIMIT_$1
    case $1 in
        install) echo "${!name:-60}" ;;
        info | fuzz) echo "${!name:-20}" ;;
        products | launches | failed | ops) echo "${!name:-30}" ;;
        memcheck | racecheck) echo "${!name:-50}" ;;
        compiled) echo "${!name:-60}" ;;
        kernels) echo "${!name:-80}" ;;
        cuda_tests | slow_tests) echo "${!name:-120}" ;;
        train) echo "${!name:-160}" ;;
        all_tests | scaling | reuse | surgery | ops_compiled | train_checkpoint) echo "${!name:-250}" ;;
        *) return 1 ;;
    esac
}

# --- running them -----------------------------------------------------------------------------------------------------

# timeout runs programs, not functions: the script calls itself for one stage.
if [[ ${1:-} == --stage ]]; then
    "$2"
    exit
fi

[[ $# -gt 0 ]] || set -- first second
chosen=()
total=0
for name in "$@"; do
    case $name in
        first) chosen+=($FIRST) total=$((total + 400)) ;;
        second) chosen+=($SECOND) total=$((total + 400)) ;;
        *)
            limit_of "$name" >/dev/null || { echo "no stage is called '$name'; see the head of $0" >&2; exit 2; }
            chosen+=("$name")
            ;;
    esac
done
TOTAL=${TOTAL:-$total} # 0: no limit
if [[ -n ${FAILED:-} ]]; then # taken over first: it may lie in OUT, which starts anew
    [[ -f $FAILED ]] || { echo "FAILED: there is no file $FAILED" >&2; exit 2; }
    mkdir -p .pytest_cache/v/cache && cp "$FAILED" .pytest_cache/v/cache/lastfailed || exit 2
fi

mkdir -p "$OUT" || exit 2
if [[ ${PACK:-} == 1 ]]; then
    results=$(mktemp -d) && trap 'rm -rf "$results"' EXIT
fi
export RESULTS=$results
: >"$OUT/log.txt"
: >"$OUT/summary.txt"
echo '{}' >"$OUT/failed.json"

# Each stage is a job of its own, in a process group that gets the signals: one that a shell starts in the background
# without job control would ignore Ctrl-C, and the terminal's would miss it.
set -m
GRACE=15 # seconds between the interrupt and the end
job=0 interrupted=0
trap 'interrupted=1; [[ $job -eq 0 ]] || kill -INT -- "-$job"' INT TERM
failures=0
for stage in "${chosen[@]}"; do
    limit=$(limit_of "$stage")
    left=$((TOTAL - SECONDS - GRACE))
    if [[ $TOTAL -gt 0 && $left -lt ${limit%.*} ]]; then
        limit=$((left > 0 ? left : 0))
    fi
    if [[ $limit == 0 || $interrupted -eq 1 ]]; then
        printf '%-17s %s\n' "$stage" "NOT RUN" >>"$OUT/summary.txt"
        failures=1
        continue
    fi
    echo "=== $stage (at most $limit s)" | tee -a "$OUT/log.txt"
    start=$SECONDS
    timeout --signal=INT --kill-after="$GRACE" "$limit" "$root/benchmarks/gpu_all.sh" --stage "$stage" \
        > >(trap '' INT && tee -a "$OUT/log.txt") 2>&1 &
    job=$!
    wait "$job"
    code=$?
    if [[ $interrupted -eq 1 ]]; then # the trap ended the first wait
        wait "$job"
        code=130
    fi
    job=0
    case $code in
        0) outcome=ok ;;
        124 | 137) outcome="OUT OF TIME" ;;
        130) outcome=INTERRUPTED ;;
        *) outcome=FAILED ;;
    esac
    [[ $code -eq 0 ]] || failures=1
    printf '%-17s %-12s exit code %3d  %4d s of %s\n' "$stage" "$outcome" "$code" $((SECONDS - start)) "$limit" \
        >>"$OUT/summary.txt"
    [[ ${PACK:-} == 1 ]] && tar -czf "$OUT/results.tar.gz" -C "$results" .
done
wait # for the last of the output
echo "=== summary"
cat "$OUT/summary.txt"
[[ $interrupted -eq 0 ]] || exit 130
exit "$failures"
