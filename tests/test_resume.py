"""Every training resumes exactly: each method and each arm, and whole commands that are killed.

Environment variable `MEDSYN_KILLS`: how often each command is killed. nbs/results/kills/ holds a long run."""
import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from learners import small_backbone, small_loaders

from medsyn import core
from medsyn.core import MedsynError, content_hash
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import find_images, find_pairs, image_dls, pair_dls
from medsyn.diffusion.backbone import Backbone
from medsyn.diffusion.learner import pretrain_backbone
from medsyn.experiment import open_arm, split_once, train_segmenter
from medsyn.generate.catalog import METHODS, generator_learners
from medsyn.generate.control import ControlGenerator
from medsyn.resume import fit_resumable, read_state, states_in
from medsyn.segment.annealing import RealAnchorCB
from medsyn.segment.feedback import GenerativeFeedbackCB
from medsyn.segment.learner import segment_learner
from medsyn.segment.streams import SynthTermCB
from medsyn.synth import synthesize

KILLS = int(os.environ.get('MEDSYN_KILLS', 10))
STEPS, STOPS = 5, (2, 4)

class Killed(Exception): pass

class KillAt(Callback):
    "Ends the fit in the middle of a step, without any of fastai's events."
    def __init__(self, step): self.step = step
    def after_backward(self):
        if self.learn.steps.done == self.step: raise Killed('killed')

def stopped_and_resumed(train, folder):
    "What `train(state, cbs)` returns when it is killed at `STOPS`, and when it is not."
    for stop in STOPS:
        with pytest.raises(Killed): train(folder, [KillAt(stop)])
        assert int(states_in(folder)[0].name[:9]) == stop
    return train(folder, []), train(None, [])

def same(one, other):
    "Whether two lists of learners have the same weights, logs and evaluations, to the last bit."
    for a, b in zip(one, other, strict=True):
        assert content_hash(a.model.state_dict()) == content_hash(b.model.state_dict())
        assert a.history.frame().to_csv() == b.history.frame().to_csv()
        assert a.history.evals().to_csv() == b.history.evals().to_csv()

# Generators -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('pairs')/'toy'

SETTINGS = dict(paired=dict(channels=(16, 32), attend=()), concat=dict(drop_mask=.5), siamese=dict(K_tau=1))

@pytest.mark.parametrize('method', ('control', 'siamese', 'alignment', 'concat', 'paired'))
def test_generators(folder, tmp_path, method):
    settings = SETTINGS.get(method, {})
    def train(state, cbs):
        backbone = small_backbone() if METHODS[method].backbone else None
        learners = generator_learners(method, small_loaders(folder), backbone, probe=2, **settings)
        *earlier, last = learners
        for i, learn in enumerate(earlier):
            fit_resumable(learn, STEPS, state and state.with_name(f'state{i}'), every=0)
        fit_resumable(last, STEPS, state, every=0, cbs=cbs)
        return learners
    same(*stopped_and_resumed(train, tmp_path/'state'))

def test_pretraining(folder, tmp_path):
    "Images alone, from a loader of their own, with a prompt that is dropped at random."
    def train(state, cbs):
        dls = small_loaders(folder)
        images = image_dls([p.image for p in dls.pairs_train], 16, bs=4, seed=3, device='cpu')
        both = DataLoaders(images, dls.valid, device='cpu')
        both.size = 16
        return [pretrain_backbone(both, small_backbone(), STEPS, cbs=cbs, state=state, save_every=0)]
    same(*stopped_and_resumed(train, tmp_path/'state'))

# Segmenters -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def parts(tmp_path_factory):
    "Pairs of 32 px, frames without masks, partners under the real masks, a generator."
    base = tmp_path_factory.mktemp('parts')
    split = split_once(find_pairs(lesion_folder(base/'data', 20, 32, seed=0)))
    frames = find_images(lesion_folder(base/'frames', 8, 32, seed=5)/'images')
    images = torch.from_numpy(draw_lesions(8, 32, seed=1)[0]).permute(0, 3, 1, 2)/127.5 - 1
    generator = ControlGenerator(Backbone.tiny(images, 32, channels=(16, 32)))
    generator.save_pretrained(base/'generator')
    n = len(split.train)
    synthesize(generator.eval(), split.train, base/'synthetic', n, masks='real', steps=1, bs=n)
    return base, split, frames

ARMS = ('copy-paste+mixup', 'paste-onto', 'stream-annealed:{base}/synthetic+feedback:{base}/generator',
        'mcpmix-learned:{base}/synthetic', 'mean-teacher')

