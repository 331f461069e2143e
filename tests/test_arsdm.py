"ArSDM and pixel diffusion: identities, the guard of empty masks, and a refinement whose gradient flows."
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from learners import small_backbone, small_loaders
from torch import nn

from medsyn.core import MedsynError, seed_of
from medsyn.data.pairs import find_pairs
from medsyn.diffusion.backbone import Backbone, random_stable_diffusion
from medsyn.diffusion.learner import Cond, Denoiser, lesion_weights
from medsyn.diffusion.sample import _timesteps, defaults_of, denoise, sample, start_noise
from medsyn.diffusion.schedule import SAMPLERS, Schedule
from medsyn.experiment import make_generator
from medsyn.generate.arsdm import (AdaptiveWeightCB, ArSDMGenerator, RefineCB, Spade, absolute_loss,
                                   adaptive_weights, arsdm_learner, decoder_norms, mask_loss, modulated)
from medsyn.generate.catalog import (METHODS, ddpm_learner, generator_learner, load_generator,
                                     unconditional_learner)
from medsyn.segment.catalog import as_arm
from medsyn.segment.feedback import feedback, noised_images
from medsyn.synth import synthesize
from medsyn.train import fit_steps

SMALL = dict(channels=(16, 32), hidden=8, seed=0)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('pairs')

@pytest.fixture
def dls(folder): return small_loaders(folder)

@pytest.fixture(scope='module')
def backbone(): return Backbone.pixels(16, (16, 32), attend=(8,)).requires_grad_(False)

@pytest.fixture(scope='module')
def masks():
    torch.manual_seed(0)
    return torch.rand(4, 1, 16, 16).round()

@pytest.fixture(scope='module')
def inputs():
    torch.manual_seed(1)
    return torch.randn(4, 3, 16, 16), torch.tensor([0, 300, 600, 999])

def judge():
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

def losses(learn, steps=2): return fit_steps(learn, steps).history.frame().loss.tolist()

class KeepPred(Callback):
    "Keeps the network's answer, which fastai forgets after a fit."
    def after_pred(self): self.learn.kept = self.pred.detach()

class NoLesion(Callback):
    "Empties every mask."
    order = -10
    def before_batch(self): self.learn.yb = (self.yb[0]*0,)

# SPADE --------------------------------------------------------------------------------------------

@torch.no_grad()
def test_untrained_it_is_the_plain_network(backbone, masks, inputs):
    gen = ArSDMGenerator(backbone, hidden=8)
    cond = gen.condition(masks)
    plain = Denoiser(backbone)(*inputs, cond)
    assert torch.equal(gen(*inputs, cond), plain)
    for conv in gen.spade.affine: nn.init.normal_(conv.weight, std=.1)
    assert (gen(*inputs, cond) - gen(*inputs, gen.condition(1 - masks))).abs().max() > 1e-3
    assert torch.equal(Denoiser(backbone)(*inputs, cond), plain)        # the backbone is another network
    handles = [norm._forward_hooks for norm in decoder_norms(gen.backbone.unet)]
    assert not any(handles)                                             # no hook is left behind

def test_hooks_go_when_the_network_fails(backbone):
    norms = decoder_norms(backbone.unet)
    with pytest.raises(ZeroDivisionError):
        with modulated(norms, lambda i, h: 1/0):
            backbone.unet(torch.randn(1, 3, 16, 16), torch.tensor([1]), None)
    assert not any(norm._forward_hooks for norm in norms)

def test_spade_is_the_formula():
    "Against the equation written out, with a label map of the features' own size."
    torch.manual_seed(0)
    spade = Spade([6], hidden=4)
    for p in spade.affine.parameters(): nn.init.normal_(p)
    h, labels = torch.randn(2, 6, 8, 8), torch.rand(2, 2, 8, 8)
    gamma, beta = spade.affine[0](spade.shared[0](labels).clamp_min(0)).split(6, 1)
    assert torch.allclose(spade(0, h, labels), (1 + gamma)*h + beta)
    coarse = F.avg_pool2d(labels, 2)
    assert torch.allclose(spade(0, h[..., :4, :4], labels), spade(0, h[..., :4, :4], coarse), atol=1e-6)

