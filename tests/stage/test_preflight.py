# SPDX-License-Identifier: Apache-2.0
"""Everything wrong with a YAML is said before training, with the key, the value and what would be right."""

import shutil

import pytest
import tiny
import torch

from cpt_algorithms.checkpoints.save_folder import repair
from cpt_algorithms.stage.preflight import preflight
from cpt_algorithms.stage.restart_checks import write_record
from cpt_algorithms.stage.stage import KEEP_OPTIMIZER_IGNORE_KEYS, Stage


def replay(data, fraction=0.05, **over):
    streams = {'old': {'local': str(data['old']), 'split': 'train'}}
    return {'dataset': {'replay': {'fraction': fraction, 'streams': streams, **over}}}


def test_a_good_yaml_passes(data, tmp_path):
    preflight(Stage.from_yaml(tiny.config(tmp_path, data, 'good', train_loader=replay(data))), world_size=2)


# what is changed, and what a problem must name: the key, the value, what would be right
BAD = {
    'top level key': ({'max_durration': '8ba'}, 'max_durration', "'max_duration'"),
    'top level type': ({'expandable_segments': 'maybe'}, 'expandable_segments', "'maybe'"),
    'missing run_name': ({'run_name': None}, 'run_name'),
    'scheduler name': ({'scheduler': {'name': 'infinit', 't_warmup': '1ba'}}, 'scheduler', "'infinit'", "'infinite'"),
    'scheduler key': ({'scheduler': {'t_warmpu': '1ba'}}, 'scheduler.t_warmpu', "'t_warmup'"),
    'scheduler unit': ({'scheduler': {'t_warmup': '1000tok'}}, 't_warmup', '1000tok', '8ba'),
    'infinite in dur': (
        {'scheduler': {'name': 'infinite', 't_warmup': '0.1dur', 't_cooldown': '1ba', 't_anneal': '0ba', 'alpha_const': 0.5}},
        't_warmup', '0.1dur',
    ),
    'exponential to zero': (
        {'scheduler': {'name': 'infinite', 't_warmup': '1ba', 't_cooldown': '1ba', 't_anneal': '1ba', 'alpha_const': 0.5,
                       'alpha_f': 0.0}},
        'alpha_f=0',
    ),
    'optimizer name': ({'optimizer': {'name': 'decoupled_adam', 'lr': 1e-3}}, "'decoupled_adam'", "'decoupled_adamw'"),
    'model name': ({'model': {'name': 'mpt_causal_llm', 'd_model': 16}}, "'mpt_causal_llm'", "'mpt_causal_lm'"),
    'optimizer key': ({'optimizer': {'weight_decy': 0.1}}, 'optimizer.weight_decy', "'weight_decay'"),
    'callback name': ({'callbacks': {'stage_strat': {}}}, 'callbacks.stage_strat', "'stage_start'"),
    'callback key': ({'callbacks': {'final_loss': {'windw': '5ba'}}}, 'callbacks.final_loss.windw', "'window'"),
    'algorithm name': ({'algorithms': {'gradient_cliping': {}}}, 'algorithms.gradient_cliping', "'gradient_clipping'"),
    'clipping at 0': (
        {'algorithms': {'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 0}}},
        'algorithms.gradient_clipping.clipping_threshold=0',
    ),
    'loader name': ({'train_loader': {'name': 'replay_txt', 'dataset': {}}}, 'train_loader', "'replay_text'"),
    'dataset key': ({'train_loader': {'dataset': {'shuffel': True}}}, 'train_loader.dataset.shuffel', "'shuffle'"),
    'missing data': (
        {'train_loader': {'dataset': {'new': {'local': 'nowhere', 'split': 'train'}}}},
        'train_loader.dataset.new', 'nowhere/train/index.json',
    ),
    'eval dataset key': (
        {'eval_loader': {'name': 'text', 'drop_last': False, 'num_workers': 0, 'dataset': {'local': 'x', 'shufle': 1}}},
        'eval_loader[0].dataset.shufle', "'shuffle'",
    ),
    'missing eval data': (
        {'eval_loader': {'name': 'text', 'drop_last': False, 'num_workers': 0, 'dataset': {'local': 'nowhere', 'split': 'val'}}},
        'eval_loader[0].dataset', 'nowhere/val/index.json',
    ),
    'batch size': ({'global_train_batch_size': 7}, 'global_train_batch_size=7', '2 ranks'),
    'duration': ({'max_duration': '0ba'}, 'max_duration=0ba'),
    'too little data': ({'max_duration': '51ba'}, '6,528 tokens', '6,400'),
    'no autoresume': ({'autoresume': False}, 'autoresume=false'),
    'overwrite': ({'save_overwrite': True}, 'save_overwrite=true'),
    'row length': ({'max_seq_len': 32, 'train_loader': {'dataset': {'max_seq_len': 32}}}, 'max_seq_len=32', '16 tokens'),
    'two lengths': ({'max_seq_len': 32}, 'train_loader.dataset.max_seq_len=16', 'max_seq_len=32'),
    'tokenizer': ({'tokenizer': {'name': 'no/where'}}, 'tokenizer', 'no/where'),
    'optimizer state': ({'callbacks': {'stage_start': {'optimizer_state': 'keeep'}}}, "stage_start.optimizer_state='keeep'", 'keep'),
    'export elsewhere': (
        {'variables': {'lm_eval': 'english'}, 'callbacks': {'hf_checkpointer': {'save_folder': 'away/{run_name}', 'save_interval': '1dur'}}},
        "callbacks.hf_checkpointer.save_folder='away/{run_name}'", 'variables.lm_eval',
    ),
    'export of another name': (
        {'variables': {'lm_eval': 'english'}, 'callbacks': {'hf_checkpointer': {'huggingface_folder_name': 'x', 'save_folder': '', 'save_interval': '1dur'}}},
        "callbacks.hf_checkpointer.huggingface_folder_name='x'", 'variables.lm_eval',
    ),
    'final loss window': ({'callbacks': {'final_loss': {'window': '10tok'}}}, 'final_loss.window', '10tok', 'ba'),
    'code path': ({'code_paths': ['nowhere.py']}, 'code_paths', 'nowhere.py'),
    'no such parent': ({'load_path': 'nowhere.pt'}, 'load_path=nowhere.pt'),
    'parent without stage_start': ({'load_path': 'nowhere.pt', 'callbacks': {'stage_start': None}}, 'callbacks.stage_start'),
    'contradiction': ({'load_path': 'nowhere.pt', 'load_weights_only': False}, 'load_weights_only=False', 'optimizer_state=reset'),
    'starred key': (
        {'load_path': 'nowhere.pt', 'callbacks': {'stage_start': {'optimizer_state': 'keep'}},
         'load_ignore_keys': ['state/schedulers*', *KEEP_OPTIMIZER_IGNORE_KEYS[1:]]},
        'load_ignore_keys', 'state/schedulers',
    ),
}  # fmt: skip


@pytest.mark.parametrize('case', BAD)
def test_bad_input_is_named(case, data, tmp_path):
    change, *named = BAD[case]
    cfg = tiny.merge(tiny.config(tmp_path, data, 'bad'), change)
    found = tiny.problems(cfg, world_size=2)
    assert any(all(word in problem for word in named) for problem in found), found
    # one mistake is said once; of these YAMLs, two have a second: no parent, and rows that the model cannot read
    is_second = cfg.get('load_path') is not None and 'does not exist' not in found[0]
    assert len(found) == 1 + (is_second or cfg['max_seq_len'] == 32), found


@pytest.fixture(scope='module')
def folders(data, tmp_path_factory):
    root = tmp_path_factory.mktemp('models')
    for name in ('llama-2', 'empty', 'gguf', 'exported'):
        (root / name).mkdir()
    (root / 'gguf' / 'llama-Q4_K_M.gguf').write_bytes(b'GGUF')
    (root / 'llama-2' / 'config.json').write_text('{}')
    return root


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('lama-2', ["does not exist; did you mean 'llama-2'?"]),
        ('nowhere/lama-2', ['does not exist']),
        ('empty', ['has no config.json']),
        ('llama-2/config.json', ['is a file; name the folder']),
        ('gguf', ["gguf_file='llama-Q4_K_M.gguf'", 'save_pretrained']),
        ('gguf/llama-Q4_K_M.gguf', ["gguf_file='llama-Q4_K_M.gguf'", 'save_pretrained']),
    ],
)
@pytest.mark.parametrize('relative', [False, True])
def test_a_model_that_is_no_folder_of_one(name, words, relative, folders, data, tmp_path, monkeypatch):
    monkeypatch.chdir(folders.parent)
    named = f'{folders.name}/{name}' if relative else str(folders / name)
    cfg = tiny.config(tmp_path, data, 'x', model={'name': 'hf_causal_lm', 'pretrained_model_name_or_path': named})
    (found,) = tiny.problems(cfg)
    assert found.startswith(f'model.pretrained_model_name_or_path={named}')
    assert all(word in found for word in words), found
    if name != 'empty':  # a tokenizer needs no configuration of a model
        (found,) = tiny.problems(tiny.config(tmp_path, data, 'x', tokenizer={'name': named}))
        assert found.startswith(f'tokenizer.name={named}'), found


