"The driver: order, what is current, what fails, what is stopped, and what a run leaves behind."
import base64
import io
import json
import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from conftest import COMMAND, ROOT, chapter, environment, refused, wait
from PIL import Image

from dinocls.app import driver
from dinocls.kit.config import preset
from dinocls.kit.figures import claim, write_findings
from dinocls.kit.files import UserError
from dinocls.kit.stage import STAGES

CHAPTERS = driver.chapters()


# --- what chapters say of themselves


def test_a_chapter_says_what_it_reads_and_costs(book):
    chapter(book, '01_first', 'pass')
    chapter(book, '02_times', 'pass', reads='`01_first`', runs='alone, since it measures time')
    chapter(book, '03_last', 'pass', reads='all')
    first, times, last = driver.chapters()
    assert (first.title, first.claim, first.module) == ('01_first', 'A chapter of the test book.', 'first')
    assert first.reads == () and first.cost == {'smoke': 1} and not first.alone
    assert times.reads == ('01_first',) and times.alone and last.reads == ('01_first', '02_times')


def test_no_notebooks(tmp_path, monkeypatch, in_process):
    monkeypatch.setenv('DINOCLS_HOME', str(tmp_path))
    refused(in_process('run', '-p', 'smoke'), 'no notebooks')


def test_the_library_alone_lists_and_computes_stages(tmp_path, monkeypatch, in_process):
    monkeypatch.setenv('DINOCLS_HOME', str(tmp_path))
    said = in_process('list', '-p', 'smoke')
    assert said.returncode == 0 and 'phase1_logits' in said.stdout and 'quick' in said.stdout
    said = in_process('stage', 'splits', '-p', 'smoke')
    assert said.returncode == 0 and said.stdout.startswith('splits: ') and (tmp_path/'outputs/smoke/stages').is_dir()
    assert 'splits …' in said.stderr  # no terminal: it says at least what it does


@pytest.mark.parametrize('text, expected', [
    ('1-2,phase1,06', ['01_data', '02_augment', '05_phase1', '06_phase2']), ('A1', ['A1_pretrain']),
    ('0', ['00_stats']), ('-1', ['00_stats', '01_data']), ('14-', ['14_report', 'A1_pretrain', 'A2_distill']),
    ('', [c.name for c in CHAPTERS])])
def test_chapters_are_chosen_as_pages_are(text, expected):
    assert [c.name for c in driver.choose(CHAPTERS, text)] == expected


@pytest.mark.parametrize('text, complaint', [('99', 'no chapter'), ('phas1', 'did you mean'), ('6-5', 'backwards')])
def test_chapters_that_cannot_be_chosen(text, complaint):
    with pytest.raises(UserError, match=complaint): driver.choose(CHAPTERS, text)


def test_what_has_the_longest_way_to_go_is_most_urgent():
    urgency = driver.Run(preset('quick'), CHAPTERS).urgency
    assert urgency['05_phase1'] > urgency['06_phase2'] > urgency['14_report']


def test_a_chapter_that_would_run_alone_has_all_cores(monkeypatch):
    monkeypatch.setattr(driver, 'cores', lambda: 8)
    monkeypatch.setattr(driver, 'jobs', lambda cfg: 4)
    run = driver.Run(preset('laptop'), CHAPTERS)
    threads = {c.name: run.threads(c) for c in CHAPTERS}
    assert threads['06_phase2'] == 8 > threads['09_ablation'] == threads['A1_pretrain'] == 2  # all else waits for it


@pytest.mark.parametrize('seconds, text', [(45, '45 s'), (200, '3 min 20 s'), (7500, '2 h 5 min')])
def test_durations_are_written_for_people(seconds, text): assert driver.duration(seconds) == text


def test_a_large_model_has_the_gpu_to_itself():
    assert driver.jobs(preset('reference', device='cuda')) == 1 <= driver.jobs(preset('smoke'))


# --- what a run leaves behind


def test_parameters_are_what_differs_from_the_preset(tmp_path):
    assert driver.parameters(preset('quick', seed=7)) == {'preset': 'quick', 'overrides': 'seed=7'}
    assert driver.parameters(preset('quick', out=str(tmp_path)))['out'] == str(tmp_path)
    assert driver.parameters(preset('quick', keep=True, cluster='ray'))['overrides'] == 'cluster=ray keep=True'


def test_a_digest_follows_configuration_and_notebook(book):
    chapter(book, '01_first', 'pass')
    cfg, (first,) = preset('smoke'), driver.chapters()
    before = driver.chapter_digest(first, [first], cfg)
    assert driver.chapter_digest(first, [first], replace(cfg, out='elsewhere')) == before
    assert driver.chapter_digest(first, [first], replace(cfg, seed=1)) != before
    chapter(book, '01_first', '1 + 1')
    assert driver.chapter_digest(first, [first], cfg) != before


