"The denoising loss and the sampler: precision, devices, dropped masks, weights, defaults, kept regions."
import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from fastai.callback.core import Callback
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from medsyn.core import MedsynError
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import Pair, PairDataset, Reading, find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone, random_stable_diffusion
from medsyn.diffusion.cache import cached_dls, latent_moments
from medsyn.diffusion.learner import (Cond, Denoiser, DenoisingWeightCB, MaskGenerator, Noised, PairGenerator,
                                      denoising_learner, denoising_loss, lesion_weights)
from medsyn.diffusion.sample import defaults_of, latent_region, sample, to_uint8
from medsyn.diffusion.schedule import SAMPLERS, Schedule, min_snr_weight
from medsyn.generate.alignment import AlignmentGenerator
from medsyn.generate.catalog import METHODS
from medsyn.generate.concat import with_unlabelled
from medsyn.generate.control import ControlGenerator
from medsyn.generate.siamese import SiameseGenerator
from medsyn.train import ORDER, fit_steps

class Masked(MaskGenerator):
    "A U-Net whose input has the lesion painted in: it depends on the mask."
    def forward(self, zt, t, cond):
        lesion = F.adaptive_avg_pool2d(cond.mask, zt.shape[-2:])
        return super().forward(zt + lesion, t, cond)

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return lesion_folder(tmp_path_factory.mktemp('lesions'), 16, size=32, seed=0)

def loaders(folder):
    return pair_dls(find_pairs(folder), size=32, bs=4, valid=.25, seed=0, augment=False, device='cpu')

@pytest.fixture(scope='module')
def backbone(): return Backbone.tiny(as_x0(*draw_lesions(8, 32, seed=0))[0], 32, channels=(16, 32))

@pytest.fixture(scope='module')
def stable_diffusion(tmp_path_factory):
    return Backbone.from_pretrained(random_stable_diffusion(tmp_path_factory.mktemp('sd')), size=64)

def as_x0(images, masks):
    return torch.from_numpy(images).permute(0, 3, 1, 2)/127.5 - 1, torch.from_numpy(masks)[:, None].float()

def learner(folder, backbone, **kw):
    return denoising_learner(loaders(folder), Masked(copy.deepcopy(backbone)), **kw)

def losses(learn, steps=4): return fit_steps(learn, steps).history.frame().loss.tolist()

# defaults of sampling belong to the class

def test_each_paper_has_its_guidance(stable_diffusion):
    "Free Lunch is sampled with 7 (Sec. 4.2), Siamese-Diffusion and ControlNet with 9."
    for kind, guidance in ((ControlGenerator, 9.), (SiameseGenerator, 9.), (AlignmentGenerator, 7.)):
        assert defaults_of(kind(stable_diffusion)) == (guidance, 'prompt')

def test_tiny_backbones_are_guided_by_the_mask(backbone):
    assert defaults_of(AlignmentGenerator(backbone)) == (2., 'mask')
    assert defaults_of(Denoiser(backbone)) == (1., 'prompt')

@pytest.mark.parametrize('method', METHODS)
def test_every_generator_is_of_one_kind(method):
    kind = METHODS[method].opens
    assert issubclass(kind, PairGenerator) or issubclass(kind, MaskGenerator) or kind is Denoiser
    if issubclass(kind, PairGenerator):
        for name in ('sample_pairs', 'clean_mask', 'check_size'):
            assert getattr(kind, name) is not getattr(PairGenerator, name)

# devices and precision

class NoFloat64(TorchDispatchMode):
    "Stands for a device without float64: whatever is moved to `meta` may not be float64."
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(v, torch.Tensor) and v.device.type == 'meta': assert v.dtype != torch.float64, func
        return out

@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_no_float64_on_the_device(prediction):
    s = Schedule(prediction=prediction)
    z, t = torch.zeros(3, 8, 4, 4, device='meta'), torch.tensor([0, 500, 999], device='meta')
    with NoFloat64():
        for method in (s.noise, s.target, s.to_eps, s.z0_from_eps): assert method(z, z, t).shape == z.shape
        assert min_snr_weight(s, t).shape == (3,)

