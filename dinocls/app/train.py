"""Pictures of one's own: look them over, choose a model that can learn from them in the time there is, train it, and
say what came of it."""
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..data import check_splits, load_split, splits
from ..inference import ProductionModel, production
from ..kit.config import FIELDS, WHERE, Config, preset, root
from ..kit.datasets import Dataset, loaded
from ..kit.fetch import weights_file
from ..kit.files import UserError, expand, read_json
from ..model import BACKBONES, device, infer, random_backbone
from ..phase1 import phase1_logits
from ..phase2 import phase2_logits
from ..probe import knn, pixels
from ..stats import wilson
from .driver import short

# On DINOv2's features a small head and the rates of preset best, because own pictures are few and the backbone is good;
# the book's own backbone knows small photographs of ten kinds, and has more to learn.
_DINOV2 = dict(phase1_lr=1e-3, lr_backbone=1e-5, lr_head=1e-3, head_widths=(256,), head_dropout=(0.25,))
_OWN = _DINOV2 | dict(backbone='book-cifar', image_size=32, lr_backbone=1e-4)
SIDES = 224, 154, 112  # pixels, multiples of DINOv2's patch
STEPS = 400, 200  # of both phases, which small sets repeat their pictures for


def find_backbone(where) -> tuple[dict, str]:
    "Return the fields of DINOv2 where its weights are to be had, else of the book's own, and a sentence about it."
    name = 'dinov2_vitb14' if where.type == 'cuda' else 'dinov2_vits14'
    print(f'Looking for the weights of {name} …', flush=True)
    try: weights_file(name, hub=BACKBONES[name].timm)
    except UserError as e:
        return _OWN, (f'{str(e).partition(": ")[0]}. Until they are there, the book\'s own small backbone sees these '
                      'pictures at 32 pixels; it has seen nothing but CIFAR-10\'s photographs, so expect less.')
    return _DINOV2 | {'backbone': name}, f'The backbone is {name}, with its published weights.'


