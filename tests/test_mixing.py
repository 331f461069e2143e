"""MCPMix and its annealing: partners in register, limits to the bit, the look-ahead gradient against finite differences, and what the gates do.

The finite differences take the step for real, on a copy of the network, and know nothing of the code under test.
"""
import copy
import gc
import json
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from medsyn import experiment
from medsyn.core import MedsynError, seeded
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import Pair, find_pairs, pair_dls, read_pair
from medsyn.diffusion.backbone import Backbone
from medsyn.experiment import MIX_ARMS, Arm, _describe, as_arm, compare, mixing_arms
from medsyn.generate.control import ControlGenerator
from medsyn.segment.annealing import RealAnchorCB, hypergradient
from medsyn.segment.feedback import GenerativeFeedbackCB
from medsyn.segment.learner import segment_learner
from medsyn.segment.mixing import CutMixCB, MixedBatch, MixUpCB, PairedMixCB, find_partners, frozen_stats, partner_dls
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
            Image.fromarray(draw(m, rng)).save(f); partners[k][p.name] = [Pair(p.name, f, p.mask)]
    return pairs, partners

def net(w=8, act=nn.ReLU):
    block = lambda i, o: [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), act()]
    return nn.Sequential(*block(3, w), nn.Dropout(.05), *block(w, w), *block(w, w), nn.Conv2d(w, 1, 1))

def train(discs, kind, cbs, steps=160, seed=0, augment='flip', lr=1e-2):
    pairs, partners = discs
    dls = pair_dls(pairs, S, 8, valid=.2, seed=seed, augment=augment, device='cpu')
    if kind: dls = partner_dls(dls, partners[kind])
    with seeded(seed): return fit_steps(segment_learner(dls, net(), cbs=list(cbs)), steps, lr, 'one_cycle')

def state(learn): return torch.cat([v.double().flatten() for k, v in learn.model.state_dict().items() if not k.startswith('kept_')])

# Limits ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('kw', [dict(s=0), dict(w=0), dict(s=0, passes=1), dict(w=0, passes=1), dict(w=1e-30), dict(s=.9, w=1e-30, per_image=True)], ids=str)
def test_limits_are_real_only_training_bit_for_bit(discs, kw):
    "With w = 1e-30 the mixed pass runs in full and must leave no trace: statistics, dropout's stream, gradients."
    plain = train(discs, None, [], 12, augment=True)
    mixed = train(discs, 'good', [PairedMixCB(**kw)], 12, augment=True)
    assert torch.equal(state(plain), state(mixed))
    assert not torch.equal(state(plain), state(train(discs, 'good', [PairedMixCB()], 12, augment=True)))

def test_one_pass_leaves_a_trace(discs):
    "The check above is not blind."
    assert not torch.equal(state(train(discs, None, [], 3)), state(train(discs, 'good', [PairedMixCB(w=1e-30, passes=1)], 3)))

def test_statistics_are_thawed_after_an_error():
    m = net()
    with pytest.raises(RuntimeError):
        with frozen_stats(m): m(torch.rand(2, 5, S, S))
    assert all(b.track_running_stats for b in m.modules() if isinstance(b, nn.BatchNorm2d))

# The look-ahead gradient ------------------------------------------------------------------------------------------------

def bce(out, m): return nn.functional.binary_cross_entropy_with_logits(out[:, 0], m)

@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('s,w', [(.05, .3), (.5, 1.), (.95, .6), (.7, .02)])
def test_hypergradient_is_the_look_ahead_loss(s, w, per_image):
    torch.manual_seed(1)
    m = nn.Sequential(*[o for o in net(4, nn.SiLU) if not isinstance(o, nn.Dropout)]).double().train()
    draw, masks = lambda: torch.rand(4, 3, 12, 12).double(), lambda: (torch.rand(4, 12, 12) > .7).double()
    b, (ax, ay), eta = MixedBatch(draw(), draw(), (masks(),), seed=3, per_image=per_image), (draw(), masks()), .2
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
    assert abs(dw - fw) < 1e-6*abs(fw) + 1e-5*scale*h and abs(ds - fs) < 1e-4*abs(fs) + 1e-4*scale*h, (ds, fs, dw, fw)
    assert abs(fw) <= scale/w                                                           # the unit bounds what the mixed part can do

# What the gates do --------------------------------------------------------------------------------------------------------

def test_good_partners_keep_the_gates_open_longer(discs):
    h = {k: train(discs, k, [PairedMixCB(s=.9, w=1.), RealAnchorCB(every=8)]).history.frame() for k in KINDS}
    amount = {k: (v.s*v.w).mean() for k, v in h.items()}
    open_ = {k: (v.s > .45).sum() for k, v in h.items()}
    for bad in ('noise', 'shifted'): assert amount['good'] > 1.2*amount[bad] and open_['good'] > open_[bad] + 8, (amount, open_)
    for v in h.values():
        assert v.s.iloc[-1] < .1 and v.w.iloc[-1] < .1 and v.s.between(0, .9).all() and v.w.between(0, 1).all()
        assert v[['force_s', 'force_w']].abs().max().max() <= 1 and v.prior.is_monotonic_increasing

