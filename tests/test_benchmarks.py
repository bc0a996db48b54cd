"The benchmarks, as far as seconds go: variants train, parts for a GPU run, answers are checked, reports tell."
import hashlib
import importlib.util
import random
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from dinocls.kit import files
from dinocls.kit.files import UserError

CASE = {'model': 'book-digits', 'side': 32, 'batch': 4, 'lead': 1, 'steps': 1, 'rounds': 2, 'options': True,
        'threads': 1}


def script(name):
    "Import a benchmark."
    spec = importlib.util.spec_from_file_location(f'benchmark_{name}', ROOT/'benchmarks'/f'{name}.py')
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sys.path.insert(0, str(ROOT/'benchmarks'))  # as for a script
train, faults, gpu, scale, own_pictures = map(script, ('train', 'faults', 'gpu', 'scale', 'own_pictures'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='the loops of others would go to the GPU')
@pytest.mark.parametrize('variant, phase',
                         [*((v, p) for v in ('dinocls', 'tutorial', 'timm') for p in (1, 2)), ('stored', 1),
                          ('half a batch at once', 2)])
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
    text = '\n'.join(train.tables([(CASE, 2,
                                    {'dinocls': v(20., 60., 30.), 'tutorial': v(10., 20., 30.),
                                     'gradient checkpointing': v(10., 30., 15.)})]))
    assert ('| tutorial | 20 | 2.00× (1.00 – 3.00) | 100 | 1.00× |' in text and '| timm | fails here |' in text
            and '| gradient checkpointing | 15 | 0.50× (0.50 – 0.50) |' in text)


def test_one_bit_is_flipped(tmp_path):
    (file := tmp_path/'file').write_bytes(bytes(1000))
    faults.flip_bit(file, random.Random(0))
    assert sum(byte.bit_count() for byte in file.read_bytes()) == 1 and file.stat().st_size == 1000


def test_only_sound_checkpoints_count_and_their_names_tell_the_place(tmp_path):
    (folder := tmp_path/'stages'/'phase2-0.partial').mkdir(parents=True)
    for step in (1, 2):
        (file := folder/'file').write_text(str(step))
        file.rename(folder/f'checkpoint-phase2-00003-{step:07d}-{faults.files.file_digest(file)[:16]}.pt')
    first, second = reversed(faults.sound(tmp_path))
    assert (faults.place(first), faults.place(second)) == (('phase2', 3, 1), ('phase2', 3, 2))
    faults.flip_bit(second, random.Random(0))
    assert faults.sound(tmp_path) == [first]


def test_a_difference_is_told():
    result = lambda weights: {'phase1': ('a' * 64, [{'loss': 1.}]), 'phase2': (weights * 64, [{'loss': 2.}])}
    event = {'seed': 1, 'seconds': 1.0, 'stage': 'phase2', 'done': 3, 'newest': ('phase2', 3, 1), 'flipped': True,
             'intact': ('phase2', 2, 3)}
    told = lambda weights: '\n'.join(faults.report([{'seed': 1, 'kills': 1, 'flips': 1, 'noted': 1, 'seconds': 9.0,
                                                     'whole': result('b'), 'killed': result(weights)}], [event], {}, 5,
                                                     60.0))
    assert 'different' not in told('b') and told('c').count('**different**') == 1
    row = '| phase2, epoch 4 | phase2, epoch 4, after step 1 | yes | phase2, epoch 3, after step 3 | 1 to 4 |'
    assert row in told('b')


@pytest.fixture
def home(tmp_path, monkeypatch):
    "Results of the script for a GPU, in a folder of their own."
    monkeypatch.setattr(gpu, 'OUT', tmp_path/'outputs')
    (tmp_path/'outputs'/'speed').mkdir(parents=True)
    return tmp_path/'outputs'


def by_turns(case, phase):
    "Stand in for `compare`, in this process; in phase 1 the others fail."
    others = {'tutorial': train.tutorial, 'timm': train.timms} if phase == 2 else {}
    return {name: {'rates': [train.turn(epoch(c := case | {'variant': name, 'phase': phase}), c)['rate']]}
            for name, epoch in ({'dinocls': train.ours} | others).items()}


@pytest.mark.skipif(torch.cuda.is_available(), reason='the tiny sizes are for a CPU')
@pytest.mark.slow
def test_every_speed_is_measured_and_told(home, monkeypatch):
    monkeypatch.setitem(sys.modules, 'train', train)
    monkeypatch.setattr(train, 'WORKERS', 0)
    monkeypatch.setattr(train, 'compare', by_turns)
    monkeypatch.setitem(gpu.PARTS, 'check', lambda size: {'fails': 'not this time'})
    gpu.measure(SimpleNamespace(parts=[*gpu.PARTS], tiny=True))
    text = '\n'.join(gpu.report())
    assert '- check failed: not this time' in text and text.count(' failed: ') == 1
    assert ('| `best`, phase 2, bf16 (aim: 50 %) | 4 |' in text and text.count('| inference, ') == 2
            and text.count('would take') == text.count('% of a step') == 2)
    assert 'Phase 2, batch 4: ' in text and 'Phase 1, batch 4: tutorial fails here; timm fails here.' in text


@pytest.mark.slow
def test_what_fails_or_takes_too_long_costs_itself(home, monkeypatch):
    asked = []
    def child(words, until):
        asked.append(words[2:])
        if len(asked) > 1: return None  # the time is over
        files.write_json(home/'speed'/'check.json', {'text': []})
        return -11
    monkeypatch.setattr(gpu, 'child', child)
    files.write_json(home/'speed'/'training.json', {'fails': 'on another day'})
    monkeypatch.setattr(gpu, 'PARTS', dict.fromkeys(('check', 'peak', 'training')))
    gpu.speed(SimpleNamespace(tiny=False), time.monotonic() + 5)
    assert (asked[:2] == [['check', 'peak', 'training'], ['training']]
            and 'status -11' in files.read_json(home/'speed'/'peak.json')['fails'])


@pytest.mark.parametrize('tree, files', [(10, [6] + [3] * 30), (30, [6] + [3] * 30), (1, [6])])
def test_each_command_travels_within_its_limit_and_all_take_a_quarter_of_an_hour(tmp_path, tree, files):
    for i, size in enumerate(files):
        with open(tmp_path/f'{i:02d}', 'wb') as f: f.truncate(size * gpu.MIB)
    room = gpu.CARRIED - gpu.MIB - tree * gpu.MIB
    folders = gpu.share_out(sorted(tmp_path.iterdir()), room)
    assert ([f for folder in folders for f in folder] == sorted(tmp_path.iterdir())
            and all(sum(f.stat().st_size for f in folder) <= room for folder in folders))
    given = gpu.commands(len(folders))
    assert ([c for c, *_ in given][-2:] == ['pretrain', 'book']
            and {n for _, n, _ in given} - {0} == {*range(1, len(folders) + 1)} and given[-1][1] == 0)
    assert (sum(m for *_, m in given) + (gpu.START + len(given) * gpu.TRANSFER) / 60 == pytest.approx(15)
            and all(m > 0.4 for *_, m in given))
    with pytest.raises(UserError, match='does not fit'): gpu.share_out(sorted(tmp_path.iterdir()), gpu.MIB)


def test_parts_become_the_binary_version_again(tmp_path, monkeypatch):
    from PIL import Image
    monkeypatch.setattr(gpu, 'IMAGES', 300), monkeypatch.setattr(gpu, 'CHUNK', 100)
    rng, parts = np.random.default_rng(0), tmp_path/'parts'
    parts.mkdir()
    images, labels = rng.integers(0, 256, (300, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, 300, dtype=np.uint8)
    rows = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(300, -1)], 1)
    batches = {f'batch{i}': part.tobytes() for i, part in enumerate(np.split(rows, 3))}
    proofs = {name: hashlib.md5(b).hexdigest() for name, b in batches.items()}
    monkeypatch.setattr('dinocls.kit.datasets.BATCHES', proofs)
    for i in range(3):
        Image.fromarray(gpu.to_mosaic(images[100 * i:][:100])).save(parts/f'images-{i:02d}.webp', lossless=True)
    np.save(parts/'labels.npy', labels[::-1])
    (parts/'cifar10h-counts.npy').write_text('votes')
    args, target = SimpleNamespace(work=tmp_path), tmp_path/'data'/'cifar-10-batches-bin'
    with pytest.raises(UserError, match='MD5 differs'): gpu.restore(args)
    assert not target.exists()
    np.save(parts/'labels.npy', labels)
    (late := parts/'images-02.webp').rename(tmp_path/'late')
    with pytest.raises(UserError, match='2 of 3 parts'): gpu.restore(args)
    (tmp_path/'late').rename(late)
    gpu.restore(args)
    assert ({f.stem: f.read_bytes() for f in target.iterdir()} == batches
            and (tmp_path/'data'/'cifar10h-counts.npy').read_text() == 'votes')


