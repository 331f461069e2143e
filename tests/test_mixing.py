"""MCPMix and its annealing: limits to the bit, the look-ahead gradient, what the gates do.

The finite differences take the step for real, on a copy of the network, without the code under test.
"""
import contextlib
import copy
import gc
import json
import weakref

import numpy as np
import pytest
import torch
from fastai.callback.fp16 import MixedPrecision
from PIL import Image
from torch import nn

from medsyn import experiment
from medsyn.core import MedsynError, seeded
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import FITS, Pair, PairDataset, Reading, find_pairs, pair_dls, read_pair, read_with
from medsyn.diffusion.backbone import Backbone
from medsyn.experiment import compare, describe_arm
from medsyn.generate.control import ControlGenerator
from medsyn.segment.annealing import RealAnchorCB, anchor_batch, hypergradient, move_gate, unit_forces
from medsyn.segment.catalog import MIX_ARMS, Arm, as_arm, mixing_arms
from medsyn.segment.feedback import GenerativeFeedbackCB
from medsyn.segment.learner import segment_learner
from medsyn.segment.mixing import (MIX_SCHEDULES, CutMixCB, MixedBatch, MixUpCB, PairedMixCB, PartnerDataset,
                                   check_partners, find_partners, frozen_stats, partner_dls)
from medsyn.segment.models import Segmenter, segmenter
from medsyn.train import fit_steps

S = 24

def disc(rng):
    yy, xx = np.mgrid[:S, :S]
    cy, cx = rng.uniform(6, S - 6, 2)
    return (yy - cy)**2 + (xx - cx)**2 < rng.uniform(3, 6)**2

def paint(m, rng):
    ground = rng.uniform(60, 140, 3) + rng.normal(0, 18, (S, S, 1)) + rng.normal(0, 10, (S, S, 3))
    return (ground + m[..., None]*60*rng.uniform(.7, 1.3)*np.array([1, .6, .4])).clip(0, 255).astype(np.uint8)

KINDS = dict(good=paint, noise=lambda m, rng: rng.integers(0, 256, (S, S, 3), dtype=np.uint8),
             shifted=lambda m, rng: paint(np.roll(m, (S//2, S//2), (0, 1)), rng))

@pytest.fixture(scope='module')
def discs(tmp_path_factory):
    "Eighty discs and their partners of three kinds."
    d, rng = tmp_path_factory.mktemp('discs'), np.random.default_rng(5)
    pairs, partners = [], {k: {} for k in KINDS}
    for i in range(80):
        m, p = disc(rng), Pair(f'{i:03d}', d/f'{i:03d}.png', d/f'{i:03d}_mask.png')
        pairs.append(p)
        Image.fromarray(paint(m, rng)).save(p.image); Image.fromarray((m*255).astype(np.uint8)).save(p.mask)
        for k, draw in KINDS.items():
            f = d/f'{i:03d}_{k}.png'
            Image.fromarray(draw(m, rng)).save(f)
            partners[k][p.name] = [Pair(p.name, f, p.mask)]
    return pairs, partners

def net(w=8, act=nn.ReLU):
    block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), act()]
    return nn.Sequential(*block(3, w), nn.Dropout(.05), *block(w, w), *block(w, w), nn.Conv2d(w, 1, 1))

def train(discs, kind, cbs, steps=160, seed=0, augment='flip', lr=1e-2):
    pairs, partners = discs
    dls = pair_dls(pairs, S, 8, valid=.2, seed=seed, augment=augment, device='cpu')
    if kind: dls = partner_dls(dls, partners[kind])
    with seeded(seed): return fit_steps(segment_learner(dls, net(), cbs=list(cbs)), steps, lr, 'one_cycle')

def state(learn):
    "Every weight and running statistic; not the gates."
    kept = {k: v for k, v in learn.model.state_dict().items() if not k.startswith('kept_')}
    return torch.cat([v.double().flatten() for v in kept.values()])

# Limits -------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(s=0), dict(w=0), dict(s=0, passes=1), dict(w=0, passes=1), dict(w=1e-30),
                                dict(s=.9, w=1e-30, per_image=True)], ids=str)
