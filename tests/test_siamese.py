"""Siamese-Diffusion against a naive reference from the paper's equations: every loss term, every gradient.

The reference copies the network at every step, computes everything that it needs each time that it needs it,
takes the features of mask and image one after the other, and weights each sample of the augmentation by w_a.
"""
import copy
import tempfile
from types import UnionType

import pytest
import torch
from fastai.callback.core import Callback
from learners import check_two_steps, small_backbone, small_loaders

from medsyn.core import MedsynError
from medsyn.diffusion.backbone import Backbone, random_stable_diffusion
from medsyn.diffusion.learner import Cond
from medsyn.diffusion.sample import defaults_of
from medsyn.generate.catalog import METHODS, check_settings, settings_of
from medsyn.generate.control import ControlGenerator, PrecomputedCond, control_learner
from medsyn.generate.siamese import SETTINGS, SiameseGenerator, siamese_cbs, siamese_learner
from medsyn.train import fit_steps

def unet_eps(gen, zt, t, text, control):
    "The noise that diffusers' own U-Net predicts when it is given control features, and its plain answer."
    bb, (down, mid) = gen.backbone, control
    out = bb.unet(zt, t, text, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample
    if bb.schedule.prediction == 'epsilon': return out, out
    a = bb.schedule.abar[t].reshape(-1, 1, 1, 1).to(zt)
    return a.sqrt()*out + (1 - a).sqrt()*zt, out

def naive(gen, n, k, N, w_c=1., K_tau=None, T_tau=200, terms=('L_i', 'L_c', "L_m'")):
    "The terms of Eq. 5-13 for a batch `n` at step `k` of `N`; `loss` is L_m, in what the backbone predicts."
    def features(zt, hint): return gen.control(zt, n.t, n.cond.text, hint, return_dict=False)
    def mse(x, y): return ((x - y)**2).mean()
    m, i = n.mask.expand(-1, 3, -1, -1), (n.x0 + 1)/2
    eps_m, out = unet_eps(gen, n.zt, n.t, n.cond.text, features(n.zt, m))                           # Eq. 7
    twin = copy.deepcopy(gen)                                                                       # theta'
    w_i, c_i, c_m = k/N, features(n.zt, i), features(n.zt, m)
    c_mix = [w_i*a + b.detach() for a, b in zip(c_i[0], c_m[0])], w_i*c_i[1] + c_m[1].detach()      # Eq. 5
    eps_mix, _ = unet_eps(twin, n.zt, n.t, n.cond.text, c_mix)                                      # Eq. 8
    a = gen.backbone.schedule.abar[n.t].reshape(-1, 1, 1, 1).to(n.zt)
    z0 = (n.zt - (1 - a).sqrt()*eps_mix.detach())/a.sqrt()                                          # Eq. 11
    zt = a.sqrt()*z0 + (1 - a).sqrt()*n.eps                                                         # Eq. 1
    eps_a, _ = unet_eps(gen, zt, n.t, n.cond.text, features(zt, m))                                 # Eq. 12
    w_a = ((k > (N/3 if K_tau is None else K_tau)) & (n.t < T_tau)).to(n.zt)                        # Eq. 13
    losses = {'loss': mse(out, n.target), 'L_i': mse(eps_mix, n.eps), 'L_c': w_c*mse(eps_m, eps_mix.detach())}
    losses["L_m'"] = (w_a*((eps_a - n.eps)**2).mean((1, 2, 3))).mean()
    return {name: losses[name] for name in ('loss', *terms)}                                        # Eq. 6

class Double(Callback):
    "Float64 for what the batch brings."
    order = 12.5
    def before_batch(self):
        n = self.learn.noised
        n.x0, n.mask = n.x0.double(), n.mask.double()
        n.cond.mask = n.mask

class Compare(Callback):
    "Keeps the largest relative differences to the naive reference, and the augmented share."
    order = 5       # before the gradients are clipped
    def __init__(self, **kw): self.kw, self.terms, self.grads, self.share = kw, [], [], []
    def after_backward(self):
        n, k, N = self.learn.noised, self.learn.steps.done, self.learn.steps.total
        trained = [p for p in self.model.parameters() if p.requires_grad]
        want = naive(self.model, n, k, N, **self.kw)
        grads = torch.autograd.grad(sum(want.values()), trained, allow_unused=True)
        weights = {c.name: c.weight for c in self.learn.cbs if c.name in want}
        terms = getattr(self.learn, 'terms', {})
        got = {'loss': self.learn.loss, **{c: weights[c]*terms[c] for c in weights}}
        assert set(got) == set(want)
        self.terms.append(max(off(got[c], want[c]) for c in want))
        self.grads.append(max(off(p.grad, g) for p, g in zip(trained, grads, strict=True)))
        assert all(p.grad is None for p in self.model.parameters() if not p.requires_grad)
        self.share.append(float(terms.get('augmented', 0)))
        self.learn.loss = self.learn.loss.float()       # fastai averages it in float32

def off(a, b):
    "Relative difference of two tensors, of which `None` is zero."
    a, b = (torch.zeros(()) if v is None else v.double() for v in (a, b))
    return ((a - b).norm()/b.norm().clamp_min(1e-30)).item() if b.norm() > 1e-14 else float(a.norm() > 1e-14)

@pytest.fixture(scope='module')
def dls():
    with tempfile.TemporaryDirectory() as folder: return small_loaders(folder)

def backbone(prediction='epsilon'): return small_backbone(prediction)

def compared(dls, prediction='epsilon', steps=6, setting=8, compare=Compare, **kw):
    "A few steps of a tiny network in float64 with random weights everywhere, compared at each."
    torch.manual_seed(0)
    cmp = compare(**kw, terms=[c.name for c in siamese_cbs(setting)])
    learn = siamese_learner(dls, backbone(prediction), setting, lr=1e-3, ema=None, cbs=[Double(), cmp], **kw)
    learn.model.double()
    with torch.no_grad():
        for p in learn.model.control.parameters(): p.add_(0.05*torch.randn_like(p))
    learn.remove_cbs([c for c in learn.cbs if c.name == 'obedience'])       # it evaluates in float32
    fit_steps(learn, steps)
    return cmp

@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('T_tau,which', [(0, 'none'), (500, 'some'), (1000, 'all')])
def test_terms_and_gradients_are_the_papers(dls, prediction, T_tau, which):
    "Steps 0 to 2 are before K_tau = N/3 = 2, steps 3 to 5 after it."
    c = compared(dls, prediction, T_tau=T_tau)
    assert max(c.terms) < 1e-9 and max(c.grads) < 1e-9, (c.terms, c.grads)
    assert c.share[:3] == [0, 0, 0]
    late = c.share[3:]
    assert {'none': max(late) == 0, 'some': all(0 < s < 1 for s in late), 'all': min(late) == 1}[which], late

@pytest.mark.parametrize('setting', SETTINGS)
def test_every_setting_of_table_5(dls, setting):
    c = compared(dls, steps=3, setting=setting, w_c=0.5, K_tau=0, T_tau=600)
    assert max(c.terms) < 1e-9 and max(c.grads) < 1e-9, (c.terms, c.grads)

def test_reference_notices(dls):
    "The comparison is not blind: another w_c, another threshold, and gradients differ."
    class Wrong(Compare):
        def after_backward(self): self.kw['w_c'] = 1.1; super().after_backward()
    c = compared(dls, steps=2, compare=Wrong)
    assert c.terms[1] > 1e-3 and c.grads[1] > 1e-6, (c.terms, c.grads)

def test_image_branch_is_not_in_the_way_of_evaluation(dls):
    "The probe and sampling call the generator with a mask alone, during training too."
    learn = fit_steps(siamese_learner(dls, backbone(), probe=1), 3)
    assert len(learn.history.evals()) == 3
    assert list(learn.history.frame()) == ['step', 'loss', 'w_i', 'augmented', 'L_i', 'L_c', "L_m'", 'lr']
    twice = siamese_learner(dls, backbone(), cbs=siamese_cbs(4))
    with pytest.raises(MedsynError, match='two loss terms'): fit_steps(twice, 1)

def test_wrong_sizes_are_named():
    bb = backbone()
    gen = SiameseGenerator(bb)
    with pytest.raises(MedsynError, match='whose stride is 4'):
        gen(torch.randn(1, 8, 4, 4), torch.tensor([5]), Cond(torch.zeros(1, 1, 18, 16), bb.text([bb.prompt])))

# Two training steps, as they were before the code was rewritten -----------------------------------

PLAIN = [1.077425241, 1.224827886]

@pytest.mark.parametrize('image, weights', [(False, 15789.246903402249), (True, 15806.490014596675)])
def test_two_steps_of_control(tmp_path, image, weights):
    learn = control_learner(small_loaders(tmp_path), small_backbone(), image=image, lr=1e-3, seed=0)
    check_two_steps(learn, dict(loss=PLAIN), weights)

def test_two_steps_of_siamese(tmp_path):
    learn = siamese_learner(small_loaders(tmp_path), small_backbone(), K_tau=-1, T_tau=600, lr=1e-3)
    losses = {
        'loss': [1.077425241, 1.224812388], 'w_i': [0., .5], 'augmented': [2/6, 3/6],
        'L_i': [0.145956144, 0.238673463], 'L_c': [0., 2e-09], "L_m'": [0.011245214, 0.054884717]}
    check_two_steps(learn, losses, 25943.903087180228)

def test_two_steps_of_setting_5_on_noise(tmp_path):
    settings = dict(setting=5, w_c=.5, K_tau=-1, T_tau=600)
    learn = siamese_learner(small_loaders(tmp_path), small_backbone('epsilon'), **settings, lr=1e-3)
    losses = {
        'loss': [1.050173163, 1.107873559], 'w_i': [0., .5], 'augmented': [2/6, 3/6],
        'L_i': [1.050173163, 1.107862592], 'L_c': [0., 1.1e-08], "L_m'": [0.339731812, 0.54116267]}
    check_two_steps(learn, losses, 15788.819889668524)

# Settings -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('make', [control_learner, siamese_learner], ids=['control', 'siamese'])
def test_dropped_masks(tmp_path, make):
    "The branch sees an empty mask; noise and timesteps do not change."
    def last_batch(share):
        learn = make(small_loaders(tmp_path), small_backbone(), drop_mask=share)
        return fit_steps(learn, 2).noised
    dropped, kept = last_batch(1.), last_batch(0.)
    assert dropped.cond.mask.abs().sum() == 0 < kept.cond.mask.abs().sum()
    assert torch.equal(dropped.eps, kept.eps) and torch.equal(dropped.t, kept.t)

def test_precomputed_condition_keeps_what_is_given():
    "Trunk and flags travel with the condition; a second `prepare` computes nothing."
    gen = ControlGenerator(small_backbone())
    zt, t, mask = torch.randn(2, 8, 4, 4), torch.tensor([5, 700]), torch.ones(2, 1, 16, 16)
    cond = Cond(mask, gen.condition(mask).text, has_mask=torch.tensor([1., 0.]))
    known = gen.prepare(zt, t, cond)
    assert type(known) is PrecomputedCond and known.mask is mask and known.has_mask is cond.has_mask
    assert gen.prepare(zt, t, known) is known

def test_guidance_on_stable_diffusion_is_the_papers(tmp_path):
    bb = Backbone.from_pretrained(random_stable_diffusion(tmp_path/'sd'), size=64)
    for generator in (ControlGenerator, SiameseGenerator): assert defaults_of(generator(bb)) == (9., 'prompt')
    assert defaults_of(SiameseGenerator(small_backbone())) == (2., 'mask')

@pytest.mark.parametrize('method', METHODS)
def test_settings_are_the_signatures(method):
    "Every setting has a type and a line of documentation; a misspelt one is named with its neighbour."
    settings = settings_of(method)
    for name, (kind, default, doc) in settings.items():
        assert isinstance(kind, type | UnionType) and doc, (name, kind, default)
        assert default is None or isinstance(default, kind), (name, kind, default)
    assert not {'dls', 'backbone', 'model', 'lr', 'seed', 'probe', 'cbs', 'kwargs'} & set(settings)
    if METHODS[method].backbone: assert {'min_snr', 'drop_prompt'} <= set(settings)
    assert ('drop_mask' in settings) == METHODS[method].opens.needs_mask
    check_settings(method, {name: default for name, (_, default, _) in settings.items()})
    name = next(iter(settings))
    with pytest.raises(MedsynError, match=f"did you mean {name!r}"): check_settings(method, {name + 'x': 1})