def test_as_many_epochs_as_fit_by_what_is_measured_now(home, monkeypatch):
    args, asked = SimpleNamespace(tiny=False, set=['pretrain_batch=64']), []
    def epochs(size, fields, **more):
        asked.append((*fields, more))
        return {fields[0]: {'epoch': 2.0, 'first': 20.0}}
    monkeypatch.setattr(gpu, 'epochs', epochs)
    assert gpu.fitting(args, 'pretrain_epochs', 110.9) == 50  # half of the first seconds come out of a cache
    assert gpu.fitting(args, 'pretrain_epochs', 110.9, trainings=5) == 10
    assert gpu.fitting(args, 'pretrain_epochs', 3) == 1 and gpu.fitting(args, 'pretrain_epochs', 1e9) == 1000
    assert asked[0] == ('pretrain_epochs', {'pretrain_batch': '64'})
    assert files.read_json(home/'plan'/'pretrain_epochs.json')['epochs'] == 1000


def test_what_comes_home_goes_on(tmp_path, home, monkeypatch):
    monkeypatch.setattr(gpu, 'PIECE', 200_000), monkeypatch.setattr(gpu, 'HOME', 1_500_000)
    for name, seconds, size in (('quick', 1, 900_000), ('dear', 99, 900_000), ('large', 9999, 3_000_000)):
        (stage := home/'cifar-x'/'stages'/name).mkdir(parents=True)
        (stage/'weights').write_bytes(random.Random(name).randbytes(size))
        files.write_json(stage/'run.json', {'seconds': seconds})
    for name, size in (('cifar-x/run.json', 2), ('cifar-x/05_phase1.ipynb', 10),
                       ('cifar-x/05_phase1/huge.png', 600_000), ('cifar-x/html/page.html', 5),
                       ('weights/w.safetensors', 7),
                       ('cifar-x/stages/chapters/05.json', 3), ('check/run.json', 4)):
        (home/name).parent.mkdir(parents=True, exist_ok=True)
        (home/name).write_bytes(bytes(size))
    gpu.pack(tmp_path/'home')
    assert 'huge.png is left out: 0.6 MB' in (home/'log.txt').read_text()
    pieces = sorted((tmp_path/'home').iterdir())
    assert len(pieces) == 5 and pieces[0].name == 'home-1-of-5.tgz' and all(f.stat().st_size <= 200_000 for f in pieces)
    monkeypatch.setattr(gpu.os, 'execve', lambda *_: None), monkeypatch.setattr(gpu.os, 'chdir',
        lambda _: None), monkeypatch.setattr(gpu, 'ROOT', tmp_path/'checkout')
    (carried := tmp_path/'checkout'/gpu.STOCK/'1').mkdir(parents=True)
    pieces[4].rename(carried/pieces[4].name)
    gpu.settle(args := SimpleNamespace(work=tmp_path/'work', out=tmp_path/'out', resume=None), 0)
    there = lambda: {f.relative_to(tmp_path/'work'/'book'/'outputs').as_posix()
                     for f in (tmp_path/'work'/'book'/'outputs').rglob('*') if f.is_file()}
    assert there() == set()  # four pieces are missing
    args.resume = tmp_path/'home'
    gpu.settle(args, 0)
    kept = {'cifar-x/run.json', 'cifar-x/05_phase1.ipynb', 'weights/w.safetensors', 'cifar-x/stages/chapters/05.json',
            'cifar-x/stages/dear/weights', 'cifar-x/stages/dear/run.json'}
    assert there() == kept
    (newer := tmp_path/'work'/'book'/'outputs'/'weights'/'w.safetensors').write_text('newer')
    gpu.settle(args, 0)
    assert newer.read_text() == 'newer'  # unpacked once