def test_limits_are_real_only_training_bit_for_bit(discs, kw):
    "With w = 1e-30 the mixed pass runs in full and must leave no trace in statistics, streams or gradients."
    plain = train(discs, None, [], 12, augment=True)
    mixed = train(discs, 'good', [PairedMixCB(**kw)], 12, augment=True)
    assert torch.equal(state(plain), state(mixed))
    assert not torch.equal(state(plain), state(train(discs, 'good', [PairedMixCB()], 12, augment=True)))

def test_one_pass_leaves_a_trace(discs):
    "The check above is not blind."
    one_pass = train(discs, 'good', [PairedMixCB(w=1e-30, passes=1)], 3)
    assert not torch.equal(state(train(discs, None, [], 3)), state(one_pass))

def test_partner_equal_to_the_image_is_a_second_real_pass(discs):
    "With the real image as its own partner the term is the real loss, whatever the strength."
    pairs, _ = discs
    itself = pairs, {'itself': {p.name: [p] for p in pairs}}
    def log(s):
        learn = train(itself, 'itself', [PairedMixCB(s)], 4)
        return learn.history.frame()[['loss', 'L_mix']].to_numpy()
    np.testing.assert_allclose(log(.2), log(1.), rtol=1e-4)

@pytest.mark.parametrize('schedule', list(MIX_SCHEDULES))
def test_schedules_end_where_they_say(schedule):
    factor = MIX_SCHEDULES[schedule]
    assert factor(0) == 1 and factor(1) == pytest.approx(1. if schedule == 'fixed' else 0.)

@pytest.mark.parametrize('s', [0., .3, 1.])
def test_strength_of_each_image(s):
    "Uniform in [0, s], the same at every call, exactly the real image at s = 0."
    torch.manual_seed(0)
    b = MixedBatch(torch.zeros(64, 3, 4, 4), torch.ones(64, 3, 4, 4), (), seed=5, per_image=True)
    mixed = b.at(s)
    assert torch.equal(mixed, b.at(s)) and mixed.min() >= 0 and mixed.max() <= s
    assert (mixed.flatten(1).std(1) == 0).all()  # one strength an image
    if s:
        assert mixed[:, 0, 0, 0].mean() == pytest.approx(s/2, abs=.1*s)
        assert mixed[:, 0, 0, 0].unique().numel() > 60

@pytest.mark.parametrize('augment', ['none', 'flip', 'full', 'strong'])
def test_partners_stay_in_register(discs, augment):
    "The real half is that of a loader without partners; a partner that is the image moves as it does."
    pairs, partners = discs
    def make(): return pair_dls(pairs, S, 8, valid=.2, seed=3, augment=augment, device='cpu')
    itself = {p.name: [p] for p in pairs}
    loaders = make().train, partner_dls(make(), partners['good']).train, partner_dls(make(), itself).train
    for (x, y), (real, partner, mask), (_, copied, _) in zip(*loaders, strict=True):
        assert torch.equal(x, real) and torch.equal(y, mask) and not torch.equal(real, partner)
        assert torch.equal(real, copied) == (augment != 'full')                         # colours of its own

def test_partners_of_another_shape(tmp_path):
    "Images that are not square: masks are compared, and pictures read, at height and width."
    pairs = wide_pairs(tmp_path/'r')
    partners = find_partners(synthetic(tmp_path/'s', pairs), pairs)
    dls = partner_dls(pair_dls(pairs, (32, 64), 4, valid=.25, device='cpu'), partners)
    real, partner, mask = dls.train.one_batch()
    assert real.shape == partner.shape == (4, 3, 32, 64) and mask.shape == (4, 32, 64)

@pytest.mark.parametrize('cache,limit,kept', [(True, 2, True), (True, 3e-4, False), (False, 2, False)])
def test_partners_stay_in_memory_as_the_real_images_do(discs, cache, limit, kept):
    "The same choice and the same limit; five partners of each image do not fit where one does."
    pairs, partners = discs
    real = PairDataset(pairs, S, cache=cache, limit=limit)
    five = {name: found*5 for name, found in partners['good'].items()}
    one_each, five_each = PartnerDataset(real, partners['good']), PartnerDataset(real, five)
    assert (real.cache is not None) == (one_each.cache is not None) == cache
    assert (five_each.cache is not None) == kept
    for ds in (one_each, five_each):
        first, again = ds[0][1], ds[0][1]
        assert torch.equal(first, again) and (first is again) == (ds.cache is not None)

