"""Generative feedback: its gradient, who gets it, its switches, and where it pulls a mask."""
import tempfile
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from PIL import Image

from medsyn.core import MedsynError, seeded
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls, read_pair
from medsyn.diffusion.backbone import Backbone
from medsyn.diffusion.learner import MASKS, Cond, Denoiser, pretrain_backbone
from medsyn.generate.catalog import METHODS, generator_learner
from medsyn.generate.control import ControlGenerator
from medsyn.segment.feedback import GenerativeFeedbackCB, feedback, judged, noised_images, pulled, soft_mask
from medsyn.segment.learner import segment_learner
from medsyn.segment.models import segmenter
from medsyn.train import fit_steps

KINDS = ('control', 'siamese', 'alignment')

def judge(kind='control', size=32, seed=0, image=False):
    "A small generator with random weights wherever training would have put some."
    with seeded(seed):
        x0 = torch.from_numpy(draw_lesions(8, size, seed=1)[0]).permute(0, 3, 1, 2)/127.5 - 1
        bb = Backbone.tiny(x0, size, channels=(16, 32))
        gen = ControlGenerator(bb, image=True) if image else METHODS[kind].opens(bb)
        with torch.no_grad():
            for m in gen.trainable():
                for p in m.parameters(): p.add_(0.1*torch.randn_like(p))
    return gen.eval()

def net(classes=1):
    with seeded(0):
        return segmenter('unet', size=32, classes=classes, encoder_depth=3, decoder_channels=(32, 16, 8))

@pytest.fixture(scope='module')
def pairs():
    with tempfile.TemporaryDirectory() as d: yield find_pairs(lesion_folder(d, 12, size=32, seed=0))

def batches(pairs): return pair_dls(pairs, size=32, bs=4, valid=0.25, seed=0, augment=False, device='cpu')

@pytest.fixture
def dls(pairs): return batches(pairs)

def draws(gen, x, n_t=1, seed=3, **kw):
    return list(noised_images(gen, x, torch.Generator().manual_seed(seed), n_t=n_t, **kw))

# The gradient -------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('classes', [1, 2])
def test_gradient_is_plain_differentiation(kind, classes):
    "In float64, the gradients are those of one graph through segmenter and generator, written from Eq. 8-10."
    gen, model = judge(kind).double(), net(classes).double().eval()
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bb, flags = gen.backbone, [p.requires_grad for p in gen.parameters()]
    n, = draws(gen, x)
    out = model(x)
    m = soft_mask(out, 0.5).double()
    v, g = feedback(gen, [n], m)
    got = torch.autograd.grad(pulled(v, m, g), list(model.parameters()), allow_unused=True)
    l = model(x)/0.5
    soft = (l.softmax(1)[:, 1:] if classes == 2 else torch.cat([0*l, l], 1).softmax(1)[:, 1:])
    z0 = bb.codec.encode(x*2 - 1)
    a = bb.schedule.abar[n.t].reshape(-1, 1, 1, 1)
    zt = a.sqrt()*z0 + (1 - a).sqrt()*n.eps
    with torch.no_grad(): text = bb.text([bb.prompt]*2)
    want = ((gen.eps(zt, n.t, Cond(soft, text)) - n.eps)**2).mean()
    torch.testing.assert_close(v, want.detach().to(v), rtol=1e-5, atol=0)
    grads = torch.autograd.grad(want, list(model.parameters()), allow_unused=True)
    top = max(b_.norm() for b_ in grads if b_ is not None)  # the mask is float32, all else float64
    for a_, b_ in zip(got, grads, strict=True):
        if b_ is not None: assert (a_ - b_).norm() <= 1e-4*b_.norm() + 1e-4*top
    assert [p.requires_grad for p in gen.parameters()] == flags
    assert all(p.grad is None for p in gen.parameters())