@pytest.mark.slow
def test_neighbours_are_compared_with_those_of_others(capsys):
    knn = script('knn')
    knn.main(1, 0.01)
    text = capsys.readouterr().out
    assert '100 queries, 500 × 768 vectors' in text and 'scikit-learn, NearestNeighbors' in text and '| 30 |' in text
    bank = torch.randn(50, 8).numpy()
    with pytest.raises(AssertionError):
        # neighbours that are further off
        knn.same(bank, bank[:5], torch.arange(5)[:, None].numpy(), torch.arange(5)[:, None].numpy() + 1)


def test_photographs_are_jpegs_of_many_sizes():
    from dinocls.kit.pictures import decode
    sizes = {decode(file).size for file in script('inference').photographs(6)}
    assert len(sizes) == 6 and all(256 <= s < 428 for size in sizes for s in size)


def test_the_page_about_scale_follows_from_what_was_measured():
    assert (ROOT/'docs'/'scaling.md').read_text(encoding='utf-8') == scale.page(3)
    assert [scale.time(s) for s in (2.53, 64.8, 86_400 * 49)] == ['2.5 s', '1.1 min', '49 days']
    assert scale.memory(3072 * 50_000) == '154 MB' and scale.gflop('dinov2_vitb14') == pytest.approx(46.1, abs=0.1)


