# SPDX-License-Identifier: Apache-2.0
"""``scripts/convert_gguf.py``: what it refuses; the conversion itself needs a real file (``make smollm2``)."""

import re

import convert_gguf
import pytest


@pytest.mark.parametrize(
    ('file', 'out', 'said'),
    [('nowhere.gguf', 'model', r'nowhere\.gguf is no file'), ('model.gguf', '.', r'--out .* exists already')],
)
def test_bad_input_is_refused_in_one_line(file, out, said, tmp_path, capsys):
    (tmp_path / 'model.gguf').write_bytes(b'no GGUF')
    with pytest.raises(SystemExit) as stopped:
        convert_gguf.main([str(tmp_path / file), '--out', str(tmp_path / out)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert re.search(said, error), error
    assert [path.name for path in tmp_path.iterdir()] == ['model.gguf']