def wide_pairs(folder):
    "Rendered pairs of 48x32 pixels."
    pairs = find_pairs(lesion_folder(folder, 12, size=32, seed=0))
    for p in pairs:
        for file, resample in ((p.image, Image.Resampling.BILINEAR), (p.mask, Image.Resampling.NEAREST)):
            Image.open(file).resize((48, 32), resample).save(file)
    return pairs

def triples(pairs, partners, size=32, **reading):
    dls = pair_dls(pairs, size, 4, valid=.25, augment='none', device='cpu', **reading)
    return list(partner_dls(dls, partners).train)

@pytest.mark.parametrize('own', FITS)
@pytest.mark.parametrize('given', [None, *FITS])
def test_partners_are_read_as_the_real_images(tmp_path, own, given):
    "With the loader's fit, or else with that of the real pair: an image as its own partner stays itself."
    pairs = read_with(wide_pairs(tmp_path/'r'), Reading(fit=own))
    reading = dict(fit=given) if given else {}
    for size in (32, (32, 64)):
        for real, partner, _ in triples(pairs, own_partners(pairs), size, **reading):
            assert torch.equal(real, partner)

@pytest.mark.parametrize('own', FITS)
def test_partners_lie_on_the_real_images_or_are_refused(tmp_path, own):
    "Partners sampled at a square from images that are not: they serve for that fit and for squares."
    pairs = read_with(wide_pairs(tmp_path/'r'), Reading(fit=own))
    partners = find_partners(synthetic(tmp_path/'s', pairs, 64, shade=1), pairs)
    for real, partner, _ in triples(pairs, partners, 64): assert torch.equal(real, partner)
    for real, partner, _ in triples(pairs, partners, 32): assert (real - partner).abs().mean() < .02
    for fit in FITS:
        if fit == own: continue
        said = f"sampled with fit='{own}'.* does not lie on .* fit='{fit}' at 32"
        with pytest.raises(MedsynError, match=said): triples(pairs, partners, 32, fit=fit)
    if own == 'stretch': assert triples(pairs, partners, (32, 64))
    else:
        with pytest.raises(MedsynError, match='the aspect ratio of the partners'):
            triples(pairs, partners, (32, 64))

def test_partners_on_the_pages_of_one_file(tmp_path):
    "Each page is a partner of its own, although all have one path."
    pairs = find_pairs(lesion_folder(tmp_path/'r', 12, size=32, seed=0))
    first, *others = [Image.open(p.image) for p in pairs]
    first.save(tmp_path/'all.tif', save_all=True, append_images=others)
    def page(i, p): return Pair(p.name, tmp_path/'all.tif', p.mask, Reading(page=i))
    partners = {p.name: [page(i, p)] for i, p in enumerate(pairs)}
    for real, partner, _ in triples(pairs, partners): assert torch.equal(real, partner)

def test_no_partners_at_all(discs):
    pairs, _ = discs
    check_partners([], {})
    said = "80 of 80 real images have no synthetic partner, '000' first"
    with pytest.raises(MedsynError, match=said): check_partners(pairs, {})

def test_damaged_manifest(tmp_path, discs):
    folder = synthetic(tmp_path/'s', discs[0][:2])
    (folder/'manifest.jsonl').write_text((folder/'manifest.jsonl').read_text()[:-5])
    with pytest.raises(MedsynError, match='is damaged .* run synthesize again'):
        find_partners(folder, discs[0])

def test_a_generator_with_masks_of_its_own_leaves_no_partners(tmp_path, discs):
    "Its lines name no real pair and no transform."
    folder = synthetic(tmp_path/'s', discs[0][:2])
    about = [json.loads(line) for line in (folder/'manifest.jsonl').read_text().splitlines()]
    own = [{k: row[k] for k in ('index', 'file', 'mask')} | dict(seed=1, tidied=0) for row in about]
    dropped = dict(index=2, seed=2, tidied=0, dropped='empty mask')
    (folder/'manifest.jsonl').write_text('\n'.join(map(json.dumps, [dropped, *own])))
    said = r"000000\.png has a mask .* itself.* run synthesize with masks='real'"
    with pytest.raises(MedsynError, match=said): find_partners(folder, discs[0])

def test_statistics_are_thawed_after_an_error():
    m = net()
    with pytest.raises(RuntimeError):
        with frozen_stats(m): m(torch.rand(2, 5, S, S))
    assert all(b.track_running_stats for b in m.modules() if isinstance(b, nn.BatchNorm2d))