@pytest.mark.parametrize('labels', [['mean'], ['new', 'new/lawa'], ['new_stderr', 'new'], ['new', 'new']])
def test_labels_by_which_results_cannot_be_told_apart_are_refused(labels, data, tmp_path):
    loaders = [tiny.eval_loader(label, data['new']) for label in labels]
    assert any(
        'eval_loader' in each and 'label' in each
        for each in tiny.problems(tiny.config(tmp_path, data, 'x', eval_loader=loaders))
    )


@pytest.mark.parametrize(
    ('loader', 'message'),
    [
        ({'fraction': 1.5}, 'replay.fraction=1.5 is out of range'),
        ({'fraction': 0.9}, "too little data: a budget of 6,400 tokens reads 5,760 tokens of the replay stream 'old', which has 4,800"),
        ({'fration': 0.1}, "did you mean 'fraction'"),
    ],
)  # fmt: skip
def test_bad_replay_is_named(loader, message, data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'bad', max_duration='50ba', train_loader=replay(data, **loader))
    assert any(message in problem for problem in tiny.problems(cfg))


def test_several_problems_are_said_at_once(data, tmp_path):
    found = tiny.problems(
        tiny.config(tmp_path, data, 'bad', callbacks={'stage_strat': {}}, optimizer={'lrr': 1}, save_overwrite=True)
    )
    assert len(found) == 3


