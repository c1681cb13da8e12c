#!/usr/bin/env bash
# The kernels' proof where there is no GPU: bash tests/emulator/run.sh     (make emulate sets up what it needs)
# A part of it, for CI:             bash tests/emulator/run.sh --quick
# The CPU's own kernels, sanitized: bash tests/emulator/run.sh --cpu          (make sanitize)
#
# The emulator's own tests; then for every op that has a csrc/kernels/<op>_cuda.cu, on the Hopper path (90) and the
# portable one (80) side by side: its suite in thread order, and what depends on order under drawn and adversarial ones.
# In thread order, what both paths launch alike goes over one of them. Unless quick, what depends on order runs once more
# under AddressSanitizer and UndefinedBehaviorSanitizer. The CPU's: the ops' tests under both, on each instruction set's
# loops; AVX-512's are compiled for AVX2.
set -uo pipefail
cd "$(dirname "$0")/../.."

adversaries="ahead behind" seeds=20 sanitized=yes part= rest= out=build/emulate
export FLEXTRON_EMULATE=1 OMP_NUM_THREADS=1
if [[ "${1:-}" == --quick ]]; then
  adversaries=ahead seeds=1 sanitized=no
  part=" and (tiles or sm90)" # the files whose tests fill several tiles: these orders ask more of them than thread order
  rest=" and not (tiles or sm90)"
elif [[ "${1:-}" == --cpu ]]; then
  out=build/sanitize FLEXTRON_EMULATE=avx512
elif (($# > 0)); then
  echo "run.sh: the argument must be --quick, --cpu or nothing, got $*" >&2
  exit 2
fi

python=${PYTHON:-python3}
rm -rf "$out"
mkdir -p "$out"

ops="" files=(tests/test_ops.py)
for kernel in csrc/kernels/*_cuda.cu; do
  op=$(basename "$kernel" _cuda.cu)
  if [[ -f csrc/ops/$op.cpp ]]; then
    ops+="${ops:+ or }$op"
    files+=(tests/ops/test_"$op"*.py)
  fi
done
# Tracing, numeric derivatives and refusals launch the same kernels again or none at all: once is enough.
once="gradcheck or opcheck or compil or exports or autocast or bad_arguments"
ordered="($ops) and not ($once)$part"

# In thread order: only 16-bit kernels differ between the paths, and how decode's second launch starts. Attention's
# plain kernels and the above are for path 80, decode's plain ones for path 90.
declare -A forward=(
  [90]="($ops)$rest and not ($once) and not ((test_head_attention.py or head_attention-float) and not float16)"
  [80]="($ops)$rest and not ((test_head_attention_decode.py or head_attention_decode-float) and not float16)"
)

# check NAME ARGUMENTS: one run of pytest, one line.
check() {
  local log=${1//,/} begin=$SECONDS verdict=ok
  log="$out/${log// /-}.log"
  LD_PRELOAD=${preload:-} "$python" -m pytest -p no:cacheprovider "${@:2}" >"$log" 2>&1 || verdict=FAILED
  printf '%-32s %-6s %4d s  %s\n' "$1" $verdict $((SECONDS - begin)) \
    "$(grep -oE '[0-9]+ (failed|passed).*' "$log" | tail -n 1)"
  [[ $verdict == ok ]] && return
  grep -E '^(FAILED|ERROR)|AddressSanitizer:|runtime error:' "$log" | head -n 20
  echo "  all of it: $log"
  wrong=1
}

# in_every_order ARCH: the seeds and orders of one path; the other path has other seeds.
in_every_order() {
  local wrong=0 order seed first=1 drawn=
  export FLEXTRON_ARCH=$1
  [[ $1 == 90 ]] && check "emulator" tests/test_emulator.py
  [[ $1 == 80 ]] && first=$((seeds + 1))
  check "sm_$1 forward" "${files[@]}" -k "${forward[$1]}"
  for ((seed = first; seed < first + seeds; ++seed)); do drawn+=" random:$seed"; done
  for order in $adversaries; do drawn+=" $order:$first"; done
  for order in $drawn; do
    FLEXTRON_EMULATE_ORDER=${order%:*} FLEXTRON_EMULATE_SEED=${order#*:} \
      check "sm_$1 ${order/:/, seed }" "${files[@]}" -k "$ordered"
  done
  return $wrong
}

# Python was not linked with sanitizers, nor with the C++ library whose exceptions they watch. What it leaks is its own.
with_sanitizers() {
  preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)"
  export FLEXTRON_EMULATE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0
}

# sanitized ARCH: once, under the sanitizers.
sanitized() {
  local wrong=0 preload
  with_sanitizers
  export FLEXTRON_ARCH=$1
  [[ $1 == 90 ]] && check "sanitized emulator" tests/test_emulator.py
  FLEXTRON_EMULATE_ORDER=random FLEXTRON_EMULATE_SEED=1 \
    check "sanitized sm_$1 random, seed 1" "${files[@]}" -k "$ordered"
  return $wrong
}

# sanitized_cpu ISA: the same of the loops of an instruction set.
sanitized_cpu() {
  local wrong=0 preload
  with_sanitizers
  export FLEXTRON_ISA=$1
  check "sanitized $1" tests/test_ops.py tests/ops -k "not ($once or each_instruction_set)"
  return $wrong
}

# at_once FUNCTION ARGUMENTS: the function of each argument, side by side.
at_once() {
  local failed=0 argument runs=()
  for argument in "${@:2}"; do
    "$1" "$argument" &
    runs+=($!)
  done
  for argument in "${runs[@]}"; do wait "$argument" || failed=1; done
  return $failed
}

failed=0
if [[ $FLEXTRON_EMULATE == avx512 ]]; then
  echo "== building the ops with sanitizers"
  "$python" tests/emulator/build.py avx512 --sanitize || exit 1
  at_once sanitized_cpu generic avx2 avx512 || { echo "== FAILED after $SECONDS s"; exit 1; }
  echo "== every CPU kernel passed, in $SECONDS s"
  exit
fi
echo "== building the ops with emulated kernels"
"$python" tests/emulator/build.py || exit 1
echo "== emulated: ${ops// or /, }"
at_once in_every_order 90 80 || failed=1
if [[ $sanitized == yes ]]; then
  echo "== building them with sanitizers"
  "$python" tests/emulator/build.py --sanitize || exit 1
  at_once sanitized 90 80 || failed=1
fi
((failed)) && { echo "== FAILED after $SECONDS s"; exit 1; }
echo "== every kernel passed, in $SECONDS s"
