"The benchmarks, as far as seconds go: every variant trains, a flipped bit is one bit, every part for a GPU runs, others' answers are checked, and the reports tell a difference."
import importlib.util
import random
import sys
import tarfile
import time

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


train, faults, gpu, gpu_book = (script(name) for name in ('train', 'faults', 'gpu', 'gpu_book'))


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


def by_turns(case, phase):
    "Stand in for `compare`, in this process; at the smaller batch the others fail."
    epochs = {'dinocls': gpu.train.ours} | ({'tutorial': gpu.train.tutorial, 'timm': gpu.train.timms} if case['batch'] == 4 else {})
    return {name: {'rates': [gpu.train.turn(epoch(c := case | {'variant': name, 'phase': phase}), c)['rate']], 'peak': 1.0} for name, epoch in epochs.items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason='the tiny sizes are for a CPU')
def test_every_part_for_a_gpu_is_measured_and_told(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.train, 'WORKERS', 0)
    monkeypatch.setattr(gpu.train, 'compare', by_turns)
    for part in gpu.PARTS:
        gpu.measure(part, tmp_path, tiny=True)
        found = {p: gpu.core.read_json(tmp_path/f'{p}.json') for p in gpu.PARTS if (tmp_path/f'{p}.json').exists()}
        text = '\n'.join(gpu.report(found))  # also of what there is so far
    assert 'Not measured yet' not in text
    for row in ('inference, plain | 4', 'phase 1, dinocls | 2', 'phase 2, dinocls | 4'): assert f'| {row} |' in text
    assert text.count('The recipe `') == 2 and '| JPEG, 500×375, torch |' in text and 'too much' not in text and 'fails here' in text


def test_gpu_parts_end_in_time_and_count_operations(tmp_path):
    assert round(gpu.gflop('dinov2_vitb14', 224), 1) == 46.3
    clock = time.monotonic()
    assert gpu.run(['ceiling'], tmp_path, True, clock) == ['ceiling'] and time.monotonic() - clock < 10


def test_the_book_on_a_gpu_takes_its_data_from_an_archive(tmp_path):
    for part in ('train', 'test'): (tmp_path/'pictures'/part/'cat').mkdir(parents=True)
    (held := tmp_path/'held').mkdir()
    with tarfile.open(held/'a.tar.xz', 'w:xz') as tar:
        for part in ('train', 'test'): tar.add(tmp_path/'pictures'/part, part)
    (held/'votes.npy').write_text('judges')
    assert gpu_book.unpacked(tmp_path/'pictures', tmp_path/'none') == tmp_path/'pictures'
    folder = gpu_book.unpacked(held, tmp_path/'data')
    assert sorted(p.name for p in folder.iterdir()) == ['test', 'train', 'votes.npy'] and (folder/'train'/'cat').is_dir()
    assert gpu_book.unpacked(held/'a.tar.xz', folder) == folder
    with pytest.raises(gpu_book.UserError, match='nor holds one'): gpu_book.unpacked(tmp_path/'data'/'train', tmp_path/'other')


def test_what_is_packed_goes_on(tmp_path, monkeypatch):
    run = tmp_path/'run'
    for name, seconds, size in (('quick', 1, 900_000), ('dear', 99, 900_000), ('large', 9999, 3_000_000)):
        (stage := run/'stages'/name).mkdir(parents=True)
        (stage/'weights').write_bytes(random.Random(name).randbytes(size))
        gpu_book.core.write_json(stage/'run.json', {'seconds': seconds, 'files': {'weights': {'bytes': size}}})
    for name, size in (('run.json', 2), ('05_phase1.ipynb', 10), ('05_phase1/huge.png', 600_000), ('html/page.html', 5)):
        (run/name).parent.mkdir(exist_ok=True)
        (run/name).write_bytes(bytes(size))
    monkeypatch.setattr(gpu_book, 'PIECE', 200_000)
    (weights := tmp_path/'w.safetensors').touch()
    said = gpu_book.pack(run, tmp_path/'pack', weights, state_mb=1)
    assert 'huge.png is left out: 0.6 MB' in said[-1] and len(list((tmp_path/'pack').glob('state.tar.gz.*'))) == 5 and (tmp_path/'pack'/'w.safetensors').exists()
    kept = {p.relative_to(run).as_posix() for p in run.rglob('*') if p.is_file()} - {'05_phase1/huge.png', 'html/page.html', *(f'stages/{s}/{f}' for s in ('quick', 'large') for f in ('weights', 'run.json'))}
    dear = (run/'stages'/'dear'/'weights').read_bytes()
    gpu_book.shutil.rmtree(run)
    gpu_book.resume(tmp_path/'pack', run)
    assert {p.relative_to(run).as_posix() for p in run.rglob('*') if p.is_file()} == kept and (run/'stages'/'dear'/'weights').read_bytes() == dear


def test_neighbours_are_compared_with_those_of_others(capsys):
    knn = script('knn')
    knn.main(1, 0.01)
    text = capsys.readouterr().out
    assert '100 random queries, 500 × 768 vectors' in text and 'scikit-learn, NearestNeighbors' in text and '| 30 |' in text
    bank = torch.randn(50, 8).numpy()
    with pytest.raises(AssertionError): knn.same(bank, bank[:5], torch.arange(5)[:, None].numpy(), torch.arange(5)[:, None].numpy() + 1)  # neighbours that are further off


def test_photographs_are_jpegs_of_many_sizes():
    from dinocls.data import decode
    sizes = {decode(file).size for file in script('inference').photographs(6)}
    assert len(sizes) == 6 and all(256 <= s < 428 for size in sizes for s in size)