def test_stock_loader_with_several_streams_is_refused(data, tmp_path):
    streams = {name: {'local': str(data[name]), 'split': 'train', 'proportion': 0.5} for name in ('new', 'old')}
    loader = {'name': 'text', 'drop_last': True, 'num_workers': 0, 'dataset': {'streams': streams, 'max_seq_len': 16}}
    assert 'use name: replay_text' in tiny.problems(tiny.config(tmp_path, data, 'bad', train_loader=loader))[0]


def test_a_parent_of_another_shape_is_named(data, tmp_path):
    tiny.run(tiny.config(tmp_path, data, 'parent', max_duration='2ba', scheduler={'t_max': '8ba'}))
    parent = str(tmp_path / 'parent' / 'latest-rank0.pt')
    cfg = tiny.config(tmp_path, data, 'child', load_path=parent)
    preflight(Stage.from_yaml(cfg))
    wider = tiny.merge(cfg, {'model': {'d_model': 32}})
    assert 'wte.weight is (256, 16) there and (256, 32) here' in tiny.problems(wider)[0]
    deeper = tiny.merge(cfg, {'model': {'n_layers': 2}})
    assert 'is missing there' in tiny.problems(deeper)[0]


def test_a_parent_with_a_malicious_pickle_is_refused(data, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / 'owned'), 'w'))

    torch.save({'state': {'model': Evil()}}, tmp_path / 'evil.pt')
    found = tiny.problems(tiny.config(tmp_path, data, 'child', load_path=str(tmp_path / 'evil.pt')))
    assert 'evil.pt is not safe to read: it asks to import' in found[0]
    assert 'trust_checkpoint: true' in found[0]
    assert not (tmp_path / 'owned').exists()


def test_somebody_elses_checkpoints_are_not_taken_over(data, tmp_path):
    one = tiny.config(tmp_path, data, 'one', max_duration='2ba', scheduler={'t_max': '8ba'})
    tiny.run(one)
    cfg = tiny.config(tmp_path, data, 'two', save_folder=str(tmp_path / 'one'))
    assert "holds the checkpoints of run 'one'" in tiny.problems(cfg)[0]
    write_record(Stage.from_yaml({**cfg, 'run_name': 'one', 'max_duration': '2ba', 'scheduler': one['scheduler']}))
    assert "holds the checkpoints of run 'one', and run_name is 'two'" in tiny.problems(cfg)[0]
    preflight(Stage.from_yaml(one))
    (tmp_path / 'one' / 'stage.json').write_text('{"run_name": "one"}')
    assert 'stage.json' in tiny.problems(one)[0], 'it cannot be seen whether this is that run'


# what llm-foundry takes and a restart could not live with
NOT_TAKEN = {
    'names of checkpoints': ({'save_filename': 'ep{epoch}-ba{batch}/rank{rank}.pt'}, 'save_filename', 'leave it out'),
    'names of links': ({'save_latest_filename': 'newest.pt'}, 'save_latest_filename', 'leave it out'),
    'names of shards': (
        {'fsdp_config': {'sharded_ckpt_prefix_dir': 'x{batch}'}},
        'fsdp_config.sharded_ckpt_prefix_dir',
    ),
    'state left out': ({'save_ignore_keys': ['state/optimizers']}, 'save_ignore_keys', 'leave it out'),
    'part of a pass': ({'train_subset_num_batches': 3}, 'train_subset_num_batches=3', 'max_duration'),
}