@pytest.mark.parametrize('kind', KINDS)
def test_only_the_segmenter_learns(kind, pairs):
    "The generator's gradients are None and its weights stay; the segmenter's move because of the term."
    class Spy(Callback):
        order = 5
        def after_backward(self):
            assert all(p.grad is None for p in gen.parameters())
            self.learn.moved = [p.grad.clone() for p in self.model.parameters() if p.grad is not None]
    gen = judge(kind).train().requires_grad_(True)  # even if somebody left it like this
    before = {k: v.clone() for k, v in gen.state_dict().items()}
    def run(cbs): return fit_steps(segment_learner(batches(pairs), net(), cbs=[Spy(), *cbs], clip=None), 1)
    plain, fed = run([]), run([GenerativeFeedbackCB(gen, weight=10.)])
    assert all(torch.equal(v, before[k]) for k, v in gen.state_dict().items())
    assert all(p.requires_grad for p in gen.parameters())
    assert any((a - b).abs().max() > 1e-6 for a, b in zip(plain.moved, fed.moved, strict=True))
    log = fed.history.frame()
    assert log.loss[0] == plain.history.frame().loss[0] and log.L_fb[0] > 0  # the plain loss stays readable

def test_weight_zero_is_plain_training(pairs):
    run = lambda cbs: fit_steps(segment_learner(batches(pairs), net(), cbs=cbs), 3)
    a, b = run([]), run([GenerativeFeedbackCB(judge(), weight=0.)])
    assert all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))

def test_averaged_weights(pairs):
    "The judge still sees the raw network and is not averaged; the evaluated network has the averages."
    gen = judge()
    before = {k: v.clone() for k, v in gen.state_dict().items()}
    def run(ema):
        learn = segment_learner(batches(pairs), net(), ema=ema, lr=1e-2, cbs=[GenerativeFeedbackCB(gen)])
        return fit_steps(learn, 6)
    plain, averaged = run(None), run(0.8)
    assert plain.history.frame().L_fb.tolist() == averaged.history.frame().L_fb.tolist()
    assert all(torch.equal(v, before[k]) for k, v in gen.state_dict().items())
    assert all(p.grad is None for p in gen.parameters())
    assert len(averaged.ema.params()) == len(list(averaged.model.parameters()))
    end, raw = averaged.model.state_dict(), plain.model.state_dict()
    assert any(not torch.equal(end[k], raw[k]) for k in end if k.endswith('weight'))
    statistics = [k for k in end if k.endswith('running_mean')]
    for k, average in zip(statistics, averaged.ema.avg_statistics[::2], strict=True):
        assert torch.equal(end[k], average)

def test_mask_and_image_generator():
    "A generator that also sees the image (M+I) is given it."
    gen, x = judge(image=True), torch.rand(2, 3, 32, 32)
    n, = draws(gen, x)
    assert torch.equal(n.cond.image, x*2 - 1)
    v, g = feedback(gen, [n], torch.rand(2, 1, 32, 32))
    assert torch.isfinite(v) and g.abs().sum() > 0

def test_a_certain_segmenter_gets_no_pull():
    "Saturated logits: the soft mask is two-valued, and neither the temperature nor the judge can move it."
    gen, x = judge(), torch.rand(2, 3, 32, 32)
    n, = draws(gen, x)
    out = torch.full((2, 1, 32, 32), 200.)
    out[..., 16:] *= -1
    values = []
    for temperature in (1., 0.5, 0.1):
        logits = out.clone().requires_grad_()
        mask = soft_mask(logits, temperature)
        v, g = feedback(gen, [n], mask)
        pulled(v, mask, g).backward()
        assert logits.grad.abs().max() == 0
        values.append(v)
    assert values[0] == values[1] == values[2] == judged(gen, n, (out > 0).float()).mean()

def test_one_timestep(pairs):
    "The shortest range there is."
    gen, x = judge(), torch.rand(4, 3, 32, 32)
    n, = draws(gen, x, t_range=(0, 1))
    assert n.t.tolist() == [0]*4
    learn = segment_learner(batches(pairs), net(), cbs=[GenerativeFeedbackCB(gen, t_range=(999, 1000))])
    assert fit_steps(learn, 1).history.frame().L_fb[0] > 0

