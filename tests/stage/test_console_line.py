# SPDX-License-Identifier: Apache-2.0
"""What a run says while it trains: one line a batch, one an evaluator."""

import re

import tiny


def test_a_batch_is_one_line_and_so_is_an_evaluator(data, tmp_path, capsys):
    cfg = tiny.config(
        tmp_path, data, 'run', log_to_console=True, console_log_interval='2ba', eval_interval='4ba',
        eval_loader=[tiny.eval_loader('old', data['old'])],
    )  # fmt: skip
    tiny.recipe_here(cfg, tmp_path)
    said = [line for line in capsys.readouterr().err.splitlines() if re.match(r'\[|\t', line)]
    trained = [line for line in said if line.startswith('[batch=')]
    assert [int(re.match(r'\[batch=(\d+)/8\] ', line)[1]) for line in trained] == [1, 2, 4, 6, 8]
    for line in trained:
        assert re.fullmatch(r'\S+ loss \d\.\d+, lr \S+, [\d,]+ tokens/s, \d+:\d\d:\d\d left', line), line
    assert trained[-1].endswith(' 0:00:00 left')
    # rewarm_cosine of tiny.config: 0.25 -> 1 over 4 batches, times 1e-3; what batches 0 and 1 were trained with
    assert ' lr 2.5e-4,' in trained[0] and ' lr 4.38e-4,' in trained[1]
    evaluated = [line for line in said if line not in trained]
    assert len(evaluated) == 2
    assert all(
        re.match(r'\[Eval batch=\d+/\d+\] Eval on eval/old data: .*LanguageCrossEntropy \d\.\d', each)
        for each in evaluated
    )