def test_a_digest_follows_the_module_and_its_table(book, tmp_path, monkeypatch):
    chapter(book, '01_first', 'pass')
    cfg, (first,), seen = preset('smoke'), driver.chapters(), set()
    monkeypatch.setattr(driver, 'PACKAGE', tmp_path/'package')
    (tmp_path/'package').mkdir()
    for name, text in (('first.py', 'a = 1'), ('first.py', 'a = 2'), ('first.csv', '1'), ('first.csv', '2')):
        (tmp_path/'package'/name).write_text(text)
        seen.add(driver.chapter_digest(first, [first], cfg))
    assert len(seen) == 4


def test_pictures_are_shrunk_to_256_colours_if_that_is_shorter():
    Image.linear_gradient('L').convert('RGB').save(file := io.BytesIO(), 'PNG')
    small = driver.smaller(base64.b64encode(file.getvalue()).decode())
    assert Image.open(io.BytesIO(base64.b64decode(small))).size == (256, 256) and driver.smaller(small) == small


def test_an_executed_chapter_answers_once_on_top_and_gives_its_reasons_at_the_end(book):
    chapter(book, '01_first', "write_findings(cfg, '01_first', 'Yes.')")
    cfg, (first,) = preset('smoke', out=str(book/'run')), driver.chapters()
    found = write_findings(cfg, first.name, 'Yes.', [claim('It holds', True, 'n = 9')], 'bars', 'Bars', 'the rest')
    nb = json.loads(first.path.read_text())
    shown = {'text/markdown': found._repr_markdown_().splitlines(keepends=True), 'text/plain': [str(found)]}
    nb['cells'][-1]['outputs'] = [{'output_type': 'execute_result', 'data': shown, 'metadata': {}}]
    first.path.write_text(json.dumps(nb))
    top, end = ((cells := json.loads(driver.tidy(first.path, found))['cells'])[i] for i in (1, -1))
    assert top['source'] == '## The answer\n\n**Yes.**\n\n![Bars](01_first/bars.png)'
    assert end['outputs'][0]['data'] == {'text/markdown': found.reasons()} and '- ✓ It holds' in found.reasons()
    assert len(cells) == len(nb['cells']) + 1 and 'Yes' not in found.reasons()


@pytest.mark.slow
def test_a_failing_chapter_stops_only_what_depends_on_it(book, in_process):
    chapter(book, '01_breaks', "import os; print('before', os.getcwd())", "raise ValueError('planted')")
    chapter(book, '02_waits', 'pass', reads='`01_breaks`')
    chapter(book, '03_runs', "print('fine')")
    result = in_process('run', '-p', 'smoke')
    assert result.returncode == 1 and '01_breaks FAILED in cell 6: ValueError: planted' in result.stdout, result
    assert '02_waits skipped' in result.stdout and '03_runs done' in result.stdout
    run = book/'outputs'/'smoke'
    assert 'planted' in (text := (run/'01_breaks.ipynb').read_text()) and 'start_time' not in text
    assert str(book) not in text.replace(f'before {book}', '') and (run/'03_runs.ipynb').exists()
    assert not (run/'02_waits.ipynb').exists() and (run/'html'/'03_runs.html').exists()
    told = json.loads((run/'book.json').read_text())['chapters']
    assert [r['status'] for r in told.values()] == ['failed', 'skipped', 'done'] and told['01_breaks']['cell'] == 5
    assert 20 < told['03_runs']['peak_mb'] < 1000 and told['03_runs']['seconds'] > 0
    chapter(book, '01_breaks', "print('mended')")
    result = in_process('run', '-p', 'smoke')
    assert result.returncode == 0 and '03_runs is current' in result.stdout and '02_waits done' in result.stdout
    told = json.loads((run/'book.json').read_text())['chapters']
    assert [r['status'] for r in told.values()] == ['done'] * 3 and 'Open ' in result.stdout


@pytest.mark.slow
def test_a_kernel_that_dies_fails_its_chapter_alone(book, in_process):
    chapter(book, '01_dies', 'import os, signal; os.kill(os.getpid(), signal.SIGKILL)')
    chapter(book, '02_runs', 'pass')
    result = in_process('run', '-p', 'smoke')
    assert result.returncode == 1 and '01_dies FAILED: Kernel died, perhaps for lack of memory' in result.stdout
    assert '02_runs done' in result.stdout and 'Traceback' not in result.stdout + result.stderr


def test_a_parameter_that_a_notebook_lacks_is_an_error(book, in_process):
    chapter(book, '01_old', 'pass', parameters="present: str = 'smoke'")
    refused(in_process('run', '-p', 'smoke'), '01_old.ipynb', "'preset'", "did you mean 'present'")