def test_amplitudes_are_rounded_once():
    s, t = Schedule(), torch.arange(1000)
    for dtype in (torch.float32, torch.float64):
        a, b = s.coefs(t, torch.zeros(1000, 1, 1, 1, dtype=dtype))
        assert torch.equal(a.flatten(), s.abar.sqrt().to(dtype))
        assert torch.equal(b.flatten(), (1 - s.abar).sqrt().to(dtype))

class Autocast(Callback):
    "bf16 on the CPU, for the part of a step that fastai's MixedPrecision covers."
    order = ORDER['precision']
    def before_batch(self):
        self.autocast = torch.autocast('cpu', torch.bfloat16)
        self.autocast.__enter__()
    def after_loss(self): self.autocast.__exit__(None, None, None)

class Keep(Callback):
    "Keeps the noised batch, the type of the prediction, and the loss."
    order = ORDER['weighted_loss']
    def before_fit(self): self.kept = []
    def after_loss(self): self.kept.append((self.learn.noised, self.pred.dtype, self.learn.loss.detach()))

def batches(learn, bf16):
    learn.add_cbs([Keep(), *([Autocast()] if bf16 else [])])
    return fit_steps(learn, 2).keep.kept

def test_float32_under_autocast(folder, backbone):
    "Latents, noise, noised latents and targets are the same as without autocast, and the loss is float32."
    plain, low = (batches(learner(folder, backbone), bf16) for bf16 in (False, True))
    for (a, a_type, a_loss), (b, b_type, b_loss) in zip(plain, low, strict=True):
        assert (a_type, b_type) == (torch.float32, torch.bfloat16)
        for name in ('z0', 'eps', 'zt', 'target'):
            assert getattr(b, name).dtype == torch.float32, name
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert b_loss.dtype == torch.float32 and abs(a_loss - b_loss) < .03*a_loss

def test_cached_and_uncached_agree_under_autocast(folder, backbone, tmp_path):
    plain = batches(learner(folder, backbone), True)
    bb = copy.deepcopy(backbone)
    cached = batches(denoising_learner(cached_dls(loaders(folder), bb, tmp_path), Masked(bb)), True)
    for (a, _, a_loss), (b, _, b_loss) in zip(plain, cached, strict=True):
        assert torch.allclose(a.zt, b.zt, atol=1e-6) and torch.allclose(a_loss, b_loss, rtol=1e-2)

def test_a_cache_keeps_pairs_alone(folder, backbone, tmp_path):
    "Images without masks, or a cache of a cache: one sentence, and nothing is written."
    images = [p.image for p in find_pairs(lesion_folder(tmp_path/'more', 4, size=32, seed=9))]
    pairs = loaders(folder)
    for dls in (with_unlabelled(pairs, images), cached_dls(pairs, backbone, tmp_path/'first')):
        with pytest.raises(MedsynError, match='latents are kept of pairs alone'):
            cached_dls(dls, backbone, tmp_path/'second')
    assert not (tmp_path/'second').exists()

def pages_of_one_file(path):
    "Four pairs whose images are the pages of one file of 48x32 px, with a mask each."
    images, masks = draw_lesions(4, 48, seed=5)
    first, *others = [Image.fromarray(image[:32]) for image in images]
    first.save(path/'stack.tif', save_all=True, append_images=others)
    for k, mask in enumerate(masks): Image.fromarray(mask[:32]*255).save(path/f'{k}.png')
    return [Pair(str(k), path/'stack.tif', path/f'{k}.png', Reading(page=k)) for k in range(4)]