def test_gates_travel_with_the_model(tmp_path):
    pairs = find_pairs(lesion_folder(tmp_path/'r', 12, size=32, seed=0))
    dls = lambda: partner_dls(pair_dls(pairs, 32, 4, valid=.25, seed=0, device='cpu'), {p.name: [p] for p in pairs})
    cbs = lambda: [PairedMixCB(.8, .6), RealAnchorCB(every=2)]
    learn = fit_steps(segment_learner(dls(), segmenter('unet', 'mobilenetv3_small_050', size=32), cbs=cbs()), 5)
    want = learn.gates.levels()
    again = Segmenter.from_pretrained(learn.model.save_pretrained(tmp_path/'m'))
    log = fit_steps(segment_learner(dls(), again.train(), cbs=cbs()), 1).history.frame()
    assert (log.s[0], log.w[0]) == tuple(float(torch.tensor(v)) for v in want) and want != (.8*.9, .6*.9)

# Arms -----------------------------------------------------------------------------------------------------------------------

def synthetic(folder, pairs):
    "A folder as `synthesize(..., masks='real')` leaves it: the real pictures, darkened."
    (folder/'images').mkdir(parents=True); (folder/'masks').mkdir()
    rows = []
    for i, p in enumerate(pairs):
        a, m = read_pair(p)
        Image.fromarray((a*.7).astype(np.uint8)).save(folder/'images'/f'{i:06d}.png'); Image.fromarray(m*255).save(folder/'masks'/f'{i:06d}.png')
        rows.append(json.dumps(dict(index=i, file=f'images/{i:06d}.png', mask=f'masks/{i:06d}.png', source=p.name, transform=dict(kind='real'))))
    (folder/'manifest.jsonl').write_text('\n'.join(rows))
    return folder

def test_one_compare_call_takes_every_arm(tmp_path, monkeypatch):
    pairs, test = (find_pairs(lesion_folder(tmp_path/k, n, size=32, seed=s)) for k, n, s in (('r', 24, 0), ('t', 6, 1)))
    folder = synthetic(tmp_path/'s', pairs)
    arms = mixing_arms(folder)
    assert list(arms) == ['real', 'synthetic', 'mixup', 'cutmix', 'mcpmix-fixed', 'mcpmix-scheduled', 'mcpmix-learned']
    res = compare(pairs, {'t': test}, arms, tmp_path/'res', segmenters=[dict(network='unet', encoder='mobilenetv3_small_050')], seeds=(0,), size=32, steps=3, bs=4)
    config = json.loads((res/'compare.json').read_text())
    assert config['arms']['mcpmix-fixed']['cbs'] != config['arms']['mcpmix-scheduled']['cbs'] and 'partners' not in config['arms']['real']
    log = next((res/'runs').glob('mcpmix-learned*.log.csv')).read_text().splitlines()
    assert {'s', 'w', 'L_mix', 'force_s'} <= {*log[0].split(',')} and len(log) == 4
    with pytest.raises(MedsynError, match='unknown kind of mixing'): as_arm(f'mcpmix-learnt:{folder}', pairs)
    lines = (folder/'manifest.jsonl').read_text().splitlines(); (folder/'manifest.jsonl').write_text('\n'.join(lines[12:]))
    with pytest.raises(MedsynError, match='have no synthetic partner'): compare(pairs, {'t': test}, {'real': 'real', 'm': f'mcpmix-fixed:{folder}'}, tmp_path/'x', seeds=(0,), size=32, steps=1, bs=4)
    with pytest.raises(MedsynError, match='needs two as its anchor'): compare(pairs[:12], {'t': test}, {'real': 'real', 'm': Arm(partners={p.name: [p] for p in pairs}, cbs=MIX_ARMS['mcpmix-learned'])}, tmp_path/'x', seeds=(0,), size=32, steps=1, bs=4)
    assert not (tmp_path/'x').exists()

def test_networks_of_finished_runs_are_freed(tmp_path, monkeypatch):
    "Before the next run begins, whether or not Python's collector is due: a learner is few objects, but large ones."
    pairs, test = (find_pairs(lesion_folder(tmp_path/k, n, size=32, seed=s)) for k, n, s in (('r', 24, 0), ('t', 2, 1)))
    seen, alive, train_ = [], [], experiment.train_segmenter
    def watched(*a, **kw):
        alive.append(sum(r() is not None for r in seen))
        learn = train_(*a, **kw); seen.append(weakref.ref(learn.model))
        return learn
    monkeypatch.setattr(experiment, 'train_segmenter', watched)
    gc.disable()
    try: compare(pairs, {'t': test}, {'real': 'real', 'm': Arm(partners={p.name: [p] for p in pairs}, cbs=MIX_ARMS['mcpmix-learned'])}, tmp_path/'res',
                 segmenters=[dict(network='unet', encoder='mobilenetv3_small_050')], seeds=(0,), size=32, steps=2, bs=4)
    finally: gc.enable()
    assert alive == [0, 0]