def test_every_parameter_is_trained(dls, backbone):
    learn = arsdm_learner(dls, ema=None, **SMALL)
    before = {k: v.clone() for k, v in learn.model.named_parameters() if v.requires_grad}
    fit_steps(learn, 3)                     # SPADE's first layers move once its last ones have left zero
    still = [k for k, v in learn.model.named_parameters() if k in before and torch.equal(v, before[k])]
    assert not still, still
    assert not any(k.startswith('backbone.text') for k in before)

# The adaptive loss --------------------------------------------------------------------------------

def test_weights():
    mask = torch.zeros(4, 1, 16, 16)
    mask[0, :, 2:5, 2:5] = 1; mask[1, :, 1:15, 1:15] = 1; mask[3] = 1           # small, large, empty, full
    w, r = adaptive_weights(mask), mask.mean((1, 2, 3))
    assert torch.equal(w[2:], torch.ones(2, 1, 16, 16))                         # they are not silenced
    for i in (0, 1):
        assert torch.allclose(w[i][mask[i] == 1], 1 - r[i]) and torch.allclose(w[i][mask[i] == 0], r[i])
        assert torch.allclose((w*mask)[i].sum(), (w*(1 - mask))[i].sum())
    assert torch.allclose(w.mean((1, 2, 3))[:2], (2*r*(1 - r))[:2])
    even = adaptive_weights(mask, normalise=True)
    assert torch.allclose(even.mean((1, 2, 3)), torch.ones(4), atol=1e-5)
    assert torch.allclose(even, lesion_weights(mask, (16, 16)), atol=1e-6)

def test_an_empty_mask_does_not_silence_the_loss(folder):
    "With every mask empty, the weighted run is the unweighted one, step by step."
    weighted = losses(arsdm_learner(small_loaders(folder), cbs=[NoLesion()], **SMALL), 3)
    plain = losses(arsdm_learner(small_loaders(folder), adaptive=False, cbs=[NoLesion()], **SMALL), 3)
    assert weighted == plain and len(set(plain)) == 3

def test_the_gradient_is_that_of_the_weighted_loss(dls):
    learn = fit_steps(arsdm_learner(dls, **SMALL, ema=None, cbs=[KeepPred()]), 1)
    n, log = learn.noised, learn.history.frame()
    direct = (adaptive_weights(n.mask)*(learn.kept - n.target).abs()).mean().item()
    assert log.loss[0] + log.L_adaptive[0] == pytest.approx(direct, rel=1e-4)
    assert log.loss[0] == pytest.approx((learn.kept - n.target).abs().mean().item(), rel=1e-5)

def test_a_weight_of_zero_is_the_plain_loss(folder):
    plain = losses(arsdm_learner(small_loaders(folder), adaptive=False, **SMALL))
    none = arsdm_learner(small_loaders(folder), adaptive=False, cbs=[AdaptiveWeightCB(0.)], **SMALL)
    assert losses(none) == plain
    weighted = losses(arsdm_learner(small_loaders(folder), **SMALL))
    assert weighted[0] == plain[0] and weighted[1] != plain[1]

def test_absolute_loss():
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.allclose(absolute_loss(a, b), (a - b).abs().mean())
    assert absolute_loss(a, b, reduction='none').shape == a.shape

# The refinement -----------------------------------------------------------------------------------

def refined(folder, **kw):
    "The log and the weights after three steps in which the refinement takes part in every sample."
    learn = arsdm_learner(small_loaders(folder), adaptive=False, ema=None, **SMALL)
    if kw: learn.add_cb(RefineCB(judge(), start=0., t_max=1000, **kw))
    fit_steps(learn, 3)
    return learn.history.frame(), torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_the_gradient_of_the_refinement_flows(folder):
    log_none, none = refined(folder)
    log_real, real = refined(folder, released=False)
    log_released, released = refined(folder, released=True)
    assert (log_real.L_refine > 0).all() and log_real.L_refine[0] == log_released.L_refine[0]
    assert torch.equal(released, none)              # as released: a number, and no gradient
    assert (real - none).abs().max() > 1e-6
    assert log_released.loss.tolist() == log_none.loss.tolist()

def test_the_refinement_makes_the_judge_agree(dls):
    "Training on the term alone lowers it, while the judge stays what it was."
    net = judge()
    before = [p.clone() for p in net.parameters()]
    class TermOnly(RefineCB):
        def after_loss(self):
            self.learn.loss_grad = self.learn.loss_grad*0
            super().after_loss()
    learn = arsdm_learner(dls, adaptive=False, lr=3e-3, drop_mask=0., **SMALL)
    learn.add_cb(TermOnly(net, start=0., t_max=1000))
    log = fit_steps(learn, 25).history.frame()
    assert log.L_refine[-5:].mean() < log.L_refine[:5].mean()
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before, net.parameters(), strict=True))