def test_the_cache_knows_how_images_are_read(backbone, tmp_path):
    "Pages of one file have entries of their own, and so has each fit: of the pairs, or of the data set."
    pairs, codec, cache = pages_of_one_file(tmp_path), backbone.codec, tmp_path/'latents.safetensors'
    padded = [replace(p, reading=p.reading.over(fit='pad')) for p in pairs]
    for of, reading in ((pairs, {}), (pairs, dict(fit='pad')), (padded, {}), (padded, dict(fit='crop')),
                        (pairs, dict(page=1)), (pairs, {})):
        dataset = PairDataset(of, 32, **reading)
        x0 = torch.stack([image.as_subclass(torch.Tensor) for image, _ in dataset]).float()/127.5 - 1
        stored = torch.stack(latent_moments(cache, dataset, codec))
        assert torch.allclose(stored, codec.moments(x0), atol=1e-5), reading

def test_both_branches_of_alignment_are_float32_under_autocast(folder, backbone):
    "The latents of image and mask are encoded and noised as they are without autocast."
    make = METHODS['alignment'].learner
    plain, low = (batches(make(loaders(folder), backbone), bf16)[0][0] for bf16 in (False, True))
    for name in ('h0', 'ht', 'zt'): assert torch.equal(getattr(plain, name), getattr(low, name)), name

@pytest.mark.parametrize('scale', ['tiny', 'stable diffusion'])
def test_encoding_ignores_autocast(scale, backbone, stable_diffusion):
    codec, x0 = (backbone if scale == 'tiny' else stable_diffusion).codec, torch.rand(2, 3, 64, 64)*2 - 1
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16): low = codec.encode(x0)
    assert torch.equal(low, codec.encode(x0).detach())

def test_the_loss_is_reduced_in_float32():
    target = torch.randn(4, 8, 16, 16)
    pred = (target + .01*torch.randn_like(target)).bfloat16()
    exact = (pred.double() - target.double()).square().mean()
    assert abs(denoising_loss(pred, target) - exact) < 1e-6*exact
    assert denoising_loss(pred.double(), target.double()).dtype == torch.float64

# dropped masks and weights

def test_drop_0_is_the_old_loss(folder, backbone):
    switched_off = learner(folder, backbone, drop_mask=0., min_snr=None, lesion_weight=False)
    assert losses(learner(folder, backbone)) == losses(switched_off)

def test_everything_dropped_is_no_mask(folder, backbone):
    "With drop_mask=1 the loss is that of a network without a mask, on the same noise."
    dropped = losses(learner(folder, backbone, drop_mask=1.), 1)
    assert dropped == losses(denoising_learner(loaders(folder), Denoiser(copy.deepcopy(backbone))), 1)
    assert dropped != losses(learner(folder, backbone), 1)

def test_noised_is_documented(folder, backbone):
    learn = fit_steps(learner(folder, backbone, drop_mask=.5), 1)
    n = learn.noised
    assert isinstance(n, Noised)
    assert set(vars(n)) == {'x0', 'mask', 'z0', 'eps', 't', 't_cpu', 'zt', 'cond', 'target'}
    assert torch.equal(n.cond.mask, n.mask*n.cond.has_mask.reshape(-1, 1, 1, 1))

class ValidBatches(Callback):
    "Which masks validation is given."
    order = ORDER['weighted_loss']
    def before_fit(self): self.has_mask = []
    def after_loss(self):
        if not self.training: self.has_mask += self.learn.noised.cond.has_mask.tolist()

def test_validation_drops_nothing(folder, backbone):
    learn = learner(folder, backbone, drop_mask=1., cbs=[ValidBatches()])
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    assert learn.valid_batches.has_mask == [1.]*4

@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('kind', ['scaled_linear', 'squaredcos_cap_v2'])
def test_min_snr_against_diffusers(prediction, kind):
    t, scheduler = torch.arange(1000), DDPMScheduler(beta_start=.00085, beta_end=.012, beta_schedule=kind)
    oracle = compute_snr(scheduler, t)
    want = oracle.clamp(max=5)/(oracle if prediction == 'epsilon' else oracle + 1)
    weights = min_snr_weight(Schedule(kind=kind, prediction=prediction), t, 5.)
    assert torch.allclose(weights[:990], want[:990], rtol=2e-3, atol=1e-6)