# Precision ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('how', ['autocast', 'weights'])
def test_bf16(kind, how):
    "Under autocast, as in a bf16 learner, and with bf16 weights: nearly the same value and direction."
    x, mask = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 1, 32, 32)
    mask[..., 8:20, 8:20] = 0.9
    v, g = feedback(gen := judge(kind), draws(gen, x), mask)
    with torch.autocast('cpu', torch.bfloat16) if how == 'autocast' else nullcontext():
        low = judge(kind) if how == 'autocast' else judge(kind).bfloat16()
        v2, g2 = feedback(low, draws(low, x), mask)
        out = torch.zeros(2, 1, 32, 32, requires_grad=True, dtype=torch.bfloat16)
        m = soft_mask(out); pulled(v2, m, g2).backward()
    assert v2.dtype == torch.float32 and abs(v2 - v) < 0.05*v
    assert torch.cosine_similarity(g.flatten(), g2.float().flatten(), 0) > 0.95 and out.grad.abs().sum() > 0

# What it costs ------------------------------------------------------------------------------------

def test_every(dls):
    learn = segment_learner(dls, net(), cbs=[GenerativeFeedbackCB(judge(), every=3)])
    log = fit_steps(learn, 7).history.frame()
    assert log.L_fb.notna().tolist() == [k % 3 == 0 for k in range(7)]

def test_n_t_is_the_mean_of_draws():
    gen, x, mask = judge(), torch.rand(2, 3, 32, 32), torch.rand(2, 1, 32, 32)
    ns = draws(gen, x, n_t=3)
    one = [feedback(gen, [n], mask) for n in ns]
    v, g = feedback(gen, ns, mask)
    torch.testing.assert_close(v, torch.stack([o[0] for o in one]).mean())
    torch.testing.assert_close(g, torch.stack([o[1] for o in one]).mean(0))
    assert len({o[0].item() for o in one}) == 3

def test_trunk_is_computed_once_for_many_masks(monkeypatch):
    calls, real = [], ControlGenerator.trunk
    monkeypatch.setattr(ControlGenerator, 'trunk', lambda self, *a: (calls.append(1), real(self, *a))[1])
    gen, x = judge(), torch.rand(2, 3, 32, 32)
    n, = draws(gen, x)
    masks = [torch.rand(2, 1, 32, 32) for _ in range(3)]
    got = [judged(gen, n, m) for m in masks]
    assert len(calls) == 1
    for m, v in zip(masks, got):
        whole = gen.eps(n.zt, n.t, gen.condition(m))
        torch.testing.assert_close(v, (whole - n.eps).square().mean((1, 2, 3)))

def test_lower_resolution_judge(dls):
    gen, x = judge(size=16), torch.rand(2, 3, 32, 32)
    v, g = feedback(gen, draws(gen, x), torch.rand(2, 1, 32, 32))
    assert g.shape == (2, 1, 32, 32) and (g != 0).float().mean() > 0.9  # every pixel of the large mask counts
    learn = segment_learner(dls, net(), cbs=[GenerativeFeedbackCB(gen, resize=True)])
    log = fit_steps(learn, 2).history.frame()
    assert (log.L_fb > 0).all()
    with pytest.raises(MedsynError, match='samples 16x16 px, the segmenter gets 32x32'):
        fit_steps(segment_learner(dls, net(), cbs=[GenerativeFeedbackCB(gen)]), 1)

def test_timesteps_and_seeds(pairs):
    gen, x = judge(), torch.rand(64, 3, 32, 32)
    n, = draws(gen, x, t_range=(300, 310))
    assert n.t.min() >= 300 and n.t.max() < 310 and len(set(n.t.tolist())) > 5
    def run(seed):
        learn = segment_learner(batches(pairs), net(), cbs=[GenerativeFeedbackCB(gen, seed=seed)])
        return fit_steps(learn, 2).history.frame().L_fb.tolist()
    assert run(0) == run(0) != run(1)

