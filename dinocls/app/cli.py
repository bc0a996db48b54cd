"The command `dinocls`."
import contextlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from ..kit import config as configuration
from ..kit.config import PRESETS, Config, parse_overrides, root
from ..kit.files import UserError, as_os_error, nearest, reason, replacing
from ..kit.machine import hardware, rank, versions
from ..kit.stage import open_run
from .driver import chapters, duration, jobs, run_book, short, stages
from .site import as_source, chapter_table, preset_table


def settings(preset: str, config: Path | None, fields: list[str], out: Path | None) -> Config:
    "Return the configuration that the command line asks for: a preset or a YAML file, then single fields."
    given = _read_yaml(config) if config else {}
    if config and preset and given.get('preset', preset) != preset:
        raise UserError(f'--preset {preset} contradicts preset: {given["preset"]} in {config}: give one of them.')
    name = given.pop('preset', None) or preset or 'quick'
    given |= parse_overrides(' '.join(shlex.quote(f) for f in fields))
    for field in ('data_root', 'weights'):  # chapters run in the project's folder, paths are meant from this one
        if given.get(field, '') in ('', 'random', 'official') or '://' in str(given[field]) or Path.cwd() == root(): continue
        given[field] = str(Path(given[field]).expanduser().absolute())
    return configuration.preset(name, **given | ({'out': str(out)} if out else {}))


def _read_yaml(path: Path) -> dict:
    "Read a configuration file: `preset: quick` and single fields."
    import yaml
    try: given = yaml.safe_load(path.read_text(encoding='utf-8'))
    except OSError as e: raise UserError(f'{path} cannot be read ({e.strerror}): give the path of a YAML file.') from None
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f'{path} is not YAML ({reason(e)}): write lines of the form field: value.') from None
    if not isinstance(given, dict): raise UserError(f'{path} holds no fields: write lines of the form field: value.')
    return {str(k): v for k, v in given.items()}


app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode='rich',
                  help='Run the experiment book, or a part of it.', context_settings={'help_option_names': ['-h', '--help']})

PresetOption = Annotated[str, typer.Option('--preset', '-p', help='smoke, quick, laptop, cifar, reference or best; quick if nothing is said')]
ConfigOption = Annotated[Path | None, typer.Option('--config', '-c', help='YAML file: `preset: …` and single fields')]
SetOption = Annotated[list[str] | None, typer.Option('--set', '-s', help='field=value, may be repeated')]
OutOption = Annotated[Path | None, typer.Option('--out', '-o', help='run folder; default outputs/<preset and changes>')]


@app.command()
def run(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None,
        chapters: Annotated[str, typer.Option(help="which, as in '5-8,12'; default all")] = '',
        out: OutOption = None,
        force: Annotated[bool, typer.Option('--force', help='compute anew what the chapters have stored')] = False,
        eager: Annotated[bool, typer.Option('--eager', help='start chapters at once, to wait for stages and not for chapters')] = False):
    "Execute chapters through papermill, side by side where they are independent."
    raise typer.Exit(run_book(settings(preset, config, set or [], out), chapters, force, eager))


