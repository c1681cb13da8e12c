#!/usr/bin/env bash
# Two visits to a machine with a GPU, each in under ten minutes: bash python/benchmarks/gpu_check.sh --models
#
#   --models            whole models: the captured graph, training, latency tables, generation beside its rivals
#   --ops               the ops: tests, benchmarks, sanitizers. Without either: whole models, then ops while there is time
#   --only PATTERN      of the steps, those whose names match, after those that set up
#   --cpu               whole models on this machine's CPU: tiny ones, stand-ins for graphs and compilation. It needs the
#                       project's own environment and shows that the script works, nothing of a GPU
#   --dry-run           prints the steps and their limits, and does nothing
#   --pack [VERSION]    on the machine that has the build and a network: puts into build/gpu what a machine without
#                       a network lacks: the op library, its sources' checksum, the commit, and wheels for that Python
#                       (3.12 by default), transformers among them. Below 60 MiB; copy it there with the repository.
#
# The machine needs nvcc, cmake, ninja, a C++ compiler and a python3 with a CUDA build of torch (PYTHON= names
# another). Nothing is installed: wheels are unpacked in build/gpu/site. The packed op library has no Python in it and
# serves every torch; it is used where it loads and its sources are these, and built otherwise. _C is always built
# there, for that Python: it takes seconds.
#
# Leaves in $OUT (gpu-out by default): summary.txt, log.txt (all that every step printed), *.csv and *.png.
# A step that fails or runs out of time does not stop the next one; the exit code says whether one did.
# shellcheck disable=SC2329 # the steps are called by name
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 2

OUT=${OUT:-gpu-out}
PYTHON=${PYTHON:-python3}
packed=build/gpu
deadline=575 # of the whole visit, in seconds
dry=
only=
parts="models ops"
target=cuda
failed=0

sources_checksum() {
  find CMakeLists.txt csrc -type f | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d ' ' -f 1
}

pack() {
  local version=$1 library=flextron_ext/libflextron.so
  "$PYTHON" -m cmake --build build/cmake || { echo "gpu_check: build/cmake must build, got a failure" >&2; return 1; }
  rm -rf "$packed"
  mkdir -p "$packed/wheels"
  gzip -9 -c "$library" >"$packed/libflextron.so.gz"
  sources_checksum >"$packed/sources"
  git describe --always --dirty >"$packed/commit"
  # What these need is named too: pip follows no dependency of a platform that it does not run on. The versions are
  # those of the environment here, where the suite passed; torch and NumPy are the machine's.
  "$PYTHON" -m pip freeze --exclude-editable | grep -v '@' >"$packed/versions"
  "$PYTHON" -m pip --disable-pip-version-check --quiet download --no-deps --only-binary=:all: \
    --python-version "$version" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --dest "$packed/wheels" --constraint "$packed/versions" \
    pybind11 pytest iniconfig pluggy packaging pygments pytest-xdist execnet hypothesis sortedcontainers \
    transformers huggingface-hub tokenizers safetensors regex tqdm pyyaml filelock fsspec typing-extensions \
    typer annotated-doc pydantic pydantic-core annotated-types typing-inspection shellingham rich markdown-it-py mdurl \
    click httpx2 httpcore2 anyio h11 idna truststore || return 1
  du -sh "$packed"
  (($(du -sm "$packed" | cut -f 1) < 60)) || { echo "gpu_check: build/gpu must be below 60 MiB, got more" >&2; return 1; }
}

# step NAME LIMIT COMMAND...: runs a function or command under a limit, logs it, and adds a line to the summary.
step() {
  local name=$1 limit=$2 begin=$SECONDS verdict=ok code left
  shift 2
  [[ $name =~ ^(device|packages|library)$ || $name =~ $only ]] || return
  if [[ -n $dry ]]; then
    printf '%-22s %4d s  %s\n' "$name" "$limit" "$*"
    return
  fi
  left=$((deadline - SECONDS))
  ((left < limit)) && limit=$left
  if ((limit < 5)); then
    verdict="not run: the time is up"
  else
    printf '\n==== %s: %s\n' "$name" "$*" >>"$OUT/log.txt"
    timeout --signal=INT --kill-after=10 "$limit" bash -c '"$@"' step "$@" >"$OUT/.step" 2>&1 </dev/null
    code=$?
    cat "$OUT/.step" >>"$OUT/log.txt"
    case $code in
      0) ;;
      3) verdict="not run" ;;
      124 | 137) verdict="OUT OF TIME" ;;
      *) verdict=FAILED ;;
    esac
  fi
  [[ $verdict == ok ]] || failed=1
  printf '%-22s %-12s %4d s  %s\n' "$name" "$verdict" $((SECONDS - begin)) "$(last_words)" | tee -a "$OUT/summary.txt"
}