@pytest.mark.parametrize('arm', ARMS)
def test_segmenters(parts, tmp_path, arm):
    base, split, frames = parts
    opened = open_arm(arm.format(base=base), split, frames)
    def train(state, cbs):
        def callbacks():
            made = opened.cbs()
            for c in made:
                if isinstance(c, RealAnchorCB): c.every = 2
                if isinstance(c, GenerativeFeedbackCB): c.every = 2
            return [*made, *cbs]
        small = dict(encoder='mobilenetv3_small_050', size=32, bs=4, steps=STEPS, ema=.9)
        return [train_segmenter(split, replace(opened, cbs=callbacks), state=state, save_every=0, **small)]
    same(*stopped_and_resumed(train, tmp_path/'state'))

# Faults -----------------------------------------------------------------------------------------------------

def one(folder, state, steps=STEPS, every=0):
    "A short training of a small generator."
    learn, = generator_learners('unconditional', small_loaders(folder), small_backbone(), probe=10**6)
    return fit_resumable(learn, steps, state, every)

def test_a_damaged_state_is_named_and_the_one_before_it_used(folder, tmp_path):
    whole = one(folder, None)
    one(folder, tmp_path)
    newest, before = states_in(tmp_path)
    data = bytearray(newest.read_bytes())
    data[len(data)//2] ^= 1                     # one bit
    newest.write_bytes(data)
    with pytest.warns(UserWarning, match=f'{newest.name} is damaged: {before.name} is used'):
        same([one(folder, tmp_path)], [whole])

def test_a_state_of_another_training_is_refused(folder, tmp_path):
    one(folder, tmp_path)
    with pytest.raises(MedsynError, match=r'another training \(steps was 5, now 9\)'):
        one(folder, tmp_path, 9)
    pairs = find_pairs(lesion_folder(tmp_path.with_name('more'), 16, 16, seed=4))
    dls = pair_dls(pairs, 16, bs=6, valid=.5, seed=0, augment=False, device='cpu')
    learn, = generator_learners('unconditional', dls, small_backbone())
    with pytest.raises(MedsynError, match='images was 12, now 8'): fit_resumable(learn, STEPS, tmp_path)

def test_a_full_disk_costs_no_state(folder, tmp_path, monkeypatch):
    "The third state does not fit: one sentence, and the second is whole."
    written, fsync = [], os.fsync
    def full(descriptor):
        written.append(descriptor)
        if len(written) == 5: raise OSError(errno.ENOSPC, 'No space left on device')
        fsync(descriptor)
    monkeypatch.setattr(core.os, 'fsync', full)
    with pytest.raises(MedsynError, match='cannot write .* the disk is full'): one(folder, tmp_path)
    monkeypatch.undo()
    assert [int(f.name[:9]) for f in states_in(tmp_path)] == [2, 1]
    assert read_state(tmp_path)['callbacks']['steps']['done'] == 2
    same([one(folder, tmp_path)], [one(folder, None)])

def test_a_short_training_leaves_no_state(folder, tmp_path):
    one(folder, tmp_path/'state', every=10)
    assert not (tmp_path/'state').exists()

def test_a_loader_without_a_position_is_refused(folder, tmp_path):
    pairs = small_loaders(folder)
    loader = torch.utils.data.DataLoader(pairs.train.dataset, 4)
    learn, = generator_learners('unconditional', small_loaders(folder), small_backbone())
    learn.dls = DataLoaders(loader, loader)
    with pytest.raises(MedsynError, match='cannot resume: make the loaders with pair_dls'):
        fit_resumable(learn, 2, tmp_path)

def test_a_stream_without_a_position_is_refused_before_the_first_step(folder, tmp_path):
    dls = small_loaders(folder)
    data = torch.utils.data.TensorDataset(torch.rand(4, 3, 16, 16), torch.zeros(4, 16, 16).long())
    other = torch.utils.data.DataLoader(data, 2)
    learn = segment_learner(dls, torch.nn.Conv2d(3, 1, 1), cbs=[SynthTermCB(other, augment='none')])
    with pytest.raises(MedsynError, match='a second stream from a DataLoader cannot resume'):
        fit_resumable(learn, 2, tmp_path)
    assert learn.steps.done == 0

# Whole commands ---------------------------------------------------------------------------------------------

def test_killed_commands(tmp_path):
    "No file that was reported as written is lost, and every result is that of the uninterrupted run."
    script = Path(__file__).with_name('kill.py')
    commands = 'pretrain', 'train', 'segment', 'compare', 'fit'
    call = [sys.executable, script, tmp_path, *commands, '--kills', KILLS, '--steps', 4]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr
    *_, found, total = done.stdout.splitlines()
    print(total)
    found = json.loads(found)
    assert [row['command'] for row in found] == list(commands)
    assert all(row['kills'] >= KILLS and row['files_checked'] and not row['losses'] for row in found)
    checked = sum(row['files_checked'] for row in found)
    assert total == f'kills: {KILLS*len(commands)}, files checked: {checked}, losses: 0'