# The look-ahead gradient --------------------------------------------------------------------------

def bce(out, m): return nn.functional.binary_cross_entropy_with_logits(out[:, 0], m)

@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('s,w', [(.05, .3), (.5, 1.), (.95, .6), (.7, .02)])
def test_hypergradient_is_the_look_ahead_loss(s, w, per_image):
    torch.manual_seed(1)
    m = nn.Sequential(*[o for o in net(4, nn.SiLU) if not isinstance(o, nn.Dropout)]).double().train()
    draw, masks = lambda: torch.rand(4, 3, 12, 12).double(), lambda: (torch.rand(4, 12, 12) > .7).double()
    b = MixedBatch(draw(), draw(), (masks(),), seed=3, per_image=per_image)
    (ax, ay), eta = (draw(), masks()), .2
    u = torch.rand(4, 1, 1, 1, generator=torch.Generator().manual_seed(3)).double() if per_image else 1.
    mix = lambda s: b.real + u*s*(b.partner - b.real)
    def ahead(s, w):
        one = copy.deepcopy(m)
        (bce(one(b.real), *b.yb) + w*bce(one(mix(s)), *b.yb)).backward()
        with torch.no_grad():
            for p in one.parameters(): p -= eta*p.grad
            return bce(one(ax), ay).item()
    loss = bce(m(b.real), *b.yb) + w*bce(m(mix(s)), *b.yb)
    grads = dict(zip(dict(m.named_parameters()), torch.autograd.grad(loss, list(m.parameters()))))
    before = copy.deepcopy(m.state_dict())
    ds, dw, scale = hypergradient(m, bce, grads, b, (ax, ay), s, w, eta, delta=1e-4)
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())            # nothing moved
    h = 1e-4
    fs, fw = (ahead(s + h, w) - ahead(s - h, w))/(2*h), (ahead(s, w + h) - ahead(s, w - h))/(2*h)
    assert abs(dw - fw) < 1e-6*abs(fw) + 1e-5*scale*h
    assert abs(ds - fs) < 1e-4*abs(fs) + 1e-4*scale*h
    assert abs(fw) <= scale/w  # the unit bounds the mixed part

def test_weight_zero_has_no_gradient_in_strength():
    "dL_A/ds is proportional to w; the direction in which w would help remains."
    torch.manual_seed(0)
    m = nn.Conv2d(3, 1, 3, padding=1).double()
    real, partner = torch.rand(2, 2, 3, 8, 8).double()
    b = MixedBatch(real, partner, ((torch.rand(2, 8, 8) > .5).double(),))
    grads = dict(zip(('weight', 'bias'), torch.autograd.grad(bce(m(b.real), *b.yb), list(m.parameters()))))
    ds, dw, scale = hypergradient(m, bce, grads, b, (b.real, *b.yb), .5, 0., .1)
    assert ds == 0 and dw != 0 and scale > 0

def test_real_partners_help_a_real_anchor():
    "With the same images as partner, anchor and batch, more weight is a longer step the right way."
    torch.manual_seed(0)
    m = nn.Conv2d(3, 1, 3, padding=1).double()
    x, y = torch.rand(4, 3, 8, 8).double(), (torch.rand(4, 8, 8) > .5).double()
    grads = dict(zip(('weight', 'bias'), torch.autograd.grad(bce(m(x), y), list(m.parameters()))))
    ds, dw, scale = hypergradient(m, bce, grads, MixedBatch(x, x, (y,)), (x, y), .5, 1., 1e-6)
    force_s, force_w = unit_forces(ds, dw, scale, 1., 1.)
    assert force_s == pytest.approx(0, abs=1e-6)
    assert force_w == pytest.approx(-1, abs=1e-3)       # full force: open the weight

@pytest.mark.parametrize('a,force,want', [(0., 0., 0.), (1., 1., .5), (1., -1., 1.5),
                                          (3.9, -9., 4.), (-3.9, 9., -4.)])
def test_move_gate(a, force, want): assert move_gate(a, force, .5) == pytest.approx(want)