def test_the_clamp_does_not_cut_the_gradient(backbone):
    "At a late timestep many estimates lie outside [0,1]: each still moves the output that it came from."
    gen, zt = ArSDMGenerator(backbone, hidden=8), 2*torch.randn(4, 3, 16, 16)
    pred, t = torch.randn(4, 3, 16, 16, requires_grad=True), torch.full((4,), 299)
    cb = RefineCB(judge(), t_max=300)
    cb.learn = SimpleNamespace(noised=SimpleNamespace(zt=zt, t=t), pred=pred, model=gen)
    image = cb.estimate(torch.ones(4, dtype=torch.bool))
    at_the_ends = ((image == 0) | (image == 1)).float().mean()
    image.sum().backward()
    assert at_the_ends > .2 and image.min() >= 0 and image.max() <= 1 and (pred.grad != 0).all()

def test_it_begins_late_and_only_at_early_timesteps(folder):
    learn = arsdm_learner(small_loaders(folder), refine=judge(), **SMALL)
    log = fit_steps(learn, 6).history.frame()
    assert (log.L_refine[:3] == 0).all()
    never = arsdm_learner(small_loaders(folder), **SMALL)
    never.add_cb(RefineCB(judge(), start=0., t_max=1))
    assert (fit_steps(never, 2).history.frame().L_refine == 0).all()

def test_mask_loss():
    mask = torch.zeros(2, 8, 8); mask[:, 2:6, 2:6] = 1
    sure = (mask*2 - 1)[:, None]*30
    assert mask_loss(sure, mask) < 1e-4 and mask_loss(-sure, mask) > 10
    assert mask_loss(sure*0, mask*0) < mask_loss(sure.abs(), mask*0)
    two = torch.cat([-sure/2, sure/2], 1)
    assert torch.allclose(mask_loss(two, mask), mask_loss(sure, mask), atol=1e-6)

@pytest.mark.parametrize('name', SAMPLERS)
def test_on_pixels_a_wild_network_still_gives_pictures(name, tmp_path):
    "Samplers keep the estimate in [-1,1] on pixels, also of an opened backbone, and leave latents alone."
    pixels = Backbone.pixels(32, channels=(16, 32))
    pixels.save_pretrained(tmp_path)
    latents = Backbone.tiny(torch.rand(4, 3, 32, 32)*2 - 1, 32, (16, 32))
    class Wild(Denoiser):
        def forward(self, zt, t, cond): return torch.full_like(zt, 30.)
    def end(backbone):
        scheduler, timesteps = _timesteps(backbone, name, 3, 1.)
        z = torch.zeros(1, backbone.codec.channels, 8, 8)
        return denoise(Wild(backbone), z, Cond(), Cond(), 1., scheduler, timesteps).abs().max()
    assert end(pixels) < 3 and end(Backbone.from_pretrained(tmp_path)) < 3
    assert end(latents) > 10

def test_fresh_noise_is_ddpm():
    "With eta 1 and every timestep, a step is Eq. 7 of Ho et al.; an image's noise follows from its seed."
    schedule = Schedule(8, .01, .3, 'linear')
    pixels = Backbone.pixels(16, (16,), schedule=schedule)
    class Half(Denoiser):
        def forward(self, zt, t, cond): return zt/2
    gen, seeds = Half(pixels), [3, 5]
    start = start_noise(seeds, (3, 16, 16))
    scheduler = schedule.sampler('ddim')
    scheduler.set_timesteps(8)
    found = denoise(gen, start, Cond(), Cond(), 1., scheduler, scheduler.timesteps, seeds=seeds, eta=1.)
    z, abar = start.double(), schedule.abar.double()
    for k, t in enumerate(range(7, 0, -1)):
        beta, before = 1 - abar[t]/abar[t - 1], abar[t - 1]
        x0 = (z - (1 - abar[t]).sqrt()*z/2)/abar[t].sqrt()
        mean = (before.sqrt()*beta*x0 + (1 - beta).sqrt()*(1 - before)*z)/(1 - abar[t])
        noise = start_noise([seed_of(s, 'eta', k, 0) for s in seeds], (3, 16, 16)).double()
        z = mean + ((1 - before)/(1 - abar[t])*beta).sqrt()*noise
    assert torch.allclose(found.double(), z, atol=1e-4)

