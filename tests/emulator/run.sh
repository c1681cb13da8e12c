#!/usr/bin/env bash
# The kernels' proof where there is no GPU: bash tests/emulator/run.sh     (make emulate sets up what it needs)
# A part of it, for CI:             bash tests/emulator/run.sh --quick
# The CPU's own kernels, sanitized: bash tests/emulator/run.sh --cpu          (make sanitize)
#
# For every op that has a csrc/kernels/<op>_cuda.cu, on the Hopper path (90) and the portable one (80): its suite in thread
# order, and what depends on order under drawn and adversarial ones; and the emulator's own tests. In thread order, what
# both paths launch alike goes over one of them. Quick, each path has one other order. Unless quick, the decode step of
# whole models gives the modules' logits on both, and what depends on order runs once more under AddressSanitizer and
# UndefinedBehaviorSanitizer. The CPU's: the ops' tests under both, on each instruction set's loops; AVX-512's are compiled
# for AVX2.
set -uo pipefail
cd "$(dirname "$0")/../.."

adversaries="ahead behind" seeds=20 all=yes part= rest= out=build/emulate
export FLEXTRON_EMULATE=1 OMP_NUM_THREADS=1
if [[ "${1:-}" == --quick ]]; then
  adversaries= seeds=0 all=no
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

# check NAME SETTINGS -- ARGUMENTS: one run of pytest, one line.
check() {
  local name=$1 settings=() begin=$SECONDS verdict=ok
  local log=${name//,/}
  log="$out/${log// /-}.log"
  shift
  while [[ $1 != -- ]]; do settings+=("$1") && shift; done
  shift
  env LD_PRELOAD="$preload" "${settings[@]}" "$python" -m pytest -p no:cacheprovider "$@" >"$log" 2>&1 || verdict=FAILED
  printf '%-32s %-6s %4d s  %s\n' "$name" $verdict $((SECONDS - begin)) \
    "$(grep -oE '[0-9]+ (failed|passed).*' "$log" | tail -n 1)"
  [[ $verdict == ok ]] && return
  grep -E '^(FAILED|ERROR)|AddressSanitizer:|runtime error:' "$log" | head -n 20
  echo "  all of it: $log"
  return 1
}

# JOBS checks run side by side (2 unless it says otherwise); as soon as one ends, the next begins.
begin() {
  if ((running == ${JOBS:-2})); then wait -n || failed=1; else running=$((running + 1)); fi
  check "$@" &
}
finish() {
  for (( ; running > 0; --running)); do wait -n || failed=1; done
}

# In thread order, then the seeds and orders, on both paths; each path has seeds of its own.
in_every_order() {
  local arch order seed
  local -A first=([90]=1 [80]=$((seeds + 1)))
  for arch in 90 80; do begin "sm_$arch forward" FLEXTRON_ARCH=$arch -- "${files[@]}" -k "${forward[$arch]}"; done
  if [[ $all == no ]]; then # one order for each path
    in_order 90 ahead 1
    in_order 80 random 2
  fi
  for order in $adversaries; do
    for arch in 90 80; do in_order $arch $order ${first[$arch]}; done
  done
  for ((seed = 0; seed < seeds; ++seed)); do
    for arch in 90 80; do in_order $arch random $((first[$arch] + seed)); done
  done
  begin "emulator" FLEXTRON_ARCH=90 -- tests/test_emulator.py
  [[ $all == yes ]] || return 0
  for arch in 90 80; do begin "sm_$arch decode step" FLEXTRON_ARCH=$arch -- tests/nn/test_decode_step.py -k logits; done
}
in_order() {
  begin "sm_$1 $2, seed $3" FLEXTRON_ARCH=$1 FLEXTRON_EMULATE_ORDER=$2 FLEXTRON_EMULATE_SEED=$3 -- \
    "${files[@]}" -k "$ordered"
}

# Python was not linked with sanitizers, nor with the C++ library whose exceptions they watch. What it leaks is its own.
with_sanitizers() {
  preload="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so.6)"
  export FLEXTRON_EMULATE_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0
}

failed=0 running=0 preload=
if [[ $FLEXTRON_EMULATE == avx512 ]]; then
  echo "== building the ops with sanitizers"
  "$python" tests/emulator/build.py avx512 --sanitize || exit 1
  with_sanitizers
  for isa in generic avx2 avx512 avx512_vnni avx512_bf16 amx; do
    begin "sanitized $isa" FLEXTRON_ISA=$isa -- tests/test_ops.py tests/ops -k "not ($once or each_instruction_set)"
  done
  finish
  ((failed)) && { echo "== FAILED after $SECONDS s"; exit 1; }
  echo "== every CPU kernel passed, in $SECONDS s"
  exit
fi
echo "== building the ops with emulated kernels"
"$python" tests/emulator/build.py || exit 1
echo "== emulated: ${ops// or /, }"
in_every_order
finish
if [[ $all == yes ]]; then
  echo "== building them with sanitizers"
  "$python" tests/emulator/build.py --sanitize || exit 1
  with_sanitizers
  for arch in 90 80; do
    begin "sanitized sm_$arch random, seed 1" FLEXTRON_ARCH=$arch FLEXTRON_EMULATE_ORDER=random \
      FLEXTRON_EMULATE_SEED=1 -- "${files[@]}" -k "$ordered"
  done
  begin "sanitized emulator" FLEXTRON_ARCH=90 -- tests/test_emulator.py
  finish
fi
((failed)) && { echo "== FAILED after $SECONDS s"; exit 1; }
echo "== every kernel passed, in $SECONDS s"
