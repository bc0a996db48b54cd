"Many stages at once: a process for each device here, through joblib, or the workers of a cluster."
import contextlib
import dataclasses
import importlib
import itertools
import os
import sys
import threading
import time
import warnings

from .cluster import attempt, on_cluster
from .config import FIELDS
from .files import UserError, locked
from .machine import cores, memory_free
from .stage import PACKAGE, STAGES, Result, code, code_digests, open_run


def run_stages(stage,  # a `Stage`
               cfgs: list,  # configurations
               devices: list[str] | None = None) -> list[Result]:  # None: the GPUs, if there are several
    """Bring a stage to completion for several configurations, one at a time on each device; return the results in their
    order. Raise `UserError` that names those that failed, once the others are stored."""
    todo = [getattr(c, '_cfg', c) for c in cfgs if not stage.is_done(c)]
    if devices is None: devices = _devices(todo)
    away = bool(todo) and todo[0].cluster != 'none' and not _launched()
    home = _home(stage) if away or min(len(devices), len(todo)) > 1 else ''
    if home: failed = on_cluster(stage, home, todo) if away else _in_workers(stage, home, todo, devices)
    else: failed = [(c, why) for c in todo if (why := attempt(stage, c))]
    if failed:
        plain = [getattr(c, '_cfg', c) for c in cfgs]
        apart = [f for f in FIELDS if len({getattr(c, f) for c in plain}) > 1]
        def told(c): return ', '.join(f'{f}={getattr(c, f)}' for f in apart) or 'the only one'
        raise UserError(f'{stage.name} failed for {len(failed)} of {len(cfgs)} configurations, the others are stored: '
                        + '; '.join(f'{told(c)}: {why}' for c, why in failed) + '.')
    return [stage(c) for c in cfgs]


def _home(stage) -> str:
    "Return the module where a worker finds a stage: of a notebook's, the exported one while both are the same."
    if stage.fn.__module__ != '__main__': return stage.fn.__module__
    found = next((f for f in PACKAGE.glob('*.py') if code(f).defines(stage.name)), None)
    return f'{PACKAGE.name}.{found.stem}' if found and code_digests(stage)[found.stem] == code(found).digest else ''


def _devices(cfgs: list) -> list[str]:
    """Return the devices that may share the work: each GPU `at_once` times, or the CPU; none if there is nothing to
    share, a configuration names its device, or a launcher has shared it."""
    if len(cfgs) < 2 or _launched() or any(c.device not in ('auto', 'cuda') for c in cfgs): return []
    import torch
    torch.cuda.empty_cache()  # a worker may need what this process keeps for later
    gpus, most = [f'cuda:{i}' for i in range(torch.cuda.device_count())], cfgs[0].at_once
    return gpus * most or ['auto'] * max(1, min(most, memory_free() // 2**31))  # 2 GB for each process


def _launched() -> bool:
    "Tell whether a launcher has started several processes of which this is one."
    return int(os.environ.get('WORLD_SIZE', 1)) > 1


def _in_workers(stage, home: str, cfgs: list, devices: list) -> list[tuple]:  # configuration, what went wrong
    "Compute a stage for each configuration in processes, as many as there are devices."
    from joblib import Parallel, delayed
    from joblib.externals.loky.process_executor import TerminatedWorkerError
    def work(cfgs, at_once):
        jobs = (delayed(_work)(home, stage.name, c, devices, os.getpid()) for c in cfgs)
        return Parallel(n_jobs=at_once, batch_size=1)(jobs)
    def alone(cfg):
        try: return '' if stage.is_done(cfg) else work([cfg], 2)[0]  # 2: in a process of its own
        except TerminatedWorkerError: return 'its process ended, perhaps for lack of memory'
    if not (cfgs[0].folder/'run.json').exists(): open_run(cfgs[0])
    warnings.filterwarnings('ignore', 'A worker stopped')  # joblib renews one whose memory has grown, and says so
    try: found = work(cfgs, min(len(devices), len(cfgs)))
    except TerminatedWorkerError: found = [alone(c) for c in cfgs]  # one that dies takes the others along
    return [(c, why) for c, why in zip(cfgs, found) if why]


def _work(module: str, name: str, cfg, devices: list, first: int) -> str:
    "Compute a stage on a device that no other worker uses; return what went wrong, or nothing."
    if os.getppid() == first: threading.Thread(target=_follow, args=(first,), daemon=True).start()
    importlib.import_module(module)
    if torch := sys.modules.get('torch'):  # more threads than cores wait for each other, ten times as long as they work
        torch.set_num_threads(max(1, cores() // len(devices)))
    with _free(devices, cfg.folder) as device: return attempt(STAGES[name], dataclasses.replace(cfg, device=device))


def _follow(first: int):
    "End this process when the one that started it is gone, in the middle of a training if need be."
    while os.getppid() == first: time.sleep(0.5)
    os._exit(1)


@contextlib.contextmanager
def _free(devices: list, folder):
    "Yield a device once it is free, and hold it."
    from filelock import Timeout
    for place, device in itertools.cycle(enumerate(devices)):
        with contextlib.suppress(Timeout), locked(folder/'stages'/f'device-{place}.lock', timeout=0):
            yield device
            return
        time.sleep(0.05)
