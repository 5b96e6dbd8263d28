# shellcheck shell=bash
# SPDX-License-Identifier: Apache-2.0
# Sets up a bare GPU machine with what scripts/gpu/wheels.sh gathered, without a network: in the checkout,
#
#   source scripts/gpu/setup_bare.sh && python3 -m pytest -m gpu tests/gpu
#
# Everything goes to $SITE (/tmp/cpt-site if it is not set); the machine's own packages stay as they are, and what is
# edited in the checkout needs no second installation.

set_up_bare() {
    local checkout list
    checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd) || return
    export SITE=${SITE:-/tmp/cpt-site}
    list=$(ls "$checkout/.whl") || return
    if [ "$(cat "$SITE/.wheels" 2>/dev/null)" != "$list" ]; then
        if [ -e "$SITE/.wheels" ]; then rm -rf "$SITE"; fi # of other wheels
        python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE" \
            "$checkout"/.whl/*.whl || return
        # the entry points by which llm-foundry finds this package, which itself is imported from the checkout
        (cd "$checkout" && PYTHONPATH=$SITE python3 setup.py -q dist_info --output-dir "$SITE") || return
        echo "$list" >"$SITE/.wheels"
    fi
    export PYTHONPATH=$SITE:$checkout/.whl_stubs:$checkout
    export HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline
    # one GPU is torch's alone; and no git program needs to be there
    export USE_FLAX=0 USE_TF=0 GIT_PYTHON_REFRESH=quiet NCCL_DEBUG=WARN
    unset PYTHONDONTWRITEBYTECODE # each rank and stage would compile it all again
}
set_up_bare
