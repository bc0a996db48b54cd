"One frozen `Config` decides everything; a preset is a `Config` with a name, a price and a promise."
import ast
import dataclasses
import os
import shlex
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator, Field, ValidationError
from pydantic.dataclasses import dataclass

from .files import UserError, digest, expand, nearest


def _whole_number(value):
    "Read `1e3` and `'7'` as whole numbers."
    return int(float(value)) if isinstance(value, (str, float)) and float(value).is_integer() else value


def _frozen(value):
    "Read a list of numbers, which may be text, as a tuple; YAML hands over 1e-3 as text."
    try:
        if isinstance(value, str): value = ast.literal_eval(value)
        return tuple(_frozen(v) if isinstance(v, (list, tuple)) else float(v) if isinstance(v, str) else v + 0
                     for v in value)
    except (SyntaxError, TypeError, RecursionError, MemoryError):
        raise ValueError('it is not a list of numbers') from None


Text = Annotated[str, BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value)]
Whole = Annotated[int, BeforeValidator(_whole_number)]
Size = Annotated[Whole, Field(ge=0)]
Count = Annotated[Whole, Field(ge=1)]
Width = Annotated[Whole, Field(ge=1, le=2**14)]
Rank = Annotated[Whole, Field(ge=0, le=2**14)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Part = Annotated[float, Field(ge=0, lt=1)]
Turn = Annotated[float, Field(ge=0, le=0.5)]
Dropouts = Annotated[tuple[Part, ...], BeforeValidator(_frozen)]
Pair = Annotated[tuple[Positive, Positive], BeforeValidator(_frozen)]
LayerWidths = Annotated[tuple[Width, ...], BeforeValidator(_frozen), Field(max_length=64)]
Widths = Annotated[tuple[Width, Width], BeforeValidator(_frozen)]
RatePairs = Annotated[tuple[tuple[Amount, Amount], ...], BeforeValidator(_frozen), Field(min_length=1)]
Rates = Annotated[tuple[Amount, ...], Field(min_length=1)]
RateGrid = Annotated[tuple[Rates, Rates], BeforeValidator(_frozen)]


@dataclass(frozen=True)
class DataConfig:
    "What is learned from."
    dataset: Literal['digits', 'cifar10', 'cifar100', 'stl10', 'tiny-imagenet', 'imagefolder'] = 'digits'
    data_root: Text = ''  # folder of the data; empty: $DINOCLS_DATA, else the user's cache
    train_size: Size = 0  # training images; 0: all that are left
    val_size: Count = 360  # validation images, taken out of the training set: every choice is made on them
    test_size: Size = 360  # test images; 0: the whole test set
    split_seed: Size = 42  # seed of the stratified splits
    on_broken: Literal['raise', 'skip'] = 'raise'  # image files that can't be read: an error that lists them, or skip
    on_drift: Literal['raise', 'report'] = 'raise'  # splits that differ: an error that says how, or report


@dataclass(frozen=True)
class ModelConfig:
    "What learns."
    backbone: Literal['book-digits', 'book-cifar',
                      'student-vit32', 'student-vit48', 'student-vit64', 'student-cnn',
                      'dinov2_vits14', 'dinov2_vitb14', 'dinov2_vitl14', 'dinov2_vitg14',
                      'dinov2_vits14_reg', 'dinov2_vitb14_reg', 'dinov2_vitl14_reg', 'dinov2_vitg14_reg',
                      'dinov3_vits16', 'dinov3_vitb16'] = 'book-digits'
    weights: Text = ''  # empty: the published ones; 'official': the authors' file; 'random'; a URL, or a path
    image_size: Width = 32  # side of the image that the backbone sees, in pixels
    pooling: Literal['cls', 'mean', 'cls+mean', 'attention'] = 'cls'  # what the head reads of the backbone's tokens
    head_widths: LayerWidths = (1024, 512, 256)  # hidden layers of the head
    head_dropout: Dropouts = (0.5, 0.5, 0.25)  # dropout after each hidden layer


@dataclass(frozen=True)
class AugmentConfig:
    "How training images are varied, at their native size."
    flip: bool = True  # mirror half of the images
    crop: Annotated[Whole, Field(ge=0, le=2**10)] = 4  # padded crop: largest shift in pixels
    brightness: Part = 0.2  # factor drawn from 1 ± this
    contrast: Part = 0.2  # factor drawn from 1 ± this
    saturation: Part = 0.2  # factor drawn from 1 ± this
    hue: Turn = 0.0  # turn drawn from ± this, in circles; 0: off
    policy: Literal['', 'randaugment', 'autoaugment'] = ''  # a list of operations instead (AutoAugment: CIFAR-10's)
    randaugment_ops: Count = 2  # operations per image
    randaugment_magnitude: Annotated[Whole, Field(ge=0, le=30)] = 9  # their strength
    erasing: Part = 0.25  # probability of Random Erasing
    mixup: Amount = 0.2  # alpha of MixUp; 0: off
    cutmix: Amount = 1.0  # alpha of CutMix; 0: off
    mix_probability: Share = 1.0  # share of the images that are mixed
    cutmix_share: Share = 0.5  # of CutMix among these, where MixUp is on as well


@dataclass(frozen=True)
class TrainConfig:
    "What both phases share."
    seed: Size = 42  # initial weights, order of the images, augmentation, dropout
    batch_size: Count = 64  # images per step, over all processes
    precision: Literal['auto', 'fp32', 'bf16', 'fp16'] = 'auto'
    weight_decay: Amount = 0.05  # of AdamW; norms, biases and positions are exempt
    schedule: Literal['onecycle', 'cosine', 'constant'] = 'onecycle'  # of the rates, each after a warm-up
    warmup: Part = 0.1  # fraction of the steps in which the rates rise
    label_smoothing: Part = 0.1  # mass spread over the other classes
    focal_gamma: Amount = 0.0  # gamma of the focal loss, which counts sure predictions less; 0: cross entropy
    hard_weight: Amount = 0.0  # an image counts in proportion to its loss to this power; 0: all alike
    clip_norm: Amount = 1.0  # largest norm of the gradient; 0: no clipping
    ema_decay: Part = 0.9999  # of the averaged weights; 0: no average
    ema_warmup: bool = True  # let the decay rise from 0, so that short runs forget their start


@dataclass(frozen=True)
class PhasesConfig:
    "Head only, backbone frozen; then end to end."
    phase1_epochs: Count = 10  # passes over the training split
    phase1_lr: Amount = 1e-4  # peak rate of the head
    phase2_epochs: Count = 40  # passes over the training split
    lr_backbone: Amount = 1e-6  # peak rate of the backbone
    lr_head: Amount = 1e-4  # peak rate of the head
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0  # factor on the backbone's rate per block away from the head
    lora_rank: Rank = 0  # rank of LoRA's matrices, trained in place of the backbone's weights; 0: all weights


@dataclass(frozen=True)
class StudyConfig:
    "How deep the studies go."
    members: Count = 2  # models in the ensemble: seeds `seed`, `seed + 1`, …
    study_seeds: Count = 3  # seeds of each ablation row
    study_size: Size = 0  # training images of the studies of chapter 9; 0: all
    study_phase2: bool = False  # train the rows that leave one technique out end to end, and not the head alone
    student: Literal['student-vit32', 'student-vit48', 'student-vit64', 'student-cnn'] = 'student-vit48'  # of A2
    teaching: Literal['labels', 'soft', 'hot', 'labelled', 'features', 'both', 'fixed'] = 'hot'  # how it is taught
    lr_pairs: RatePairs = ((1e-4, 1e-4), (1e-5, 1e-3), (1e-6, 1e-4))  # (backbone, head) rates compared
    lr_grid: RateGrid = ((1e-6, 1e-5, 1e-4), (1e-5, 1e-4, 1e-3))  # rates of backbone and head, all pairs tried once
    knn_k: Count = 3  # neighbours that vote
    attention_images: Count = 100  # images in the attention study, stratified
    corruption_images: Size = 0  # test images that are corrupted, evenly spaced over the split; 0: all
    benchmark_seconds: Positive = 2.0  # time spent at each batch size of the inference benchmark


@dataclass(frozen=True)
class RunConfig:
    "How a run is carried out, which changes results by rounding at most: no result is told apart by it."
    micro_batch: Size = 0  # images that the backbone sees at once; 0: the whole batch, halved when memory runs out
    gradient_checkpointing: bool = False  # keep the blocks' inputs only, and compute the rest again on the way back
    compile: Literal['auto', 'on', 'off'] = 'auto'  # torch.compile for the backbone; auto: on GPUs, for long runs
    checkpoint_every: Count = 5  # epochs between checkpoints
    checkpoint_minutes: Amount = 10.0  # minutes between checkpoints, within an epoch as well
    at_once: Count = 1  # trainings of a study side by side on each device: a small model leaves a GPU idle
    cluster: Literal['none', 'ray', 'dask'] = 'none'  # where the trainings of a study go, instead of this machine
    bad_steps: Count = 10  # steps in a row without a finite gradient, after which training stops
    keep: bool = False  # take stored results of other code or data all the same, and say so


@dataclass(frozen=True)
class ViewConfig:
    "How the views that pre-training compares are drawn, each by its own random numbers."
    view_zoom: Pair = (0.45, 1.0)  # side of the part that is seen, over the side of the image; below 1 anywhere inside
    view_aspect: Amount = 0.15  # largest logarithm of height over width
    view_rotation: Amount = 0.0  # largest angle, in degrees
    view_shear: Amount = 0.0  # largest slope
    view_shift: Amount = 0.0  # largest further shift, over half the side
    view_elastic: Amount = 0.0  # deviation of a smooth random displacement, over half the side
    view_flip: bool = True  # mirror half of the views
    view_brightness: Part = 0.4  # factor drawn from 1 ± this
    view_contrast: Part = 0.4  # factor drawn from 1 ± this
    view_saturation: Part = 0.4  # factor drawn from 1 ± this
    view_hue: Turn = 0.0  # turn drawn from ± this, in circles; 0: off
    view_grey: Amount = 0.2  # probability that all colour is taken away
    view_noise: Amount = 0.0  # largest deviation of added noise, of the range 0 … 1
    view_erasing: Part = 0.0  # probability of Random Erasing
    view_start: Amount = 0.4  # share of all these at the beginning of training; it rises to 1
    view_ramp: Amount = 0.5  # share of training until then


@dataclass(frozen=True)
class PretrainConfig:
    "How the book's own backbones learn without labels (appendix A1)."
    pretrain_method: Literal['dino', 'simclr'] = 'dino'  # a student learns from its own average, or contrast
    pretrain_epochs: Count = 100  # passes over these images
    pretrain_size: Size = 0  # images seen: the training split first, then such as are in no split; 0: that split
    pretrain_from: Text = ''  # weights to go on from, of a backbone or of a whole teacher; empty: a fresh start
    pretrain_batch: Annotated[Whole, Field(ge=2)] = 256  # images per step, two views each, compared with each other
    pretrain_lr: Amount = 1e-3  # peak rate
    projection: Widths = (512, 64)  # widths of the projection head: hidden, bottleneck
    contrast_temperature: Positive = 0.2  # of SimCLR: the smaller, the more the closest strangers count
    prototypes: Annotated[Whole, Field(ge=1, le=2**20)] = 1024  # outputs of the student's head
    centring: Literal['sinkhorn', 'mean'] = 'sinkhorn'  # what keeps the teacher from one answer for all
    teacher_temperature: Positive = 0.05  # below the student's 0.1: the teacher is surer
    teacher_momentum: Annotated[float, Field(gt=0, lt=1)] = 0.99  # of the teacher, at the beginning
    teacher_rise: bool = True  # let it rise to 1, as DINO does; SimCLR's teacher is an average that teaches nobody
    local_views: Size = 0  # further small views per image, which only the student sees
    koleo: Amount = 0.0  # weight of the loss that spreads embeddings
    patch_loss: Amount = 0.0  # weight of the loss on masked patches


@dataclass(frozen=True)
class Config(RunConfig, PretrainConfig, ViewConfig, StudyConfig, PhasesConfig, TrainConfig, AugmentConfig, ModelConfig,
             DataConfig):
    "Every choice there is, in one place."
    preset: str = 'quick'  # the preset that it started from
    out: Text = ''  # run folder; empty: outputs/<preset and overrides>
    device: str = 'auto'  # auto, cpu, cuda, cuda:1, mps

    def __post_init__(self):
        if self.dataset == 'imagefolder' and not self.data_root:
            raise UserError('The dataset imagefolder needs data_root: the folder that holds train/<class>/… and '
                            'test/<class>/….')
        if len(self.head_widths) != len(self.head_dropout):
            raise UserError(f'head_widths has {len(self.head_widths)} entries and head_dropout '
                            f'{len(self.head_dropout)}: give one dropout for each hidden layer.')

    @property
    def folder(self) -> Path:
        "Run folder."
        return expand(self.out).resolve() if self.out else root()/'outputs'/run_name(self)


FIELDS = {f.name: f for f in dataclasses.fields(Config)}
WHERE = ('preset', 'out', 'device', *RunConfig.__dataclass_fields__)  # say where or how, and change no result


def choices(name: str) -> tuple:
    "Return the words that a field may take."
    return get_args(FIELDS[name].type)


def make(**values) -> Config:
    "Return a configuration. Raise `UserError` with one sentence for the first field that is unknown or impossible."
    for name in values:
        if name not in FIELDS: raise UserError(f'Unknown field {name!r} in the configuration: {nearest(name, FIELDS)}')
    try: return Config(**values)
    except ValidationError as e: first = e.errors()[0]
    def short(value): return text if len(text := repr(value)) < 100 else f'{text[:100]}…'
    (name, *place), given, kind, limits = first['loc'], first['input'], first['type'], first.get('ctx', {})
    if kind == 'literal_error': raise UserError(f'Unknown {name} {short(given)}: {nearest(given, choices(name))}')
    words = {'greater_than_equal': 'at least {ge}', 'greater_than': 'above {gt}', 'less_than': 'below {lt}',
             'less_than_equal': 'at most {le}', 'too_short': 'at least {min_length} long'}
    expected = {bool: 'true or false', int: 'a whole number', float: 'a number', str: 'text',
                tuple: f'a list of numbers, as in {FIELDS[name].default}'}[type(FIELDS[name].default)]
    must = f'it must be {words[kind].format(**limits)}' if kind in words else f'expected {expected}'
    raise UserError(f'{name}={short(given)}{" (within the list)" if place else ""} in the configuration: {must}.')


def root() -> Path:
    """Return the project's folder: $DINOCLS_HOME, the checkout around the current folder or this package, else the
    current folder."""
    if os.environ.get('DINOCLS_HOME'): return expand(os.environ['DINOCLS_HOME']).resolve()
    here = Path.cwd().resolve()
    for folder in (here, *here.parents, Path(__file__).resolve().parents[2]):
        settings = folder/'settings.ini'
        if settings.is_file() and 'lib_name = dinocls' in settings.read_text(encoding='utf-8'): return folder
    return here


def run_name(cfg: Config) -> str:
    "Name a run by its preset and by what differs from it, as in `quick+seed=7`."
    base = preset(cfg.preset)
    changed = [f'{name}={getattr(cfg, name)}' for name in FIELDS
               if name not in WHERE and getattr(cfg, name) != getattr(base, name)]
    name = '+'.join([cfg.preset, *changed])
    plain = ''.join(c if c.isalnum() or c in '._=+-' else '_' for c in name)
    return plain if len(plain) <= 80 else f'{cfg.preset}+{digest(name)[:12]}'


@dataclasses.dataclass(frozen=True)
class Preset:
    "A named configuration, with its price and its promise."
    purpose: str  # what it is for
    cost: str  # time and hardware
    expect: str  # what comes out
    fields: dict  # differences from the defaults of `Config`


_DIGITS = dict(dataset='digits', backbone='book-digits', image_size=32, flip=False, crop=1, batch_size=32,
               phase1_lr=1e-2, lr_backbone=1e-4, lr_head=1e-2, lr_pairs=((1e-2, 1e-2), (1e-3, 1e-1), (1e-4, 1e-2)),
               lr_grid=((1e-4, 1e-3, 1e-2), (1e-3, 1e-2, 1e-1)),
               view_zoom=(0.85, 1.18), view_rotation=15.0, view_shear=0.15, view_shift=0.12, view_elastic=0.12,
               view_flip=False, view_brightness=0.3, view_saturation=0.0, view_grey=0.0, view_noise=0.05,
               view_erasing=0.25, pretrain_batch=128, pretrain_lr=2e-3, prototypes=128, teacher_momentum=0.9)
_SMOKE = _DIGITS | dict(train_size=200, val_size=100, test_size=100, batch_size=50, phase1_epochs=2, phase2_epochs=2,
                        members=2, study_seeds=2, lr_grid=((1e-4, 1e-2), (1e-2,)), attention_images=20,
                        corruption_images=12, benchmark_seconds=0.1, pretrain_epochs=2, pretrain_batch=50)
# Ten labels a class; the images that are in no split are the pool that pre-training sees besides, without labels.
_QUICK = _DIGITS | dict(train_size=100, val_size=200, test_size=900, batch_size=20, phase1_epochs=10, phase2_epochs=10,
                        lr_head=1e-3,  # phase 1 has trained the head; chapter 9 has the runs at 1e-2, too
                        members=3, study_seeds=8, at_once=2, checkpoint_every=10, corruption_images=150,
                        benchmark_seconds=0.5, pretrain_method='simclr', pretrain_size=697, pretrain_epochs=16)
# Memory on a CPU at batch_size=128: 2.4 GB while everything is trained, 2.8 GB with LoRA, of which about 1.4 GB are
# activations kept for the way back, in proportion to the batch (micro_batch bounds them); images are held once, 0.2 GB.
_CIFAR = dict(dataset='cifar10', val_size=5000, test_size=0, backbone='book-cifar', image_size=32,
              batch_size=512, phase1_epochs=10, phase1_lr=1e-3, phase2_epochs=60, lr_backbone=1e-3, lr_head=1e-3,
              members=3, study_size=5000, lr_pairs=((1e-2, 1e-2), (1e-4, 1e-2), (1e-3, 1e-3)),
              lr_grid=((1e-5, 1e-4, 1e-3, 1e-2), (1e-3, 1e-2)),
              # see benchmarks/recipe.py, which did not try these together; gpu.py takes batches of 1024 at 2e-3.
              # 128 images take 3.0 GB on a CPU, 256 take 4.5 GB
              pretrain_method='simclr', pretrain_batch=128, view_hue=0.1, teacher_rise=False)
_LAPTOP = _CIFAR | dict(train_size=2500, val_size=2500, batch_size=64, phase1_epochs=3, phase2_epochs=4,
                        lr_backbone=1e-4, members=3, at_once=2, study_size=500,
                        study_seeds=6,  # the fewest of which a test by signs can tell anything at 5 %
                        lr_pairs=((1e-3, 1e-3),), lr_grid=((1e-5, 1e-4, 1e-3), (1e-3, 1e-2)),
                        corruption_images=150, benchmark_seconds=0.5, pretrain_size=5000, pretrain_epochs=1)
_REFERENCE = dict(dataset='cifar10', val_size=5000, test_size=0, backbone='dinov2_vitb14', image_size=224,
                  batch_size=64, precision='fp16', corruption_images=1000)
_BEST = _REFERENCE | dict(corruption_images=2000, batch_size=256, precision='bf16', phase2_epochs=20,
                          lr_backbone=1e-5, lr_head=1e-3, members=3)

PRESETS = {
    'smoke': Preset('tests: each chapter in seconds', '2 min for the book on 2 CPU cores, no network',
                    'every cell runs; the scores mean nothing', _SMOKE),
    'quick': Preset('the embedded default: real digits, ten labels a class',
                    '9 min on 2 CPU cores; no network',
                    'a small ViT, pre-trained without labels: about 94 % on 900 test digits', _QUICK),
    'laptop': Preset('CIFAR-10 itself on two cores: 2,500 labels, all 10,000 test images',
                     '57 min on 2 CPU cores with AMX; CIFAR-10 download of 170 MB',
                     'two phases: 67.6 % of 10,000 test images, everything at once 69.8 %', _LAPTOP),
    'cifar': Preset('a real experiment without a model download',
                    'on an H100 1.4 s an epoch of pre-training and 3.1 s of phase 2; all else 11 min on 2 CPU cores; '
                    'CIFAR-10 download of 170 MB',
                    'after 8 of the 60 epochs of phase 2 83.5 % of 10,000 test images; the whole not measured yet',
                    _CIFAR),
    'reference': Preset('the reference recipe exactly',
                        '6 h on a T4 as reported, 41 min of training on an H100 by measured steps; model download of '
                        '350 MB',
                        '99.4 % on the test set as reported, not measured yet', _REFERENCE),
    'best': Preset('the same model on a large GPU',
                   '19 min of training on an H100 by measured steps; model download of 350 MB', 'not measured yet',
                   _BEST),
}


def preset(name: str,  # name of a preset
           **overrides) -> Config:  # single fields
    "Return the configuration of a preset, with single fields overridden. Raise `UserError` for a wrong name or value."
    if name not in PRESETS: raise UserError(f'Unknown preset {name!r}: {nearest(name, PRESETS)}')
    return make(**PRESETS[name].fields | {'preset': name} | overrides)


def parse_overrides(text: str) -> dict:
    "Read `'seed=7 lr_head=1e-3'` as a dict of texts."
    try: pairs = [word.partition('=') for word in shlex.split(text)]
    except ValueError as e: raise UserError(f'The overrides {text!r} cannot be read ({e}).') from None
    bad = [name + equals for name, equals, value in pairs if not (name and equals)]
    if bad: raise UserError(f'{bad[0]!r} in the overrides {text!r} is not of the form field=value.')
    return {name: value for name, _, value in pairs}


def format_overrides(cfg: Config) -> str:
    "Write what a configuration changes in its preset, so that `parse_overrides` reads it back."
    base = preset(cfg.preset)
    return ' '.join(shlex.quote(f'{name}={getattr(cfg, name)}') for name in FIELDS
                    if name not in ('preset', 'out') and getattr(cfg, name) != getattr(base, name))
