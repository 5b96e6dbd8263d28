# SPDX-License-Identifier: Apache-2.0
"""What rank 0 raises, all ranks raise: the recipe ends in one line by its class."""

import pytest

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.files import StorageError
from cpt_algorithms.ranks import on_rank_zero
from cpt_algorithms.validation import ConfigError


@pytest.mark.parametrize('error', [CheckpointError('damaged'), StorageError('gone'), ConfigError(['a', 'b'])])
def test_an_error_keeps_its_class_and_its_words(error):
    def fail():
        raise error

    with pytest.raises(ValueError) as raised:
        on_rank_zero(fail)
    assert str(raised.value) == str(error)
    assert type(raised.value) is (ValueError if isinstance(error, ConfigError) else type(error))
