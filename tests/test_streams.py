"""The arms of a comparison: each trains, each leaves the real stream alone, and the limits are exact."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from medsyn.core import MedsynError, seeded
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls, read_pair, split_pairs
from medsyn.segment.catalog import ARMS, Arm, as_arm, callbacks_of, combine
from medsyn.segment.learner import segment_learner
from medsyn.segment.mixing import partner_dls
from medsyn.segment.models import Segmenter, segmenter
from medsyn.segment.streams import CopyPasteCB, SynthTermCB, class_losses, implausible, save_ignored
from medsyn.train import LossTermCB, fit_steps

SIZE = 32
SMALL = dict(name='unet', encoder='mobilenetv3_small_050', size=SIZE)

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Twenty real pairs, as many synthetic ones under the same masks with a manifest, and ten frames."
    d = tmp_path_factory.mktemp('arms')
    real = find_pairs(lesion_folder(d/'real', 20, size=SIZE, seed=0))
    synthetic = d/'synthetic'
    for folder in ('images', 'masks'): (synthetic/folder).mkdir(parents=True)
    rows = []
    for i, p in enumerate(real):
        image, mask = read_pair(p)
        row = dict(index=i, file=f'images/{i:06d}.png', mask=f'masks/{i:06d}.png', source=p.name,
                   transform=dict(kind='real'))
        Image.fromarray(image[..., ::-1].copy()).save(synthetic/row['file'])
        Image.fromarray(mask*255).save(synthetic/row['mask'])
        rows.append(json.dumps(row))
    (synthetic/'manifest.jsonl').write_text('\n'.join(rows))
    frames = [p.image for p in find_pairs(lesion_folder(d/'frames', 10, size=SIZE, seed=1))]
    return real, synthetic, frames

def train(data, cbs=(), steps=3, arm=None, augment='strong', **kw):
    "A real network after a few steps; with an arm, what it adds."
    real, _, _ = data
    arm = arm or Arm()
    train_pairs, held = split_pairs(real, .2)
    pairs = [*train_pairs*arm.copies, *arm.pairs]
    dls = pair_dls(pairs, SIZE, 4, valid=held, seed=1, augment=augment, device='cpu')
    if arm.partners: dls = partner_dls(dls, arm.partners)
    with seeded(0):
        learn = segment_learner(dls, segmenter(**SMALL), cbs=[*cbs, *callbacks_of(arm)], **kw)
        return fit_steps(learn, steps, 1e-3)

def state(learn):
    return torch.cat([v.double().flatten() for v in learn.model.state_dict().values()])

class BatchesCB(LossTermCB):
    "Keeps the real batches that the network is trained on."
    name, order = 'kept_batches', 30
    def before_fit(self): self.batches = []
    def before_batch(self): self.batches.append((self.x.clone(), self.y.clone()))
    def after_loss(self): pass

@pytest.mark.parametrize('augment', ['strong', 'full'])
def test_no_weight_is_real_only_bit_for_bit(data, augment):
    pairs = find_pairs(data[1])
    plain = state(train(data, augment=augment))
    everything = {p.name: np.ones((SIZE, SIZE), bool) for p in pairs}
    unused = SynthTermCB(pairs, w=0, schedule='first')
    for cb in (unused, CopyPasteCB(p=0), SynthTermCB(pairs, ignore=everything)):
        assert torch.equal(state(train(data, [cb], augment=augment)), plain), vars(cb)
    traces = state(train(data, [SynthTermCB(pairs, w=1e-30)], augment=augment)) - plain
    assert traces.abs().max() < 1e-20           # the term itself where the real gradient is 0, nothing else
    assert not torch.equal(state(train(data, [SynthTermCB(pairs)], augment=augment)), plain)

SKIP = {'feedback', 'diffusion-init'}       # these need a generator and a backbone

def form(name, synthetic): return f'{name}:{synthetic}' if ARMS[name].folder == 'pairs' else name

@pytest.mark.parametrize('name', sorted(set(ARMS) - SKIP))
def test_every_arm_trains(data, name):
    real, synthetic, frames = data
    augment = 'full' if name.startswith('mcpmix') else 'strong'
    learn = train(data, steps=2, arm=as_arm(form(name, synthetic), real, frames), augment=augment)
    log = learn.history.frame()
    assert len(log) == 2 and np.isfinite(log.loss).all()
    assert ARMS[name].about

ADDED = ['stream', 'two-passes', 'paste-onto', 'fixmatch', 'mean-teacher', 'mcpmix-fixed']

@pytest.mark.parametrize('name', ADDED)
def test_what_is_added_leaves_the_real_batches_alone(data, name):
    real, synthetic, frames = data
    alone, beside = BatchesCB(), BatchesCB()
    train(data, [alone], augment='full')
    train(data, [beside], arm=as_arm(form(name, synthetic), real, frames), augment='full')
    for (x, y), (u, v) in zip(alone.batches, beside.batches, strict=True):
        assert torch.equal(x, u) and torch.equal(y, v)

def test_combinations(data):
    real, synthetic, frames = data
    text = f'stream-annealed:{synthetic}+fixmatch+copy-paste'
    arm = as_arm(text, real, frames)
    assert (arm.schedule, len(arm.synthetic), len(arm.unlabelled)) == ('cosine', 20, 10)
    names = [type(c).__name__ for c in callbacks_of(arm)]
    assert names == ['TeacherCB', 'UnlabelledCB', 'CopyPasteCB', 'SynthTermCB']
    log = train(data, arm=arm).history.frame()
    assert {'L_u', 'L_syn', 'w_syn', 'w_u', 'sure'} <= set(log)
    with pytest.raises(MedsynError, match='second stream'):
        as_arm(f'stream:{synthetic}+stream:{synthetic}', real)
    mixed = combine([Arm(pairs=real[:2], copies=2), Arm(passes=2), Arm(pairs=real[2:3])])
    assert (len(mixed.pairs), mixed.copies, mixed.passes) == (3, 2, 2)
    arm = as_arm(f'mcpmix-fixed:{synthetic}+two-passes', real)
    log = train(data, arm=arm, augment='full').history.frame()
    assert {'L_mix', 'L_again'} <= set(log)

def test_schedules_in_a_run(data):
    pairs = find_pairs(data[1])
    log = train(data, [SynthTermCB(pairs, w=.8, schedule='cosine')], steps=8).history.frame()
    assert np.allclose(log.w_syn, [.4*(1 + math.cos(math.pi*k/8)) for k in range(8)], atol=1e-6)
    log = train(data, [SynthTermCB(pairs, schedule='first', switch=.25)], steps=8).history.frame()
    assert log.w_syn.tolist() == [1., 1.] + [0.]*6 and log.L_syn.isna().tolist() == [False]*2 + [True]*6

def test_ignored_pixels_beside_the_pairs_are_found(data, tmp_path):
    "All pixels ignored in the folder: the stream teaches nothing."
    real, synthetic, _ = data
    pairs = find_pairs(synthetic)
    arm = as_arm(f'stream:{synthetic}', real)
    assert arm.ignored is None
    arm.ignored = save_ignored(tmp_path/'ignored', {p.name: np.ones((SIZE, SIZE), bool) for p in pairs})
    assert torch.equal(state(train(data, arm=arm)), state(train(data)))

def test_the_filter_reads_the_real_mean_of_each_class(data):
    "A teacher that knows: nothing is ignored where it agrees, everything where it is wrong."
    real = data[0]
    class Oracle(torch.nn.Conv2d):
        def forward(self, x): return (20*self.answer - 10 + self.noise)[:len(x)]
    net = Oracle(3, 1, 1)
    teacher = Segmenter(net, 2, dict(name='oracle', size=SIZE, mean=[0.]*3, std=[1.]*3)).eval()
    net.answer = torch.stack([torch.from_numpy(read_pair(p)[1]) for p in real[:8]])[:, None].float()
    net.noise = torch.randn(net.answer.shape, generator=torch.Generator().manual_seed(0))
    ignored = implausible(teacher, real[:8], factor=50., real=real[:8])
    assert not any(v.any() for v in ignored.values())
    assert max(class_losses(teacher, real[:8])) < .01
    net.answer[0, 0, :16] = 1 - net.answer[0, 0, :16]
    wrong = implausible(teacher, real[:8], factor=2.)
    assert wrong[real[0].name][:16].mean() > .9 and not wrong[real[0].name][16:].any()
