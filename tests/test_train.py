"The training engine: numbers that are not finite, full disks, signals, kills, and several processes."
import contextlib
import dataclasses
import errno
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import COMMAND, ROOT, environment, wait

from dinocls.kit import config, files
from dinocls.kit.training import Checkpointer, checkpoints
from dinocls import train
from dinocls.data import halves, load_split
from dinocls.model import classifier
from dinocls.phase2 import phase2
from dinocls.train import fit

pytestmark = pytest.mark.slow  # it trains

SMALL = config.preset('smoke', device='cpu', precision='fp32', out='/nonexistent')


def run(folder, epochs=2, change=None, rate=1e-3, **fields):
    "Train the small model on 100 images, two steps an epoch."
    cfg = dataclasses.replace(config.preset('smoke', device='cpu', precision='fp32', out=str(folder/'run')), **fields)
    data = [tuple(t[:100] for t in load_split(cfg, s)) for s in ('train', 'val')]
    model = classifier(cfg, 10)
    if change: change(model)
    return fit(model, *data, cfg, epochs=epochs, lr_backbone=rate, lr_head=rate, folder=folder)


def losses(result): return [r['loss'] for r in result['history']]


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    steps, original = iter(range(99)), train.mixed_loss
    monkeypatch.setattr(train, 'mixed_loss', lambda *args: original(*args) * (torch.nan if next(steps) == 1 else 1))
    result = run(tmp_path)
    assert [r['skipped'] for r in result['history']] == [1, 0]
    assert all(np.isfinite(r['loss']) for r in result['history'])
    assert all(torch.isfinite(v).all() for v in result['weights'].values())


def test_the_first_half_of_validation_chooses_the_epoch_alone(tmp_path, monkeypatch):
    (_, y), answers = load_split(SMALL, 'val'), iter(range(1, 9))
    first, second = halves(y[:100].numpy(), SMALL.split_seed)
    def val_logits(*_):
        epoch, logits = next(answers), np.zeros((100, 10), np.float32)
        sure = first[:30 if epoch == 2 else 20], second[:5 if epoch == 2 else 50]  # 35 right in the second, else 70
        logits[np.concatenate(sure), y[np.concatenate(sure)]] = 9
        logits[(logits == 0).all(1), (y[:100][(logits == 0).all(1)] + 1) % 10] = 9
        return logits
    monkeypatch.setattr(train, 'val_logits', val_logits)
    result = run(tmp_path, epochs=4, ema_decay=0.0)
    assert (result['best_epoch'], [round(r['val_accuracy'], 2) for r in result['history']]) == (2, [.7, .35, .7, .7])
    assert round(result['val_accuracy'], 2) == 0.35


def test_overflows_lower_the_scale_and_hold_the_schedule(tmp_path, monkeypatch):
    original = train.make_accelerator
    def scaled(cfg):
        acc = original(cfg)
        # the first gradients overflow, even in fp32; Accelerate has no scaler for a CPU
        acc.scaler = torch.amp.GradScaler('cpu', init_scale=2.**127)
        acc.unscale_gradients = lambda: acc.scaler.unscale_(acc._optimizers[0].optimizer)
        return acc
    loops, start, original_loss = [], train.start, train.mixed_loss
    monkeypatch.setattr(train, 'mixed_loss', lambda *args: 30 * original_loss(*args))
    monkeypatch.setattr(train, 'make_accelerator', scaled)
    monkeypatch.setattr(train, 'start', lambda *a, **k: loops.append(start(*a, **k)) or loops[0])
    result = run(tmp_path, epochs=15, bad_steps=1)
    loop, skipped = loops[0], sum(r['skipped'] for r in result['history'])
    assert 0 < skipped < 30 and loop.accelerator.scaler.get_scale() < 2.**127
    assert loop.steps == 30 - skipped == loop.schedule.last_epoch
    assert loop.ema and all(torch.isfinite(v).all() for v in result['weights'].values())


def test_a_full_disk_leaves_the_last_good_checkpoint_and_the_training_goes_on(tmp_path, monkeypatch, capsys):
    saves, original = iter(range(99)), torch.save
    def save(state, file):
        if next(saves) >= 2: raise OSError(errno.ENOSPC, 'No space left on device')
        original(state, file)
    monkeypatch.setattr(train.torch, 'save', save)
    assert len(run(tmp_path, checkpoint_minutes=0, checkpoint_every=99)['history']) == 2
    said = capsys.readouterr().out
    assert said.count('No space left') == 1 and 'goes on' in said
    assert [c.name[:29] for c in checkpoints(tmp_path, 'fit')] == ['checkpoint-fit-00000-0000002-']
    assert not list(tmp_path.glob('.checkpoint*'))


