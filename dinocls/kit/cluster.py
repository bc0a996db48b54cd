"""Many stages on a cluster: Ray or Dask starts each where there is room, and once more where a worker is lost.

Results come home through the run folder where the workers see it, and through the cluster where they don't.
"""
import contextlib
import dataclasses
import importlib
import os
import platform
import shutil
import socket
import tempfile
import threading
from pathlib import Path

from .files import UserError, explain, reason, replacing
from .machine import needing, progress
from .stage import STAGES, Result, code_digests, open_run, record_of

TRIES = 3  # a worker that does not see the run folder says so first; what it made may rest on what another made, too
ALONE = threading.RLock()  # random numbers belong to a process: its threads take turns


def on_cluster(stage, home: str, cfgs: list) -> list[tuple]:  # configuration, what went wrong
    "Compute a stage for each configuration on the cluster that they name."
    run, code, said, todo = cfgs[0].folder, code_digests(stage), {}, range(len(cfgs))
    if not (run/'run.json').exists(): open_run(cfgs[0])  # else a study may vary what the run was opened with
    sent = [dataclasses.replace(c, out=str(run), cluster='none', device=c.device.partition(':')[0]) for c in cfgs]
    try: sign = tempfile.NamedTemporaryFile(dir=run, prefix='.run-')
    except OSError as e: raise UserError(f'{run} cannot be written ({reason(e)}): choose another with --out.') from None
    with sign, {'ray': _ray, 'dask': _dask}[cfgs[0].cluster](cfgs[0]) as submit:
        for tried in range(TRIES):
            jobs = {i: submit(home, stage.name, sent[i], code, sign.name, _known(stage, cfgs[i]) if tried else None)
                    for i in todo}
            for n, (i, job) in enumerate(jobs.items()):
                progress(stage.name, n, len(jobs))
                try: said[i], files = job.result()
                except Exception as e: said[i], files = f'{type(e).__name__}: {reason(e)}', {}
                store_results(run, files)
            if not (todo := [i for i in todo if not (said[i] or stage.is_done(cfgs[i]))]): break
    return [(c, why) for i, c in enumerate(cfgs) if (why := 'its result did not come home' if i in todo else said[i])]


def work(home: str, name: str, cfg, code: dict, sign: str, known: dict | None) -> tuple[str, dict]:
    """Compute a stage in a worker; return what went wrong, or nothing, and the results that were made if the run folder
    is not seen here. Then `known` are those that it may rest on; without them nothing is done."""
    importlib.import_module(home)
    if other := sorted(m for m, made in code_digests(STAGES[name]).items() if made != code.get(m)):
        return f'{platform.node()} has other code of {", ".join(other)}: install the same there', {}
    if is_shared(sign): return attempt(STAGES[name], cfg), {}
    if known is None: return '', {}
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(cfg, out=folder)
        store_results(open_run(cfg), known)
        why = attempt(STAGES[name], cfg)
        return why, pack_results(f for f in Path(folder, 'stages').iterdir() if record_of(f) and f.name not in known)


def is_shared(sign: str) -> bool: return os.path.exists(sign)


def attempt(stage, cfg) -> str:
    "Compute a stage; return what went wrong, or nothing."
    try:
        with ALONE: stage(cfg)
    except Exception as e: return str(e).rstrip('.') if isinstance(e, UserError) else f'{type(e).__name__}: {reason(e)}'
    return ''


def pack_results(folders) -> dict: return {f.name: {p.name: p.read_bytes() for p in f.iterdir()} for f in folders}


def store_results(run: Path, packed: dict):
    "Write results into a run folder, each whole or not at all; one that is there and undamaged stays."
    for name, files in packed.items():
        place, made = run/'stages'/name, run/'stages'/f'{name}.{os.getpid()}.partial'
        if record_of(place) and not Result(place).damage(): continue
        made.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            with replacing(made/file) as tmp: tmp.write_bytes(content)
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError): made.rename(place)  # another chapter was quicker
        shutil.rmtree(made, ignore_errors=True)


def _known(stage, cfg) -> dict:
    "Return the stored results that a stage may rest on."
    reached = code_digests(stage)
    return pack_results(found.folder for s in STAGES.values() if s.module in reached and (found := s.find(cfg)[0]))


def knock(address: str):  # host:port or ray://host:port; nothing is asked of others, as auto
    "Raise `UserError` where nobody listens at an address of Ray, which itself would try for minutes."
    host, _, port = address.rpartition('://')[2].rpartition(':')
    if port.isdecimal():
        with explain((OSError, OverflowError, UnicodeError), f'No cluster of Ray answers at {address}',
                     'see `ray status` there, or name another one in $RAY_ADDRESS.'):
            socket.create_connection((host.strip('[]'), int(port)), timeout=1).close()


@contextlib.contextmanager
def _ray(cfg):
    "Yield what sends work to Ray, a GPU's share for each; $RAY_ADDRESS or this machine says which cluster."
    with needing('ray', 'A cluster of Ray'): import ray
    if mine := not ray.is_initialized():
        knock(os.environ.get('RAY_ADDRESS', ''))
        with explain((ConnectionError, RuntimeError, ValueError), 'No cluster of Ray can be used',
                     'start one by `ray start --head`, or name it in $RAY_ADDRESS.'):
            ray.init(address='auto', log_to_driver=False, logging_level='ERROR')
    try:
        nodes = [n['Resources'] for n in ray.nodes() if n['Alive'] and n['Resources'].get('CPU')]
        gpus = [n for n in nodes if n.get('GPU')] if cfg.device != 'cpu' else []
        share = min((n['CPU'] // (n['GPU'] if gpus else 1) for n in gpus or nodes), default=1) / cfg.at_once
        task = ray.remote(num_cpus=max(1, int(share)), num_gpus=1 / cfg.at_once if gpus else 0)(work)
        yield lambda *job: task.remote(*job).future()
    finally:
        if mine: ray.shutdown()  # what still runs ends with it


@contextlib.contextmanager
def _dask(cfg):
    "Yield what sends work to Dask, one for each worker; $DASK_SCHEDULER_ADDRESS says which cluster."
    with needing('dask', 'A cluster of Dask'): import distributed, dask
    if not (address := dask.config.get('scheduler-address', None)):
        raise UserError('Which cluster of Dask? Name its scheduler in $DASK_SCHEDULER_ADDRESS, as in tcp://host:8786.')
    try: client = distributed.Client(address, set_as_default=False)
    except (OSError, ValueError) as e:
        raise UserError(f'The scheduler of Dask at {address} does not answer ({reason(e)}).') from None
    with client:
        if max(client.nthreads().values(), default=1) > 1:
            raise UserError('A worker of Dask may do one thing at a time: start the workers with --nthreads 1.')
        yield lambda *job: client.submit(work, *job, pure=False)
