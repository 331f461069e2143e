"""Free Lunch's generator against a naive reference: terms and gradients; what is saved; stock diffusers."""
import shutil
import tempfile
import warnings

import pytest
import torch
from fastai.callback.core import Callback
from learners import check_two_steps, small_backbone, small_loaders

from medsyn.core import MedsynError, seed_of, seeded
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone, random_stable_diffusion
from medsyn.diffusion.learner import denoising_learner
from medsyn.diffusion.sample import defaults_of, sample
from medsyn.generate.alignment import AlignmentCB, AlignmentGenerator, Encoded, alignment_learner, stock_unet
from medsyn.generate.catalog import METHODS, load_generator
from medsyn.synth import synthesize
from medsyn.train import fit_steps

@pytest.fixture(scope='module')
def pairs():
    with tempfile.TemporaryDirectory() as d: yield find_pairs(lesion_folder(d, 16, size=16, seed=0))

@pytest.fixture(scope='module')
def dls(pairs): return batches(pairs)

def batches(pairs): return pair_dls(pairs, size=16, bs=6, valid=0.25, seed=0, augment=False, device='cpu')

def backbone(prediction='epsilon'): return small_backbone(prediction)

def stir(gen):
    "Random numbers wherever training would have put some."
    with torch.no_grad():
        for m in gen.trainable():
            for p in m.parameters(): p.add_(0.1*torch.randn_like(p))
    return gen

# The loss -----------------------------------------------------------------------------------------

def naive(gen, n, stop):
    "Eq. 1-4, the two branches one after the other, from diffusers' own network."
    bb, a = gen.backbone, gen.backbone.schedule.abar[n.t].reshape(-1, 1, 1, 1)
    h0 = bb.codec.encode(torch.cat([n.mask]*3, 1)*2 - 1).detach()
    ht = a.sqrt()*h0 + (1 - a).sqrt()*n.eps
    out = [bb.unet(torch.cat([v, h0], 1), n.t, n.cond.text).sample for v in (n.zt, ht)]
    to_eps = lambda o, v: o if bb.schedule.prediction == 'epsilon' else a.sqrt()*o + (1 - a).sqrt()*v
    z, h = to_eps(out[0], n.zt), to_eps(out[1], ht)
    z_, h_ = (z.detach() if stop == 'image' else z), (h.detach() if stop == 'mask' else h)
    return {'loss': ((out[0] - n.target)**2).mean(), 'L_al': ((z_ - h_)**2).mean()}

class Double(Callback):
    "Float64 for what the batch brings."
    order = 12.5
    def before_batch(self):
        n = self.learn.noised
        n.mask = n.cond.mask = n.mask.double()