NOTE_TIME = '''import time
from pathlib import Path
begin = time.time()
Path(f'{name}.begun').touch()
while not Path(f'{beside}.begun').exists() and time.time() < begin + 60: time.sleep(0.05)
time.sleep(1)
Path(name).write_text(f'{begin} {time.time()}')'''


@pytest.mark.slow
def test_what_measures_time_runs_alone(book, in_process, monkeypatch):
    monkeypatch.setattr(driver, 'jobs', lambda cfg: 3)
    for name, beside, runs in (('01_a', '03_c', ''), ('02_b', '02_b', 'alone'), ('03_c', '01_a', '')):
        chapter(book, name, f"name, beside = '{name}', '{beside}'", NOTE_TIME, runs=runs)
    assert in_process('run', '-p', 'smoke').returncode == 0
    a, b, c = (list(map(float, (book/name).read_text().split())) for name in ('01_a', '02_b', '03_c'))
    assert max(a[0], c[0]) < min(a[1], c[1]), 'the others run side by side'
    assert all(b[1] < other[0] or b[0] > other[1] for other in (a, c))


CARVE = '''import time
from dinocls.kit.machine import progress
progress('carving', 1, 3)
time.sleep(1)'''


@pytest.mark.slow
def test_progress_is_shown_by_stages(book, in_process):
    chapter(book, '01_works', CARVE)
    said = in_process('run', '-p', 'smoke').stdout
    assert '01_works …' in said and '01_works: carving' in said and '01_works done in' in said


@pytest.mark.slow
def test_a_terminal_shows_a_table(book):
    import pty
    chapter(book, '01_works', CARVE)
    near, far = pty.openpty()
    env = environment(DINOCLS_HOME=book, TERM='xterm', COLUMNS='100')
    process = subprocess.Popen([COMMAND, 'run', '-p', 'smoke'], stdout=far, env=env)
    os.close(far)
    said = b''
    try:
        while block := os.read(near, 4096): said += block
    except OSError: pass  # the terminal is closed
    assert process.wait() == 0 and b'01_works carving' in said and b'1/3' in said and b'1 of 1 chapters' in said


WAIT = '''import time
from pathlib import Path
for _ in range(600):
    if Path('{}').exists(): break
    time.sleep(0.1)
else: raise ValueError('nobody came')'''


@pytest.mark.slow
def test_eager_chapters_wait_for_nobody_but_the_one_that_reads_all(book, in_process, monkeypatch):
    monkeypatch.setattr(driver, 'jobs', lambda cfg: 2)
    chapter(book, '01_waits', WAIT.format('second'), "raise ValueError('planted')")
    chapter(book, '02_reads', "from pathlib import Path\nPath('second').touch()", reads='`01_waits`')
    chapter(book, '03_last', "from pathlib import Path\nassert Path('second').exists()", reads='all')
    result = in_process('run', '-p', 'smoke', '--eager', '--chapters', '1-2')
    assert '01_waits FAILED' in result.stdout and 'planted' in result.stdout, result
    assert '02_reads done' in result.stdout, result
    result = in_process('run', '-p', 'smoke', '--eager')
    assert '03_last skipped' in result.stdout, result  # it waits for all, so it knows


# --- stale results


STAGE = "from dinocls.kit.stage import configure, stage\n@stage\ndef dice(cfg, folder): return {'thrown': NUMBER}"
USE = '''result = dice(configure(preset, overrides, out))
print('thrown', result['thrown'], 'kept:', result.record['kept'])'''


@pytest.mark.slow
def test_stale_results_are_computed_anew_or_kept_and_marked(book, in_process):
    def run(number, *args):
        chapter(book, '01_dice', STAGE.replace('NUMBER', str(number)), USE)
        result = in_process('run', '-p', 'smoke', *args)
        assert result.returncode == 0, result
        return (book/'outputs'/'smoke'/'01_dice.ipynb').read_text(), result.stdout
    assert 'thrown 1 kept: \\n' in run(1)[0]
    text, said = run(2, '--keep')
    assert 'thrown 1 kept: the code of __main__ has changed' in text and 'Note: dice-' in text and 'is kept' in said
    marked = [json.loads(f.read_text())['kept'] for f in (book/'outputs'/'smoke').glob('stages/dice-*/run.json')]
    assert marked == ['the code of __main__ has changed']
    text, said = run(2)
    assert 'thrown 2 kept: \\n' in text and 'dice is computed anew: the code of __main__ has changed since' in text
    assert 'is kept' not in said


