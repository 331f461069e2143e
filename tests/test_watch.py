"Every stage can be watched: what `medsyn view` reads each time that a run writes, and afterwards."
import shutil
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medsyn import cli, experiment
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs
from medsyn.fit import Synthesis, fit
from medsyn.pages.review import Site
from medsyn.pages.runs import training_curves, training_page, training_picture, training_state
from medsyn.train import CommandClock
from medsyn.watch import LOGS, WatchCB, read_run

SMALL = ['--encoder', 'mobilenetv3_small_050', '--size', '32', '--steps', '3', '--bs', '4']

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return find_pairs(lesion_folder(tmp_path_factory.mktemp('pairs'), 14, size=32, seed=0))

@pytest.fixture
def looks(tmp_path, monkeypatch):
    "What the page shows whenever a run below `tmp_path/out` has written: name -> list of `RunView`."
    seen, write = {}, WatchCB.write
    def writing(self):
        write(self)
        view = read_run(tmp_path/'out')
        latest = training_state(Site(tmp_path, run=tmp_path/'out'), '')['name']
        seen.setdefault(latest, []).append(view[latest])
    monkeypatch.setattr(WatchCB, 'write', writing)
    return seen

def check_shown(out, looks, name, steps, pictures=0):
    "A training was shown from its first step on, with a table that grew, and is shown when it is done."
    first, last = looks[name][0], looks[name][-1]
    assert (first.done, first.total, first.finished, len(first.log)) == (1, steps, False, 1)
    assert first.text.startswith(f'running, 1 of {steps} steps; loss ')
    assert (last.done, len(last.log)) == (steps, steps)
    site = Site(out, run=out)
    state = training_state(site, name)
    assert state['finished'] and len(state['pictures']) == pictures
    assert f'finished, {steps} of {steps} steps' in training_page(site, dict(name=name))
    assert training_curves(site, name).startswith(b'\x89PNG')
    for stem in state['pictures']: assert training_picture(site, name, stem).startswith(b'\x89PNG')

def test_quickstart(tmp_path, looks, monkeypatch):
    "Backbone, generator with samples, and each run of the comparison; then the folders on their own."
    out, clocks, begin = tmp_path/'out', [], CommandClock.__init__
    def beginning(self, total):
        begin(self, total)
        clocks.append(self)
    monkeypatch.setattr(CommandClock, '__init__', beginning)
    experiment.quickstart(out, n_train=12, n_test=4, size=32, pretrain_steps=3, train_steps=4,
                          segment_steps=3, n_synth=3, sample_steps=1, channels=(16, 32), seeds=(0,))
    assert clocks[0].done == clocks[0].total == 3 + 4 + 3*3     # the bars say the time left for all stages
    check_shown(out, looks, 'backbone/pretrain', 3)
    check_shown(out, looks, 'generator/concat', 4, pictures=4)
    runs = [f'results/{arm}_unet_0' for arm in ('real', 'two-passes', 'stream')]
    for name in runs: check_shown(out, looks, name, 3)
    assert list(looks) == ['backbone/pretrain', 'generator/concat', *runs]
    assert list(read_run(out/'backbone')) == ['pretrain'] and list(read_run(out/'generator')) == ['concat']
    assert sorted(read_run(out/'results')) == [name.removeprefix('results/') for name in sorted(runs)]
    shutil.rmtree(out/'generator'/'live')                           # without it the finished tables remain
    assert read_run(out/'generator')['train'].finished

def test_train_of_pairs_leaves_samples_with_their_masks(tmp_path, pairs, looks):
    "Both networks of PIG are shown; the second samples images, each above the mask sampled with it."
    out, settings = tmp_path/'out', dict(channels=(16, 32), layers=1, attend=())
    made = experiment.make_generator(pairs, None, out, 'paired', steps=2, bs=4, size=32, settings=settings,
                                     pictures=2)
    check_shown(out, looks, 'guider', 2)
    check_shown(out, looks, 'generator', 2, pictures=2)
    shown = np.asarray(Image.open(read_run(out)['generator'].pictures[-1]))
    assert shown.shape == (64, 4*32, 3)
    images, soft = made.sample_pairs(4, 20, 'dpm++')
    assert (shown[:32] == np.concatenate(list(images), 1)).all()    # of the averaged weights that are saved
    assert (shown[32:] == np.concatenate(list((soft > 0)*255), 1)[..., None]).all()

def test_fit(tmp_path, pairs, looks):
    "The generator and the runs of each fold, then the final model."
    out, tiny = tmp_path/'out', Synthesis(least_steps=2, most_steps=2, bs=4, channels=(16, 32), per_pair=1,
                                          sample_steps=1)
    fit(pairs, out, encoder='mobilenetv3_small_050', size=32, bs=4, minutes=5, least_steps=1, most_steps=2,
        most_folds=2, arms=['real', 'mcpmix-scheduled'], synthesis=tiny)
    for k in (0, 1): check_shown(out, looks, f'cv/fold{k}/generator/concat', 2)
    check_shown(out, looks, 'model', 2)
    assert list(looks)[-1] == 'model'

def test_samples_change_no_weight(tmp_path, pairs):
    "With and without pictures the trained pair is the same, bit for bit."
    settings = dict(channels=(16, 32), layers=1, attend=())
    states = [experiment.make_generator(pairs, None, tmp_path/f'{n}', 'paired', steps=2, bs=4, size=32,
                                        settings=settings, pictures=n).state_dict() for n in (0, 2)]
    assert all((states[0][k] == states[1][k]).all() for k in states[0])

