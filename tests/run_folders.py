# SPDX-License-Identifier: Apache-2.0
"""Run folders as a training run leaves them, written here: batches of 2 x 50 tokens, losses one can work out."""

import json

BATCH, LENGTH, PARAMETERS = 2, 50, 1000
START = {'old': 3.0, 'new': 5.0}
JUDGED = {'eval_subset_num_batches': -1, 'final_loss': {}}


def read(path):
    return json.loads(path.read_text())


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def change(path, change):
    """Rewrite a JSON file after ``change`` has done something to its value."""
    value = read(path)
    change(value)
    write(path, value)


def write_run(
    folder, final=None, parent=None, batches=10, reached=None, start=START, new=None, replay=None, log=(), **config
):
    """A run whose losses go in a line from the start to `final`.

    `reached` of its batches are trained, or all; `log` is that of its failure.
    """
    done, final, tokens = reached is None, final or {}, batches * BATCH * LENGTH
    reached, parameters = batches if reached is None else reached, config.pop('parameters', PARAMETERS)
    dataset = {'new': {new or folder.name.rpartition('-s')[0] or folder.name: {'local': 'data/x', 'split': 'train'}}}
    if replay:
        dataset['replay'] = {'fraction': 0.25, 'streams': replay}
    seed = folder.name.rpartition('-s')[2]
    config = {
        'run_name': folder.name, 'save_folder': str(folder), 'seed': int(seed) if seed.isdigit() else 17,
        'max_duration': f'{tokens}tok', 'global_train_batch_size': BATCH, 'max_seq_len': LENGTH,
        'model': {'name': 'mpt_causal_lm'}, 'tokenizer': {'name': 'x'}, 'optimizer': {'lr': 0.01}, 'load_path': parent,
        'scheduler': {'name': 'rewarm_cosine', 'alpha_f': 0.1},
        'train_loader': {'name': 'replay_text', 'dataset': dataset},
        'eval_loader': [{'label': label} for label in start], **config,
    }  # fmt: skip
    base = config['model'].get('pretrained_model_name_or_path')
    versions = {'torch': '2.7.0'}
    stage = {'run_name': folder.name, 'parent': parent or base, 'config': config, 'versions': versions}
    write(folder / 'stage.json', stage)

    def line(label):
        begin, end = start.get(label.split('/')[0], 9.0), final[label]
        return [[b, b * BATCH * LENGTH, begin + (end - begin) * b / batches] for b in range(0, reached + 1, 5)]

    write(
        folder / 'losses.json',
        {
            'losses': {label: line(label) for label in final} if batches else {},
            'final': {label: {'mean': loss, 'stderr': 0.0, 'count': 1} for label, loss in final.items()} if done else {},
            'learning_rate': [[b, b * BATCH * LENGTH, 0.01 * (1 - b / batches)] for b in range(reached)],
            'cost': {'tokens': reached * BATCH * LENGTH, 'device_seconds': 720.0 * reached / (batches or 1), 'devices': 2,
                     'device': 'gpu', 'parameters': parameters, 'batch': reached},
        },
    )  # fmt: skip
    if parent:
        lengths = {'old': 4.0, 'new': 2.0}
        write(folder / 'forgetting.json', {'old': ['old'], 'new': ['new'], 'parent': start, 'bytes_per_token': lengths})
    if done:
        max_duration = config['max_duration']
        write(folder / 'done.json', {'batch': batches, 'time': {}, 'max_duration': max_duration, 'lm_eval': None})
    if log:
        write(folder / 'failed.json', {'returncode': 1, 'log': log})


def entry(name, arm, stage, seed, parent=None, tokens=None, before=None):
    """A run as a sequence plans it."""
    return {'name': name, 'arm': arm, 'stage': stage, 'seed': seed, 'parent': parent, 'tokens': tokens, 'batches': 10,
            'tokens_before_branch': before or {}, 'plan': 'p', 'judged_by': JUDGED}  # fmt: skip


def write_plan(folder, name, stages, runs, data=('old', 'new')):
    """``sequence.json`` of runs whose stages, of so many tokens, are of one plan."""
    plans = {'p': {'data': list(data), 'tokens': stages, 'stages': {}}}
    write(folder / 'sequence.json', {'name': name, 'data': list(data), 'plan': 'p', 'plans': plans, 'runs': runs})


def write_sequence(folder, seeds=(1, 2, 3), union=True, averages=(), parameters=PARAMETERS):
    """Stage `old`, then `new` without replay and with 25 %; seed s forgets s/10 more and learns s/10 less."""
    runs = []
    untrained = {'old': 9.0, 'new': 9.0}
    for seed in seeds:
        off, parent = seed / 10, f'old-s{seed}'
        write_run(folder / parent, {'old': 3.0, 'new': 5.0}, start=untrained, parameters=parameters)
        runs.append(entry(parent, 'none', 'old', seed, tokens={'old': 1000}))
        for arm, slug, old, new, replay in (('none', 'none', 4.0, 1.0, 0), ('replay 25 %', 'r25', 3.2, 1.5, 0.25)):
            final = {'old': old + off, 'new': new + off}
            final |= {f'{label}/{a}': loss - 0.5 for a in averages for label, loss in final.items()}
            path, streams = f'{folder}/{parent}/latest-rank0.pt', {'old': {'local': 'data/y'}} if replay else None
            name = f'new-{slug}-s{seed}'
            write_run(folder / name, final, path, new='new', replay=streams, parameters=parameters)
            tokens = {'new': 750, 'old': 250} if replay else {'new': 1000}
            runs.append(entry(name, arm, 'new', seed, parent, tokens))
        if union:
            final = {'old': 2.5, 'new': 1.2}
            write_run(folder / f'union-s{seed}', final, batches=20, start=untrained, parameters=parameters)
            runs.append(entry(f'union-s{seed}', 'union', 'union', seed, tokens={'new': 1000, 'old': 1000}))
    write_plan(folder, 'tiny', {'old': 1000, 'new': 1000}, runs)
    return folder