def test_anchor_batches(discs):
    "The same seed gives the same pairs, another seed others; held-out pairs alone, without augmentation."
    pairs, _ = discs
    dls = pair_dls(pairs, S, 8, valid=.2, seed=0, augment='strong', device='cpu')
    a, b, c = (anchor_batch(dls.valid, 8, seed) for seed in (1, 1, 2))
    assert torch.equal(a[0], b[0]) and not torch.equal(a[0], c[0])
    assert len(anchor_batch(dls.valid, 1000, 0)[0]) == len(dls.valid.dataset)
    held_out = torch.stack([torch.from_numpy(read_pair(p)[0]).permute(2, 0, 1)/255 for p in dls.pairs_valid])
    for image in a[0].as_subclass(torch.Tensor):
        assert (held_out - image).abs().amax((1, 2, 3)).min() < 1e-6

# What the gates do --------------------------------------------------------------------------------

def test_good_partners_keep_the_gates_open_longer(discs):
    h = {k: train(discs, k, [PairedMixCB(s=.9, w=1.), RealAnchorCB(every=8)]).history.frame() for k in KINDS}
    amount = {k: (v.s*v.w).mean() for k, v in h.items()}
    open_ = {k: (v.s > .45).sum() for k, v in h.items()}
    for bad in ('noise', 'shifted'):
        assert amount['good'] > 1.2*amount[bad], amount
        assert open_['good'] > open_[bad] + 8, open_
    for v in h.values():
        assert v.s.iloc[-1] < .1 and v.w.iloc[-1] < .1
        assert v.s.between(0, .9).all() and v.w.between(0, 1).all()
        assert v[['force_s', 'force_w']].abs().max().max() <= 1 and v.prior.is_monotonic_increasing

class ScaledCB(MixedPrecision):
    "fp16's loss scaler on the CPU, with float32 inside: the gradients have its factor until the step."
    def __init__(self, scale, overflows=()):
        super().__init__()
        self.scale, self.overflows = scale, overflows

    def before_fit(self):
        self.autocast, self.scales = contextlib.nullcontext(), []
        self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=self.scale)

    def before_backward(self):
        super().before_backward()
        if self.train_iter in self.overflows: self.learn.loss_grad = self.learn.loss_grad*float('inf')

def test_gates_do_not_see_the_loss_scaler(discs):
    "Under fp16's scaler the forces, the gates and the network are those without it."
    def run(*more): return train(discs, 'shifted', [PairedMixCB(.9), RealAnchorCB(every=2), *more], 8)
    plain, scaled = run(), run(ScaledCB(2.**16))
    columns = ['s', 'w', 'force_s', 'force_w']
    a, b = (learn.history.frame()[columns].to_numpy() for learn in (plain, scaled))
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert (np.abs(a[:, 2:]) > 1e-3).any() and torch.allclose(state(plain), state(scaled), atol=1e-4)

def test_gates_wait_where_the_scaler_skips_a_step(discs):
    "An overflow moves neither the network nor the gates; the next update does."
    scaler = ScaledCB(2.**16, overflows=(0, 4))
    log = train(discs, 'shifted', [PairedMixCB(.9), RealAnchorCB(every=2), scaler], 8).history.frame()
    assert log.s.notna().all() and log.w.notna().all()
    assert log.s[0] == log.s[2] != log.s[3] and log.s[3] == log.s[6] != log.s[7]
    assert log.force_s[:2].isna().all() and log.force_s[2:].notna().all()

def test_gates_travel_with_the_model(tmp_path):
    pairs = find_pairs(lesion_folder(tmp_path/'r', 12, size=32, seed=0))
    def dls():
        return partner_dls(pair_dls(pairs, 32, 4, valid=.25, seed=0, device='cpu'), own_partners(pairs))
    def cbs(): return [PairedMixCB(.8, .6), RealAnchorCB(every=2)]
    model = segmenter('unet', 'mobilenetv3_small_050', size=32)
    learn = fit_steps(segment_learner(dls(), model, cbs=cbs()), 5)
    want = learn.gates.levels()
    again = Segmenter.from_pretrained(learn.model.save_pretrained(tmp_path/'m'))
    log = fit_steps(segment_learner(dls(), again.train(), cbs=cbs()), 1).history.frame()
    assert (log.s[0], log.w[0]) == tuple(float(torch.tensor(v)) for v in want) and want != (.8*.9, .6*.9)

# Arms ---------------------------------------------------------------------------------------------

