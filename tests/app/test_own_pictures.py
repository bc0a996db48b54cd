"`dinocls train`: from a folder of pictures to a model that answers, and what is said on the way."
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from dinocls.app import train
from dinocls.kit import datasets, fetch
from dinocls.kit.config import preset
from dinocls.kit.datasets import load_dataset
from dinocls.kit.files import UserError, write_json

COLOURS = {'red': (200, 40, 40), 'green': (40, 160, 60), 'blue': (40, 60, 200)}


RNG = np.random.default_rng(0)


def pictures(root, n: int, names=tuple(COLOURS)):
    "Write n grainy pictures of each class, 48×40 pixels; return the folder."
    for name in names:
        (root/name).mkdir(parents=True)
        for i in range(n):
            x = RNG.normal(COLOURS[name], 40, (40, 48, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(x).save(root/name/f'{i}.png')
    return root


@pytest.fixture
def alone(monkeypatch):
    "No network, and a cache without weights."
    def refuse(*_, **__): raise OSError('no network')
    monkeypatch.setattr('huggingface_hub.hf_hub_download', refuse)
    known = fetch.weights_at_hand
    monkeypatch.setattr(fetch, 'weights_at_hand', lambda name, weights='', hub='': None if hub else known(name))


def test_a_folder_of_classes_is_a_data_set_and_one_of_other_things_is_not(tmp_path):
    found = load_dataset('imagefolder', pictures(tmp_path/'set', 3))
    assert found.classes == sorted(COLOURS) and len(found.splits['train']) == 9 and [*found.splits] == ['train']
    with pytest.raises(UserError, match='has no folder train, but set'): load_dataset('imagefolder', tmp_path)


def test_copies_are_left_out_and_so_is_what_lies_in_two_classes(tmp_path, capsys):
    root = pictures(tmp_path/'set', 4)
    shutil.copy(root/'red'/'0.png', root/'red'/'again.png')
    shutil.copy(root/'green'/'1.png', root/'blue'/'disputed.png')
    found = load_dataset('imagefolder', root)
    names = [found.files[i] for i in found.splits['train']]
    assert 'red/0.png' in names and not {'red/again.png', 'green/1.png', 'blue/disputed.png'} & {*names}
    said = capsys.readouterr().out
    assert '2 of 14 pictures are copies of others' in said and '2 of 14 pictures are in two classes' in said
    shutil.rmtree(root/'red')
    shutil.copytree(root/'green', root/'red')
    with pytest.raises(UserError, match='Each picture of the class .green. lies in another class'):
        load_dataset('imagefolder', root)


def test_parts_are_a_fifth_each_of_what_is_not_divided_yet(tmp_path):
    data = load_dataset('imagefolder', pictures(tmp_path/'set', 10))
    assert train.divided(data) == {'val_size': 6, 'test_size': 6}
    few = load_dataset('imagefolder', pictures(tmp_path/'few', 3))
    assert train.divided(few) == {'val_size': 3, 'test_size': 3}
    two = load_dataset('imagefolder', pictures(tmp_path/'two', 2))
    with pytest.raises(UserError, match='6 pictures of 3 classes are too few.*at least 3 of each'): train.divided(two)
    for part in ('train', 'test'): pictures(tmp_path/'own'/part, 5)
    assert train.divided(load_dataset('imagefolder', tmp_path/'own')) == {'val_size': 3, 'test_size': 0}


def test_epochs_follow_from_the_time_there_is():
    first, second, cost = train.fitting_epochs(320, 80, 32, each=0.001, seconds=1e9)
    assert (first, second) == (40, 20) and cost == pytest.approx(40 * 0.4 + 20 * 1.04)
    less = train.fitting_epochs(320, 80, 32, each=0.001, seconds=cost / 2)
    assert less[:2] == (20, 10) and less[2] == pytest.approx(cost / 2)
    assert train.fitting_epochs(32_000, 8000, 32, each=1, seconds=1)[:2] == (1, 1)


@pytest.mark.parametrize('side, batch, timed', [(32, 32, 32), (32, 3, 3), (112, 32, 32), (224, 32, 8)])
def test_the_backbone_is_timed_with_batches_as_in_training(monkeypatch, side, batch, timed):
    sizes = []
    monkeypatch.setattr(train, 'random_backbone', lambda *_: torch.nn.Identity())
    monkeypatch.setattr(train, 'infer', lambda model, images, cfg: sizes.append(images.shape))
    cfg = preset('quick', image_size=side, batch_size=batch)
    assert train.seconds_per_image(cfg, torch.device('cpu')) > 0 and {*sizes} == {(timed, 3, side, side)}


def test_images_are_smaller_where_time_is_short(tmp_path, monkeypatch):
    known = {'backbone': 'dinov2_vits14', 'weights': 'random'}
    monkeypatch.setattr(train, 'find_backbone', lambda _: (known, 'It is known.'))
    monkeypatch.setattr(train, 'seconds_per_image', lambda cfg, _: cfg.image_size ** 2 * 1e-6)
    root = pictures(tmp_path/'set', 10)
    for minutes, side in ((10, 224), (0.15, 154), (0.01, 112)):
        cfg, told = train.plan(root, minutes, tmp_path/f'{side}', {})
        assert cfg.image_size == side and cfg.crop == side // 16 and f'at {side} pixels' in told[1]
    cfg, _ = train.plan(root, 0.01, tmp_path/'mine', {'image_size': '28'})
    assert cfg.image_size == 28


def test_a_run_that_was_begun_goes_on_with_what_was_chosen(tmp_path):
    (out := tmp_path/'run').mkdir()
    chosen = {'phase1_epochs': 3, 'image_size': 32, 'val_size': 6, 'test_size': 6}
    write_json(out/'run.json', {'config': chosen}, sealed=True)
    cfg, told = train.plan(root := pictures(tmp_path/'set', 10), 10, out, {'seed': '7'})
    assert {k: getattr(cfg, k) for k in chosen} == chosen and cfg.seed == 7 and 'goes on' in told[0]
    for file in [f for f in root.rglob('*.png') if int(f.stem) > 3]: file.unlink()
    datasets._loaded.cache_clear()  # as in a process of its own
    with pytest.raises(UserError, match='set holds fewer pictures than when .* was begun'):
        train.plan(root, 10, out, {})


def test_without_the_published_weights_the_books_own_are_taken_and_it_is_said(alone):
    fields, told = train.find_backbone(type('Device', (), {'type': 'cpu'}))
    assert fields['backbone'] == 'book-cifar' and 'could not be downloaded' in told and 'expect less' in told


@pytest.mark.slow
def test_few_unbalanced_and_broken_pictures_end_in_a_model_that_answers(tmp_path, alone, in_process):
    root = pictures(tmp_path/'my set', 24, ('red', 'green'))
    pictures(root, 3, ('blue',))
    (root/'red'/'broken.png').write_text('not a picture')
    said = in_process('train', root, '--minutes', '0.2', '--out', tmp_path/'run')
    assert said.returncode == 0, said.stderr
    for part in (' to learn from: 20 or more', 'will lean towards', 'red/broken.png', 'raw pixels', 'taken for',
                 'The least sure', f'dinocls serve {tmp_path}/run/production'): assert part in said.stdout, said.stdout
    answer = in_process('predict', root/'green'/'0.png', '--model', tmp_path/'run'/'production')
    assert answer.returncode == 0 and 'green' in answer.stdout
    again = in_process('train', root, '--out', tmp_path/'run')
    assert 'goes on' in again.stdout and again.stdout.partition('On ')[2] == said.stdout.partition('On ')[2]


def test_what_cannot_be_learned_from_is_refused(tmp_path, in_process):
    from conftest import refused
    refused(in_process('train', tmp_path/'nowhere'), 'There is no folder')
    root = pictures(tmp_path/'set', 3)
    refused(in_process('train', root, '--set', 'phase1_epoch=3'), 'phase1_epochs')
    refused(in_process('train', root, '--set', 'image_size=large'), 'image_size')


def test_many_classes_are_reported_by_their_errors():
    classes = [f'class {i}' for i in range(20)]
    labels = np.arange(20)
    guesses = np.where(labels < 2, 5, labels)
    files = [f'{i}.png' for i in labels]
    text = train.report({'classes': classes, 'labels': labels, 'guesses': guesses, 'files': files,
                         'confidence': np.linspace(0.2, 0.9, 20), 'folder': preset('quick').folder/'production',
                         'scores': {'the fine-tuned model': (0.9, 0.7, 0.97), 'raw pixels': (0.9, 0.7, 0.97)}})
    assert '1 × class 0 taken for class 5' in text and '0.png: class 5, 20 % sure, wrong: class 0' in text
    assert '90.0 % (70.0 to 97.0)' in text and 'Raw pixels do as well' in text
