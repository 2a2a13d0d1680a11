#!/usr/bin/env bash
# The first run on a GPU: what docs/gpu-static.md predicts, measured, in at most 10 minutes.
#
#   bash benchmarks/gpu_first_run.sh [FOLDER]               on a machine with a GPU and torch
#   bash benchmarks/gpu_first_run.sh --rehearse [FOLDER]    on a CPU, tiny: times mean nothing
#
# Needs no network, installs nothing, and takes the package from this clone. Each step has a limit in
# seconds; a step that fails or takes longer is recorded, and the rest goes on. FOLDER gets a JSON
# file and a log for each step, and page.md, which puts measured beside predicted: send the whole
# folder. PYTHON names the interpreter, STEPS the steps to run (all by default).
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
limit=${LIMIT:-590}  # seconds for everything, page included
rehearse=
if [ "${1:-}" = --rehearse ]; then
  rehearse=--rehearse
  export TRITON_INTERPRET=1
  shift
fi
folder=${1:-gpu-first-run-$(date +%Y%m%d-%H%M%S)}
mkdir -p "$folder"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"

step() {  # name, limit
  local left=$((limit - 15 - SECONDS)) begin=$SECONDS code=0
  [ "$1" = page ] && left=$((left + 15))
  local most=$(($2 < left ? $2 : left))
  if [ "$most" -lt 1 ]; then
    code=124
  else
    timeout -k 5 "$most" "$python" "$root/benchmarks/gpu_first_run.py" "$1" "$folder" $rehearse \
      > "$folder/$1.log" 2>&1 || code=$?
  fi
  printf '{"step": "%s", "seconds": %d, "limit": %d, "exit": %d}\n' \
    "$1" $((SECONDS - begin)) "$most" "$code" >> "$folder/steps.jsonl"
  printf '%-12s %3d s, exit %d\n' "$1" $((SECONDS - begin)) "$code"
}

rm -f "$folder/steps.jsonl"
for name in ${STEPS:-environment small bandwidth products tiles kernels tests throughput sanitizer}; do
  case $name in
    environment) step environment 60 ;;
    small) step small 80 ;;
    bandwidth) step bandwidth 30 ;;
    products) step products 40 ;;
    tiles) step tiles 90 ;;
    kernels) step kernels 70 ;;
    tests) step tests 140 ;;
    throughput) step throughput 120 ;;
    sanitizer) step sanitizer 90 ;;
    *) echo "no step is called $name" >&2; exit 2 ;;
  esac
done
step page 15
cat "$folder/page.md" 2> /dev/null || tail -n 3 "$folder/page.log"
echo "$folder/page.md"