def test_stopped_within_an_epoch_and_continued_a_run_ends_in_the_same_bits(tmp_path, monkeypatch):
    steps, original = iter(range(1, 99)), Checkpointer.after_step
    def after_step(keeper):
        if next(steps) == 1: signal.raise_signal(signal.SIGINT)
        original(keeper)
    whole = run(tmp_path/'a')
    monkeypatch.setattr(Checkpointer, 'after_step', after_step)
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'b')
    assert [c.name[:29] for c in checkpoints(tmp_path/'b', 'fit')] == ['checkpoint-fit-00000-0000001-']
    with pytest.raises(files.UserError, match='batch_size=50'): run(tmp_path/'b', batch_size=25)
    continued = run(tmp_path/'b')
    assert all(torch.equal(v, continued['weights'][k]) for k, v in whole['weights'].items())
    assert np.array_equal(whole['val_logits_by_epoch'], continued['val_logits_by_epoch'])
    for row in (*whole['history'], *continued['history']): row.pop('seconds')
    assert whole['history'] == continued['history']


def test_an_absurd_rate_ends_with_the_last_good_weights(tmp_path):
    with pytest.raises(files.UserError, match='3 steps in a row.* the last good weights are in .*checkpoint-fit'):
        run(tmp_path, epochs=40, rate=1e30, bad_steps=3)
    state = torch.load(checkpoints(tmp_path, 'fit')[0], weights_only=True)['model']
    assert all(torch.isfinite(v).all() for v in state.values())


def test_memory_that_runs_out_is_said_once(tmp_path, capsys):
    def shorten(model):
        forward = model.backbone.forward
        def limited(x):
            if torch.is_grad_enabled() and len(x) > 13: raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return forward(x)
        model.backbone.forward = limited
    # at this rate a part without its gradient changes the loss by 3e-4, and at 1e-3 rounding alone by 1e-4
    halved, whole = run(tmp_path/'a', change=shorten, rate=5e-4), run(tmp_path/'b', rate=5e-4)
    said = capsys.readouterr().out
    assert [line.count('memory ran out') for line in said.splitlines() if 'memory' in line] == [1, 1]
    assert 'sees 13 at a time' in said  # 50, 25, 13
    assert losses(halved) == pytest.approx(losses(whole), rel=1e-4)


def test_one_image_that_does_not_fit_is_an_error(tmp_path):
    def fails(x): raise torch.cuda.OutOfMemoryError('out of memory')
    def never(model): model.backbone.forward = fails
    with pytest.raises(files.UserError, match='smaller backbone'): run(tmp_path, change=never)


def test_each_phase_and_each_seed_has_batches_of_its_own(tmp_path, monkeypatch):
    seen, original = [], train.augment
    def watched(x, *rest):
        seen.append((x.sum().item(), original(x, *rest)))
        return seen[-1][1]
    monkeypatch.setattr(train, 'augment', watched)
    def first(name, seed):
        cfg = dataclasses.replace(config.preset('smoke', device='cpu', out=str(tmp_path/'run')), seed=seed)
        data = [tuple(t[:100] for t in load_split(cfg, s)) for s in ('train', 'val')]
        seen.clear()
        fit(classifier(cfg, 10).freeze(), *data, cfg, epochs=1, lr_backbone=0., lr_head=1e-3,
            folder=tmp_path/f'{name}{seed}', name=name)
        return seen[0]
    batches = [first(name, seed) for name, seed in (('phase1', 1), ('phase2', 1), ('phase1', 2), ('again', 1))]
    assert len({total for total, _ in batches}) == 4  # other images first
    assert len({b.numpy().tobytes() for _, b in batches}) == 4


def test_siblings_are_trained_by_the_recipe_whatever_it_is(tmp_path, monkeypatch):
    from dinocls import ensemble, phase2
    told, original = [], phase2.fit
    def watched(model, *args, **options):
        told.append((options['name'], options['layer_decay'], any('lora' in n for n, _ in model.named_parameters())))
        return original(model, *args, **options)
    monkeypatch.setattr(phase2, 'fit', watched)
    for fields in ({'layer_decay': 0.5}, {'lora_rank': 2}):
        cfg = config.preset('smoke', device='cpu', out=str(tmp_path/next(iter(fields))), members=2, phase1_epochs=1,
                            phase2_epochs=1, **fields)
        weights = ensemble.siblings(cfg)['weights1']
        assert weights.keys() == classifier(cfg, 10).state_dict().keys()
    assert [(n, d) for n, d, _ in told] == [('sibling1', 0.5), ('sibling1', 1.0)] and told[1][2]


@pytest.mark.parametrize('fields', [
    {'pooling': 'mean'}, {'pooling': 'cls+mean'}, {'pooling': 'attention', 'micro_batch': 20},
    {'head_widths': (), 'head_dropout': ()}, {'schedule': 'cosine'},
    {'schedule': 'constant', 'clip_norm': 0., 'ema_decay': 0.}], ids=str)
