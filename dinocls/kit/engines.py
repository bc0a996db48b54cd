"""PyTorch, ONNX Runtime, OpenVINO, and TensorRT where there is one, behind one call that proves itself equal.

Whoever has a classifier describes it as a `Subject`; `start_backend` gives a function of images that answers as PyTorch
does, or says in a sentence why there is none. What is exported is preprocessing and model in one graph."""
import contextlib
import copy
import functools
import hashlib
import importlib.util
import io
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .files import (
    UserError, cache_folder, digest, explain, file_digest, locked, nearest, reason, recall, remember, replacing)
from .machine import cpu_name, install, version, versions

CLOSE = {'fp32': 1e-3, 'bf16': 0.1, 'fp16': 0.1, 'int8': 0.2}  # what rounding may change, as a share of the largest
# logit; in fp32 also of any probability
TIED = 0.01  # probabilities that differ by less may exchange places


@dataclass
class Subject:
    "What engines need to know of a classifier."
    model: torch.nn.Module  # what `preprocess` returns → logits (n, classes)
    preprocess: Callable  # uint8 (n, 3, h, w) → float (n, 3, side, side)
    infer: Callable  # (module in the model's place, uint8 images, precision or '') → float32 array: what was evaluated
    native: tuple  # (height, width) of the images
    device: torch.device
    precision: str  # fp32, bf16 or fp16: what `infer` computes in if it is given ''
    temperature: float = 1.0
    settings: str = ''  # what answers depend on, beside the weights and the native size
    examples: Tensor | None = None  # uint8 (n, 3, *native)
    bf16_gain: Callable = lambda: 0.0  # how many times as fast as fp32 this CPU is in bf16
    known: dict = field(default_factory=dict, init=False, repr=False)  # what `expected` returned

    @functools.cached_property
    def digest(self) -> str:
        "Return what the answers depend on, as one digest."
        sha = hashlib.sha256(repr((self.native, self.settings)).encode())
        for k, t in self.model.state_dict().items(): sha.update(k.encode() + t.cpu().contiguous().numpy().tobytes())
        return sha.hexdigest()

    def pictures(self, n: int) -> Tensor:
        "Return up to n of the examples, or as many of noise where there are none, but at most 16."
        if self.examples is not None: return self.examples[:n]
        noise = torch.Generator().manual_seed(0)
        return torch.randint(0, 256, (min(n, 16), 3, *self.native), dtype=torch.uint8, generator=noise)

    def proof(self, n: int) -> Tensor:
        "Return n pictures and four of noise, from grey to grainy, which shows how an engine resizes."
        noise = torch.randint(-127, 128, (4, 3, *self.native), generator=torch.Generator().manual_seed(1))
        grain = torch.tensor([0.1, 0.3, 0.6, 1]).view(4, 1, 1, 1)
        return torch.cat([self.pictures(n), (128 + grain * noise).byte()])

    def expected(self, n: int, precision: str = '') -> np.ndarray:
        "Return PyTorch's logits for `proof(n)`, worked out once."
        if (n, precision) not in self.known:
            self.known[n, precision] = self.infer(self.model, self.proof(n), precision)
        return self.known[n, precision]

    @functools.cached_property
    def exports(self) -> Path:
        "Return the folder for what is exported of it: in the cache, or a temporary one where no cache can be written."
        with contextlib.suppress(UserError, OSError):
            folder = cache_folder()/'exports'/digest([self.digest, version(), torch.__version__])[:24]
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK): return folder
        self.known['exports'] = tempfile.TemporaryDirectory(prefix='dinocls-')  # goes when this subject does
        return Path(self.known['exports'].name)


# --- how fast


def synchronise(device: torch.device):
    "Wait until the device has done what it was given."
    if device.type == 'cuda': torch.cuda.synchronize(device)
    elif device.type == 'mps': torch.mps.synchronize()


