#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# On a bare GPU machine, with what scripts/gpu/wheels.sh gathered: does everything work there, and how fast?
#
#   bash scripts/gpu/check.sh OUT [SECONDS]   # 570: no measurement begins later than two minutes before
#
# `make gpu`, then `make bench-gpu` for as long as is left; numbers in OUT/gpu.json and OUT/bench.json, logs beside them.
# Without a GPU it rehearses both on the CPU.
set -uo pipefail
out=$(mkdir -p "$1" && cd "$1" && pwd) || exit
seconds=${2:-570}
cd "$(dirname "${BASH_SOURCE[0]}")/../.." || exit
source scripts/gpu/setup_bare.sh || exit
export PYTHONUNBUFFERED=1 COLUMNS=150
marks=(-m gpu) size=()
python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || marks=() size=(--tiny)
echo "set up after $SECONDS s"
df -h /tmp /dev/shm; free -g; nvidia-smi; ip address || cat /proc/net/dev # why, if something fails for want of it
# INT: whoever is stopped still says what there is
timeout -s INT -k 20 400 python3 -m pytest -q -W ignore --durations=3 -o faulthandler_timeout=100 -p no:cacheprovider "${marks[@]}" tests/gpu/test_one_device.py \
    --results "$out/gpu.json" 2>&1 | tee "$out/gpu.log" | tail -n 100
tests=$?
echo "tests ended after $SECONDS s"
timeout -s INT -k 20 "$((seconds - SECONDS - 15))" python3 scripts/benchmarks/gpu.py "${size[@]}" --budget "$((seconds - SECONDS - 120))" \
    --json "$out/bench.json" 2>&1 | tee "$out/bench.log"
bench=$?
echo "tests: exit code $tests, benchmark: exit code $bench, after $SECONDS s"
exit "$((tests > bench ? tests : bench))"