def test_the_noise_of_an_image_is_its_own(masks):
    gen = Denoiser(Backbone.pixels(16, (16, 32), seed=1))
    kw = dict(sampler='ddim', steps=4, eta=1.)
    together = sample(gen, masks, seeds=[1, 2, 3, 4], **kw)
    alone = sample(gen, masks[2:3], seeds=[3], **kw)[0].astype(int)
    assert abs(alone - together[2]).max() <= 1
    assert (together[0] != sample(gen, masks[:1], seeds=[1], sampler='ddim', steps=4)[0]).any()
    for wrong in (dict(eta=1., sampler='dpm++'), dict(eta=2., sampler='ddim')):
        with pytest.raises(MedsynError, match='share of fresh noise'): sample(gen, masks, **wrong)

# As a generator -----------------------------------------------------------------------------------

def test_saved_and_opened(dls, masks, inputs, tmp_path):
    gen = fit_steps(arsdm_learner(dls, **SMALL), 3).model.eval()
    gen.save_pretrained(tmp_path)
    back = load_generator(tmp_path)
    assert type(back) is ArSDMGenerator and back.config == gen.config
    for name, v in gen.state_dict().items(): assert torch.equal(v, back.state_dict()[name]), name
    cond = gen.condition(masks)
    with torch.no_grad(): assert torch.equal(back(*inputs, cond), gen(*inputs, cond))
    assert (sample(gen, masks, steps=2, seeds=3) == sample(back, masks, steps=2, seeds=3)).all()

    gen.requires_grad_(False)           # as an arm: it judges a segmenter's masks
    rng = torch.Generator().manual_seed(0)
    draws = noised_images(gen, torch.rand(4, 3, 16, 16), rng, (200, 800), 1, None)
    assert feedback(gen, draws, masks)[1].abs().max() > 0

def test_on_latents_and_on_stable_diffusion(dls, masks, tmp_path):
    "The same SPADE on a given backbone, which is not changed."
    tiny = small_backbone()
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    log = losses(arsdm_learner(dls, tiny, hidden=8))
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items()) and len(log) == 2
    stable = Backbone.from_pretrained(random_stable_diffusion(tmp_path/'sd', width=16), size=64)
    gen = ArSDMGenerator(stable, hidden=8).eval()
    nn.init.normal_(gen.spade.affine[0].weight)
    gen.save_pretrained(tmp_path/'gen')
    mask = torch.ones(1, 1, 64, 64)
    assert (sample(load_generator(tmp_path/'gen'), mask, steps=2) == sample(gen, mask, steps=2)).all()

def test_bad_input(dls, backbone, inputs):
    with pytest.raises(MedsynError, match='pass masks'): ArSDMGenerator(backbone)(*inputs, Cond())
    with pytest.raises(MedsynError, match='give a network'): arsdm_learner(dls, refine='folder', **SMALL)
    with pytest.raises(MedsynError, match='a share in'): RefineCB(judge(), start=2.)
    with pytest.raises(MedsynError, match='whose stride is 64: use 64 or 128 px'):
        arsdm_learner(dls, channels=(16,)*7)
    with pytest.raises(MedsynError, match='leave them or the backbone out'):
        arsdm_learner(dls, small_backbone(), channels=(16, 32))
    with pytest.raises(MedsynError, match='would count twice'):
        arsdm_learner(dls, lesion_weight=True, **SMALL)
    arsdm_learner(dls, lesion_weight=True, adaptive=False, **SMALL)
    unseen = ((ddpm_learner, 'drop_mask'), (ddpm_learner, 'drop_prompt'),
              (unconditional_learner, 'drop_mask'))
    for make, name in unseen:
        with pytest.raises(MedsynError, match=f'leave {name} out'):
            make(dls, small_backbone(), **{name: .5})
    for method, name in (('ddpm', 'drop_prompt'), ('unconditional', 'lesion_weight')):
        with pytest.raises(MedsynError, match=f'has no setting {name!r}'):
            generator_learner(method, dls, small_backbone(), **{name: True})
    with pytest.raises(MedsynError, match="did you mean 'hidden'"):
        generator_learner('arsdm', dls, None, hiden=8)

