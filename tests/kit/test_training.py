"What keeps a training going: checkpoints that are damaged, are of another training, or find no room; compiling."
import signal
from types import SimpleNamespace

import pytest
import torch

from dinocls.kit import config, training
from dinocls.kit.files import UserError
from dinocls.kit.training import (
    LONG, Checkpointer, SignalCatcher, checkpoints, compiles, load_checkpoint, save_checkpoint)


def fresh(**plan):
    "Return a loop that has not begun, as far as checkpoints know one."
    torch.manual_seed(0)
    line = torch.nn.Linear(2, 2)
    optimiser = torch.optim.AdamW(line.parameters())
    alone = SimpleNamespace(scaler=None, device='cpu', num_processes=1, is_main_process=True, wait_for_everyone=int)
    return SimpleNamespace(trained=line, ema=None, optimiser=optimiser, accelerator=alone, plan={'cutmix': 1.0} | plan,
                           schedule=torch.optim.lr_scheduler.LambdaLR(optimiser, lambda t: 1 / (1 + t)),
                           epoch=0, step=0, steps=0, skipped=0, losses=None, best={}, answers=[], history=[],
                           cfg=config.preset('smoke'))


def moved():
    "Return a loop that has taken a step."
    loop = fresh()
    loop.trained(torch.ones(1, 2)).sum().backward()
    loop.optimiser.step(), loop.schedule.step()
    loop.step, loop.steps, loop.history = 3, 3, [{'epoch': 1, 'loss': 0.1}]
    return loop


def test_a_loop_is_as_it_was(tmp_path):
    loop, again = moved(), fresh()
    save_checkpoint(loop, tmp_path, 'demo')
    assert load_checkpoint(again, tmp_path, 'demo') and (again.step, again.history) == (3, loop.history)
    for part in ('trained', 'optimiser', 'schedule'):
        assert str(getattr(again, part).state_dict()) == str(getattr(loop, part).state_dict())


def test_a_damaged_checkpoint_is_removed_and_the_one_before_is_used(tmp_path):
    loop = moved()
    first = save_checkpoint(loop, tmp_path, 'demo')
    loop.step = 4
    second = save_checkpoint(loop, tmp_path, 'demo')
    data = bytearray(second.read_bytes())
    data[len(data) // 2] ^= 1  # one flipped bit
    second.write_bytes(data)
    again = fresh()
    assert load_checkpoint(again, tmp_path, 'demo') and again.step == 3
    first.write_bytes(first.read_bytes()[:1000])  # cut short
    assert not load_checkpoint(fresh(), tmp_path, 'demo') and not checkpoints(tmp_path, 'demo')
    for step in range(3):
        loop.step = step
        save_checkpoint(loop, tmp_path, 'demo')
    assert [c.name[16:29] for c in checkpoints(tmp_path, 'demo')] == ['00000-0000002', '00000-0000001']  # two are kept


def test_a_checkpoint_of_another_plan_is_refused(tmp_path):
    save_checkpoint(moved(), tmp_path, 'demo')
    with pytest.raises(UserError, match='cutmix=1.0, this one has cutmix=0.5'):
        load_checkpoint(fresh(cutmix=0.5), tmp_path, 'demo')


def test_a_full_disk_costs_the_older_checkpoint_and_is_said_once(tmp_path, monkeypatch, capsys):
    loop, original, room = moved(), training.save_checkpoint, [1, 1, 0, 1, 0, 0, 0, 0]
    def save(*args):
        if not room.pop(0): raise UserError('No space left.')
        return original(*args)
    monkeypatch.setattr(training, 'save_checkpoint', save)
    keeper = Checkpointer(loop, tmp_path, 'demo')
    for loop.step in range(5): keeper.write()
    assert [c.name[22:29] for c in checkpoints(tmp_path, 'demo')] == ['0000002'] and not room
    assert capsys.readouterr().out.count('Training goes on') == 1


def test_a_signal_waits_for_the_step_in_hand(tmp_path, capsys):
    loop = moved()
    with pytest.raises(KeyboardInterrupt), Checkpointer(loop, tmp_path, 'demo') as keeper:
        signal.raise_signal(signal.SIGINT)
        loop.step = 4  # it goes on till it is asked
        keeper.after_step()
    assert 'demo stopped after step 4 of epoch 1' in capsys.readouterr().out
    assert [c.name[22:29] for c in checkpoints(tmp_path, 'demo')] == ['0000004']
    with pytest.raises(KeyboardInterrupt), SignalCatcher():
        for _ in range(2): signal.raise_signal(signal.SIGINT)  # a second one is not waited for


def test_long_runs_on_a_gpu_are_compiled(monkeypatch):
    monkeypatch.setattr(training, 'has_compiler', lambda device: True)
    cfg, cpu, gpu = config.preset('smoke'), torch.device('cpu'), torch.device('cuda')
    assert [compiles(cfg, gpu, LONG), compiles(cfg, gpu, LONG - 1), compiles(cfg, cpu, 10**6)] == [True, False, False]
    monkeypatch.setattr(training, 'has_compiler', lambda device: False)
    assert not compiles(cfg, gpu, LONG)