@pytest.mark.parametrize('case', NOT_TAKEN)
def test_what_a_restart_could_not_live_with(case, data, tmp_path):
    change, *expected = NOT_TAKEN[case]
    found = tiny.problems(tiny.config(tmp_path, data, 'run', **change))
    assert len(found) == 1, found
    assert all(words in found[0] for words in expected), found


def test_a_pass_that_is_cut_short_is_refused_of_any_loader(data, tmp_path):
    loader = {key: value for key, value in tiny.eval_loader('', data['new']).items() if key != 'label'}
    cfg = tiny.config(tmp_path, data, 'run', train_loader=loader | {'dataset': loader['dataset'] | {'split': 'train'}})
    preflight(Stage.from_yaml(cfg))
    (found,) = tiny.problems({**cfg, 'train_subset_num_batches': 3})
    assert found.startswith('train_subset_num_batches=3: ')


def test_a_copied_folder_is_refused_by_name_and_left_as_it_is(data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'run')
    tiny.recipe_here(cfg, tmp_path)
    folder = tmp_path / 'run'
    latest, newest = folder / 'latest-rank0.pt', folder / 'ep0-ba8-rank0.pt'
    latest.unlink()
    newest.rename(latest)
    preflight(Stage.from_yaml(cfg))  # it is done, whatever lies there
    (folder / 'done.json').unlink()
    assert 'rename it to ep0-ba8-rank0.pt' in tiny.problems(cfg)[0]
    latest.rename(newest)
    preflight(Stage.from_yaml(cfg))


def test_composers_own_names_are_taken(data, tmp_path):
    names = {'save_filename': 'ep{epoch}-ba{batch}-rank{rank}.pt', 'save_latest_filename': 'latest-rank{rank}.pt'}
    preflight(Stage.from_yaml(tiny.config(tmp_path, data, 'run', **names)))


def test_epochs_are_as_long_as_the_data(data, tmp_path):
    """50 batches: schedules in batches fit in."""
    infinite = {'name': 'infinite', 't_warmup': '20ba', 't_cooldown': '20ba', 't_anneal': '10ba', 'alpha_const': 0.5}
    for scheduler in ({'name': 'rewarm_cosine', 't_warmup': '49ba'}, infinite):
        preflight(Stage.from_yaml(tiny.config(tmp_path, data, 'run', max_duration='1ep', scheduler=scheduler)))
    too_long = tiny.config(tmp_path, data, 'run', max_duration='1ep', scheduler={**infinite, 't_warmup': '21ba'})
    assert '51' in tiny.problems(too_long)[0]
    assert '50' in tiny.problems(too_long)[0]


def test_a_parent_with_other_settings_of_the_same_shapes(data, tmp_path):
    tiny.run(tiny.config(tmp_path, data, 'parent', max_duration='2ba', scheduler={'t_max': '8ba'}))
    cfg = tiny.config(tmp_path, data, 'child', load_path=str(tmp_path / 'parent' / 'latest-rank0.pt'))
    preflight(Stage.from_yaml(cfg))
    clipped = {'attn_config': {'attn_impl': 'torch', 'clip_qkv': 0.1}}
    for name, changed in {
        'n_heads': {'n_heads': 8},
        'attn_config.clip_qkv': clipped,
        'logit_scale': {'logit_scale': 2.0},
    }.items():
        other = tiny.merge(cfg, {'model': {**changed, 'resid_pdrop': 0.1, 'init_config': {'name': 'neox_init_'}}})
        (found,) = tiny.problems(other)
        assert f'{name}: ' in found
        assert found.count(' -> ') == 1, 'dropout and initialisation are settings of training'
    preflight(Stage.from_yaml(tiny.merge(other, {'callbacks': {'stage_start': {'model_changes': [name]}}})))


def test_a_folder_with_weights_of_any_name_is_not_begun_in(data, tmp_path):
    cfg = tiny.config(tmp_path, data, 'run')
    folder = tmp_path / 'run'
    for name in ('step3', 'ba4/rank0.pt', 'ep0-ba4/rank0.pt', 'ep0-ba2-rank0.pt.old', 'model.safetensors'):
        (folder / name).parent.mkdir(parents=True)
        torch.save({'state': {}}, folder / name)
        assert 'holds the checkpoints of a run that this recipe did not start' in tiny.problems(cfg)[0], name
        write_record(Stage.from_yaml(cfg))
        assert 'no whole checkpoint to go on from' in tiny.problems(cfg)[0], name
        repair(folder)
        assert (folder / name).exists(), 'nothing is deleted'
        shutil.rmtree(folder)
    write_record(Stage.from_yaml(cfg))
    (folder / 'ep0-ba2-rank0.pt').write_bytes(b'PK\3\4 and no more')
    preflight(Stage.from_yaml(cfg))
