# SPDX-License-Identifier: Apache-2.0
"""Validation losses of averages over a run's checkpoints, all of which were kept."""

import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from llmfoundry.utils.builders import build_composer_model, build_tokenizer
from streaming import StreamingDataset

from cpt_algorithms.checkpoints.open import safe_globals
from cpt_algorithms.weight_averaging.functional import weighted_mean

__all__ = ['KeptCheckpoints']


class KeptCheckpoints:
    """A run of one rank with ``save_num_checkpoints_to_keep: -1``, and its first validation rows.

    Args:
        run: Its save_folder.
        rows: Validation rows of its first evaluator to judge by. Default: ``128``.

    Cost: The weights of all checkpoints in memory; a loss is a forward pass over the rows.
    """

    def __init__(self, run: Path, rows: int = 128) -> None:
        cfg = json.loads((run / 'stage.json').read_text())['config']
        tokenizer = build_tokenizer(cfg['tokenizer']['name'], dict(cfg['tokenizer']['kwargs']))
        section = {key: value for key, value in cfg['model'].items() if key != 'name'}
        self._model = build_composer_model(cfg['model']['name'], section, tokenizer).eval()
        place = cfg['eval_loader'][0]['dataset']
        dataset = StreamingDataset(local=place['local'], split=place['split'], batch_size=1)
        taken = range(min(rows, len(dataset)))
        self._rows = torch.stack([torch.tensor(dataset[index]['tokens']).long() for index in taken])
        found = {int(re.findall(r'-ba(\d+)', path.name)[0]): path for path in run.glob('ep*-ba*-rank0.pt')}
        self._weights = {batch: _weights(found[batch]) for batch in sorted(found)}

    @property
    def batches(self) -> list[int]:
        """Where the checkpoints are, in order."""
        return list(self._weights)

    def loss(self, weights: Mapping[int, float]) -> float:
        """The loss of an average, in nats per token.

        Args:
            weights: ``{batch: weight}``, with sum 1; ``{batch: 1.0}`` is that checkpoint.
        """
        states = [self._weights[batch] for batch in weights]
        parts = list(weights.values())
        mean = {
            name: weighted_mean([state[name] for state in states], parts, torch.device('cpu')) for name in states[0]
        }
        self._model.load_state_dict(mean)
        with torch.no_grad():
            logits = self._model({'input_ids': self._rows}).logits
        return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self._rows[:, 1:].flatten()))


def _weights(path: Path) -> dict[str, torch.Tensor]:
    with torch.serialization.safe_globals(safe_globals()):
        return torch.load(path, weights_only=True, mmap=True)['state']['model']
