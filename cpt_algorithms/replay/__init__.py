# SPDX-License-Identifier: Apache-2.0
"""What to read: new data with a little old data in every batch."""

from cpt_algorithms.replay.functional import Interleaving, MixedSequence, ShuffledOrder, shares_of
from cpt_algorithms.replay.replay_text import ReplayTextDataset, build_replay_text_dataloader
from cpt_algorithms.replay.streams import ResilientStream, StreamError

__all__ = [
    'Interleaving',
    'MixedSequence',
    'ReplayTextDataset',
    'ResilientStream',
    'ShuffledOrder',
    'StreamError',
    'build_replay_text_dataloader',
    'shares_of',
]