def test_weighted_gradient_by_hand(folder, backbone):
    "One step of plain gradient descent on the weighted loss, written out."
    learn = learner(folder, backbone, min_snr=5., lesion_weight=True)
    fit_steps(learn, 1)
    n, model = learn.noised, learn.model
    pred = model(n.zt, n.t, n.cond)
    by_time = min_snr_weight(model.backbone.schedule, n.t, 5.)[:, None, None, None]
    w = by_time*lesion_weights(n.mask, n.zt.shape[-2:])
    learn.pred, learn.yb = pred, (n.target,)
    cb = next(c for c in learn.cbs if isinstance(c, DenoisingWeightCB))
    by_hand = (w*(pred - n.target)**2).mean()
    assert torch.allclose(denoising_loss(pred, n.target) + cb.term(), by_hand, rtol=1e-5)

def test_lesion_weights_never_vanish():
    mask = torch.zeros(3, 1, 32, 32); mask[0, :, :3, :3] = 1; mask[1] = 1
    w = lesion_weights(mask, (8, 8))
    assert (w > 0).all() and torch.allclose(w.mean((1, 2, 3)), torch.ones(3))
    m = F.avg_pool2d(mask[:1], 4); r = m.mean()
    assert torch.allclose(w[:1]*(2*r*(1 - r)), m*(1 - r) + (1 - m)*r)        # ArSDM's W, divided by its mean

def test_conditions_in_one_batch():
    a = Cond(torch.ones(2, 1, 4, 4), torch.zeros(2, 3, 5))
    both = a.without_mask().cat(a)
    assert both.has_mask.tolist() == both.mask.mean((1, 2, 3)).tolist() == [0, 0, 1, 1]
    assert a.cat(a).has_mask is None

# a region that is kept

@pytest.fixture(scope='module')
def scene(): return as_x0(*draw_lesions(3, 32, seed=5))

@pytest.mark.parametrize('sampler', SAMPLERS)
@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
def test_outside_the_region_the_frame_is_kept(scene, sampler, prediction):
    x0, masks = scene
    bb = Backbone.tiny(x0, 32, channels=(16, 32), prediction=prediction).requires_grad_(False)
    keep = 1 - F.max_pool2d(masks, 5, 1, 2)
    round_trip = to_uint8(bb.codec.decode(bb.codec.encode(x0)))
    inside = F.interpolate(latent_region(keep, 4).float(), scale_factor=4)[:, 0].bool().numpy()
    for kw in (dict(), dict(strength=.5)) + ((dict(resample=2),) if sampler == 'ddim' else ()):
        out = sample(Masked(bb), masks, steps=4, init=x0, keep=keep, sampler=sampler, **kw)
        assert (out[inside] == round_trip[inside]).all() and (out[~inside] != round_trip[~inside]).any()
        assert inside.any() and (~inside).any()

def test_a_latent_pixel_is_kept_only_whole():
    keep = torch.ones(1, 1, 8, 8); keep[..., 5, 2] = 0
    assert latent_region(keep, 4)[0, 0].tolist() == [[True, True], [False, True]]

def test_strength_0_gives_the_image_back(scene, backbone):
    x0, masks = scene
    round_trip = to_uint8(backbone.codec.decode(backbone.codec.encode(x0)).detach())
    assert (sample(Masked(backbone), masks, steps=4, init=x0, strength=0.) == round_trip).all()
    assert (sample(Masked(backbone), masks, steps=4, init=x0, strength=0., keep=masks) == round_trip).all()
    assert (sample(Masked(backbone), masks, steps=4, init=x0, strength=.01) != round_trip).any()

