# SPDX-License-Identifier: Apache-2.0
"""What is no checkpoint, or a damaged one, is refused by its name before it is read."""

import zipfile

import pytest
import torch

from cpt_algorithms.checkpoints.errors import CheckpointError
from cpt_algorithms.checkpoints.open import INDEX, SINGLE, model_config_of, open_checkpoint


def saved(path, config, tokenizer=None):
    """A checkpoint of one weight."""
    described = {'huggingface': {'model': {'config': {'content': config}}, 'tokenizer': tokenizer or {}}}
    torch.save({'state': {'model': {'weight': torch.ones(4)}, 'integrations': described}}, path)
    return path


@pytest.mark.parametrize('name', [SINGLE, INDEX])
def test_a_device_is_no_checkpoint(name, tmp_path):
    (tmp_path / name).symlink_to('/dev/zero')
    with pytest.raises(CheckpointError, match=f'{name} is missing, or no file'):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=f'{name} is missing, or no file'):
        open_checkpoint(tmp_path / name)


def test_a_record_whose_own_header_is_damaged(tmp_path):
    """Its place is known from the directory at the end, and torch refuses it."""
    path = saved(tmp_path / 'one.pt', {})
    assert list(open_checkpoint(path).tensors) == ['weight']
    with zipfile.ZipFile(path) as archive:
        at = next(record.header_offset for record in archive.infolist() if record.filename.endswith('data/0'))
    content = bytearray(path.read_bytes())
    content[at : at + 4] = bytes(4)
    path.write_bytes(content)
    with pytest.raises(RuntimeError):
        torch.load(path, weights_only=True)
    with pytest.raises(CheckpointError, match=r'one\.pt is damaged'):
        open_checkpoint(path)


def test_a_setting_of_the_model_that_is_a_tensor(tmp_path):
    assert model_config_of(saved(tmp_path / 'right.pt', {'n_heads': 2})) == {'n_heads': 2}
    with pytest.raises(CheckpointError, match=r'wrong\.pt is not of the form of a checkpoint'):
        model_config_of(saved(tmp_path / 'wrong.pt', {'n_heads': torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r'wrong\.pt: state\.integrations holds a tensor'):
        open_checkpoint(tmp_path / 'wrong.pt')


@pytest.mark.parametrize(
    'entry', ['lawa', {'file_extension': '.txt', 'content': 'a line'}, {'content': {}}, {'file_extension': '.json'}]
)
def test_files_of_a_tokenizer_are_of_the_form_that_composer_gives_them(entry, tmp_path):
    right = {'merges.txt': {'file_extension': '.txt', 'content': ['a line']}}
    assert open_checkpoint(saved(tmp_path / 'right.pt', {}, right)).hugging_face[1] == right
    with pytest.raises(CheckpointError, match=r'wrong\.pt is not of the form of a checkpoint'):
        open_checkpoint(saved(tmp_path / 'wrong.pt', {}, {**right, 'x': entry}))
