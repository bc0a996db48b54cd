"The command `dinocls`."
import contextlib
import glob
import json
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from ..kit import config as configuration
from ..kit.config import PRESETS, Config, parse_overrides, root
from ..kit.datasets import at_hand, loaded
from ..kit.fetch import FULL, data_folder, remote, weights_at_hand
from ..kit.files import UserError, as_os_error, expand, explain, nearest, reason, replacing
from ..kit.machine import hardware, rank, version, versions
from ..kit.pictures import pictures, to_pixels
from ..kit.stage import open_run
from .driver import chapters, duration, jobs, run_book, short, stages
from .site import RECORD, generated, repositories
from .website import build_site


def settings(preset: str, config: Path | None, fields: list[str] | None, out: Path | None) -> Config:
    "Return the configuration that the command line asks for: a preset or a YAML file, then single fields."
    given = _read_yaml(config) if config else {}
    if config and preset and given.get('preset', preset) != preset:
        raise UserError(f'--preset {preset} contradicts preset: {given["preset"]} in {config}: give one of them.')
    name = str(given.pop('preset', preset or 'quick'))
    given |= parse_overrides(shlex.join(fields or []))
    for field in ('data_root', 'weights'):  # chapters run in the project's folder, paths are meant from this one
        value = given.get(field, '')
        if value not in ('', 'random', 'official') and '://' not in str(value) and Path.cwd() != root():
            given[field] = str(expand(value).absolute())
    return configuration.preset(name, **given | ({'out': str(out)} if out else {}))


def _read_yaml(path: Path) -> dict:
    "Read a configuration file: `preset: quick` and single fields."
    import yaml
    wrong = (yaml.YAMLError, ValueError, RecursionError), f'{path} is not YAML', 'write lines of the form field: value.'
    with explain(OSError, f'{path} cannot be read', 'give a YAML file.'), explain(*wrong):
        given = yaml.safe_load(path.read_text(encoding='utf-8'))
    if not isinstance(given, dict): raise UserError(f'{path} holds no fields: write lines of the form field: value.')
    empty = [str(k) for k, v in given.items() if v is None]
    if empty: raise UserError(f'{path} gives {empty[0]} no value: write one behind the colon, or delete the line.')
    return {str(k): v for k, v in given.items()}


app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode='rich',
                  help='Run the experiment book, or a part of it.',
                  context_settings={'help_option_names': ['-h', '--help']})
Option = typer.Option


@app.callback(invoke_without_command=True)
def common(wanted: Annotated[bool, Option('--version', help='show the version')] = False):
    if wanted:
        print(f'dinocls {version()}')
        raise typer.Exit


PresetOption = Annotated[str, Option(
    '--preset', '-p', help='smoke, quick, laptop, cifar, reference or best; quick if nothing is said')]
ConfigOption = Annotated[Path | None, Option('--config', '-c', help='YAML file: `preset: …` and single fields')]
SetOption = Annotated[list[str] | None, Option('--set', '-s', help='field=value, may be repeated')]
OutOption = Annotated[Path | None, Option('--out', '-o', help='run folder; default outputs/<preset and changes>')]


@app.command()
def run(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None,
        chapters: Annotated[str, Option(help="which, as in '5-8,12-'; default all")] = '', out: OutOption = None,
        force: Annotated[bool, Option('--force', help='compute anew what the chapters have stored')] = False,
        keep: Annotated[bool, Option('--keep', help='take what is stored of other code or data too; mark it')] = False,
        backend: Annotated[str, Option('--backend', help='ray or dask: the cluster that trains for studies')] = '',
        eager: Annotated[bool, Option(
            '--eager', help='start chapters at once, to wait for stages and not for chapters')] = False):
    "Execute chapters through papermill, side by side where they are independent."
    fields = [*(set or []), *(['keep=true'] if keep else []), *([f'cluster={backend}'] if backend else [])]
    raise typer.Exit(run_book(settings(preset, config, fields, out), chapters, force, eager))