@app.command()
def stage(name: Annotated[str, typer.Argument(help='name of a stage, see `dinocls list`')],
          preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Compute one stage, and those before it, without a notebook."
    cfg, known = settings(preset, config, set or [], out), stages()
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
    cfg, console = settings(preset, config, set or [], out), Console(force_jupyter=False)
    for title, columns, rows in (
            ('Chapters', ('chapter', 'claim'), [(c.name, c.claim) for c in chapters()]),
            ('Presets', ('preset', 'for', 'cost', 'expect'), [(n, p.purpose, p.cost, p.expect) for n, p in PRESETS.items()]),
            (f'Stages of {short(cfg.folder)}', ('stage', 'chapter', 'computed'),
             [(s.name, s.module, 'yes' if s.is_done(cfg) else 'no') for s in stages().values()])):
        table = Table(*columns, title=title, title_justify='left', box=box.SIMPLE_HEAD)
        for row in rows: table.add_row(*row)
        console.print(table)


@app.command()
def download(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None):
    "Fetch the data and the weights that a preset needs."
    from ..kit.datasets import load_dataset
    from ..model import backbone, weights_at_hand
    cfg = settings(preset, config, set or [], None)
    data = load_dataset(cfg.dataset, cfg.data_root, cfg.on_broken)
    print(f'{_data_at_hand(cfg)}: {len(data.images):,} images.')
    backbone(cfg.backbone, cfg.image_size, cfg.weights or None)
    file = weights_at_hand(cfg.backbone, cfg.weights)
    print(f'{cfg.backbone}: {f"weights are at hand in {file}" if file else "random weights, nothing to fetch"}.')


@app.command()
def publish(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None,
            study: Annotated[bool, typer.Option(help='try each ingredient by exchanging it, which takes longer than all else')] = True):
    "Pre-train one of the book's own backbones and put its weights into the package."
    from ..pretrain import publish as make
    print(f'{short(make(settings(preset, config, set or [], out), study=study))} is written, and its record beside it.')


ModelOption = Annotated[Path | None, typer.Option('--model', '-m', help="production folder, stage folder or checkpoint; default: the run's production folder")]
DeviceOption = Annotated[str, typer.Option('--device', help='auto, cpu, cuda or cuda:1')]
BackendOption = Annotated[str, typer.Option('--backend', '-b', help='torch, or one of those that `dinocls bench` lists; auto: the fastest that keeps the predictions')]


def served_path(model: Path | None, cfg: Config) -> Path:
    "Return the model that a command is to use, trained if need be."
    from ..inference import production
    if model: return model
    if not (cfg.folder/'production').is_dir(): print(f'Note: {short(cfg.folder)} holds no model yet, so it is made first.', file=sys.stderr)
    open_run(cfg)
    return production(cfg)


def find_pictures(paths: list[str]) -> list:  # Path, or bytes of what came in
    "Return the pictures that are meant: files, all that is in folders, what patterns match, and standard input for a dash. What is not there stays, to be told."
    import glob
    from ..kit.pictures import pictures
    found = []
    for text in paths:
        path = Path(text).expanduser()
        if text == '-': found.append(sys.stdin.buffer.read())
        elif path.is_dir():
            inside = [f for folder in (path, *sorted(p for p in path.rglob('*') if p.is_dir())) for f in pictures(folder)]
            if not inside: raise UserError(f'{text} is a folder without pictures: give one that holds some.')
            found += inside
        else: found += [path] if path.exists() else sorted(Path(f) for f in glob.glob(str(path), recursive=True) if Path(f).is_file()) or [path]
    return found


def answer_line(name: str, found: dict, top: int) -> str:
    "Return an answer as a line."
    best = sorted(found['probabilities'].items(), key=lambda pair: -pair[1])[:top]
    return f'{name}: ' + ', '.join(f'{c} {100 * p:.1f} %' for c, p in best) + (' (uncertain)' if found['uncertain'] else '')


def draw_attention(served, items: list, names: list, file: Path) -> Path:
    "Draw the last block's mean attention and its heads over the first pictures that can be used. Raise `UserError` if there are none, or the file can't be written."
    import matplotlib.pyplot as plt
    import numpy as np
    import torch
    from ..attention import draw_maps, gather_attention
    from ..kit.pictures import to_pixels
    pictures = {}
    for item, name in zip(items, names):
        with contextlib.suppress(UserError): pictures[name] = to_pixels(item, served.native)
        if len(pictures) == 12: break
    if not pictures: raise UserError('There is no picture to draw attention over.')
    shown = np.stack(list(pictures.values()))
    heads = gather_attention(served.model, torch.from_numpy(shown).permute(0, 3, 1, 2).contiguous(), served.cfg, slice(-1, None))[0][:, 0]
    answers = [a['prediction'] for a in served.answers(list(shown))]
    maps = np.concatenate([heads.mean(1, keepdims=True), heads[:, :6]], 1)
    fig = draw_maps(shown, maps, answers, ['mean', *(f'head {i + 1}' for i in range(maps.shape[1] - 1))], 'Where the last block looks')
    with replacing(file) as tmp, as_os_error(): fig.savefig(tmp, format=file.suffix.lstrip('.') or 'png')
    plt.close(fig)
    return file


@app.command()
def predict(paths: Annotated[list[str], typer.Argument(help='pictures, folders, patterns; - reads a picture from standard input')],
            model: ModelOption = None, top: Annotated[int, typer.Option('--top', '-k', min=1, help='how many classes to show')] = 1,
            as_json: Annotated[bool, typer.Option('--json', help='a line of JSON a picture')] = False,
            attention: Annotated[Path | None, typer.Option('--attention', help='draw what the model looked at, for up to 12 pictures, into this file')] = None,
            device: DeviceOption = 'auto', backend: BackendOption = 'torch',
            preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Classify pictures, a line each; exit with 1 if some could not be used."
    from ..inference import ProductionModel
    items, failed = find_pictures(paths), False
    served = ProductionModel(served_path(model, settings(preset, config, set or [], out)), device, backend)
    names = ['standard input' if isinstance(i, bytes) else str(i) for i in items]
    for start in range(0, len(items), 256):
        for name, found in zip(names[start:], served.predict_batch(items[start:start + 256], on_error='return')):
            failed |= 'error' in found
            if as_json: print(json.dumps({'path': name, **found}, ensure_ascii=False))
            elif 'error' in found: print(f'{name}: {re.sub(r"^Cannot use images.*?: ", "", found["error"])}', file=sys.stderr)
            else: print(answer_line(name, found, top), flush=True)
    if attention: print(f'{short(draw_attention(served, items, names, attention))} shows where the model looked.', file=sys.stderr)
    raise typer.Exit(1 if failed else 0)


@app.command()
def export(kind: Annotated[str, typer.Argument(help='onnx or onnx-int8')], to: Annotated[Path, typer.Option('--to', help='file to write')] = Path('model.onnx'), model: ModelOption = None,
           preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Write the model, its preprocessing included, as one file for other runtimes."
    from ..inference import ProductionModel, exported
    if kind not in ('onnx', 'onnx-int8'): raise UserError(f'There is no export {kind!r}: {nearest(kind, ["onnx", "onnx-int8"])}')
    served = ProductionModel(served_path(model, settings(preset, config, set or [], out)), 'cpu')
    source = exported(served, int8=kind == 'onnx-int8')
    with replacing(to) as tmp, as_os_error(): shutil.copyfile(source, tmp)
    height, width = served.native
    print(f'{short(to)}: {to.stat().st_size / 1e6:.1f} MB; images uint8 (n, 3, {height}, {width}) to logits float32 (n, {len(served.classes)}); probabilities are softmax(logits / {served.temperature:.4g}).')


@app.command()
def bench(model: ModelOption = None, backend: Annotated[list[str] | None, typer.Option('--backend', '-b', help='may be repeated; all that are there unless given')] = None,
          batch: Annotated[str, typer.Option('--batch', help='batch sizes')] = '1,8,32', seconds: Annotated[float, typer.Option('--seconds', help='time for each size')] = 1.0,
          device: DeviceOption = 'auto', preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Time the model from pixels and from PNG files, with every backend that is there."
    from ..inference import BACKENDS, ProductionModel, benchmark, processor
    try: sizes = [int(b) for b in batch.split(',')]
    except ValueError: raise UserError(f'--batch {batch}: give whole numbers, as in 1,8,32.') from None
    path = served_path(model, settings(preset, config, set or [], out))
    print(f'{"backend":14} {"input":7} {"batch":>5} {"images/s":>10} {"p50 ms":>9} {"p95 ms":>9} {"p99 ms":>9}')
    for name in backend or BACKENDS:
        try: served = ProductionModel(path, device, name)
        except UserError as e:
            if backend or name == 'torch': raise
            print(f'{name:14} {e}')
            continue
        for r in benchmark(served, None, sizes, seconds)['rows']:
            print(f'{served.backend:14} {r["input"]:7} {r["batch"]:5} {r["images_per_second"]:10,.1f} {r["p50_ms"]:9.2f} {r["p95_ms"]:9.2f} {r["p99_ms"]:9.2f}', flush=True)
    print(f'{served.config["backbone"]} at {served.config["image_size"]} px on {processor(served.device)}; {", ".join(f"{k} {v}" for k, v in versions().items())}')


@app.command()
def serve(folder: Annotated[Path | None, typer.Argument(help="production folder, stage folder or checkpoint; default: the run's production folder")] = None,
          host: Annotated[str, typer.Option(help='address to listen on; 0.0.0.0: every one of this machine')] = '127.0.0.1',
          port: Annotated[int, typer.Option(help='port to listen on; 0: any that is free')] = 8000,
          api_key: Annotated[str, typer.Option(envvar='DINOCLS_API_KEY', help='what clients have to send; better set in the environment, where no list of processes shows it')] = '',
          device: DeviceOption = 'auto', backend: BackendOption = 'auto',
          page: Annotated[bool, typer.Option('--page/--no-page', help='a page for the browser, where Gradio is installed')] = True,
          limit: Annotated[list[str] | None, typer.Option('--limit', '-l', help='name=value, may be repeated: max_bytes, max_queue, timeout, …')] = None,
          preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Answer over HTTP, until it is stopped."
    from ..inference import ProductionModel
    from .service import serve as start
    limits = parse_overrides(' '.join(shlex.quote(word) for word in limit or []))
    start(ProductionModel(served_path(folder, settings(preset, config, set or [], out)), device, backend), host, port, api_key, page, **limits)


@app.command()
def doctor(preset: PresetOption = '', config: ConfigOption = None, set: SetOption = None, out: OutOption = None):
    "Show versions, devices, memory, data and weights at hand, and what would be used."
    cfg = settings(preset, config, set or [], out)
    for name, value in examine(cfg).items(): print(f'{name:<12} {value}')


def examine(cfg: Config) -> dict:
    "Return what `dinocls doctor` prints."
    import torch
    from ..model import device, precision
    where, machine = device(cfg), hardware()
    free = shutil.disk_usage(next(p for p in (cfg.folder, *cfg.folder.parents) if p.exists())).free
    return {**versions(), 'processor': f'{machine["cpu"]}, {machine["cores"]} cores, {torch.backends.cpu.get_cpu_capability()}',
            'memory': f'{machine["memory_gb"]} GB', 'gpu': machine.get('gpu', 'none'), 'root': root(), 'run folder': f'{cfg.folder} ({free / 2**30:.0f} GB free)',
            'preset': cfg.preset, 'device': where, 'precision': precision(cfg, where), 'side by side': f'{jobs(cfg)} chapters',
            'data': _data_at_hand(cfg), 'weights': _weights_at_hand(cfg)}


def _data_at_hand(cfg: Config) -> str:
    "Say whether the configured dataset is there, without fetching it."
    from ..kit.datasets import at_hand
    from ..kit.fetch import data_folder
    if cfg.dataset == 'digits': return 'digits, inside scikit-learn'
    if cfg.dataset == 'imagefolder': return f'{cfg.data_root or "data_root is not set"}{"" if Path(cfg.data_root or "/nowhere", "train").is_dir() else " (no train folder there)"}'
    found = at_hand(cfg.dataset, cfg.data_root)
    if found: return f'{cfg.dataset} in {found}'
    return f'{cfg.dataset} is not in {data_folder(cfg.data_root)} yet: dinocls download fetches it'


def _weights_at_hand(cfg: Config) -> str:
    "Say whether the configured weights are there, without fetching them."
    from ..model import BACKBONES, remote, weights_at_hand
    if cfg.weights == 'random': return 'random'
    file = weights_at_hand(cfg.backbone, cfg.weights)
    if not cfg.weights and not BACKBONES[cfg.backbone].timm: return f'{cfg.backbone}, {"inside" if file else "not in"} the package'
    if file: return f'{cfg.backbone} in {file}'
    return f'{cfg.backbone} is not in the cache yet: dinocls download fetches it' if remote(cfg.weights) or not cfg.weights else f'{cfg.weights} (not there)'


@app.command()
def sync(check: Annotated[bool, typer.Option('--check', help='change nothing; exit with 1 if something would change')] = False):
    "Bring badges, Colab cells and the README's generated blocks up to date with settings.ini and outputs/quick."
    from ..report import fill_blocks, readme_blocks
    readme = root()/'README.md'
    blocks = {'chapters': chapter_table(), 'presets': preset_table(), **readme_blocks(configuration.preset('quick'))}
    new = {c.path: as_source(c.path) for c in chapters()} | {readme: fill_blocks(readme.read_text(encoding='utf-8'), blocks)}
    stale = [p for p, text in new.items() if p.read_text(encoding='utf-8') != text]
    for p in stale:
        print(f'{short(p)} {"is out of date: run dinocls sync" if check else "brought up to date"}')
        if not check:
            with replacing(p) as tmp: tmp.write_text(new[p], encoding='utf-8')
    raise typer.Exit(1 if check and stale else 0)


def main():
    "Run the command line."
    try: app()
    except UserError as e:
        print(f'dinocls: {e}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt: sys.exit(130)
