#!/usr/bin/env bash
# The CPU's kernels compiled for ARM by Debian's cross compiler, and run on an emulated processor: make arm
#
# With NEON, and with the dot products of bytes and of bfloat16. It needs the packages g++-aarch64-linux-gnu and qemu-user.
set -euo pipefail
cd "$(dirname "$0")/../.."
for program in aarch64-linux-gnu-g++ qemu-aarch64; do
  command -v $program >/dev/null || { echo "make arm: $program must be there (Debian: apt install g++-aarch64-linux-gnu qemu-user)"; exit 2; }
done

out=build/arm
mkdir -p $out
compile() { # SOURCE OPTIONS...
  local object=$out/$(basename "$1" .cpp).o
  [[ $1 == tests/* ]] && object=$out/checks_$(basename "$1" .cpp).o
  [[ $object -nt $1 && -z $(find csrc/core csrc/kernels tests/arm -name '*.h' -newer $object -print -quit) ]] ||
    aarch64-linux-gnu-g++ -O2 -std=c++20 -Icsrc -Wall -Wextra -Werror -Wno-psabi "${@:2}" -c "$1" -o $object
  objects+=($object)
}
objects=()
for kernel in csrc/kernels/*_cpu.cpp; do compile "$kernel"; done
compile csrc/kernels/elastic_gemm_quantised_arm_dot.cpp -march=armv8.2-a+dotprod
compile csrc/kernels/elastic_gemm_arm_bf16.cpp -march=armv8.2-a+bf16 -DFLEXTRON_VECTOR_BYTES=64
for checks in tests/arm/*.cpp; do compile "$checks"; done
aarch64-linux-gnu-g++ -static "${objects[@]}" -o $out/kernels
qemu-aarch64 -cpu max $out/kernels
