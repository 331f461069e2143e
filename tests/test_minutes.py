"A quickstart that is given minutes ends near them, on machines that keep their speed and on others."
import contextlib
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch.utils.data import DataLoader, TensorDataset

from medsyn import minutes as module
from medsyn.core import MedsynError, load_json
from medsyn.data.lesions import lesion_folder
from medsyn.minutes import Pace, PaceCB, divide_minutes, quickstart_in
from medsyn.train import fit_steps

COST = dict(pretrain=.5, train=.8, segment=.2, drawing=.3, scoring=.05)

class Machine:
    "A clock that only work moves, at a speed that depends on the share of the minutes."
    def __init__(self, minutes, slowness): self.now, self.total, self.slowness = 0., 60*minutes, slowness
    def __call__(self): return self.now
    def work(self, seconds): self.now += seconds*self.slowness(self.now/self.total)

def tick(machine, seconds):
    "A callback: every optimiser step takes its time on the machine."
    class TickCB(module.Callback):
        order = 1
        def after_batch(self): machine.work(seconds)
    return TickCB()

def tiny_learner():
    "A real fit that costs next to nothing."
    data = TensorDataset(torch.randn(64, 2), torch.randn(64, 1))
    loader = DataLoader(data, 8)
    return Learner(DataLoaders(loader, loader), torch.nn.Linear(2, 1), torch.nn.functional.mse_loss)

def imagined_fit(stage, work):
    "The steps of a fit of which only the callback is real; returns how many there were."
    pace, = stage.cbs
    steps = SimpleNamespace(done=0, total=stage.n, planned=lambda: stage.n)
    pace.learn = SimpleNamespace(steps=steps)
    pace.before_fit()
    while steps.done < steps.total:
        steps.done += 1
        work()
        pace.after_batch()
    pace.after_fit()
    return steps.done

def stages(pace, machine, seeds=(0, 1, 2)):
    "What a quickstart does, with imagined work."
    done = {}
    machine.work(.01*machine.total)                                     # opening
    for name in ('pretrain', 'train'):
        with pace.stage(name) as stage:
            done[name] = imagined_fit(stage, lambda name=name: machine.work(COST[name]))
        assert done[name] <= stage.n
    with pace.stage('synth') as stage: machine.work(stage.n*COST['drawing'])
    done['synth'] = stage.n
    with pace.stage('segment') as stage:
        for seeds_run in pace.rounds(seeds):
            done['seeds'] = len(seeds_run)
            for _ in range(3): machine.work(stage.n*COST['segment'] + 40*COST['scoring'])
    return dict(done, segment=stage.n)

def run(minutes, slowness):
    "The lengths of an imagined quickstart, and the share of its minutes that it took."
    machine = Machine(minutes, slowness)
    state = dict(minutes=minutes, cost=COST, memory=1., n_seeds=3, counts=dict(n_train=120, n_test=40))
    done = stages(Pace(state, clock=machine), machine)
    return done, machine.now/machine.total

def slower_at(share): return lambda t: 2. if t > share else 1.
def faster_at(share): return lambda t: 1/3 if t > share else 1.

@pytest.mark.parametrize('slowness', [lambda t: 1., slower_at(.5), slower_at(.2), slower_at(.8),
                                      slower_at(.9),
                                      faster_at(0.), faster_at(.5), faster_at(.85),
                                      lambda t: 1 + .8*math.sin(40*t)],
                         ids=['steady', 'slow at 50%', 'slow at 20%', 'slow at 80%', 'slow at 90%', 'fast',
                              'fast at 50%', 'fast at 85%', 'waves'])
def test_ends_within_fifteen_percent(slowness):
    done, share = run(20, slowness)
    assert .85 <= share <= 1.15, (share, done)
    assert min(done[k] for k in ('pretrain', 'train', 'segment')) >= module.LEAST_STEPS and done['seeds'] >= 1

def test_a_fast_machine_uses_its_time_and_a_slow_one_does_less():
    steady, fast, slow = (run(20, f)[0] for f in (lambda t: 1., faster_at(0.), slower_at(.5)))
    assert fast['train'] > 2*steady['train'] and fast['segment'] > 2*steady['segment']
    assert slow['train'] < steady['train'] and slow['segment'] < .6*steady['segment']

def test_the_schedule_ends_where_it_should():
    "A fit that is made shorter ends with the learning rate of the last step, not of the middle."
    machine = Machine(1, slower_at(.5))
    pace = PaceCB(60., machine)
    learn = fit_steps(tiny_learner(), 120, schedule='cosine', cbs=[pace, tick(machine, .5)])
    rates = learn.history.frame().lr
    assert 80 <= len(rates) <= 95 and machine.now <= 60.5
    assert rates.iloc[-1] < .05*rates.max()

def test_too_few_minutes_and_another_plan(tmp_path, monkeypatch):
    cost = {k: COST[k] for k in ('pretrain', 'train', 'segment')}
    with pytest.raises(MedsynError, match='0.1 minutes are too few.*give') as e:
        divide_minutes(cost, .3, .1, 9, 120, scoring=2.)
    enough = int(str(e.value).split('give ')[1].split()[0])
    assert divide_minutes(cost, .3, enough, 9, 120, scoring=2.).minutes <= enough
    lesion_folder(tmp_path/'data', 16, size=32, seed=0)
    monkeypatch.setattr(module, 'measure_quickstart', lambda *a: COST)
    monkeypatch.setattr(module, 'quickstart', lambda *a, **k: exec("raise KeyboardInterrupt"))
    with contextlib.suppress(KeyboardInterrupt):
        quickstart_in(10, str(tmp_path/'data'), tmp_path/'q', size=32)
    assert load_json(tmp_path/'.q.plan.json')['minutes'] == 10
    with pytest.raises(MedsynError, match='a run of 10 minutes, now 12'):
        quickstart_in(12, str(tmp_path/'data'), tmp_path/'q', size=32)

def test_a_run_resumes_with_its_own_plan(tmp_path, monkeypatch, capsys):
    "Stopped after the backbone, the same call keeps what was decided and used; then it does nothing."
    data, machine = str(lesion_folder(tmp_path/'data', 16, size=32, seed=0)), Machine(20, slower_at(.5))
    measured, lengths = [], []
    monkeypatch.setattr(module, 'measure_quickstart', lambda *a: measured.append(1) or COST)
    def stopped(out, *a, pace, **k):
        with pace.stage('pretrain') as stage: lengths.append(imagined_fit(stage, lambda: machine.work(.5)))
        raise KeyboardInterrupt
    def finished(out, *a, pace, seeds, **k):
        lengths.append(pace.length('pretrain'))
        lengths.append(stages(pace, machine, seeds))
    call = partial(quickstart_in, 20, data, tmp_path/'q', clock=machine)
    monkeypatch.setattr(module, 'quickstart', stopped)
    with contextlib.suppress(KeyboardInterrupt): call()
    used = load_json(tmp_path/'.q.plan.json')['spent']
    assert used == machine.now > 300
    monkeypatch.setattr(module, 'quickstart', finished)
    call()
    assert lengths[0] == lengths[1] and measured == [1] and not (tmp_path/'.q.plan.json').exists()
    assert load_json(tmp_path/'q'/'minutes.json')['spent'] == pytest.approx(machine.now, rel=.01)
    call()
    assert measured == [1] and lengths[-2] == lengths[0] and lengths[-1]['seeds'] == lengths[2]['seeds']
    assert 'of 20 minutes' in capsys.readouterr().out