class Compare(Callback):
    "Keeps the largest relative difference to the naive reference, over terms and gradients."
    order = 5
    def __init__(self, alpha, stop): self.alpha, self.stop, self.off, self.steps = alpha, stop, 0., 0
    def after_backward(self):
        want = naive(self.model, self.learn.noised, self.stop)
        ps = [p for p in self.model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(want['loss'] + self.alpha*want['L_al'], ps)
        def off(a, b): return ((a - b).norm()/b.norm().clamp_min(1e-12)).item()
        losses = {'loss': self.learn.loss, **self.learn.terms}
        self.off = max(self.off, *[off(losses[name], value) for name, value in want.items()])
        self.off = max(self.off, *[off(p.grad, g) for p, g in zip(ps, grads)])
        assert all(p.grad is None for p in self.model.parameters() if not p.requires_grad)
        self.learn.loss, self.steps = self.learn.loss.float(), self.steps + 1

@pytest.mark.parametrize('prediction', ['epsilon', 'v_prediction'])
@pytest.mark.parametrize('stop', [None, 'image', 'mask'])
def test_terms_and_gradients_are_the_papers(dls, prediction, stop):
    cmp = Compare(0.7, stop)
    learn = alignment_learner(dls, backbone(prediction), stop=stop, lr=1e-3, ema=None, cbs=[Double(), cmp])
    stir(learn.model.double())
    learn.remove_cbs([c for c in learn.cbs if c.name == 'obedience'])       # it evaluates in float32
    fit_steps(learn, 3)
    assert cmp.steps == 3 and cmp.off < 1e-9, cmp.off

def test_reference_notices(dls):
    "The comparison is not blind: another alpha, and the gradients differ."
    cmp = Compare(0.6, None)
    learn = alignment_learner(dls, backbone(), lr=1e-3, ema=None, cbs=[Double(), cmp])
    stir(learn.model.double())
    learn.remove_cbs([c for c in learn.cbs if c.name == 'obedience'])
    fit_steps(learn, 1)
    assert cmp.off > 1e-3

def test_alpha_zero_is_plain_fine_tuning(pairs):
    "Bit for bit, weights and log, against a learner without the callback; with alpha it is something else."
    def run(cbs):
        with seeded(seed_of(0, 'lora')): model = AlignmentGenerator(backbone())
        return fit_steps(denoising_learner(batches(pairs), model, cbs=cbs), 4)
    def same(a, b): return all(map(torch.equal, a.model.parameters(), b.model.parameters()))
    plain, some = run([]), run([AlignmentCB()])
    zero = fit_steps(alignment_learner(batches(pairs), backbone(), alpha=0., lr=5e-4), 4)
    assert same(plain, zero) and plain.history.frame().equals(zero.history.frame())
    assert not same(plain, some) and 'L_al' in some.history.frame()

def test_backbone_is_as_it_was(dls):
    bb = backbone()
    before = {k: v.clone() for k, v in bb.state_dict().items()}
    gen = fit_steps(alignment_learner(dls, bb, lr=1e-2), 3).model
    after = bb.state_dict()
    assert list(before) == list(after) and all(torch.equal(v, before[k]) for k, v in after.items())
    assert not hasattr(bb.unet, 'peft_config')
    assert any(p.abs().sum() > 0 for m in gen.trainable() for p in m.parameters())

def test_regularises_other_generators_too(dls):
    "A loss term does not ask which network it belongs to."
    from medsyn.generate.control import control_learner
    log = fit_steps(control_learner(dls, backbone(), cbs=[AlignmentCB()]), 2).history.frame()
    assert (log.L_al > 0).all()

def test_kept_latent_is_never_stale():
    gen = stir(AlignmentGenerator(backbone())).eval()
    zt, t, mask = torch.randn(2, 8, 4, 4), torch.tensor([10, 900]), (torch.rand(2, 1, 16, 16) > 0.5).float()
    with torch.no_grad():
        for m in (mask, 1 - mask, mask[:1].expand(2, -1, -1, -1), mask):
            latent = gen.backbone.codec.encode(m.expand(-1, 3, -1, -1)*2 - 1)
            fresh = gen(zt, t, Encoded(m, gen.condition(m).text, latent=latent))
            assert torch.equal(gen(zt, t, gen.condition(m)), fresh)
        gen(zt, t, gen.condition(mask)); mask.mul_(0)                                      # changed in place
        assert torch.equal(gen(zt, t, gen.condition(mask)), gen(zt, t, gen.condition(mask.clone())))

@pytest.mark.parametrize('share', [0., .5, 1.])
def test_dropped_masks_do_not_count(tmp_path, share):
    "A sample whose mask was dropped is denoised under an empty mask, and has no part in L_al."
    learn = alignment_learner(small_loaders(tmp_path), small_backbone('epsilon'), drop_mask=share, lr=1e-3)
    n = fit_steps(stirred(learn), 1).noised
    given = n.cond.has_mask.bool()
    distance = ((n.eps_z - n.eps_h)**2).mean((1, 2, 3))
    assert learn.terms['L_al'].item() == pytest.approx((distance*given).sum().item()/len(given), rel=1e-5)
    assert n.cond.mask[~given].abs().sum() == 0 and (given.all() if share == 0 else not given.all())
    assert share == 1. or distance[given].min() > 0

def stirred(learn):
    stir(learn.model)
    return learn

def test_guidance_is_the_papers(stable):
    "Sec. 4.2: 7 on Stable Diffusion, the prompt left out; by the mask on a tiny backbone."
    assert defaults_of(stable[1]) == (7., 'prompt')
    assert defaults_of(AlignmentGenerator(backbone())) == (2., 'mask')

# Two training steps, as they were before the code was rewritten -----------------------------------

@pytest.mark.parametrize('prediction, settings, losses, weights', [
    ('v_prediction', {},
     dict(loss=[1.077425241, 1.224690557], L_al=[0.83309561, 1.219623566]), 1865.8646808459926),
    ('epsilon', dict(stop='mask', rank=4),
     dict(loss=[1.050173163, 1.10832274], L_al=[0.064584322, 0.061574489]), 929.3016007622427)])
def test_two_steps(tmp_path, prediction, settings, losses, weights):
    learn = alignment_learner(small_loaders(tmp_path), small_backbone(prediction), lr=1e-3, **settings)
    check_two_steps(learn, losses, weights)

# On disk ------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    "A folder with a backbone and a generator on it."
    d = tmp_path_factory.mktemp('saved')
    bb = backbone(); bb.save_pretrained(d/'backbone')
    gen = stir(AlignmentGenerator(bb, rank=4)).eval()
    gen.backbone.size = 32
    gen.save_pretrained(d/'generator')
    return d, gen

def answer(gen):
    mask = torch.zeros(1, 1, 16, 16); mask[..., 4:9, 4:12] = 1
    zt, t = torch.linspace(-1, 1, 128).reshape(1, 8, 4, 4), torch.tensor([300])
    with torch.no_grad(): return gen(zt, t, gen.condition(mask))

def answers_alike(a, b):
    "Equal but for rounding: weights mapped from a file lie at other addresses, where sums round differently."
    return torch.allclose(answer(a), answer(b), rtol=1e-5, atol=2e-6)

def test_saves_the_adapters_alone(saved):
    d, gen = saved
    names = ['generator.json', 'mask_in.safetensors', 'pytorch_lora_weights.safetensors']
    assert sorted(p.name for p in (d/'generator').iterdir()) == names
    n = sum(p.numel() for m in gen.trainable() for p in m.parameters())
    assert sum(p.stat().st_size for p in (d/'generator').iterdir()) < 4*n + 30_000
    back = load_generator(d/'generator')
    assert type(back) is AlignmentGenerator and back.config['rank'] == 4 and back.backbone.size == 32
    assert answers_alike(back, gen)

def test_moved_folders(saved, tmp_path):
    "The two folders moved together are found; the adapters alone need to be told where the backbone is."
    d, gen = saved
    shutil.copytree(d, tmp_path/'both')
    moved = shutil.copytree(d/'generator', tmp_path/'alone'/'x'/'generator')
    shutil.move(d/'backbone', d/'gone')
    try:
        assert answers_alike(load_generator(tmp_path/'both'/'generator'), gen)
        with pytest.raises(MedsynError, match='that was in .*backbone, which is gone'):
            load_generator(moved)
        backbone_elsewhere = Backbone.from_pretrained(d/'gone')
        opened = AlignmentGenerator.from_pretrained(moved, backbone_elsewhere)
        assert answers_alike(opened, gen)
    finally: shutil.move(d/'gone', d/'backbone')

def test_whole_where_there_is_no_other_copy(tmp_path, dls):
    "A backbone that is on no disk, or no longer the one on disk, is saved with the adapters."
    bb = backbone()
    gen = stir(AlignmentGenerator(bb)).eval(); gen.save_pretrained(tmp_path/'a')
    assert (tmp_path/'a'/'unet').is_dir() and answers_alike(load_generator(tmp_path/'a'), gen)
    shutil.move(tmp_path/'a', tmp_path/'b')
    assert answers_alike(load_generator(tmp_path/'b'), gen)
    bb.save_pretrained(tmp_path/'bb')
    fit_steps(METHODS['unconditional'].learner(dls, bb), 1)     # trains it in place
    gen = stir(AlignmentGenerator(bb)).eval(); gen.save_pretrained(tmp_path/'c')
    assert (tmp_path/'c'/'unet').is_dir() and answers_alike(load_generator(tmp_path/'c'), gen)

def test_another_backbone_is_refused(saved, tmp_path):
    d, _ = saved
    shutil.copytree(d, tmp_path/'s')
    other = backbone()
    with torch.no_grad(): next(other.unet.parameters()).add_(0.01)
    other.save_pretrained(tmp_path/'s'/'backbone')
    with pytest.raises(MedsynError, match='is not the one that the adapters were trained on'):
        load_generator(tmp_path/'s'/'generator')

@pytest.mark.parametrize('name', ['mask_in.safetensors', 'pytorch_lora_weights.safetensors'])
def test_damaged_files_are_named(saved, tmp_path, name):
    d, _ = saved
    g = shutil.copytree(d, tmp_path/'s')/'generator'
    (g/name).write_bytes((g/name).read_bytes()[:100])
    with pytest.raises(MedsynError, match=name): load_generator(g)
    (g/name).unlink()
    with pytest.raises(MedsynError, match=name): load_generator(g)

def test_adapters_of_another_network_are_refused(saved, tmp_path):
    d, _ = saved
    g = shutil.copytree(d, tmp_path/'s')/'generator'
    stir(AlignmentGenerator(backbone(), rank=2)).save_pretrained(tmp_path/'r2')
    shutil.copy(tmp_path/'r2'/'pytorch_lora_weights.safetensors', g)
    with pytest.raises(MedsynError, match='do not fit'): load_generator(g)

def test_synthesis(saved, pairs, tmp_path):
    "A generator that was opened draws the same pairs, and the masks matter."
    d, gen = saved
    generators = dict(a=gen, b=load_generator(d/'generator'))
    made = [synthesize(g, pairs, tmp_path/name, 3, steps=2, size=16) for name, g in generators.items()]
    assert all(p.image.read_bytes() == q.image.read_bytes() for p, q in zip(*made, strict=True))
    masks = torch.zeros(2, 1, 16, 16); masks[1, :, 4:12, 4:12] = 1
    a, b = sample(gen, masks, steps=3, seeds=[5, 5])
    assert (a != b).any()

# Stock diffusers ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def stable(tmp_path_factory):
    d = tmp_path_factory.mktemp('sd')
    bb = Backbone.from_pretrained(random_stable_diffusion(d/'sd'), size=64)
    gen = stir(AlignmentGenerator(bb)).eval(); gen.save_pretrained(d/'gen')
    return d, gen

def test_stock_pipeline_loads_the_adapters(stable):
    "diffusers' own pipeline takes the file; it has no mask, so it agrees where the mask channels are zero."
    from diffusers import StableDiffusionPipeline
    d, gen = stable
    zt, t, mask = torch.randn(2, 4, 8, 8), torch.tensor([5, 700]), torch.ones(2, 1, 64, 64)
    text = gen.condition(mask).text
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        bb = Backbone.from_pretrained(d/'sd')
        pipe = StableDiffusionPipeline(bb.codec.vae, bb.text.encoder, bb.text.tokenizer, bb.unet,
                                       bb.schedule.sampler('ddim'), None, None, requires_safety_checker=False)
        pipe.load_lora_weights(d/'gen')
    kept = gen.backbone.unet.conv_in.mask.weight.clone()
    with torch.no_grad():
        plain, adapted = gen.plain[0].unet(zt, t, text).sample, pipe.unet(zt, t, text).sample
        gen.backbone.unet.conv_in.mask.weight.zero_()
        torch.testing.assert_close(adapted, gen(zt, t, gen.condition(mask)), rtol=1e-4, atol=1e-5)
        gen.backbone.unet.conv_in.mask.weight.copy_(kept)
    assert (adapted - plain).abs().max() > 1e-2

def test_stock_unet_is_the_generator(stable, tmp_path):
    "The exported U-Net, opened by diffusers, gives the generator's answers on the two latents side by side."
    from diffusers import UNet2DConditionModel
    _, gen = stable
    before = answer_sd(gen)
    stock_unet(gen).save_pretrained(tmp_path/'unet')
    unet = UNet2DConditionModel.from_pretrained(tmp_path/'unet').eval()
    assert unet.config.in_channels == 8
    zt, t, mask, text = before[1]
    with torch.no_grad():
        latent = gen.backbone.codec.encode(mask.expand(-1, 3, -1, -1)*2 - 1)
        out = unet(torch.cat([zt, latent], 1), t, text).sample
    torch.testing.assert_close(out, before[0], rtol=1e-3, atol=1e-4)
    assert torch.equal(answer_sd(gen)[0], before[0])        # exporting changed nothing

def answer_sd(gen):
    g = torch.Generator().manual_seed(0)
    zt, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([5, 700])
    mask = (torch.rand(2, 1, 64, 64, generator=g) > 0.5).float()
    cond = gen.condition(mask)
    with torch.no_grad(): return gen(zt, t, cond), (zt, t, mask, cond.text)

def test_light_save_on_stable_diffusion(stable):
    d, gen = stable
    size = sum(p.stat().st_size for p in (d/'gen').rglob('*') if p.is_file())
    assert size < 0.2*sum(p.stat().st_size for p in (d/'sd'/'unet').rglob('*') if p.is_file())
    opened = load_generator(d/'gen')
    torch.testing.assert_close(answer_sd(opened)[0], answer_sd(gen)[0], rtol=1e-4, atol=1e-5)