def test_a_chapter_whose_outputs_are_damaged_is_not_current(book):
    chapter(book, '01_first', '1 + 1')
    cfg, (first,) = preset('smoke', out=str(book/'run')), driver.chapters()
    run, stored = driver.Run(cfg, [first]), driver.Job(first, cfg).file('chapters')
    (cfg.folder/'01_first').mkdir()
    for name in ('01_first.ipynb', '01_first/metrics.json'): (cfg.folder/name).write_text('[1]')
    made = {'digest': driver.chapter_digest(first, run.book, cfg), 'files': driver.outputs(first, cfg)}
    driver.write_json(stored, made, sealed=True)
    assert run.is_current(first, stored)
    for file in (cfg.folder/'01_first.ipynb', cfg.folder/'01_first'/'metrics.json', stored):
        before = file.read_bytes()
        file.write_bytes(before[:-2] + b'2]')
        assert not run.is_current(first, stored)
        file.write_bytes(before)
    (cfg.folder/'book.json').write_text('{')
    driver._note(run)
    assert json.loads((cfg.folder/'book.json').read_text())['chapters'] == {}
    from dinocls.app.site import write_pages
    write_pages(cfg.folder, run.book)  # says that the copy is damaged
    (first.path).write_text('<<<<<<< HEAD')
    with pytest.raises(UserError, match='01_first.ipynb is not a notebook'): driver.chapters()


def test_force_forgets_what_the_chosen_chapters_compute(tmp_path, monkeypatch):
    driver.stages()
    cfg = preset('smoke', out=str(tmp_path/'run'))
    cache = driver.open_run(cfg)/'stages'
    for name in ('splits-0', 'phase1-0', 'chapters'): (cache/name).mkdir(parents=True)
    for name in ('01_data', '05_phase1'): (cache/'chapters'/f'{name}.json').write_text('{}')
    monkeypatch.setattr(driver.Run, 'go', lambda run: True)
    assert STAGES['splits'].module == 'data' and driver.run_book(cfg, '1', force=True) == 0
    assert [p.name for p in cache.glob('*-0')] == ['phase1-0']
    assert [p.name for p in cache.glob('chapters/*')] == ['05_phase1.json']


# --- stopping, and going on


def started(book, *marks):
    "Start a run of the test book, and wait until the marks exist; return the process and its family."
    process = subprocess.Popen([COMMAND, 'run', '-p', 'smoke'], env=environment(DINOCLS_HOME=book), cwd=book, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait(lambda: all((book/m).exists() for m in marks), 60)
    return process, psutil.Process(process.pid).children(recursive=True)


SLOW = '''from pathlib import Path
import time
Path('mark').touch()
while Path('mark').exists() and not Path('go').exists(): time.sleep(0.1)'''


@pytest.mark.slow
@pytest.mark.parametrize('blow', [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=['ctrl-c', 'term', 'kill -9'])
def test_a_stopped_run_leaves_nothing_behind_and_goes_on(book, blow, in_process):
    chapter(book, '01_quick', 'pass')
    child = 'pass' if blow == signal.SIGKILL else 'import subprocess; child = subprocess.Popen(["sleep", "600"])'
    chapter(book, '02_slow', child, SLOW, reads='`01_quick`')
    process, family = started(book, 'mark', 'outputs/smoke/stages/chapters/01_quick.json')
    process.send_signal(blow)
    said = process.communicate(timeout=30)[0]
    assert process.returncode == (-blow if blow == signal.SIGKILL else 130), said
    assert family
    wait(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in family), 15)
    run = book/'outputs'/'smoke'
    assert not (run/'02_slow.ipynb').exists() and not list(run.glob('.*'))
    if blow != signal.SIGKILL: assert 'goes on from there' in said and 'Traceback' not in said
    (book/'go').touch()
    again = in_process('run', '-p', 'smoke')
    assert again.returncode == 0 and '01_quick is current' in again.stdout and '02_slow done' in again.stdout


@pytest.mark.slow
def test_a_stopped_chapter_has_time_to_write(book):
    ask = '''import os, signal
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(3), Path('written').touch(), os._exit(1)))'''
    chapter(book, '01_slow', ask, SLOW)
    process, _ = started(book, 'mark')
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130 and (book/'written').exists()


@pytest.mark.slow
def test_two_runs_do_not_share_a_folder(book, in_process):
    chapter(book, '01_slow', SLOW)
    process, _ = started(book, 'mark')
    refused(in_process('run', '-p', 'smoke'), 'Another run is using')
    (book/'go').touch()
    assert process.wait(30) == 0


@pytest.mark.slow
def test_plain_papermill_runs_a_chapter_from_any_folder(tmp_path):
    papermill = [str(Path(COMMAND).with_name('papermill')), str(ROOT/'nbs'/'02_augment.ipynb'), 'out.ipynb']
    result = subprocess.run([*papermill, '-p', 'preset', 'smoke', '-p', 'out', str(tmp_path/'run')],
                            cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path/'run'/'02_augment'/'batch.png').exists() and (tmp_path/'out.ipynb').exists()
