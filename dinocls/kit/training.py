"""What keeps a long training going: checkpoints that are whole or not there, signals, memory that runs out, compiling.

A `loop` is chapter 4's: the model, its average, the optimiser, the schedule and the counts.
"""
import json
import signal
import threading
import time
from pathlib import Path

import torch

from .files import UserError, as_os_error, file_digest, reason, replacing

COUNTS = ('epoch', 'step', 'steps', 'skipped', 'losses', 'best', 'answers')  # held by a checkpoint as it is


def checkpoints(folder: Path, name: str) -> list[Path]:
    "Return the checkpoints of a training, the newest first."
    return sorted(Path(folder).glob(f'checkpoint-{name}-*.pt'), reverse=True)


def save_checkpoint(loop, folder: Path, name: str) -> Path:
    """Write all that continuing needs, keep the one before. The name holds the step and the content's digest, so that
    what is cut short is recognised. Raise `UserError`, and leave older ones, if it can't be written."""
    scaler, draft = loop.accelerator.scaler, Path(folder)/f'.checkpoint-{name}.pt'
    state = {f: getattr(loop, f) for f in COUNTS} | {f: json.dumps(getattr(loop, f)) for f in ('history', 'plan')} | {
        'model': loop.trained.state_dict(), 'ema': loop.ema.module.state_dict() if loop.ema else None,
        'optimiser': loop.optimiser.state_dict(), 'schedule': loop.schedule.state_dict(),
        'scaler': scaler.state_dict() if scaler else None}
    with replacing(draft) as tmp, as_os_error(): torch.save(state, tmp)
    try:
        file = f'checkpoint-{name}-{loop.epoch:05d}-{loop.step:07d}-{file_digest(draft)[:16]}.pt'
        draft.replace(file := draft.with_name(file))
        for old in [c for c in checkpoints(folder, name) if c != file][1:]: old.unlink()
    except OSError as e: raise UserError(f'The checkpoint {draft} cannot be finished ({reason(e)}).') from None
    return file


def load_checkpoint(loop, folder: Path, name: str) -> bool:
    "Continue from the newest whole checkpoint, if any. Raise `UserError` if it belongs to another configuration."
    for file in checkpoints(folder, name):
        try: sound = file_digest(file)[:16] == file.stem.rpartition('-')[2]
        except FileNotFoundError: continue  # another process has removed it
        if not sound:
            print(f'Note: {file.name} is damaged and is removed.')  # else it would outlive sound ones of earlier steps
            file.unlink(missing_ok=True)
            continue
        state = torch.load(file, map_location=loop.accelerator.device, weights_only=True)
        had, wanted = json.loads(state['plan']), json.loads(json.dumps(loop.plan))
        for f in (f for f in wanted if had.get(f) != wanted[f]):
            raise UserError(f'{file} is of a training with {f}={had.get(f)!r}, this one has {f}={wanted[f]!r}: set it '
                            'back to go on, or delete the checkpoints to start anew.')
        parts = {'model': loop.trained, 'ema': loop.ema and loop.ema.module, 'optimiser': loop.optimiser,
                 'schedule': loop.schedule, 'scaler': loop.accelerator.scaler}
        for key, part in parts.items():
            if part is not None and state[key]: part.load_state_dict(state[key])
        for f in COUNTS: setattr(loop, f, state[f])
        loop.history = json.loads(state['history'])
        return True
    return False


class SignalCatcher:
    "Notes within a block that the process is asked to stop, in place of ending it; a second Ctrl-C ends it."
    def __init__(self): self.asked, self.old = 0, {}  # number of the signal; signal → handler before

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self.old = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.old.items(): signal.signal(number, handler)

    def ask(self, number, frame):
        if number == self.asked == signal.SIGINT: raise KeyboardInterrupt  # for the second time
        self.asked = self.asked or number


class Checkpointer(SignalCatcher):
    "Writes a training's checkpoints when they are due, and when the process is asked to stop."
    def __init__(self, loop, folder: Path, name: str):
        super().__init__()
        self.loop, self.folder, self.name = loop, Path(folder), name
        self.last, self.told = time.monotonic(), False

    def after_step(self):
        "Write a checkpoint if minutes say so, and stop if asked."
        self.due(time.monotonic() - self.last > 60 * self.loop.cfg.checkpoint_minutes)

    def after_epoch(self, epochs: int):
        "Write a checkpoint if the epochs say so, and stop if asked."
        done = self.loop.epoch  # the last one spares a stage that is stopped later
        self.due(done % self.loop.cfg.checkpoint_every == 0 or done == epochs)

    def due(self, write: bool):
        "Stop if any process was asked to, all after the same step; else write a checkpoint if it is time."
        acc, asked = self.loop.accelerator, self.asked
        if acc.num_processes > 1: asked = int(acc.reduce(torch.tensor([asked], device=acc.device), 'sum').item())
        if asked: self.stop()
        elif write: self.write()

    def write(self) -> Path | None:
        """Write a checkpoint in the first process; on a full disk, again without the older of two. Where there is no
        room even so, say it once and go on."""
        self.last = time.monotonic()
        if not self.loop.accelerator.is_main_process: return None
        try: return save_checkpoint(self.loop, self.folder, self.name)
        except UserError:
            for old in checkpoints(self.folder, self.name)[1:]: old.unlink()
        try: return save_checkpoint(self.loop, self.folder, self.name)
        except UserError as e:
            if not self.told: print(f'Note: {e} Training goes on; the last checkpoint stays.')
        self.told = True

    def stop(self):
        "Write a checkpoint, and end as the signal would have ended the process."
        file, asked = self.write(), self.asked or signal.SIGTERM
        if self.loop.accelerator.is_main_process:
            print(f'\n{self.name} stopped after step {self.loop.step} of epoch {self.loop.epoch + 1}; started again, '
                  f'it goes on from {"there" if file else "the last checkpoint"}.', flush=True)
        self.loop.accelerator.wait_for_everyone()  # the first to end would make the launcher end the others
        self.__exit__()
        signal.raise_signal(asked)


def halve(loop, images: int):
    "Let the backbone see half as many images at once. Raise `UserError` if that is impossible."
    seen = min(loop.micro or images, images)
    if seen == 1 or loop.accelerator.num_processes > 1:
        what = 'use a smaller backbone or image_size' if seen == 1 else f'set micro_batch={seen // 2}'
        raise UserError(f'Memory ran out with {seen} images of {loop.cfg.image_size} pixels at once: {what}.')
    loop.micro, loop.batch = (seen + 1) // 2, None
    loop.optimiser.zero_grad()
    if torch.cuda.is_available(): torch.cuda.empty_cache()
    print(f'Note: memory ran out with {seen} images at once; the backbone sees {loop.micro} at a time from here on, '
          'and the batch stays as it is.')


LONG = 3000  # steps left, from which on compiling takes less time than it saves (`benchmarks/train.md`)


def has_compiler(device: torch.device) -> bool:
    "Tell by a small trial whether anything can be compiled for a device here."
    try:
        with torch._dynamo.config.patch(suppress_errors=False):
            torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except Exception: return False  # no compiler, no such device
    return True


def compiles(cfg, device: torch.device, steps: int) -> bool:  # steps that are left
    "Tell whether to compile: as configured, or on a GPU for long runs; what can't be compiled then runs as it is."
    wanted = cfg.compile == 'on' or (cfg.compile == 'auto' and device.type == 'cuda' and steps >= LONG)
    if not wanted or not has_compiler(device): return False
    torch._dynamo.config.suppress_errors = True
    return True
