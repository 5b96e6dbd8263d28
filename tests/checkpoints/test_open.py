# SPDX-License-Identifier: Apache-2.0
"""What is no checkpoint is refused before it is read."""

import pytest

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.open import INDEX, SINGLE, open_checkpoint


@pytest.mark.parametrize('name', [SINGLE, INDEX])
def test_a_device_is_no_checkpoint(name, tmp_path):
    (tmp_path / name).symlink_to('/dev/zero')
    with pytest.raises(CheckpointError, match=f'{name} is missing, or no file'):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f'{name} is missing, or no file'):
        open_checkpoint(tmp_path / name)