def test_settings_tell_arms_apart(tmp_path):
    "The same folder is not taken for a run with another strength."
    pairs, test = (find_pairs(lesion_folder(tmp_path/k, n, size=32, seed=s)) for k, n, s in (('r', 12, 0), ('t', 2, 1)))
    arm = lambda s: Arm(partners={p.name: [p] for p in pairs}, cbs=lambda: [PairedMixCB(s)])
    kw = dict(segmenters=[dict(network='unet', encoder='mobilenetv3_small_050')], seeds=(0,), size=32, steps=1, bs=4)
    compare(pairs, {'t': test}, {'real': 'real', 'm': arm(.5)}, tmp_path/'res', **kw)
    with pytest.raises(MedsynError, match='holds another compare run'): compare(pairs, {'t': test}, {'real': 'real', 'm': arm(.6)}, tmp_path/'res', **kw)

def test_a_judge_tells_arms_apart():
    "Feedback from another generator, or at other timesteps, is another arm; partners, gates and feedback stand in one list of callbacks."
    gens = [ControlGenerator(Backbone.tiny(torch.rand(4, 3, 32, 32)*2 - 1, 32, (32, 64), seed=s)) for s in (0, 1)]
    arm = lambda g, **kw: Arm(cbs=lambda: [*MIX_ARMS['mcpmix-learned'](), GenerativeFeedbackCB(g, **kw)])
    told = [str(_describe(a)) for a in (arm(gens[0]), arm(gens[1]), arm(gens[0], t_range=(100, 200)), arm(gens[0], every=4))]
    assert len(set(told)) == 4 and told[0] == str(_describe(arm(copy.deepcopy(gens[0]))))
    assert not any('0x' in t for t in told)                     # no address of an object, which the next run would not have

def test_feedback_beside_learned_gates(tmp_path):
    "All terms reach the segmenter, and the gates are asked at the gradient of the whole loss."
    pairs, g = find_pairs(lesion_folder(tmp_path/'r', 12, size=32, seed=0)), ControlGenerator(Backbone.tiny(torch.rand(4, 3, 32, 32)*2 - 1, 32, (32, 64)))
    with torch.no_grad(): [p.add_(.05*torch.randn_like(p)) for p in g.control.parameters()]
    def states(cbs, weight):
        dls = partner_dls(pair_dls(pairs, 32, 4, valid=.25, seed=0, device='cpu'), {p.name: [p] for p in pairs})
        with seeded(0): learn = segment_learner(dls, segmenter('unet', 'mobilenetv3_small_050', size=32), cbs=[*cbs(), GenerativeFeedbackCB(g, weight, every=2)])
        fit_steps(learn, 4); return learn.history.frame(), state(learn)
    mixed = lambda: [PairedMixCB(.8, .6), RealAnchorCB(every=1)]
    log, with_fb = states(mixed, 1.); _, without = states(mixed, 0.)
    assert log.L_fb.notna().sum() == 2 and log.L_mix.notna().all() and log.force_s.notna().all()
    assert not torch.equal(with_fb, without) and all(p.grad is None for p in g.parameters())

@pytest.mark.parametrize('order', ['feedback first', 'mixing first'])
def test_feedback_beside_one_pass(tmp_path, order):
    "The judge is shown the real half of a batch of both: the same feedback as beside two passes, for a network without batch normalisation."
    pairs, g = find_pairs(lesion_folder(tmp_path/'r', 12, size=32, seed=0)), ControlGenerator(Backbone.tiny(torch.rand(4, 3, 32, 32)*2 - 1, 32, (32, 64)))
    with torch.no_grad(): [p.add_(.05*torch.randn_like(p)) for p in g.control.parameters()]
    def log(passes):
        dls = partner_dls(pair_dls(pairs, 32, 4, valid=.25, seed=0, device='cpu'), {p.name: [q] for p, q in zip(pairs, pairs[1:] + pairs[:1], strict=True)})
        with seeded(0): model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))
        cbs = [PairedMixCB(.7, passes=passes), GenerativeFeedbackCB(g, every=2)]
        learn = segment_learner(dls, model, cbs=cbs if order == 'mixing first' else cbs[::-1])
        return fit_steps(learn, 3, 1e-3).history.frame()[['loss', 'L_mix', 'L_fb']].to_numpy()
    np.testing.assert_allclose(log(1), log(2), rtol=1e-4)

@pytest.mark.parametrize('cb', [MixUpCB, CutMixCB])
def test_rivals_train_and_repeat(discs, cb):
    a, b = (train(discs, None, [cb()], 4) for _ in range(2))
    assert torch.equal(state(a), state(b)) and not torch.equal(state(a), state(train(discs, None, [], 4)))