def test_strength_needs_a_picture(scene, backbone):
    "It is a share of the way back to a picture; 1 is no way back, so it may be given without one."
    masks, gen = scene[1], Masked(backbone)
    with pytest.raises(MedsynError, match='strength=0.4 .*pass init'):
        sample(gen, masks, steps=2, strength=.4)
    assert (sample(gen, masks, steps=2, strength=1) == sample(gen, masks, steps=2)).all()

def test_keeping_nothing_or_everything(scene, backbone):
    x0, masks = scene
    kw = dict(steps=4, init=x0, strength=.7)
    plain = sample(Masked(backbone), masks, **kw)
    assert (sample(Masked(backbone), masks, keep=masks*0, **kw) == plain).all()
    round_trip = to_uint8(backbone.codec.decode(backbone.codec.encode(x0)).detach())
    assert (sample(Masked(backbone), masks, keep=masks*0 + 1, **kw) == round_trip).all()

def test_kept_regions_do_not_depend_on_the_batch(scene, backbone):
    x0, masks = scene
    kw = dict(steps=4, init=x0, keep=1 - masks, resample=2, sampler='ddim')
    one, three = (sample(Masked(backbone), masks, bs=bs, **kw) for bs in (1, 3))
    assert np.abs(one.astype(int) - three).max() <= 1

def test_errors_of_a_kept_region(scene, backbone):
    x0, masks = scene
    gen = Masked(backbone)
    with pytest.raises(MedsynError, match='pass init'): sample(gen, masks, keep=masks)
    with pytest.raises(MedsynError, match='2 keep for 3 masks'): sample(gen, masks, init=x0, keep=masks[:2])
    with pytest.raises(MedsynError, match="sampler='ddim' alone"):
        sample(gen, masks, init=x0, keep=masks, resample=2, sampler='dpm++')
    with pytest.raises(MedsynError, match='share of the schedule'): sample(gen, masks, init=x0, strength=-.1)
    gen.train()
    class Breaks(Masked):
        def forward(self, zt, t, cond): raise RuntimeError('stop')
    broken = Breaks(backbone).train()
    with pytest.raises(RuntimeError): sample(broken, masks, steps=1)
    assert broken.training and gen.training

def test_cosine_schedule_is_kept_on_disk(scene, tmp_path):
    bb = Backbone.tiny(scene[0], 32, channels=(16, 32), schedule='squaredcos_cap_v2')
    Denoiser(bb).save_pretrained(tmp_path)
    back = Denoiser.from_pretrained(tmp_path).backbone.schedule
    oracle = DDPMScheduler(beta_schedule='squaredcos_cap_v2').alphas_cumprod
    assert torch.equal(back.abar, bb.schedule.abar)
    assert torch.allclose(back.abar.float(), oracle, rtol=1e-4, atol=1e-6)
    for sampler in SAMPLERS:
        assert np.isfinite(sample(Denoiser(bb), scene[1], steps=5, sampler=sampler)).all()

def test_the_frozen_half_is_computed_once_for_both_answers(backbone, monkeypatch):
    "Guided by the mask; by the prompt, the text differs and everything is computed for both."
    generator = ControlGenerator(backbone).eval()
    with torch.no_grad():
        rng = torch.Generator().manual_seed(0)
        for p in generator.control.parameters(): p.add_(.05*torch.randn(p.shape, generator=rng))
    masks, seen = torch.zeros(2, 1, 32, 32), []
    masks[..., 8:20, 8:20] = 1
    backbone.unet.conv_in.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    shared = sample(generator, masks, steps=3)
    assert seen == [2]*3
    seen.clear()
    by_prompt = sample(generator, masks, steps=3, guidance=3., guide='prompt')
    assert seen == [4]*3 and (by_prompt != shared).any()
    monkeypatch.setattr(ControlGenerator, 'two_answers', Denoiser.two_answers)
    apart = sample(generator, masks, steps=3)
    assert np.abs(shared.astype(int) - apart).max() <= 1