def synthetic(folder, pairs, size=None, shade=.7):
    "A folder as `synthesize(..., masks='real')` leaves it: the real pictures, darkened."
    (folder/'images').mkdir(parents=True); (folder/'masks').mkdir()
    rows = []
    for i, p in enumerate(pairs):
        image, mask = read_pair(p, size)
        row = dict(index=i, file=f'images/{i:06d}.png', mask=f'masks/{i:06d}.png',
                   source=p.name, transform=dict(kind='real'))
        Image.fromarray((image*shade).astype(np.uint8)).save(folder/row['file'])
        Image.fromarray(mask*255).save(folder/row['mask'])
        rows.append(json.dumps(row))
    (folder/'manifest.jsonl').write_text('\n'.join(rows))
    return folder

SMALL = dict(segmenters=[dict(network='unet', encoder='mobilenetv3_small_050')], seeds=(0,), size=32, bs=4)

def folders(tmp_path, n_train, n_test):
    "Rendered training and test pairs."
    sets = ('r', n_train, 0), ('t', n_test, 1)
    return [find_pairs(lesion_folder(tmp_path/name, n, size=32, seed=seed)) for name, n, seed in sets]

def own_partners(pairs): return {p.name: [p] for p in pairs}

def test_one_compare_call_takes_every_arm(tmp_path):
    pairs, test = folders(tmp_path, 24, 6)
    folder = synthetic(tmp_path/'s', pairs)
    arms = mixing_arms(folder)
    assert list(arms) == ['real', 'synthetic', 'mixup', 'cutmix', *MIX_ARMS]
    res = compare(pairs, {'t': test}, arms, tmp_path/'res', steps=3, **SMALL)
    arms = json.loads((res/'compare.json').read_text())['arms']
    assert arms['mcpmix-fixed']['cbs'] != arms['mcpmix-scheduled']['cbs'] and 'partners' not in arms['real']
    log = next((res/'runs').glob('mcpmix-learned*.log.csv')).read_text().splitlines()
    assert {'s', 'w', 'L_mix', 'force_s'} <= {*log[0].split(',')} and len(log) == 4
    with pytest.raises(MedsynError, match='mcpmix-learn'): as_arm(f'mcpmix-learnt:{folder}', pairs)

def test_arms_that_cannot_run_are_refused_before_the_first(tmp_path):
    pairs, test = folders(tmp_path, 24, 6)
    folder = synthetic(tmp_path/'s', pairs)
    lines = (folder/'manifest.jsonl').read_text().splitlines()
    (folder/'manifest.jsonl').write_text('\n'.join(lines[12:]))
    def refused(pairs, arm):
        compare(pairs, {'t': test}, {'real': 'real', 'm': arm}, tmp_path/'x', steps=1, **SMALL)
    with pytest.raises(MedsynError, match='have no synthetic partner'):
        refused(pairs, f'mcpmix-fixed:{folder}')
    learned = Arm(partners=own_partners(pairs), cbs=MIX_ARMS['mcpmix-learned'])
    with pytest.raises(MedsynError, match='needs two as its anchor'): refused(pairs[:12], learned)
    assert not (tmp_path/'x').exists()

def test_networks_of_finished_runs_are_freed(tmp_path, monkeypatch):
    "Before the next run begins, whether or not Python's collector is due."
    pairs, test = folders(tmp_path, 24, 2)
    learned = Arm(partners=own_partners(pairs), cbs=MIX_ARMS['mcpmix-learned'])
    seen, alive, train_ = [], [], experiment.train_segmenter
    def watched(*a, **kw):
        alive.append(sum(r() is not None for r in seen))
        learn = train_(*a, **kw)
        seen.append(weakref.ref(learn.model))
        return learn
    monkeypatch.setattr(experiment, 'train_segmenter', watched)
    gc.disable()
    try: compare(pairs, {'t': test}, {'real': 'real', 'm': learned}, tmp_path/'res', steps=2, **SMALL)
    finally: gc.enable()
    assert alive == [0, 0]

def test_settings_tell_arms_apart(tmp_path):
    "The same folder is not taken for a run with another strength."
    pairs, test = folders(tmp_path, 12, 2)
    def run(strength):
        arm = Arm(partners=own_partners(pairs), cbs=lambda: [PairedMixCB(strength)])
        compare(pairs, {'t': test}, {'real': 'real', 'm': arm}, tmp_path/'res', steps=1, **SMALL)
    run(.5)
    with pytest.raises(MedsynError, match='holds another compare run'): run(.6)