def test_a_mask_that_was_never_dropped_cannot_guide(dls, tmp_path):
    "Neither of a network that always saw it, nor after saving; the default is no guidance."
    one = torch.ones(1, 1, 16, 16)
    for drop_mask, usual in ((0., (1., 'prompt')), (.15, (2., 'mask'))):
        gen = arsdm_learner(dls, drop_mask=drop_mask, **SMALL).model
        gen.save_pretrained(tmp_path/f'{drop_mask}')
        for one_of in (gen, load_generator(tmp_path/f'{drop_mask}')):
            assert defaults_of(one_of) == usual
            if drop_mask: continue
            with pytest.raises(MedsynError, match='never trained without its mask'):
                sample(one_of, one, steps=1, guide='mask')
            with pytest.raises(MedsynError, match='leave guidance out'):
                sample(one_of, one, steps=1, guidance=3)

# From pairs to pairs ------------------------------------------------------------------------------

SETTINGS = dict(adapter={}, arsdm=dict(channels=(16, 32), hidden=8), anomaly=dict(encoder='resnet10t'))

@pytest.mark.parametrize('method', SETTINGS)
def test_as_an_arm(method, folder, tmp_path):
    "Trained from a folder, saved, opened by its name; its images and its feedback are arms of a comparison."
    small_loaders(folder)
    pairs = find_pairs(folder)
    backbone = small_backbone() if METHODS[method].backbone else None
    gen = make_generator(pairs, backbone, tmp_path/'gen', method, steps=2, bs=6, size=16, seed=0,
                         settings=SETTINGS[method])
    again = make_generator(pairs, backbone, tmp_path/'gen', method, steps=2, bs=6, size=16, seed=0,
                           settings=SETTINGS[method])
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in gen.state_dict().items())
    drawn = synthesize(gen, pairs, tmp_path/'synthetic', 2, steps=2)
    assert [p.name for p in as_arm(str(tmp_path/'synthetic')).pairs] == [p.name for p in drawn]
    callback, = as_arm(f"feedback:{tmp_path/'gen'}", load_generator=load_generator).cbs()
    assert type(callback.generator) is METHODS[method].opens

def test_a_backbone_too_many(folder, tmp_path):
    with pytest.raises(MedsynError, match='has networks of its own'):
        make_generator([], small_backbone(), tmp_path/'gen', 'arsdm')

# Unconditional diffusion --------------------------------------------------------------------------

def test_pixels_are_their_own_latent(backbone, inputs):
    x = inputs[0]
    assert torch.equal(backbone.codec.encode(x), x) and torch.equal(backbone.codec.decode(x), x)

def test_ddpm(dls, tmp_path):
    learn = generator_learner('ddpm', dls, None, channels=(16, 32), lr=2e-3)
    log = fit_steps(learn, 30).history.frame()
    assert log.loss[-8:].mean() < log.loss[:8].mean()
    gen = learn.model.eval()
    assert not gen.needs_mask and gen.backbone.schedule.prediction == 'epsilon'
    gen.save_pretrained(tmp_path)
    drawn = sample(gen, torch.zeros(2, 1, 16, 16), steps=3)
    assert (sample(load_generator(tmp_path), torch.ones(2, 1, 16, 16), steps=3) == drawn).all()

def test_a_latent_model_from_scratch(folder):
    "The weights of the given backbone play no part, and it is left as it is."
    tiny, other = small_backbone(), small_backbone()
    for p in other.unet.parameters(): p.data.mul_(2.)
    before = {k: v.clone() for k, v in tiny.state_dict().items()}
    def run(backbone, **kw):
        return losses(generator_learner('unconditional', small_loaders(folder), backbone, seed=3, **kw))
    scratch = run(tiny, scratch=True)
    assert all(torch.equal(v, before[k]) for k, v in tiny.state_dict().items())
    assert scratch == run(other, scratch=True) and scratch != run(other)
    generator = generator_learner('unconditional', small_loaders(folder), tiny, scratch=True).model
    assert generator.backbone.unet is not tiny.unet and generator.backbone.codec is tiny.codec

def test_catalog():
    assert not METHODS['arsdm'].backbone and not METHODS['ddpm'].backbone and METHODS['anomaly'].backbone
    needs_mask = [METHODS[name].opens.needs_mask for name in ('adapter', 'arsdm', 'anomaly', 'ddpm')]
    assert needs_mask == [True, True, True, False]
