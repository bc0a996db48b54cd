"The benchmarks of training, as far as seconds go: every variant trains, a flipped bit is one bit, and the reports tell a difference."
import importlib.util
import random
import sys

import pytest
import torch
from conftest import ROOT

CASE = {'model': 'book-digits', 'side': 32, 'batch': 4, 'lead': 1, 'steps': 1, 'rounds': 2, 'options': True, 'threads': 1}


def script(name):
    "Import a benchmark."
    spec = importlib.util.spec_from_file_location(f'benchmark_{name}', ROOT/'benchmarks'/f'{name}.py')
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


train, faults = script('train'), script('faults')


@pytest.mark.skipif(torch.cuda.is_available(), reason='the loops of others would go to the GPU')
@pytest.mark.parametrize('variant, phase', [*((v, p) for v in ('dinocls', 'tutorial', 'timm') for p in (1, 2)), ('stored', 1), ('half a batch at once', 2)])
def test_every_variant_trains_the_phase_and_nothing_else(monkeypatch, variant, phase):
    models, original = [], train.classifier
    monkeypatch.setattr(train, 'classifier', lambda *args: models.append(original(*args)) or models[-1])
    monkeypatch.setattr(train, 'WORKERS', 0)  # quicker, and the same loop
    case = CASE | {'variant': variant, 'phase': phase}
    epoch = {'tutorial': train.tutorial, 'timm': train.timms}.get(variant, train.ours)(case)
    before = {k: v.clone() for k, v in models[0].state_dict().items()}
    assert train.turn(epoch, case)['rate'] > 0
    changed = {k.partition('.')[0] for k, v in models[0].state_dict().items() if not torch.equal(v, before[k])}
    assert changed == ({'head'} if phase == 1 else {'backbone', 'head'})


def test_ratios_are_taken_within_a_round_and_a_failure_is_told():
    v = lambda *rates: {'rates': list(rates), 'seconds': [10.], 'peak': 100., 'precision': 'fp32', 'before': 50.}
    text = '\n'.join(train.tables([(CASE, 2, {'dinocls': v(20., 60., 30.), 'tutorial': v(10., 20., 30.), 'gradient checkpointing': v(10., 30., 15.)})]))
    assert '| tutorial | 20 | 2.00× (1.00 – 3.00) | 100 | 1.00× |' in text and '| timm | fails here |' in text and '| gradient checkpointing | 15 | 0.50× (0.50 – 0.50) |' in text


def test_one_bit_is_flipped(tmp_path):
    (file := tmp_path/'file').write_bytes(bytes(1000))
    faults.flip_bit(file, random.Random(0))
    assert sum(byte.bit_count() for byte in file.read_bytes()) == 1 and file.stat().st_size == 1000


def test_only_sound_checkpoints_count_and_their_names_tell_the_place(tmp_path):
    (folder := tmp_path/'stages'/'phase2-0.partial').mkdir(parents=True)
    for step in (1, 2):
        (file := folder/'file').write_text(str(step))
        file.rename(folder/f'checkpoint-phase2-00003-{step:07d}-{faults.core.file_digest(file)[:16]}.pt')
    first, second = reversed(faults.sound(tmp_path))
    assert (faults.place(first), faults.place(second)) == (('phase2', 3, 1), ('phase2', 3, 2))
    faults.flip_bit(second, random.Random(0))
    assert faults.sound(tmp_path) == [first]


def test_a_difference_is_told():
    result = lambda weights: {'phase1': ('a' * 64, [{'loss': 1.}]), 'phase2': (weights * 64, [{'loss': 2.}])}
    event = {'seed': 1, 'seconds': 1.0, 'stage': 'phase2', 'done': 3, 'newest': ('phase2', 3, 1), 'flipped': True, 'intact': ('phase2', 2, 3)}
    told = lambda weights: '\n'.join(faults.report([{'seed': 1, 'kills': 1, 'flips': 1, 'noted': 1, 'seconds': 9.0, 'whole': result('b'), 'killed': result(weights)}], [event], {}, 5, 60.0))
    assert 'different' not in told('b') and told('c').count('**different**') == 1
    assert '| phase2, epoch 4 | phase2, epoch 4, after step 1 | yes | phase2, epoch 3, after step 3 | 1 to 4 |' in told('b')