# The pull -----------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def trained():
    "A generator trained for seconds on lesions with inverted colours; unseen images and their masks."
    with tempfile.TemporaryDirectory() as d:
        pairs = find_pairs(lesion_folder(d, 40, size=32, seed=0))
        for p in pairs:
            im, m = read_pair(p)
            Image.fromarray(np.where(m[..., None] > 0, 255 - im, im)).save(p.image)
        dls = pair_dls(pairs, size=32, bs=8, valid=0.2, seed=0, augment='flip', device='cpu')
        bb = Backbone.tiny(torch.cat([x for x, _ in dls.train])*2 - 1, 32, channels=(32, 64))
        pretrain_backbone(dls, bb, steps=40, lr=2e-3)
        gen = fit_steps(generator_learner('control', dls, bb, lr=2e-3, probe=60), 60).model.eval()
        def joined(batches): return torch.cat([v.as_subclass(torch.Tensor) for v in batches]).float()
        yield gen, *map(joined, zip(*dls.valid, strict=True))

class Free(torch.nn.Module):
    "A segmenter that is nothing but its logits, begun at a mask."
    def __init__(self, mask): super().__init__(); self.logits = torch.nn.Parameter((mask[:, None]*2 - 1)*0.75)
    def forward(self, x): return self.logits

def dice(a, b): return 2*(a*b).sum((1, 2))/(a.sum((1, 2)) + b.sum((1, 2)))

def ended(gen, x, wrong, steps=40):
    "The mask after descent on the feedback alone: the learner's plain loss is 0 and sees no right mask."
    dl = DataLoader(list(zip(x, wrong, strict=True)), bs=len(x), device='cpu')
    def nothing(out, y): return 0*out.sum()
    cbs = [GenerativeFeedbackCB(gen)]
    learn = segment_learner(DataLoaders(dl, dl), Free(wrong), loss=nothing, wd=0, clip=None, cbs=cbs)
    return (fit_steps(learn, steps, 0.2).model.logits[:, 0] > 0).float()

def test_pulls_a_wrong_mask_to_the_right_one(trained):
    gen, x, mask = trained
    wrong = MASKS['shifted'](mask[:, None])[:, 0]
    before, after = dice(wrong, mask), dice(ended(gen, x, wrong), mask)
    assert before.mean() < 0.2 and after.mean() > before.mean() + 0.4, (before, after)
    assert (after > before).float().mean() > 0.8, (before, after)

@pytest.mark.parametrize('kind', KINDS)
def test_an_untrained_judge_does_not(trained, kind):
    "As it is built, nothing moves; with random weights the mask moves, and not to the lesion."
    gen, x, mask = trained
    wrong = MASKS['shifted'](mask[:, None])[:, 0]
    assert torch.equal(ended(METHODS[kind].opens(judge().backbone), x, wrong, 3), wrong)
    moved = ended(judge(kind), x, wrong, 20)
    assert (moved != wrong).any() and dice(moved, mask).mean() < dice(wrong, mask).mean() + 0.2

# Faults -------------------------------------------------------------------------------------------

def test_bad_input(dls):
    gen = judge()
    refused = ((dict(temperature=0), r'temperature 0: choose one in \(0, 1\]'),
               (dict(temperature=1.01), r'temperature 1.01'),
               (dict(t_range=(0, 1001)), 't_range 0, 1001'), (dict(t_range=(500, 500)), 't_range'),
               (dict(every=0), 'every 0'), (dict(n_t=0), 'n_t 0'))
    for kw, said in refused:
        with pytest.raises(MedsynError, match=said): GenerativeFeedbackCB(gen, **kw)
    with pytest.raises(MedsynError, match='Denoiser takes no mask, so it cannot judge one'):
        GenerativeFeedbackCB(Denoiser(gen.backbone))
    class Three(torch.nn.Module):
        def __init__(self): super().__init__(); self.net = torch.nn.Conv2d(3, 3, 1)
        def forward(self, x): return self.net(x.as_subclass(torch.Tensor))
    with pytest.raises(MedsynError, match=r'shape \(4, 3, 32, 32\): \(B,1,H,W\) or \(B,2,H,W\) is needed'):
        cbs = [GenerativeFeedbackCB(gen)]
        fit_steps(segment_learner(dls, Three(), loss=lambda out, y: out.mean(), cbs=cbs), 1)
    twice = [GenerativeFeedbackCB(gen), GenerativeFeedbackCB(gen)]
    with pytest.raises(MedsynError, match='two loss terms'):
        fit_steps(segment_learner(dls, net(), cbs=twice), 1)
