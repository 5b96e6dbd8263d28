# SPDX-License-Identifier: Apache-2.0
"""New data with a little old data in every batch."""

from typing import TYPE_CHECKING

from cpt_algorithms.lazy import lazy_names

if TYPE_CHECKING:
    from cpt_algorithms.replay.replay_text import ReplayTextDataset, build_replay_text_dataloader
    from cpt_algorithms.replay.streams import ResilientStream, StreamError

__all__ = ['ReplayTextDataset', 'ResilientStream', 'StreamError', 'build_replay_text_dataloader']

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(('ReplayTextDataset', 'build_replay_text_dataloader'), 'replay_text'),
        **dict.fromkeys(('ResilientStream', 'StreamError'), 'streams'),
    },
)