def test_every_choice_trains(tmp_path, fields):
    result = run(tmp_path, **fields)
    assert all(np.isfinite(r['loss']) for r in result['history']) and result['history'][0]['skipped'] == 0


def test_checkpointed_blocks_learn_the_same(tmp_path):
    plain, saving = run(tmp_path/'a'), run(tmp_path/'b', gradient_checkpointing=True)
    assert losses(saving) == pytest.approx(losses(plain), rel=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which('g++') and not shutil.which('c++'), reason='torch.compile needs a C++ compiler')
def test_a_compiled_backbone_learns_the_same_under_the_same_names(tmp_path):
    plain, compiled = run(tmp_path/'a'), run(tmp_path/'b', compile='on')
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-3)
    assert list(compiled['weights']) == list(plain['weights'])


@pytest.mark.slow
def test_what_cannot_be_compiled_trains_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, 'cxx', ('/nowhere/c++',))
    monkeypatch.setattr(torch._inductor.config, 'force_disable_caches', True)
    torch._dynamo.reset()
    plain, failing = run(tmp_path/'a'), run(tmp_path/'b', compile='on')
    assert losses(failing) == losses(plain)


FIELDS = {'phase2_epochs': 6, 'checkpoint_minutes': 0, 'device': 'cpu', 'precision': 'fp32'}
ARGS = ['stage', 'phase2', '-p', 'smoke', *(a for k, v in FIELDS.items() for a in ('-s', f'{k}={v}'))]


def weights(folder): return files.file_digest(next((folder/'stages').glob('phase2-*/weights.safetensors')))


def finish(folder):
    "Train to the end in this process, on one thread as `begun` does; return the folder."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try: phase2(config.preset('smoke', **FIELDS, out=str(folder)))
    finally: torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope='module')
def whole(tmp_path_factory): return finish(tmp_path_factory.mktemp('whole')/'run')  # without interruption


def begun(folder, command, delay=0.0):
    "Start the training and wait for a checkpoint that was not there."
    found = lambda: set((folder/'stages').glob('phase2-*.partial/checkpoint-*'))
    before = found()
    process = subprocess.Popen([*command, *ARGS, '--out', str(folder)], env=environment(OMP_NUM_THREADS=1), cwd=ROOT,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait(lambda: found() - before or process.poll() is not None, 120)
    time.sleep(delay)
    return process


@pytest.mark.slow
def test_killed_again_and_again_ends_in_the_same_weights(whole, tmp_path):
    chance, kills = random.Random(0), 0
    while kills < 3:
        process = begun(tmp_path/'run', [COMMAND], chance.random() * 0.3)
        if process.poll() is not None: break
        process.kill(), process.wait()
        kills += 1
    assert kills >= 2
    assert weights(finish(tmp_path/'run')) == weights(whole)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=['sigterm', 'ctrl-c'])
def test_a_stopped_training_says_so_and_goes_on(whole, tmp_path, number):
    process = begun(tmp_path/'run', [COMMAND])
    process.send_signal(number)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == (130 if number == signal.SIGINT else -number) and 'Traceback' not in said, said
    assert 'phase2 stopped after step' in said and 'goes on from there' in said
    assert weights(finish(tmp_path/'run')) == weights(whole)


@pytest.mark.slow
def test_two_processes_train_as_one_and_one_goes_on_from_two(whole, tmp_path):
    accelerate = str(Path(sys.executable).with_name('accelerate'))
    process = begun(tmp_path/'run', [accelerate, 'launch', '--multi_gpu', '--num_processes', '2', '-m', 'dinocls'])
    process.send_signal(signal.SIGTERM)  # to the launcher, as a cluster does
    said = process.communicate(timeout=90)[0]
    assert said.count('phase2 stopped after step') == 1, said
    stored = lambda folder, s: losses(json.loads(next((folder/'stages').glob(f'{s}-*/result.json')).read_text()))
    same = lambda s: stored(tmp_path/'run', s) == pytest.approx(stored(whole, s), rel=1e-4)
    assert same('phase1')  # by two processes to the end
    finish(tmp_path/'run')
    assert same('phase2') and len(list((tmp_path/'run'/'stages').glob('phase2-*/weights.safetensors'))) == 1


def test_a_batch_that_cannot_be_divided(monkeypatch):
    loop = train.start(classifier(SMALL, 10), SMALL, 1, 4, 1e-3, 1e-3)
    class Three: num_processes = 3
    with contextlib.suppress(AttributeError): loop.accelerator = Three
    data = torch.zeros(100, 3, 32, 32), torch.zeros(100)
    with pytest.raises(files.UserError, match='among 3 processes'): train.batch_source(loop, data, None)