def seconds_per_image(cfg: Config, where) -> float:
    """Measure how long the configured backbone takes to embed an image, in batches as in training: on a busy machine
    few small images take far longer each than many. Of large ones a few tell as much on a CPU."""
    model, side = random_backbone(cfg.backbone, cfg.image_size).to(where), cfg.image_size
    enough = cfg.batch_size if where.type == 'cuda' else max(1, 8 * 224**2 // side**2)
    images, taken = torch.zeros(min(cfg.batch_size, enough), 3, side, side, dtype=torch.uint8), []
    for _ in range(3):  # the first warms up
        clock = time.perf_counter()
        infer(model, images, cfg)
        taken.append(time.perf_counter() - clock)
    return min(taken) / len(images)


def fitting_epochs(train: int, scored: int, batch: int,  # images of training, of validation, and in a batch
                   each: float, seconds: float) -> tuple[int, int, float]:  # a forward pass; the time there is
    "Return the epochs of both phases that fit the time, and what they take; backwards is as dear as twice forwards."
    wanted = [int(np.clip(np.ceil(n * batch / train), 2, 40)) for n in STEPS]
    costs = each * (train + scored), each * (3 * train + scored)
    share = min(1, seconds / np.dot(wanted, costs))
    given = [max(1, int(n * share)) for n in wanted]
    return *given, float(np.dot(given, costs))


def divided(data: Dataset) -> dict:
    "Return the sizes of validation and test: a fifth of all each, at least a picture per class, where there are none."
    part = max(len(data.classes), len(data.splits['train']) // 5)
    own = {s: len(data.splits[s]) for s in ('val', 'test') if s in data.splits}
    left = len(data.splits['train']) - part * (2 - len(own))
    if left < len(data.classes):
        raise UserError(f'{len(data.splits["train"])} pictures of {len(data.classes)} classes are too few to learn '
                        'from and be tested on: give at least 3 of each class.')
    return {'val_size': own.get('val', part), 'test_size': 0 if 'test' in own else part}


def learned_from(data: Dataset, cfg: Config) -> int:
    "Return how many pictures are left to learn from; those in val/ and test/ are not taken from them."
    taken = cfg.val_size * ('val' not in data.splits) + cfg.test_size * ('test' not in data.splits)
    return len(data.splits['train']) - taken


def plan(folder: Path, minutes: float, out: Path | None, given: dict) -> tuple[Config, list]:
    "Choose how to learn from a folder's pictures; return the configuration, and sentences about it."
    if not (folder := expand(folder).absolute()).is_dir():
        raise UserError(f'There is no folder {folder}: give the one that holds the pictures.')
    out = expand(out).absolute() if out else root()/'outputs'/f'train-{folder.name}'
    own = dict(dataset='imagefolder', data_root=str(folder), out=str(out), on_broken='skip', on_drift='report')
    given = own | given
    if (out/'run.json').is_file():
        before = read_json(out/'run.json').get('config') or {}
        chosen = {k: v for k, v in before.items() if k in FIELDS and k not in WHERE}
        cfg = preset('quick', **chosen | given)
        if learned_from(loaded(cfg), cfg) < len(loaded(cfg).classes):
            raise UserError(f'{folder} holds fewer pictures than when {short(out)} was begun: name another folder with '
                            '--out, or delete that one.')
        return cfg, [f'What was begun in {short(out)} goes on, with the epochs that were chosen then.']
    where = device(asked := preset('quick', **given))
    model, told = ({}, f'The backbone is {given["backbone"]}.') if 'backbone' in given else find_backbone(where)
    fixed = asked.image_size if 'image_size' in given else model.get('image_size')
    for side in (fixed,) if fixed else SIDES:
        chosen = dict(train_size=0, flip=True, crop=max(1, side // 16), image_size=side) | model
        data = loaded(preset('quick', **chosen | given))
        chosen |= divided(data)
        train = learned_from(data, preset('quick', **chosen | given))
        chosen['batch_size'] = max(2, min(32, train))
        cfg = preset('quick', **chosen | given)
        first, second, cost = fitting_epochs(train, cfg.val_size, cfg.batch_size, seconds_per_image(cfg, where),
                                             60 * minutes)
        if first + second > 6: break  # else smaller images, if there is a choice
    chosen |= dict(phase1_epochs=first, phase2_epochs=second)
    return preset('quick', **chosen | given), [told, (
        f'{sum(map(len, data.splits.values())):,} pictures of {len(data.classes)} classes, seen at {side} pixels: '
        f'{first} epoch{"s" * (first != 1)} of the head alone and {second} of everything, in about '
        f'{max(1, round(cost / 60))} min.')]


def shortcomings(cfg: Config) -> list:
    "Return sentences about pictures that are few, unbalanced, broken, or of another kind in one split than another."
    made, data, told = splits(cfg), loaded(cfg), []
    counts = np.bincount(data.labels[made['train']], minlength=len(data.classes)).tolist()
    (few, least), (many, most) = min(pairs := [*zip(counts, data.classes)]), max(pairs)
    if few < 20:
        told.append(f'{least} has {few} picture{"s" * (few != 1)} to learn from: 20 or more per class are better.')
    if many > 5 * few: told.append(f'{most} has {many} pictures and {least} {few}: answers will lean towards {most}.')
    if data.skipped:
        some = ', '.join(data.skipped[:5]) + ', …' * (len(data.skipped) > 5)
        told.append(f'Left out because they cannot be read: {some}')
    try: check_splits(made['checks'])
    except UserError as e: told.append(str(e))
    return told


def learn(cfg: Config) -> dict:
    "Train both phases, save the production folder, and return what there is to report of the test pictures."
    head, whole = phase1_logits(cfg), phase2_logits(cfg)
    model, labels = ProductionModel(production(cfg), cfg.device), whole['test_labels']
    p = model.probabilities(list(load_split(cfg, 'test')[0].permute(0, 2, 3, 1).numpy()))
    raw, train = pixels(cfg), loaded(cfg).labels[splits(cfg)['train']]
    right = {'the fine-tuned model': p.argmax(1) == labels, 'its head alone': head['test_logits'].argmax(1) == labels,
             'the nearest picture by raw pixels': knn(raw['train'], train, raw['test'], 1) == labels}
    files = np.array(loaded(cfg).files)[whole['test_index']]
    return {'classes': model.classes, 'labels': labels, 'guesses': p.argmax(1), 'confidence': p.max(1), 'files': files,
            'scores': {k: (float(r.mean()), *wilson(r.mean(), len(r))) for k, r in right.items()},
            'folder': cfg.folder/'production'}


def report(found: dict) -> str:
    "Write what `learn` returned for a terminal: accuracies, what is taken for what, the least sure, the next commands."
    classes, labels, guesses = np.array(found['classes']), found['labels'], found['guesses']
    lines = [f'On {len(labels)} test pictures, right with 95 % interval:']
    lines += [f'  {100 * a:5.1f} % ({100 * low:.1f} to {100 * high:.1f})  {name}'
              for name, (a, low, high) in found['scores'].items()]
    model, *_, raw = (accuracy for accuracy, *_ in found['scores'].values())
    if model <= raw: lines.append('Raw pixels do as well: the model has learned nothing yet that helps. It needs more '
                                  'pictures, or the published weights.')
    if len(classes) <= 12:
        table = pd.crosstab(pd.Categorical(classes[labels], classes), pd.Categorical(classes[guesses], classes),
                            rownames=['is'], colnames=['taken for'], dropna=False)
        lines += ['', 'Test pictures by class (rows) and answer (columns):', table.to_string()]
    else:
        wrong = Counter(f'{classes[a]} taken for {classes[b]}' for a, b in zip(labels, guesses) if a != b)
        lines += ['', 'Most frequent errors:', *(f'  {n} × {pair}' for pair, n in wrong.most_common(8))]
    lines += ['', 'The least sure answers:']
    for i in found['confidence'].argsort()[:5]:
        lines.append(f'  {found["files"][i]}: {classes[guesses[i]]}, {100 * found["confidence"][i]:.0f} % sure, '
                     + ('right' if guesses[i] == labels[i] else f'wrong: {classes[labels[i]]}'))
    place = short(found['folder'])
    return '\n'.join([*lines, '', f'The model is in {place}. Next:', f'  dinocls predict PICTURE --model {place}',
                      f'  dinocls serve {place}'])
