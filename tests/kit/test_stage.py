"A stage is computed once, and anew as soon as anything that it depends on has changed."
import dataclasses
import importlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

from dinocls.kit import datasets, stage as stages
from dinocls.kit.config import preset
from dinocls.kit.files import UserError, read_json, write_json
from dinocls.kit.parallel import run_stages
from dinocls.kit.stage import STAGES, open_run, stage, variant

calls = []


@stage
def squares(cfg, folder):
    "Square some numbers."
    calls.append(cfg.seed)
    return {'values': np.arange(4) ** 2, 'seed': cfg.seed}


@stage
def total(cfg, folder):
    "Add them up."
    calls.append('total')
    return {'sum': int(squares(cfg)['values'].sum()) * cfg.batch_size, 'other': squares(variant(cfg, seed=7))['seed']}


@stage
def halves(cfg, folder):
    "Halve the seed, if it is even."
    if cfg.seed % 2: raise UserError('The seed is odd.')
    return {'half': cfg.seed // 2}


for name in ('squares', 'total', 'halves'): STAGES.pop(name)


@pytest.fixture
def cfg(tmp_path):
    calls.clear()
    return preset('smoke', out=str(tmp_path/'run'))


def test_the_first_call_computes_and_the_second_loads(cfg):
    assert [squares(cfg)['seed'] for _ in range(2)] == [42, 42] and calls == [42]
    assert squares(cfg).record['fields'] == {'seed': 42}
    assert squares(cfg)['values'].tolist() == [0, 1, 4, 9]


def test_what_is_stored_meanwhile_moves_neither_the_place_nor_its_lock(cfg):
    "Whoever asks for a result while another makes it waits, although a sibling has been stored since."
    place, (*_, lock) = squares._places(cfg)
    squares(variant(cfg, seed=5))
    after, locks = squares._places(cfg)
    assert after == place and lock in locks


def test_only_what_was_read_matters(cfg):
    first = squares(cfg).folder
    assert squares(dataclasses.replace(cfg, phase2_epochs=9)).folder == first
    assert squares(dataclasses.replace(cfg, seed=1)).folder != first
    assert calls == [42, 1]


def test_a_stage_depends_on_what_the_stages_that_it_calls_have_read(cfg):
    result = total(cfg)
    assert result.record['fields'] == {'batch_size': 50, 'seed': 42}  # the seed of the variant was given, not read
    assert [*result.record['after']] == [squares(cfg).folder.name, squares(variant(cfg, seed=7)).folder.name]
    total(dataclasses.replace(cfg, seed=7))
    assert calls == ['total', 42, 7, 'total']


def test_a_result_that_was_used_and_came_out_otherwise_counts(cfg):
    total(cfg)
    record = squares(cfg).record
    write_json(squares(cfg).folder/'run.json', record | {'digest': 'other'})
    total(cfg)
    assert calls == ['total', 42, 7, 'total']


def test_a_file_that_is_missing_or_cut_short_makes_a_result_incomplete(cfg):
    file = squares(cfg).folder/'arrays.npz'
    file.write_bytes(file.read_bytes()[:-1])
    assert squares(cfg)['values'].tolist() == [0, 1, 4, 9]
    write_json(squares(cfg).folder/'run.json', {'files': {'arrays.npz': 1}})
    assert squares(cfg)['seed'] == 42 and calls == [42, 42, 42]
    record = read_json(squares(cfg).folder/'run.json')
    del record['fields']  # as an older version wrote it
    write_json(squares(cfg).folder/'run.json', record)
    assert not squares.is_done(cfg) and squares(cfg)['seed'] == 42
    calls.pop()
    with pytest.raises(UserError, match='delete that folder'): squares(cfg)['cubes']  # an older version did not make it
    assert squares(cfg).get('cubes') is None and 'cubes' not in squares(cfg)


def test_what_a_stage_leaves_when_it_fails_is_there_for_the_next_attempt(cfg):
    def failing(cfg, folder):
        if (folder/'checkpoint').exists(): return {'resumed': True}
        (folder/'checkpoint').touch()
        raise KeyError
    made = stage(failing)
    STAGES.pop('failing')
    with pytest.raises(KeyError): made(cfg)
    assert made(cfg)['resumed'] and 'checkpoint' not in made(cfg).record['files']


def test_a_forgotten_result_is_computed_anew(cfg):
    squares(cfg), total(cfg)
    stages.forget(cfg.folder, ['squares'])
    assert not squares.is_done(cfg)
    squares(cfg)
    assert total.is_done(cfg)  # the same numbers came out


def test_other_weights_under_one_name_are_other_weights(cfg, tmp_path):
    def weighs(cfg, folder): return {'weights': cfg.weights}
    made, file = stage(weighs), tmp_path/'w.pth'
    STAGES.pop('weighs')
    file.write_bytes(b'one')
    cfg = dataclasses.replace(cfg, weights=str(file))
    first = made(cfg).folder
    file.write_bytes(b'another')
    assert not made.is_done(cfg) and made(cfg).folder != first


def test_changed_pictures_under_one_name_are_noticed(tmp_path, capsys):
    from PIL import Image
    for part in ('train', 'test'):
        for i in range(20):
            (folder := tmp_path/'data'/part/'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.full((8, 8, 3), 12 * i, np.uint8)).save(folder/f'{i}.png')
    @stage
    def brightness(cfg, folder): return {'mean': float(datasets.loaded(cfg).images.mean())}
    STAGES.pop('brightness')
    def run(root):
        datasets._loaded.cache_clear()  # as in a process of its own
        cfg = preset('smoke', dataset='imagefolder', data_root=str(root), out=str(tmp_path/'run'))
        mean, said = brightness(cfg)['mean'], capsys.readouterr().out
        return mean, [line for line in said.splitlines() if 'anew' in line]  # and not how far it is
    first = run(tmp_path/'data')
    assert run(tmp_path/'data') == (first[0], [])
    Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).save(tmp_path/'data'/'train'/'a'/'0.png')
    second, said = run(tmp_path/'data')
    assert 'computed anew: the content of dataset has changed' in said[0] and second != first[0]
    (tmp_path/'data').rename(tmp_path/'elsewhere')  # what is not there cannot have changed
    assert run(tmp_path/'data') == (second, [])


def test_asking_for_a_result_fetches_no_data(tmp_path, monkeypatch):
    def named(cfg, folder): return {'dataset': cfg.dataset}
    made, cfg = stage(named), preset('cifar', out=tmp_path/'run', data_root=tmp_path)
    STAGES.pop('named')
    monkeypatch.setattr('dinocls.kit.datasets.load_dataset', None)
    assert not made.is_done(cfg) and made(cfg)['dataset'] == 'cifar10' and made.is_done(cfg)


@pytest.mark.slow
def test_changed_code_is_noticed_and_kept_only_if_asked(tmp_path):
    "A copy of the package, in which a lower chapter's function changes."
    shutil.copytree(ROOT/'dinocls', tmp_path/'dinocls', ignore=shutil.ignore_patterns('__pycache__', 'weights'))
    (tmp_path/'dinocls'/'lower.py').write_text('def two():\n    "Two."\n    return 2\n')
    (tmp_path/'dinocls'/'upper.py').write_text(
        'from .kit.stage import stage\nfrom .lower import two\n\n'
        '@stage\ndef four(cfg, folder): return {"n": 2 * two()}\n')
    code = ('import sys; from dinocls.kit.config import preset; from dinocls.upper import four\n'
            'r = four(preset("smoke", out="run", keep=sys.argv[1] == "keep")); print(r["n"], repr(r.record["kept"]))')
    def run(keep=''):
        done = subprocess.run([sys.executable, '-c', code, keep], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout
    assert run() == "4 ''\n"
    (tmp_path/'dinocls'/'lower.py').write_text('"Nor here."\n__all__ = ["two"]\n'
                                               'def two():\n    "Docstrings do nothing."\n    return 2  # nor this\n')
    assert run() == "4 ''\n"
    (tmp_path/'dinocls'/'lower.py').write_text('def two(): return 3\ndef draw_two(): pass\n')
    assert "is kept, although the code of lower has changed" in run('keep')
    assert run('keep').endswith("4 'the code of lower has changed'\n")
    told = run()
    assert 'four is computed anew: the code of lower has changed since' in told and told.endswith("6 ''\n")
    (tmp_path/'dinocls'/'lower.py').write_text('def two(): return 3\ndef draw_two(): print()\n')
    assert run() == "6 ''\n"  # what draws gives no result


@pytest.mark.parametrize('module, chapter, name', [('augment', 'phase1', 'phase1'), ('train', 'phase2', 'direct'),
                                                   ('kit/corruptions', 'robustness', 'robustness'),
                                                   ('model', 'ensemble', 'siblings')])
def test_an_edit_far_below_a_chapters_stage_is_noticed(module, chapter, name, tmp_path, monkeypatch):
    importlib.import_module(f'dinocls.{chapter}')
    before, read = stages.code_digests(STAGES[name]), stages.code
    (other := tmp_path/'edited.py').write_text((stages.PACKAGE/f'{module}.py').read_text() + '\nEDITED = True\n')
    edited = stages.Code(other)
    edited.imports = read(stages.PACKAGE/f'{module}.py').imports
    monkeypatch.setattr(stages, 'code', lambda file: edited if file == stages.PACKAGE/f'{module}.py' else read(file))
    after = stages.code_digests(STAGES[name])
    assert {k for k in before if before[k] != after[k]} == {module}


def test_what_draws_gives_no_result():
    "Functions that draw are left out of a stage's code, so nothing else may call them."
    import ast
    for file in stages.PACKAGE.glob('**/*.py'):
        if file.parent.name == 'app' or file.name == '_modidx.py': continue
        for node in ast.parse(file.read_text(encoding='utf-8')).body:
            if getattr(node, 'name', '').lstrip('_').startswith('draw') or not hasattr(node, 'name'): continue
            used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
            stored = {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
            given = {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
            given |= {a.arg for n in ast.walk(node) if isinstance(n, ast.arguments) for a in n.args + n.kwonlyargs}
            calls = {n for n in used - stored - given if n.lstrip('_').startswith('draw')}
            assert not calls, f'{file.name}: {node.name} uses {calls}'


def test_a_run_folder_belongs_to_one_configuration(tmp_path):
    cfg = preset('smoke', out=str(tmp_path))
    assert open_run(cfg) == open_run(cfg)
    with pytest.raises(UserError, match='seed=42, this one has seed=1'):
        open_run(preset('smoke', out=str(tmp_path), seed=1))
    record = read_json(tmp_path/'run.json')
    del record['config']['pretrain_size']  # as before there was this field
    write_json(tmp_path/'run.json', record)
    assert open_run(cfg) == tmp_path.resolve()
    with pytest.raises(UserError, match='pretrain_size=0, this one has'):
        open_run(preset('smoke', out=str(tmp_path), pretrain_size=9))
    write_json(tmp_path/'run.json', {'format': 0, 'version': '0.0.1'})
    with pytest.raises(UserError, match=r'another version of dinocls \(0.0.1'): open_run(cfg)


def test_several_configurations_fail_apart(cfg):
    several = [variant(cfg, seed=s, device='cpu') for s in (6, 3, 4, 6)]
    said = 'failed for 1 of 4 configurations, the others are stored: seed=3: The seed is odd.'
    with pytest.raises(UserError, match=said):
        run_stages(halves, several)
    assert halves.is_done(several[2])
    assert [r['half'] for r in run_stages(halves, [several[i] for i in (2, 0, 3)])] == [2, 3, 3]


@pytest.mark.slow
def test_workers_compute_what_one_process_would(tmp_path):
    from dinocls.model import features
    first = preset('smoke', out=str(tmp_path/'workers'), split_seed=1, train_size=100, precision='fp32')
    cfgs = [variant(first, split_seed=s) for s in (1, 2, 3)]
    several = run_stages(features, cfgs, ['cpu', 'cpu'])
    alone = features(dataclasses.replace(first, out=str(tmp_path/'alone')))
    assert np.array_equal(several[0]['train'], alone['train'])
    assert len({r.folder for r in several}) == 3
    with pytest.raises(UserError, match='failed for 1 of 2'):
        run_stages(features, [variant(first, weights='nowhere.pth'), variant(first, train_size=101)], ['cpu', 'cpu'])


def flip(file, at):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize('keep', [False, True])
@pytest.mark.parametrize('name', ['arrays.npz', 'result.json', 'weights.safetensors', 'run.json'])
def test_a_bit_that_flips_is_noticed(tmp_path, capsys, name, keep):
    import torch
    def three(cfg, folder): return {'a': np.arange(9), 'b': 12345, 'weights': {'w': torch.ones(9)}}
    made, cfg = stage(three), preset('smoke', out=str(tmp_path/'run'), keep=keep)
    STAGES.pop('three')
    folder = made(cfg).folder
    for part in range(20):  # of the file as it is now: a record made anew tells other times
        flip(folder/name, (folder/name).stat().st_size * part // 20)
        assert made.find(cfg)[0] is None or name == 'run.json'  # where spaces changed, nothing did
        assert (made(cfg)['b'] == 12345 and made(cfg)['a'].tolist() == [*range(9)]
                and made(cfg)['weights']['w'].sum() == 9)
    if name != 'run.json':
        assert f'three is computed anew: {name} of {folder.name} is damaged.' in capsys.readouterr().out


def test_what_a_killed_attempt_was_writing_goes_and_checkpoints_make_room(cfg, monkeypatch):
    def trains(cfg, folder):
        assert not (folder/'..checkpoint-a-x1.pt').exists()
        for name in ('checkpoint-a-1.pt', 'checkpoint-a-2.pt', '.checkpoint-a.pt'): (folder/name).write_bytes(b'0')
        return {'seed': cfg.seed}
    made = stage(trains)
    STAGES.pop('trains')
    made.partial(cfg).mkdir(parents=True)
    (made.partial(cfg)/'..checkpoint-a-x1.pt').touch()
    save, tried = stages.save_result, []
    def full(folder, result):
        tried.append(sorted(p.name for p in folder.glob('checkpoint*')))
        if tried[-1]: raise UserError('No space left')
        return save(folder, result)
    monkeypatch.setattr(stages, 'save_result', full)
    write_json(cfg.folder/'run.json', {'format': 2, 'config': {}})
    result = made(cfg)
    assert [len(t) for t in tried] == [2, 1, 0] and {p.name for p in result.folder.iterdir()} == {
        'arrays.npz', 'result.json', 'run.json'}


def test_a_run_folder_that_cannot_be_written_is_a_sentence(cfg, monkeypatch):
    def refuse(*_, **__): raise OSError(30, 'Read-only file system')
    open_run(cfg)
    monkeypatch.setattr('filelock.FileLock.acquire', refuse)
    with pytest.raises(UserError, match='squares cannot be computed in .*Read-only file system.* --out'): squares(cfg)


def test_data_may_lie_elsewhere(tmp_path):
    open_run(preset('smoke', out=str(tmp_path/'run'), data_root='here'))
    open_run(preset('smoke', out=str(tmp_path/'run'), data_root='there'))
    flip(tmp_path/'run'/'run.json', 40)
    with pytest.raises(UserError, match='choose another folder with --out'):
        open_run(preset('smoke', out=tmp_path/'run'))


@pytest.mark.slow
def test_many_may_start_one_run_at_once(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    from dinocls.kit.config import preset
    from dinocls.kit.stage import open_run
    for i in range(10):
        cfg = preset('smoke', out=str(tmp_path/f'run{i}'))
        with ThreadPoolExecutor(16) as pool: assert {*pool.map(lambda _: open_run(cfg), range(16))} == {cfg.folder}