def test_pretrain_and_segment_by_command(tmp_path, pairs, looks):
    data = str(pairs[0].image.parent.parent)
    command = ['--out', str(tmp_path/'out'), '--size', '32', '--bs', '4']
    assert cli.main(['pretrain', data, *command, '--steps', '3', '--channels', '16', '32']) == 0
    check_shown(tmp_path/'out', looks, 'pretrain', 3)
    shutil.rmtree(tmp_path/'out')
    assert cli.main(['segment', data, '--out', str(tmp_path/'out'), *SMALL]) == 0
    check_shown(tmp_path/'out', looks, 'train', 3)

def test_a_run_that_was_killed_is_not_called_running(tmp_path, pairs, looks, monkeypatch):
    "Nobody writes any more: after two minutes the page says so."
    write = WatchCB.write
    def write_and_die(self):
        write(self)
        raise KeyboardInterrupt
    monkeypatch.setattr(WatchCB, 'write', write_and_die)
    with pytest.raises(KeyboardInterrupt):
        experiment.make_backbone(pairs, tmp_path/'out', size=32, steps=5, bs=4, channels=(16, 32))
    view = read_run(tmp_path/'out')['pretrain']
    assert view.text.startswith('running, 1 of 5 steps')
    monkeypatch.setattr('medsyn.watch.time.time', lambda: view.written + 600)
    assert 'nothing written for 10 minutes, it may have been stopped, 1 of 5 steps' in view.text

# Other places ----------------------------------------------------------------------------------------------

PAIR = dict(channels=(16, 32), layers=1, attend=())

def module(name, **content):
    "A library of that name."
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)
    vars(made).update(content)
    return made

def test_csv_has_every_number_of_the_run(tmp_path, pairs):
    "By command: the losses of each step, the learning rate, and the held-out curve."
    data, out = str(pairs[0].image.parent.parent), tmp_path/'out'
    assert cli.main(['segment', data, '--out', str(out), *SMALL, '--log', 'csv']) == 0
    found = pd.read_csv(out/'logs'/'train.csv').pivot(index='step', columns='name', values='value')
    log = pd.read_csv(out/'log.csv').set_index('step')
    assert sorted(found) == sorted(log) == ['held-out dice@0.5', 'loss', 'lr']
    pd.testing.assert_frame_equal(found[list(log)], log, check_names=False, atol=1e-6)

def test_a_resumed_record_has_each_step_once(tmp_path):
    writer = LOGS['csv'](tmp_path, 'train', 0)
    for step in (1, 2, 3): writer.scalars(step, dict(loss=step/10))
    resumed = LOGS['csv'](tmp_path, 'train', 2)         # the third step was not saved
    resumed.scalars(3, dict(loss=.5))
    table = pd.read_csv(tmp_path/'logs'/'train.csv')
    assert table.step.tolist() == [1, 2, 3] and table.value.tolist() == [.1, .2, .5]

def test_tensorboard_gets_losses_terms_margin_and_samples(tmp_path, pairs, monkeypatch):
    "Through PyTorch's SummaryWriter, which needs the library tensorboard; here a stand-in takes its calls."
    scalars, images, closed = [], [], []
    class Writer:
        def __init__(self, folder, purge_step): self.folder = folder.rpartition('/')[2]
        def add_scalar(self, name, value, step): scalars.append((self.folder, name, step))
        def add_image(self, name, image, step, dataformats):
            images.append((self.folder, step, image.shape, dataformats))
        def close(self): closed.append(self.folder)
    monkeypatch.setitem(sys.modules, 'tensorboard', module('tensorboard'))
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module('tensorboard', SummaryWriter=Writer))
    experiment.make_generator(pairs, None, tmp_path/'out', 'paired', steps=2, bs=4, size=32, settings=PAIR,
                              log='tensorboard')
    assert {(run, step) for run, name, step in scalars if name == 'loss'} == {
        (run, step) for run in ('guider', 'generator') for step in (1, 2)}
    assert ('generator', 'margin', 2) in scalars
    assert [(run, step) for run, step, *_ in images] == [('generator', 1), ('generator', 2)]
    assert images[0][2:] == ((64, 4*32, 3), 'HWC') and closed == ['guider', 'generator']

def test_wandb_gets_the_same(tmp_path, pairs, monkeypatch):
    calls = []
    run = SimpleNamespace(log=lambda values, step: calls.append((step, sorted(values))),
                          finish=lambda: calls.append('finish'))
    begun = []
    def init(**given):
        begun.append(given)
        return run
    monkeypatch.setitem(sys.modules, 'wandb', module('wandb', init=init, Image=lambda image: image.shape))
    experiment.make_backbone(pairs, tmp_path/'out', size=32, steps=2, bs=4, channels=(16, 32), log='wandb')
    assert begun[0]['project'] == 'medsyn' and begun[0]['resume'] == 'allow'
    assert calls[0] == (1, ['loss', 'lr', 'right']) and calls[-1] == 'finish' and len(calls) == 3

@pytest.mark.parametrize('log', ('tensorboard', 'wandb'))
def test_a_missing_library_is_one_sentence(tmp_path, pairs, capsys, monkeypatch, log):
    monkeypatch.setattr('medsyn.watch.importlib.util.find_spec', lambda name: None)
    data = str(pairs[0].image.parent.parent)
    with pytest.raises(experiment.MedsynError, match=f'--log {log} needs a library that is not'):
        experiment.make_backbone(pairs, tmp_path/'out', size=32, steps=2, bs=4, log=log)
    monkeypatch.undo()
    assert cli.main(['segment', data, '--out', str(tmp_path/'out'), *SMALL, '--log', 'tensorbord']) == 2
    assert "unknown log 'tensorbord' (did you mean 'tensorboard'?)" in capsys.readouterr().err
    assert not (tmp_path/'out').exists()