def measure(call, batch: list, seconds: float,  # time spent measuring
            device: torch.device) -> dict:
    "Time `call(batch)` again and again, warm-up excluded: images/s, latency p50, p95 and p99 in ms, timed runs."
    times, warm, started = [], 0, time.perf_counter()
    while len(times) < 3 or sum(times) < seconds:
        synchronise(device)
        clock = time.perf_counter()
        call(batch)
        synchronise(device)
        if warm >= 2 and clock - started >= seconds / 5: times.append(time.perf_counter() - clock)
        warm += 1
    latency = dict(zip(('p50_ms', 'p95_ms', 'p99_ms'), (1000 * np.percentile(times, [50, 95, 99])).tolist()))
    return {'batch': len(batch), 'images_per_second': len(batch) * len(times) / sum(times), **latency,
            'runs': len(times)}


def measure_sizes(call, items: list, sizes, seconds: float, device) -> list[dict]:
    "Measure batch sizes in rising order, on items repeated as needed, as long as one takes at most 5 × `seconds`."
    rows = []
    for size in sorted(sizes):
        if rows and size / rows[-1]['images_per_second'] > 5 * seconds: break
        rows.append(measure(call, (items * (size // len(items) + 1))[:size], seconds, device))
    return rows


def processor(device: torch.device) -> str:
    "Name what computes: the GPU, or the CPU and the threads in use."
    if device.type == 'cuda': return torch.cuda.get_device_name(device)
    return f'{cpu_name()}, {(n := torch.get_num_threads())} thread{"s" * (n > 1)}'


# --- how equal


def scaled(logits: np.ndarray, temperature: float) -> np.ndarray:  # (n, classes)
    "Return the probabilities of logits at a temperature."
    from scipy.special import softmax
    return softmax(logits.astype(np.float64) / temperature, axis=1)


def agreement(probabilities: np.ndarray, expected: np.ndarray,  # (n, classes) each
              close: float = 1e-4) -> dict:  # probabilities that differ by less are one
    "Compare probabilities: largest difference, share of equal predictions, and whether all are equal but ties."
    same, off = probabilities.argmax(1) == expected.argmax(1), np.abs(probabilities - expected).max(1)
    clear = bool((same | (off <= close)).all())
    return {'largest': float(off.max()), 'same': float(same.mean()), 'same_if_clear': clear}


def difference(subject: Subject, run: Callable, precision: str,  # what the engine computes in
               pictures: int) -> str:  # to compare
    "Say in what answers differ from PyTorch's by more than that precision explains; nothing if they are equal."
    if precision == 'fp32' and subject.device.type == 'cuda': precision = 'bf16'  # GPUs multiply fp32 in TF32
    images, expected = subject.proof(pictures), subject.expected(pictures)
    near = subject.expected(pictures, 'fp32') if precision == 'fp32' != subject.precision else expected
    given = np.concatenate([run(part) for part in (images[:1], images[1:]) if len(part)])  # alone, and in company
    some = slice(len(subject.pictures(pictures)))  # on noise, coarser rounding may decide otherwise
    if precision != 'fp32': given, near = given[some], near[some]
    off = np.abs(given - near).max() / np.abs(near).max()
    if not off < CLOSE[precision]: return f'its logits are off by {off:.2g} of the largest, too much for {precision}'
    given, near, expected = (scaled(z, subject.temperature) for z in (given, near, expected))
    if precision == 'fp32' and not (off := agreement(given, near)['largest']) < CLOSE[precision]:
        return f'its probabilities are off by {off:.2g}'
    return '' if agreement(given[some], expected[some], TIED)['same_if_clear'] else 'it gives pictures another class'


# --- engines


@contextlib.contextmanager
def silent():
    "Keep what a library has to say off the screen."
    logging.disable(logging.WARNING)
    out = io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            warnings.simplefilter('ignore')
            yield
    finally: logging.disable(logging.NOTSET)


class Prepared(torch.nn.Module):
    "Preprocessing and a classifier in one: uint8 (n, 3, h, w) to logits (n, classes)."
    def __init__(self, subject: Subject):
        super().__init__()
        self.model, self.preprocess = subject.model, subject.preprocess

    def forward(self, images): return self.model(self.preprocess(images)).float()


def session(file: Path, providers=('CPUExecutionProvider',)) -> Callable:
    "Return a function that runs an ONNX graph: uint8 tensor (n, 3, h, w) to float32 array (n, classes)."
    import onnxruntime
    if providers[0] not in onnxruntime.get_available_providers():
        raise UserError(f'This onnxruntime has no {providers[0]}: install onnxruntime-gpu, and TensorRT if meant.')
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
    graph = onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    return lambda images: np.concatenate([graph.run(None, {'images': b.numpy()})[0] for b in images.split(256)])


def export_onnx(subject: Subject, file: Path) -> Path:
    "Write preprocessing and model as one ONNX graph in fp32. Raise `UserError` if it can't be, or answers otherwise."
    if why := lacking('onnx', torch.device('cpu')): raise UserError(f'The export to ONNX {why}.')
    host = replace(subject, model=copy.deepcopy(subject.model).cpu(), device=torch.device('cpu'))
    instead = 'use the backend torch or compile.'
    host.expected(4)  # what is worked out once, as the matrices that resize, is in the graph a constant
    with replacing(Path(file)) as tmp, silent():
        with explain(Exception, 'The model cannot be exported to ONNX', instead):  # whatever the exporter raises
            torch.onnx.export(Prepared(host).eval(), (host.pictures(3),), str(tmp), dynamo=True, verbose=False,
                              input_names=['images'], output_names=['logits'], external_data=False,
                              dynamic_shapes={'images': {0: torch.export.Dim('n', min=1, max=2**16)}})
        if why := difference(host, session(tmp), 'fp32', 4):
            raise UserError(f'The exported graph answers otherwise than the model ({why}): {instead}')
    return Path(file)


def quantise(subject: Subject, source: Path, file: Path) -> Path:
    """Write a model's ONNX graph with its matrices behind the patch embedding in int8. Raise `UserError` if that
    decides otherwise than the model."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    nodes = onnx.load(str(source), load_external_data=False).graph.node
    before = [n.name for n in nodes[:[n.op_type for n in nodes].index('Conv')]]
    with replacing(Path(file)) as tmp, silent():
        quantize_dynamic(str(source), str(tmp), weight_type=QuantType.QInt8, per_channel=True,
                         reduce_range=True,  # 7 bits: CPUs without VNNI overflow at 8
                         op_types_to_quantize=['MatMul', 'Gemm'], nodes_to_exclude=before)
        if why := difference(replace(subject, model=copy.deepcopy(subject.model).cpu(), device=torch.device('cpu')),
                             session(tmp), 'int8', 16):
            raise UserError(f'In int8 the graph answers otherwise than the model ({why}): use onnx.')
    return Path(file)


def exported(subject: Subject, int8: bool = False) -> Path:
    "Return the ONNX file of a model, from the cache if it was made before and is whole."
    source, file = exported(subject) if int8 else None, subject.exports/('int8.onnx' if int8 else 'fp32.onnx')
    with locked(subject.exports/'.lock'):
        known = file.with_suffix('.sha256')
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if known.read_text(encoding='ascii') == file_digest(file): return file
        quantise(subject, source, file) if int8 else export_onnx(subject, file)
        with replacing(known) as tmp: tmp.write_text(file_digest(file), encoding='ascii')
    return file


def export_to(subject: Subject, file: Path, int8: bool = False) -> Path:
    "Write the ONNX file of a model, whatever is in the cache. Raise `UserError` as `export_onnx` and `quantise` do."
    if not int8: return export_onnx(subject, file)
    with replacing(file) as source: return quantise(subject, export_onnx(subject, source), file)


def in_torch(subject: Subject, precision: str = '', compiled: bool = False) -> Callable:
    "Run by PyTorch: as the evaluation does, in another precision, or by kernels that are written for this model."
    net = torch.compile(subject.model) if compiled else subject.model
    return lambda images: subject.infer(net, images, precision)


def in_openvino(subject: Subject, kind: str) -> Callable:
    "Run by OpenVINO on the CPU; `kind` is f32 or bf16."
    import openvino
    if kind == 'bf16':
        if 'BF16' not in openvino.Core().get_property('CPU', 'OPTIMIZATION_CAPABILITIES'):
            raise UserError('The backend openvino-bf16 needs a CPU with units for bf16; auto takes one that is there.')
        start_backend(subject, 'openvino')  # the tolerance of bf16 could hide what fp32 shows
    hints = {'INFERENCE_PRECISION_HINT': kind, 'INFERENCE_NUM_THREADS': torch.get_num_threads()}
    graph = openvino.Core().compile_model(str(exported(subject)), 'CPU', hints)
    def run(images): return graph.create_infer_request().infer([images.numpy()])[0]
    return lambda images: np.concatenate([run(part) for part in images.split(256)])


ONNX, GPU = ('onnx', 'onnxscript', 'onnxruntime'), ('CUDAExecutionProvider', 'CPUExecutionProvider')
BACKENDS = {  # name → how it is started, devices, modules, precision ('': as configured)
    'torch': (in_torch, ('cpu', 'cuda', 'mps'), (), ''),
    'torch-bf16': (lambda s: in_torch(s, 'bf16'), ('cpu', 'cuda'), (), 'bf16'),
    'compile': (lambda s: in_torch(s, compiled=True), ('cpu', 'cuda'), (), ''),
    'onnx': (lambda s: session(exported(s), GPU[s.device.type != 'cuda':]), ('cpu', 'cuda'), ONNX, 'fp32'),
    'onnx-int8': (lambda s: session(exported(s, int8=True)), ('cpu',), ONNX, 'int8'),
    'openvino': (lambda s: in_openvino(s, 'f32'), ('cpu',), (*ONNX, 'openvino'), 'fp32'),
    'openvino-bf16': (lambda s: in_openvino(s, 'bf16'), ('cpu',), (*ONNX, 'openvino'), 'bf16'),
    'tensorrt': (lambda s: session(exported(s), ('TensorrtExecutionProvider', *GPU)), ('cuda',), ONNX, 'fp32')}


def lacking(name: str, device: torch.device) -> str:
    "Return what a backend lacks here, as in `needs g++`; nothing if it can be used. Raise `UserError` if unknown."
    if name not in BACKENDS: raise UserError(f'There is no backend {name!r}: {nearest(name, [*BACKENDS, "auto"])}')
    _, devices, modules, _ = BACKENDS[name]
    if device.type not in devices: return f'does not run on {device.type}'
    absent = [m for m in modules if not importlib.util.find_spec(m)]
    return f'needs {", ".join(absent)}, which {install("export")} brings' if absent else ''


def start_backend(subject: Subject, name: str,
                  pictures: int = 16) -> Callable:  # to prove itself on; 0: only to run at all
    """Return a function of uint8 images (n, 3, h, w) that gives logits (n, classes). Raise `UserError` if the backend
    can't be used here, or answers otherwise than PyTorch does."""
    if why := lacking(name, subject.device): raise UserError(f'The backend {name} {why}; auto takes one that is there.')
    start, _, _, precision = BACKENDS[name]
    try:
        run = start(subject)
        run(subject.pictures(1))  # what compiles or needs memory may fail only now
        why = pictures and name != 'torch' and difference(subject, run, precision or subject.precision, pictures)
    except UserError: raise
    except Exception as e:  # whatever a library raises
        raise UserError(f'The backend {name} cannot be started here ({reason(e)}); auto takes one that can.') from None
    if why: raise UserError(f'The backend {name} answers otherwise than PyTorch: {why}; auto takes one that agrees.')
    return run


def candidates(subject: Subject) -> list[str]:
    """Return the backends that are worth a try: on a CPU, `compile` takes half a minute to start and is no faster
    (benchmarks/inference.md), and bf16 may take five times as long as fp32."""
    if subject.device.type != 'cpu': return [*BACKENDS]
    slow = {'compile'} if subject.bf16_gain() > 1 else {'compile', 'torch-bf16'}
    return [name for name in BACKENDS if name not in slow]


def fastest(subject: Subject, batch: int = 8, seconds: float = 0.5) -> tuple[str, Callable]:
    "Return name and function of the fastest backend that answers as PyTorch does, as measured here before, or now."
    made_by = (f'{k} {v}' for k, v in versions().items())
    key = ', '.join((subject.digest[:16], processor(subject.device), *made_by))
    known, rates, runs = recall('backends', key), {}, {}
    with contextlib.suppress(UserError):
        if known in [*BACKENDS]: return known, start_backend(subject, known)
    for name in candidates(subject):
        with contextlib.suppress(UserError):
            runs[name] = start_backend(subject, name, 256)
            rates[name] = measure(runs[name], subject.pictures(batch), seconds, subject.device)['images_per_second']
    best = remember('backends', key, max(rates, key=rates.get))
    return best, runs[best]
