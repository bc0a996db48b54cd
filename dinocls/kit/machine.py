"What a result was made by: versions, the commit, processor, cores, memory."
import contextlib
import functools
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import psutil

from .config import root
from .files import UserError, write_json


def rank() -> int:
    "Return the number of this process among those that a launcher started; 0 without one."
    return int(os.environ.get('RANK', 0))


def progress(stage: str,  # what runs
             done: int = 0,  # steps done
             total: int = 0,  # steps in all; 0: unknown
             note: str = ''):  # a few words
    "Tell how far a stage is: to the driver's file, or to the screen, where no terminal is only that it begins."
    file = os.environ.get('DINOCLS_PROGRESS')
    if rank(): return
    if file:
        about = {'stage': stage, 'done': done, 'total': total, 'note': note, 'time': time.time()}
        with contextlib.suppress(UserError): write_json(Path(file), about)
    elif 'ipykernel' in sys.modules or sys.stdout.isatty():
        if done: print(f'\r{stage} {done}/{total} {note}'.ljust(78), end='' if done < total else '\n', flush=True)
    elif not done: print(f'{stage} …', file=sys.stderr, flush=True)


def version() -> str:
    "Return the installed version of the package."
    from dinocls import __version__
    return __version__


@functools.lru_cache  # the code that this process runs; a study asks hundreds of times
def git_commit() -> str:
    "Return the commit of the checkout, with `+` if there are changes; outside git $DINOCLS_COMMIT."
    def git(*args): return subprocess.run(['git', *args], cwd=root(), capture_output=True, text=True, timeout=10)
    told = os.environ.get('DINOCLS_COMMIT', '')
    try:
        head = git('rev-parse', '--short=12', 'HEAD')
        changed = git('status', '--porcelain', '--untracked-files=no', '--', 'nbs', 'dinocls', 'settings.ini').stdout
        return head.stdout.strip() + ('+' if changed.strip() else '') if head.returncode == 0 else told
    except (OSError, subprocess.SubprocessError): return told


def install(extra: str) -> str:  # a name of settings.ini, as lora of `lora_requirements`
    "Say how the libraries of an extra are installed."
    return f"`pip install '.[{extra}]'` in the book's folder"


@contextlib.contextmanager
def needing(extra: str, what: str):  # as in 'The service'
    "Say what to install where a library is missing. Raise `UserError` then."
    try: yield
    except ModuleNotFoundError as e:
        if (e.name or '').startswith('dinocls'): raise
        raise UserError(f'{what} needs {e.name}: {install(extra)}.') from None


@functools.lru_cache
def versions() -> dict:
    "Return the versions of Python and of the libraries that decide results."
    from importlib.metadata import PackageNotFoundError, version as installed
    found = {'python': platform.python_version(), 'dinocls': version()}
    for name in ('torch', 'torchvision', 'timm', 'accelerate', 'numpy', 'scikit-learn'):
        with contextlib.suppress(PackageNotFoundError): found[name] = installed(name)
    return found


def hardware() -> dict:
    "Return processor, instruction sets, cores, memory; torch's threads, kernels and accelerator, if it is loaded."
    memory = round(memory_limit() / 2**30, 1)
    found = {'cpu': cpu_name(), 'instructions': instruction_sets(), 'cores': cores(), 'memory_gb': memory,
             'system': platform.system()}
    torch = sys.modules.get('torch')
    if torch:  # both change how sums are rounded
        found |= {'threads': torch.get_num_threads(), 'kernels': torch.backends.cpu.get_cpu_capability()}
    if torch and torch.cuda.is_available():
        found |= {'gpu': torch.cuda.get_device_name(), 'gpu_memory_gb': round(torch.cuda.mem_get_info()[1] / 2**30, 1)}
    return found


def cores() -> int:
    "Return the number of processor cores this process may use: those it is bound to, or fewer by a container's quota."
    bound = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1
    quotas = [float(q) / float(period) for q, period in (
        *(line.split()[:2] for line in _granted('cpu.max')),  # cgroup v2: "200000 100000", or "max 100000"
        *zip(_granted('cpu.cfs_quota_us', 'cpu'), _granted('cpu.cfs_period_us', 'cpu'))) if q not in ('max', '-1')]
    return max(1, min([bound, *(math.ceil(q) for q in quotas)]))


def memory_limit() -> int:
    "Return the bytes of memory that this process may use: the machine's, or a container's if it grants less."
    limits = [int(v) for v in (*_granted('memory.max'), *_granted('memory.limit_in_bytes', 'memory')) if v != 'max']
    return min([psutil.virtual_memory().total, *limits])


def memory_free() -> int:
    "Return the bytes of memory that are free for this process, on the machine and in its container."
    free = [psutil.virtual_memory().available]
    for limit, used, kind in (('memory.max', 'memory.current', ''),
                              ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'memory')):
        free += [int(m) - int(n) for m, n in zip(_granted(limit, kind), _granted(used, kind)) if m != 'max']
    return max(0, min(free))


CGROUPS = Path('/sys/fs/cgroup')


def _granted(name: str,  # of a file
             kind: str = '') -> list[str]:  # controller of cgroup v1; empty: v2
    "Return what the control groups that this process is in say in a file of that name, from the inmost outwards."
    found, path = [], '/'
    with contextlib.suppress(OSError):
        for line in Path('/proc/self/cgroup').read_text().splitlines():
            _, kinds, place = line.split(':', 2)
            if kind in kinds.split(','): path = place
    inmost = CGROUPS/kind/path.lstrip('/')
    for folder in (f for f in (inmost, *inmost.parents) if f.is_relative_to(CGROUPS/kind)):
        with contextlib.suppress(OSError): found.append((folder/name).read_text().strip())
    return found


def _cpuinfo(entry: str) -> str:
    "Return the first value of an entry of /proc/cpuinfo; empty where there is none."
    with contextlib.suppress(OSError):
        for line in Path('/proc/cpuinfo').read_text().splitlines():
            if line.startswith(entry): return line.partition(':')[2].strip()
    return ''


def cpu_name() -> str:
    "Return the processor's model name."
    return _cpuinfo('model name') or platform.processor() or platform.machine()


def instruction_sets() -> str:
    """Return those of the processor's instruction sets that decide how fast matrices are multiplied, and how they are
    rounded; empty where unknown."""
    telling = ('avx2', 'avx512f', 'avx512_vnni', 'avx512_bf16', 'avx512_fp16', 'amx_int8', 'amx_bf16', 'amx_fp16',
               'asimd', 'bf16', 'i8mm', 'sve')
    return ' '.join(sorted(set(telling) & {*_cpuinfo('flags').split(), *_cpuinfo('Features').split()}))


def peak_memory() -> dict:
    "Return the peak memory of this process so far, in MB: resident, and on the GPU if there is one."
    torch = sys.modules.get('torch')
    gpu = {'gpu': round(torch.cuda.max_memory_allocated() / 2**20)} if torch and torch.cuda.is_available() else {}
    return {'resident': round(_peak_resident() / 2**20), **gpu}


def _peak_resident() -> int:
    "Return the peak resident memory of this process in bytes."
    with contextlib.suppress(OSError, IndexError):  # getrusage would begin with the peak of the process before this one
        return int(Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0]) * 2**10
    try: import resource
    except ImportError: return psutil.Process().memory_info().peak_wset  # Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == 'darwin' else peak * 2**10  # macOS counts bytes