# The line of a step that says most: pytest's and the sanitizer's sums, else the last.
last_words() {
  { grep -E '^=* ?[0-9]+ (passed|failed|error)|ERROR SUMMARY|RACECHECK SUMMARY' "$OUT/.step" || cat "$OUT/.step"; } \
    2>/dev/null | grep -v '^ *$' | tail -n 1 | cut -c 1-110
}

# ---- the steps, each in a shell of its own, which step calls by name

device() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm --format=csv,noheader &&
    nvcc --version | tail -n 1 &&
    "$PYTHON" -c 'import sys, torch; print("python", sys.version.split()[0], "torch", torch.__version__); \
print(torch.cuda.get_device_name(), "sm_%d%d" % torch.cuda.get_device_capability(), torch.cuda.mem_get_info())'
}

packages() {
  if compgen -G "$packed/wheels/*.whl" >/dev/null; then
    "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
      --target "$packed/site" "$packed"/wheels/*.whl || return
  fi
  "$PYTHON" -c 'import hypothesis, pybind11, pytest, transformers
for one in (pybind11, pytest, transformers): print(one.__name__, one.__version__, end=" ")'
}

loads() {
  "$PYTHON" -c 'import sys, torch; torch.ops.load_library(sys.argv[1]); torch.ops.flextron.elastic_linear' "$1"
}

library() {
  local library=flextron_ext/libflextron.so torch_dir suffix includes version
  torch_dir=$("$PYTHON" -c 'import pathlib, torch; print(pathlib.Path(torch.__file__).parent)') || return
  suffix=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  includes=$("$PYTHON" -c 'import pybind11, sysconfig; print(sysconfig.get_path("include"), pybind11.get_include(), sep=";")') || return
  [[ -f $packed/libflextron.so.gz ]] && gunzip -kf "$packed/libflextron.so.gz"
  if [[ -f $packed/libflextron.so && $(cat "$packed/sources") == "$(sources_checksum)" ]] && loads "$packed/libflextron.so"; then
    cp "$packed/libflextron.so" "$library" || return
    # shellcheck disable=SC2016 # the loader expands it
    c++ -std=c++20 -O2 -shared -fPIC -fvisibility=hidden -Icsrc "-isystem${includes%;*}" "-isystem${includes#*;}" \
      csrc/bindings.cpp -o "flextron_ext/_C$suffix" "$library" '-Wl,-rpath,$ORIGIN' || return
    echo "the packed library, sources unchanged"
  else
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    cmake -G Ninja -S . -B "$packed/cmake" -DCMAKE_BUILD_TYPE=Release -DFLEXTRON_CUDA=ON \
      "-DFLEXTRON_VERSION=$version" "-DFLEXTRON_TORCH_DIR=$torch_dir" "-DFLEXTRON_PYTHON_INCLUDES=$includes" \
      "-DFLEXTRON_PYTHON_SUFFIX=$suffix" "-DFLEXTRON_OUTPUT_DIR=$PWD/flextron_ext" &&
      cmake --build "$packed/cmake" || return
    echo "built here"
  fi
  "$PYTHON" -c 'import flextron_ext; print(flextron_ext.build_info())'
}

# The op library by itself, so that a package that does not import still leaves one result.
alone() {
  "$PYTHON" - "$1" <<'CHECK'
import sys

import torch

torch.ops.load_library(sys.argv[1])
x, w = (torch.randn(*s, device="cuda").bfloat16() for s in ((130, 192), (256, 192)))
y = torch.ops.flextron.elastic_linear(x, w, None, 128, 200).double()
exact = x[:, :128].double() @ w[:200, :128].double().T
error = (torch.linalg.vector_norm(y - exact) / torch.linalg.vector_norm(exact)).item()
assert error < 5e-3, f"elastic_linear: error must be below 5e-3, got {error:.1e}"
print(f"elastic_linear is right without the package, error {error:.1e}")
CHECK
}

words() {
  local program=$packed/words
  mkdir -p "$packed"
  nvcc -std=c++20 -Icsrc -Itests -gencode=arch=compute_90a,code=sm_90a --expt-relaxed-constexpr \
    tests/emulator/words.cu csrc/kernels/tensor_map_cuda.cu -o "$program" && "$program"
}

# suite ARCH: what runs on a GPU, with the kernels of one architecture.
suite() {
  local spread=()
  "$PYTHON" -c 'import xdist' 2>/dev/null && spread=(-n 8)
  FLEXTRON_ARCH=$1 "$PYTHON" -m pytest -p no:cacheprovider --durations=10 "${spread[@]}" tests/test_ops.py tests/ops tests/test_streams.py -k cuda
}

# sanitize TOOL COMMAND...: torch's allocator hands out parts of large blocks, which would hide what is beyond a tensor.
sanitize() {
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not here"; return 3; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 --tool "$@"
}

sanitize_ops() {
  # shellcheck disable=SC2086 # a tool and its options
  sanitize $1 "$PYTHON" -m pytest -p no:cacheprovider -x tests/test_ops.py \
    -k "cuda and bfloat16 and (test_values or test_gradients)"
}

# What TMA writes counts as unwritten for initcheck: the portable kernels alone, and of its findings those
# in our kernels, as the vendor's write so too.
initcheck_ops() {
  local findings="$OUT/.initcheck" ours
  FLEXTRON_ARCH=80 sanitize_ops "initcheck --print-limit 0" >"$findings"
  tail -n 3 "$findings"
  ours=$(grep -c '^=========     at .*flextron::' "$findings")
  grep -qE '^[0-9]+ passed' "$findings" || ours+=", and tests that did not pass"
  rm "$findings"
  echo "reads of unwritten memory by our kernels: $ours"
  [[ $ours == 0 ]]
}

# bench ARCH ARGUMENTS: with the kernels of one architecture.
bench() {
  FLEXTRON_ARCH=$1 "$PYTHON" python/benchmarks/bench_ops.py --device cuda --rounds 3 --seconds 0.01 "${@:2}"
}

# models CHECK...: of check_model.py, each its line; what fails says so at once.
models() {
  "$PYTHON" python/benchmarks/check_model.py --device "$target" "$@"
}

# What the suite asks of captured steps where there is a GPU.
replays() {
  "$PYTHON" -m pytest -p no:cacheprovider tests/nn/test_graph.py tests/nn/test_decode_step.py -k "cuda or on_a_gpu"
}

# generation MODEL ARGUMENTS...: tokens per second beside the others, and a line of the CSV file for each.
generation() {
  "$PYTHON" python/benchmarks/bench_model.py --device "$target" --model "$1" --csv "$OUT/models.csv" --no-wait "${@:2}"
}

draw() {
  "$PYTHON" -c 'import matplotlib' || { echo "matplotlib is not here: bench_ops.py --read ops.csv --plot ops.png"; return 3; }
  for table in ops attention; do
    "$PYTHON" python/benchmarks/bench_ops.py --read "$OUT/$table.csv" --plot "$OUT/$table.png" || return
  done
}

whole_models() {
  step "model, graph" 80 models tokens budgets
  step "model, replays" 60 replays
  step "model, training" 60 models step memory reads
  step "model, latency" 50 models table
  local name
  for name in smollm2 llama1b llama8b; do
    step "model, $name" 75 generation $name --dtype bfloat16 --batch 1,16 --prompt 512 --new 32 --rounds 3
  done
  for name in smollm2 llama8b llama1b; do
    step "model, $name compiled" 90 generation $name --dtype bfloat16 --batch 1,16 --prompt 512 --new 32 --rounds 3 --widths 1 --who graph,compiled
  done
}

# The same on a CPU, in few processes.
stand_ins() {
  step "model, checks" 240 models
  step "model, tiny" 120 generation tiny --as-gpu --batch 1,2 --prompt 8 --new 4 --rounds 1 --widths 1,0.5 --who graph,eager,stock,compiled,vllm
}

visit() {
  [[ $target == cuda ]] || { stand_ins; return; }
  step device 30 device
  step packages 60 packages
  step library 240 library
  [[ $parts == *models* ]] && whole_models
  [[ $parts == *ops* ]] && ops
  return 0
}

ops() {
  step "library alone" 40 alone flextron_ext/libflextron.so
  step words 90 words
  step "tests, sm_90" 120 suite 90
  step "tests, sm_80" 120 suite 80
  step "bench" 120 bench 90 --op elastic_mlp,elastic_linear,route --shapes llama2-7b --csv "$OUT/ops.csv"
  step "bench, backward" 60 bench 90 --op elastic_mlp --shapes llama2-7b --tokens 4096 --backward --csv "$OUT/ops_backward.csv"
  step "bench, attention" 60 bench 90 --op head_attention,head_attention_decode --shapes llama3-8b --tokens 4096,16384 --csv "$OUT/attention.csv"
  step "bench, attention back" 40 bench 90 --op head_attention --shapes llama3-8b --tokens 4096 --backward --csv "$OUT/attention_backward.csv"
  step "bench, small model" 40 bench 90 --op elastic_mlp --shapes smollm2 --tokens 16,1024 --csv "$OUT/ops_small.csv"
  step "bench, portable" 40 bench 80 --op elastic_mlp --shapes llama2-7b --tokens 16,4096 --csv "$OUT/ops_sm80.csv"
  step "plot" 20 draw
  for tool in memcheck synccheck initcheck; do
    step "$tool, words" 30 sanitize $tool "$packed/words"
  done
  # racecheck does not follow bar.arrive.
  step "racecheck, words" 30 sanitize racecheck --kernel-name-exclude kernel_substring=named_barrier "$packed/words"
  step "memcheck, ops" 150 sanitize_ops memcheck
  step "synccheck, ops" 90 sanitize_ops synccheck
  step "initcheck, ops" 120 initcheck_ops
}

while (($#)); do
  case $1 in
    --pack) pack "${2:-3.12}"; exit ;;
    --dry-run) dry=yes ;;
    --only) only=${2:-}; [[ -n $only && $only != --* ]] || { echo "gpu_check: --only must have a pattern, got none" >&2; exit 2; }; shift ;;
    --models | --ops) parts=${1#--} ;;
    --cpu) target=cpu ;;
    *) echo "gpu_check: the argument must be --models, --ops, --only, --cpu, --dry-run, --pack or nothing, got $1" >&2; exit 2 ;;
  esac
  shift
done
[[ $target == cuda || $parts != ops ]] || { echo "gpu_check: --ops must have a GPU, got --cpu" >&2; exit 2; }
[[ $(dry=yes; visit 2>/dev/null | grep -vcE '^(device|packages|library) ') != 0 ]] || { echo "gpu_check: --only must match a step of --dry-run, got $only" >&2; exit 2; }
[[ -z $dry ]] || { visit; exit 0; }

[[ $target == cpu ]] || command -v nvidia-smi >/dev/null || { echo "gpu_check: the machine must have a GPU, got no nvidia-smi" >&2; exit 2; }
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
rm -f "$OUT"/{summary.txt,log.txt,ops.csv,ops_backward.csv,ops_small.csv,ops_sm80.csv,models.csv,attention.csv,attention_backward.csv,ops.png,attention.png}
FLEXTRON_COMMIT=$(cat "$packed/commit" 2>/dev/null || git describe --always --dirty 2>/dev/null)
export OUT PYTHON packed target FLEXTRON_COMMIT PYTHONUNBUFFERED=1
export PYTHONPATH=$PWD:$PWD/python:$PWD/$packed/site
while read -r _ _ name; do export -f "${name?}"; done < <(declare -F)

visit
rm -f "$OUT/.step"
echo "$SECONDS s; all that was printed: $OUT/log.txt" | tee -a "$OUT/summary.txt"
exit $failed
