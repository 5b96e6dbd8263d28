#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Gathers what a bare GPU machine lacks: one with Python 3.12, torch and a package index out of reach.
#
#   bash scripts/gpu/wheels.sh [NAME...]   # STACK=pinned or current (default); NAME: more packages of that stack
#
# It fills .whl (wheels) and .whl_stubs (stand-ins for the clients of two services, which are imported and not used) and
# prints their size. Take them along with the checkout; there, `source scripts/gpu/setup_bare.sh`.
# Versions are those of scripts/stacks; torch, numpy, pandas, scipy, accelerate and all else are the machine's own.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
stack=scripts/stacks/${STACK:-current}.txt
most=$((60 * 1024 * 1024))

names=(
    # what is trained and evaluated with
    mosaicml mosaicml-streaming llm-foundry lm-eval transformers tokenizers huggingface-hub
    # what they import
    beautifulsoup4 brotli catalogue coolname cramjam datasets dill evaluate gitdb gitpython importlib-metadata
    multiprocess omegaconf python-snappy smmap soupsieve tenacity zstd
    setuptools # llm-foundry imports pkg_resources, which releases since 82 do not have
    # what this package imports
    annotated-types botocore datasketch orjson pydantic pydantic-core submitit typing-inspection
    "$@"
)

version() { # of a package in the lock: an exact one, or nothing is downloaded
    sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$stack" | tail -n 1 | grep . || { echo "$stack has no $1" >&2 && return 1; }
}

wanted=()
for name in "${names[@]}"; do
    found=$(version "$name")
    wanted+=("$name==$found")
done

exclude=$(git rev-parse --git-path info/exclude)
mkdir -p "$(dirname "$exclude")"
for line in /.whl/ /.whl_stubs/; do
    grep -qxF "$line" "$exclude" 2>/dev/null || echo "$line" >>"$exclude"
done

rm -rf .whl .whl_stubs # two versions of one package stop the whole installation
mkdir -p .whl .whl_stubs
platforms=()
for libc in {39..5}; do # pip takes each for itself only
    platforms+=(--platform "manylinux_2_${libc}_x86_64")
done
for old in 2014 2010 1; do
    platforms+=(--platform "manylinux${old}_x86_64")
done
"$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp "${platforms[@]}" \
    -d .whl "${wanted[@]}"

# 16 of botocore's 17 MB describe Amazon's services, out of reach there; what is imported are its exceptions
"$python" - .whl/botocore-*.whl <<'END'
import sys
from pathlib import Path
from zipfile import ZIP_DEFLATED, ZipFile

(path,) = map(Path, sys.argv[1:])
small = path.with_suffix('.small')
with ZipFile(path) as wheel, ZipFile(small, 'w', ZIP_DEFLATED) as kept:
    for name in wheel.namelist():
        content = wheel.read(name)
        if name.endswith('/RECORD'):
            lines = content.splitlines(keepends=True)
            content = b''.join(line for line in lines if not line.startswith(b'botocore/data/'))
        if not name.startswith('botocore/data/'):
            kept.writestr(name, content)
small.replace(path)
END

# llm-foundry and Composer import these whatever they are told to log
for module in mlflow mlflow/data mlflow/transformers mcli; do
    mkdir -p ".whl_stubs/$module"
    cat >".whl_stubs/$module/__init__.py" <<'END'
"""Stands in for a package that is imported and not used: it has any name, and whoever uses one is told."""


class Absent(Exception):
    def __init__(self, *_, **__):
        raise RuntimeError(f'{__name__} is not on this machine')


def __getattr__(name):
    if name.startswith('__'):
        raise AttributeError(name)
    return Absent
END
done

bytes() { find "$@" -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum + 0 }'; }
checkout=$(git ls-files -z --cached --others --exclude-standard | { xargs -0 stat -c %s 2>/dev/null || true; } |
    awk '{ sum += $1 } END { print sum + 0 }')
carried=$(bytes .whl .whl_stubs)
find .whl -type f -printf '%s %f\n' | sort -rn
awk -v stack="$stack" -v count="$(find .whl -type f | wc -l)" -v carried="$carried" -v checkout="$checkout" 'BEGIN {
    printf "%s: %d wheels and the stubs %.1f MiB, with the checkout %.1f MiB\n",
        stack, count, carried / 1048576, (carried + checkout) / 1048576 }'
if [ "$((carried + checkout))" -gt "$most" ]; then
    echo "more than $((most / 1048576)) MiB" >&2
    exit 1
fi