def test_what_train_says_of_own_pictures_becomes_a_row(tmp_path):
    from dinocls.app.train import report
    labels, scores = np.arange(3), {'the fine-tuned model': (2 / 3, 0.2, 0.9), 'its head alone': (1 / 3, 0.1, 0.8),
                                    'the nearest picture by raw pixels': (0., 0., 0.6)}
    said = report({'classes': list(own_pictures.CLASSES), 'labels': labels, 'guesses': labels[::-1], 'scores': scores,
                   'confidence': labels / 3, 'files': ['a.png'] * 3, 'folder': tmp_path})
    said = f'9 pictures of 3 classes, seen at 32 pixels: 40 epochs of the head alone and 1 of everything.\n\n{said}'
    found = own_pictures.row(said, '{"prediction": "cat"}', 1000, 61.4)
    assert found == '| 1,000 | 3 | 66.7 % (20.0 to 90.0) | 33.3 % (10.0 to 80.0) | 0.0 % (0.0 to 60.0) | 40 + 1 | 61 |'
    assert own_pictures.row(said, '{"prediction": "cat"}', 3, None).endswith('| 40 + 1 |')
    with pytest.raises(SystemExit, match='none of the classes'):
        own_pictures.row(said, '{"prediction": "dog"}', 3, None)


def test_a_folder_of_own_pictures_holds_so_many_of_each_class_and_only_test_pictures(tmp_path):
    classes = ['airplane', 'dog', 'cat', 'ship']
    labels = np.arange(40) % 4
    images = np.arange(40, dtype=np.uint8)[:, None, None, None].repeat(4, 1).repeat(4, 2).repeat(3, 3)
    data = SimpleNamespace(classes=classes, labels=labels, images=images, splits={'test': np.arange(20, 40)})
    own_pictures.write_folder(tmp_path, data, 4)
    for name in own_pictures.CLASSES:
        found = [int(f.stem) for f in (tmp_path/name).iterdir()]
        assert len(found) == 4 and min(found) >= 20 and {classes[labels[i]] for i in found} == {name}
        with Image.open(tmp_path/name/f'{found[0]}.png') as image: assert image.getpixel((0, 0)) == (found[0],) * 3
    assert {f.name for f in tmp_path.iterdir()} == {*own_pictures.CLASSES}