@app.command()
def stage(name: Annotated[str, typer.Argument(help='name of a stage, see `dinocls list`')],
          preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Compute one stage, and those before it, without a notebook."
    cfg, known = settings(preset, config, set, out), stages()
    if name not in known: raise UserError(f'There is no stage {name!r}: {nearest(name, known)}')
    open_run(cfg)
    result = known[name](cfg)
    if not rank(): print(f'{name}: {short(result.folder)} ({duration(result.record["seconds"])})')


@app.command('list')
def list_(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Show chapters, presets, and which stages are computed."
    from rich import box
    from rich.console import Console
    from rich.table import Table
    cfg, console = settings(preset, config, set, out), Console(force_jupyter=False)
    presets = [(name, p.purpose, p.cost, p.expect) for name, p in PRESETS.items()]
    computed = [(s.name, s.module, 'yes' if s.is_done(cfg) else 'no') for s in stages().values()]
    book = [(c.name, c.claim) for c in chapters()] if (root()/'nbs').is_dir() else []  # none beside the library alone
    for title, columns, rows in (('Chapters', ('chapter', 'claim'), book),
                                 ('Presets', ('preset', 'for', 'cost', 'expect'), presets),
                                 (f'Stages of {short(cfg.folder)}', ('stage', 'chapter', 'computed'), computed)):
        table = Table(*columns, title=title, title_justify='left', box=box.SIMPLE_HEAD)
        for row in rows: table.add_row(*row)
        console.print(table)


@app.command()
def download(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None):
    "Fetch the data and the weights that a preset needs."
    from ..model import backbone
    cfg = settings(preset, config, set, None)
    data = loaded(cfg)
    print(f'{_data_at_hand(cfg)}: {len(data.images):,} images.')
    backbone(cfg.backbone, cfg.image_size, cfg.weights or None)
    print(f'weights: {_weights_at_hand(cfg)}.')


@app.command()
def publish(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None,
            study: Annotated[bool, Option(
                help='try each ingredient by exchanging it, which takes longer than all else')] = True):
    "Pre-train one of the book's own backbones and put its weights into the package."
    from ..pretrain import publish as make
    print(f'{short(make(settings(preset, config, set, out), study=study))} is written, and its record beside it.')


@app.command()
def train(folder: Annotated[Path, typer.Argument(
              help='pictures in folders of their classes, folder/cat/1.jpg, or in train/, val/ and test/ with these')],
          minutes: Annotated[float, Option('--minutes', min=0.1, help='time that training may take')] = 10.0,
          set: SetOption = None, out: OutOption = None):
    "Learn from your own pictures: look them over, choose a model, train it, and say what came of it."
    from .train import learn, plan, report, shortcomings
    cfg, told = plan(folder, minutes, out, parse_overrides(shlex.join(set or [])))
    open_run(cfg)
    for sentence in (*told, *shortcomings(cfg)): print(sentence, flush=True)
    print('', report(learn(cfg)), sep='\n')


A_MODEL = "production folder, stage folder or checkpoint; default: the run's production folder"
ModelOption = Annotated[Path | None, Option('--model', '-m', help=A_MODEL)]
DeviceOption = Annotated[str, Option('--device', help='auto, cpu, cuda or cuda:1')]
BackendOption = Annotated[str, Option('--backend', '-b', help='torch, or one of those that `dinocls bench` lists; '
                                      'auto: the fastest that keeps the predictions')]


def served_path(model: Path | None, cfg: Config) -> Path:
    "Return the model that a command is to use, trained if need be."
    from ..inference import production
    if model: return model
    if not (cfg.folder/'production').is_dir():
        print(f'Note: {short(cfg.folder)} holds no model yet, so it is made first.', file=sys.stderr)
    open_run(cfg)
    return production(cfg)


def find_pictures(paths: list[str]) -> list:  # Path, or bytes of what came in
    """Return the pictures that are meant: files, all that is in folders, what patterns match, and standard input for a
    dash. What is not there stays, to be told."""
    Image.init()  # which endings are a picture's
    found = []
    for text in paths:
        path = expand(text)
        if text == '-': found.append(sys.stdin.buffer.read())
        elif path.is_dir():
            inside = [f for f in pictures(path) if f.suffix.lower() in Image.EXTENSION]
            if not inside: raise UserError(f'{text} is a folder without pictures: give one that holds some.')
            found += inside
        elif path.exists(): found.append(path)
        else: found += sorted(f for f in map(Path, glob.glob(str(path), recursive=True)) if f.is_file()) or [path]
    return found


def answer_line(name: str, found: dict, top: int) -> str:
    "Return an answer as a line."
    best = sorted(found['probabilities'].items(), key=lambda pair: -pair[1])[:top]
    words = ', '.join(f'{c} {100 * p:.1f} %' for c, p in best)
    return f'{name}: {words}{" (uncertain)" if found["uncertain"] else ""}'


def draw_attention(served, items: list, names: list, file: Path) -> Path:
    """Draw the last block's mean attention and its heads over the first pictures that can be used. Raise `UserError` if
    there are none, or the file can't be written."""
    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    from ..attention import draw_maps, gather_attention
    usable = {}
    for item, name in zip(items, names):
        with contextlib.suppress(UserError): usable[name] = to_pixels(item, served.native)
        if len(usable) == 12: break
    if not usable: raise UserError('There is no picture to draw attention over.')
    shown = np.stack(list(usable.values()))
    images = torch.from_numpy(shown).permute(0, 3, 1, 2).contiguous()
    heads = gather_attention(served.model, images, served.cfg, slice(-1, None))[0][:, 0]
    maps = np.concatenate([heads.mean(1, keepdims=True), heads[:, :6]], 1)
    answers = [a['prediction'] for a in served.answers(list(shown))]
    columns = ['mean', *(f'head {i}' for i in range(1, maps.shape[1]))]
    fig = draw_maps(shown, maps, answers, columns, 'Where the last block looks')
    with replacing(file) as tmp, as_os_error(): fig.savefig(tmp, format=file.suffix.lstrip('.') or 'png')
    plt.close(fig)
    return file


@app.command()
def predict(paths: Annotated[list[str], typer.Argument(
                help='pictures, folders, patterns; - reads a picture from standard input')],
            model: ModelOption = None,
            top: Annotated[int, Option('--top', '-k', min=1, help='how many classes to show')] = 1,
            as_json: Annotated[bool, Option('--json', help='a line of JSON a picture')] = False,
            attention: Annotated[Path | None, Option(
                '--attention', help='draw what the model looked at, for up to 12 pictures, into this file')] = None,
            device: DeviceOption = 'auto', backend: Annotated[str, Option(
                '--backend', '-b', help='torch, which starts at once; or as for serve, where auto has each backend '
                'answer up to 256 pictures, once per model')] = 'torch',
            preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Classify pictures, a line each; exit with 1 if some could not be used."
    from ..inference import ProductionModel
    items, failed = find_pictures(paths), False
    served = ProductionModel(served_path(model, settings(preset, config, set, out)), device, backend)
    names = ['standard input' if isinstance(i, bytes) else str(i) for i in items]
    for start in range(0, len(items), 256):
        for name, found in zip(names[start:], served.predict_batch(items[start:start + 256], on_error='return')):
            failed |= 'error' in found
            if as_json: print(json.dumps({'path': name, **found}))
            elif 'error' in found:
                print(f'{name}: {re.sub(r"^Cannot use images.*?: ", "", found["error"])}', file=sys.stderr)
            else: print(answer_line(name, found, top), flush=True)
    if attention:
        drawn = draw_attention(served, items, names, attention)
        print(f'{short(drawn)} shows where the model looked.', file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


@app.command()
def export(kind: Annotated[str, typer.Argument(help='onnx or onnx-int8')],
           to: Annotated[Path, Option('--to', help='file to write')] = Path('model.onnx'), model: ModelOption = None,
           preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Write the model, its preprocessing included, as one file for other runtimes."
    import torch
    from ..inference import ProductionModel
    from ..kit.engines import export_to, lacking
    if kind not in ('onnx', 'onnx-int8'):
        raise UserError(f'There is no export {kind!r}: {nearest(kind, ["onnx", "onnx-int8"])}')
    if why := lacking(kind, torch.device('cpu')): raise UserError(f'The export to ONNX {why}.')  # before one is trained
    served = ProductionModel(served_path(model, settings(preset, config, set, out)), 'cpu')
    export_to(served.subject, to, int8=kind == 'onnx-int8')
    height, width = served.native
    print(f'{short(to)}: {to.stat().st_size / 1e6:.1f} MB; images uint8 (n, 3, {height}, {width}) to logits float32 '
          f'(n, {len(served.classes)}); probabilities are softmax(logits / {served.temperature:.4g}).')


@app.command()
def bench(model: ModelOption = None,
          backend: Annotated[list[str] | None, Option(
              '--backend', '-b', help='may be repeated; all that are there unless given')] = None,
          batch: Annotated[str, Option('--batch', help='batch sizes')] = '1,8,32',
          seconds: Annotated[float, Option('--seconds', help='time for each size')] = 1.0,
          device: DeviceOption = 'auto',
          preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Time the model from pixels and from PNG files, with every backend that is there."
    from ..inference import ProductionModel, benchmark
    from ..kit.engines import BACKENDS, processor
    try: sizes = [int(b) for b in batch.split(',')]
    except ValueError: raise UserError(f'--batch {batch}: give whole numbers, as in 1,8,32.') from None
    path = served_path(model, settings(preset, config, set, out))
    print(f'{"backend":14} {"input":7} {"batch":>5} {"images/s":>10} {"p50 ms":>9} {"p95 ms":>9} {"p99 ms":>9}')
    for name in backend or BACKENDS:
        try: served = ProductionModel(path, device, name)
        except UserError as e:
            if backend or name == 'torch': raise
            print(f'{name:14} {e}')
            continue
        for r in benchmark(served, None, sizes, seconds)['rows']:
            print(f'{served.backend:14} {r["input"]:7} {r["batch"]:5} {r["images_per_second"]:10,.1f} '
                  f'{r["p50_ms"]:9.2f} {r["p95_ms"]:9.2f} {r["p99_ms"]:9.2f}', flush=True)
    known, about = served.config, ', '.join(f'{k} {v}' for k, v in versions().items())
    print(f'{known["backbone"]} at {known["image_size"]} px on {processor(served.device)}; {about}')


@app.command()
def serve(folder: Annotated[Path | None, typer.Argument(help=A_MODEL)] = None,
          host: Annotated[str, Option(help='address to listen on; 0.0.0.0: every one of this machine')] = '127.0.0.1',
          port: Annotated[int, Option(help='port to listen on; 0: any that is free')] = 8000,
          api_key: Annotated[str, Option(envvar='DINOCLS_API_KEY', help='what clients have to send; better set in the '
                                         'environment, where no list of processes shows it')] = '',
          device: DeviceOption = 'auto', backend: BackendOption = 'auto',
          page: Annotated[bool, Option(help='a page for the browser')] = True,
          name: Annotated[list[str] | None, Option(
              help='what clients call this machine beside its numbers; may be repeated')] = None,
          limit: Annotated[list[str] | None, Option(
              '--limit', '-l', help='name=value, may be repeated: max_bytes, max_queue, timeout, …')] = None,
          replicas: Annotated[int, Option(
              min=1, help='processes that each hold the model and share the requests out, through Ray Serve')] = 1,
          preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Answer over HTTP, until it is stopped."
    from ..inference import ProductionModel
    from .replicas import prepare, run
    from .service import limits_from, listen, serve as start
    limits = parse_overrides(shlex.join(limit or []))
    bounds = limits_from(limits)  # what can be refused is refused before work begins
    with listen(host, port) as free: at = free.getsockname()[1]
    if replicas > 1: prepare(replicas, device)
    served = ProductionModel(path := served_path(folder, settings(preset, config, set, out)), device, backend)
    if replicas == 1: return start(served, host, port, api_key, page, name or (), **limits)
    del served
    run(expand(path).resolve(), replicas, device, backend, host, at, api_key, page, name or (), bounds)


@app.command()
def doctor(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Show versions, devices, memory, data and weights at hand, and what would be used."
    import torch
    from ..model import device, precision
    cfg, machine = settings(preset, config, set, out), hardware()
    where, supported = device(cfg), torch.backends.cpu.get_cpu_capability()
    free = shutil.disk_usage(next(p for p in (cfg.folder, *cfg.folder.parents) if p.exists())).free
    for name, value in {
            **versions(), 'processor': f'{machine["cpu"]}, {machine["cores"]} cores, {supported}',
            'memory': f'{machine["memory_gb"]} GB', 'gpu': machine.get('gpu', 'none'), 'root': root(),
            'run folder': f'{cfg.folder} ({free / 2**30:.0f} GB free)', 'preset': cfg.preset, 'device': where,
            'precision': precision(cfg, where), 'side by side': f'{jobs(cfg)} chapters',
            'data': _data_at_hand(cfg), 'weights': _weights_at_hand(cfg)}.items(): print(f'{name:<12} {value}')


def _data_at_hand(cfg: Config) -> str:
    "Say whether the configured dataset is there, without fetching it."
    if cfg.dataset == 'digits': return 'digits, inside scikit-learn'
    if cfg.dataset == 'imagefolder':
        return cfg.data_root + ('' if Path(cfg.data_root, 'train').is_dir() else ' (no train folder there)')
    found = at_hand(cfg.dataset, cfg.data_root)
    where = f'is not in {data_folder(cfg.data_root)} yet: dinocls download fetches it'
    return f'{cfg.dataset} in {found}' if found else f'{cfg.dataset} {where}'


def _weights_at_hand(cfg: Config) -> str:
    "Say whether the configured weights are there, without fetching them."
    from ..model import BACKBONES
    if cfg.weights == 'random': return 'random'
    file = weights_at_hand(cfg.backbone, cfg.weights, BACKBONES[cfg.backbone].timm)
    if not cfg.weights and not BACKBONES[cfg.backbone].timm:
        return f'{cfg.backbone}, {"inside" if file else "not in"} the package'
    if file: return f'{cfg.backbone} in {file}'
    if cfg.weights and not remote(cfg.weights): return f'{cfg.weights} (not there)'
    return f'{cfg.backbone} is not in the cache yet: dinocls download fetches it'


@app.command()
def sync(check: Annotated[bool, Option(
        '--check', help='change nothing; exit with 1 if something would change')] = False):
    "Bring badges, Colab cells and generated blocks of README and docs up to date with settings and committed run."
    texts = [generated(chapters(), repo) for repo in repositories()]
    def good(path): return {t[path] for t in (texts if check else texts[:1])}  # a fresh clone need not be its owner's
    stale = {p: text for p, text in texts[0].items() if p.read_text(encoding='utf-8') not in good(p)}
    for path, text in stale.items():
        print(f'{short(path)} {"is out of date: run dinocls sync" if check else "brought up to date"}')
        if not check:
            with replacing(path) as tmp: tmp.write_text(text, encoding='utf-8')
    raise typer.Exit(1 if check and stale else 0)


@app.command()
def site(run: Annotated[Path | None, Option('--run', help=f'folder of a whole run; default {RECORD}')] = None,
         to: Annotated[Path | None, Option('--to', help="the site's folder; default _site")] = None):
    "Build the book's site from the executed chapters of a run."
    begin, page = time.time(), build_site((run or root()/RECORD).resolve(), to or root()/'_site', chapters())
    print(f'The site is built in {duration(time.time() - begin)}: open {short(page)}')


# in what libraries say when the system gives no more: for arrays, for a library itself, for a thread
NO_MEMORY = 'allocate memory', 'out of memory', 'failed to map segment', "can't start new thread"


def shortage(error: Exception) -> str:
    "Say what the machine lacks, if that is why something failed; else nothing."
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return f'Memory ran out ({reason(error)}): end what else needs it, or raise the limit of this process.'
    if getattr(error, 'errno', None) in FULL and error.filename:
        return (f'Cannot write {error.filename}: {reason(error)}; free space there, make it writable, or choose '
                'another folder with --out.')
    return ''


def main():
    "Run the command line."
    for stream in (sys.stdout, sys.stderr): stream.reconfigure(errors='replace')  # not every terminal has all signs
    try: app()
    except KeyboardInterrupt: sys.exit(130)
    except Exception as e:
        if not (told := str(e) if isinstance(e, UserError) else shortage(e)): raise
        print(f'dinocls: {told}', file=sys.stderr)
        sys.exit(2)