def test_a_judge_tells_arms_apart():
    "Feedback from another generator, or at other timesteps, is another arm."
    x0 = torch.rand(4, 3, 32, 32)*2 - 1
    gens = [ControlGenerator(Backbone.tiny(x0, 32, (32, 64), seed=seed)) for seed in (0, 1)]
    arm = lambda g, **kw: Arm(cbs=lambda: [*MIX_ARMS['mcpmix-learned'](), GenerativeFeedbackCB(g, **kw)])
    arms = arm(gens[0]), arm(gens[1]), arm(gens[0], t_range=(100, 200)), arm(gens[0], every=4)
    told = [str(describe_arm(a)) for a in arms]
    assert len(set(told)) == 4 and told[0] == str(describe_arm(arm(copy.deepcopy(gens[0]))))
    assert not any('0x' in t for t in told)  # no address of an object, which the next run would not have

@pytest.fixture
def judge(tmp_path):
    "Twelve pairs and a control generator with random weights wherever training would have put some."
    pairs = find_pairs(lesion_folder(tmp_path/'r', 12, size=32, seed=0))
    torch.manual_seed(0)
    generator = ControlGenerator(Backbone.tiny(torch.rand(4, 3, 32, 32)*2 - 1, 32, (32, 64)))
    with torch.no_grad():
        for p in generator.control.parameters(): p.add_(.05*torch.randn_like(p))
    return pairs, generator

def test_feedback_beside_learned_gates(judge):
    "All terms reach the segmenter, and the gates are asked at the gradient of the whole loss."
    pairs, g = judge
    def run(weight):
        dls = partner_dls(pair_dls(pairs, 32, 4, valid=.25, seed=0, device='cpu'), own_partners(pairs))
        cbs = [PairedMixCB(.8, .6), RealAnchorCB(every=1), GenerativeFeedbackCB(g, weight, every=2)]
        with seeded(0): model = segmenter('unet', 'mobilenetv3_small_050', size=32)
        learn = fit_steps(segment_learner(dls, model, cbs=cbs), 4)
        return learn.history.frame(), state(learn)
    (log, with_fb), (_, without) = run(1.), run(0.)
    assert log.L_fb.notna().sum() == 2 and log.L_mix.notna().all() and log.force_s.notna().all()
    assert not torch.equal(with_fb, without) and all(p.grad is None for p in g.parameters())

@pytest.mark.parametrize('feedback_first', [False, True])
def test_feedback_beside_one_pass(judge, feedback_first):
    "The judge is shown the real half of a batch of both: the same terms as beside two passes."
    pairs, g = judge
    of_others = {p.name: [q] for p, q in zip(pairs, pairs[1:] + pairs[:1])}
    def log(passes):
        dls = partner_dls(pair_dls(pairs, 32, 4, valid=.25, seed=0, device='cpu'), of_others)
        with seeded(0):
            model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
        cbs = [PairedMixCB(.7, passes=passes), GenerativeFeedbackCB(g, every=2)]
        learn = segment_learner(dls, model, cbs=cbs[::-1] if feedback_first else cbs)
        return fit_steps(learn, 3, 1e-3).history.frame()[['loss', 'L_mix', 'L_fb']].to_numpy()
    np.testing.assert_allclose(log(1), log(2), rtol=1e-4)

@pytest.mark.parametrize('cb', [MixUpCB, CutMixCB])
def test_rivals_train_and_repeat(discs, cb):
    a, b = (train(discs, None, [cb()], 4) for _ in range(2))
    assert torch.equal(state(a), state(b)) and not torch.equal(state(a), state(train(discs, None, [], 4)))

def test_cutmix_of_equal_images_changes_nothing(discs):
    "Limit case: a batch of one and the same pair stays as it is."
    pairs, _ = discs
    same = [Pair(str(i), pairs[0].image, pairs[0].mask) for i in range(16)]
    def run(cbs):
        dls = pair_dls(same, S, 8, valid=pairs[1:3], seed=0, augment='none', device='cpu')
        with seeded(0): return state(fit_steps(segment_learner(dls, net(), cbs=cbs), 2))
    assert torch.equal(run([CutMixCB()]), run([]))
