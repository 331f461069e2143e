"AnomalyDiffusion: no anomaly is the backbone, no re-weighting is plain attention, only tokens are trained."
import copy

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from learners import small_backbone, small_loaders

from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone, random_stable_diffusion
from medsyn.diffusion.learner import Cond, Denoiser
from medsyn.diffusion.sample import sample
from medsyn.generate.anomaly import (AnomalyEmbedding, AnomalyGenerator, NormalCond, SpatialEncoder,
                                     anomaly_learner, difference_weights, reweighted, with_normal)
from medsyn.generate.catalog import METHODS, generator_learner, load_generator
from medsyn.segment.feedback import feedback, noised_images
from medsyn.train import fit_steps

SMALL = dict(encoder='resnet10t', seed=0)

class KeepPred(Callback):
    "Keeps the network's answer, which fastai forgets after a fit."
    def after_pred(self): self.learn.kept = self.pred.detach()

@pytest.fixture(scope='module')
def dls(tmp_path_factory): return small_loaders(tmp_path_factory.mktemp('pairs'))

@pytest.fixture(scope='module')
def backbone(): return small_backbone()

@pytest.fixture(scope='module')
def masks():
    masks = torch.zeros(4, 1, 16, 16)
    for i in range(4): masks[i, :, 3*i:3*i + 6, 4:12] = 1
    return masks

@pytest.fixture(scope='module')
def inputs():
    torch.manual_seed(1)
    return torch.randn(4, 8, 4, 4), torch.tensor([0, 300, 600, 999])

@pytest.fixture(scope='module')
def trained(dls, backbone):
    return fit_steps(anomaly_learner(dls, backbone, ema=None, cbs=[KeepPred()], **SMALL), 3)

@pytest.fixture(scope='module')
def gen(trained): return copy.deepcopy(trained.model).eval().requires_grad_(False)

# The embedding ------------------------------------------------------------------------------------

def test_the_tokens(masks):
    torch.manual_seed(0)
    embedding = AnomalyEmbedding(24, tokens=5, encoder='resnet10t')
    e = embedding(masks)
    assert e.shape == (4, 9, 24)
    assert torch.equal(e[:, :5], embedding.anomaly.expand(4, -1, -1))           # appearance: the same for all
    assert all((e[0, 5:] != e[i, 5:]).any() for i in (1, 2, 3))                 # place: the mask's own
    alone = torch.cat([embedding(m[None]) for m in masks])
    assert torch.allclose(alone, e, atol=1e-5)              # whatever else is in the batch
    e.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in embedding.parameters())

@pytest.mark.parametrize('size', [16, 64, 96])
def test_any_size_of_mask(size):
    assert SpatialEncoder(8, 'resnet10t')(torch.zeros(1, 1, size, size)).shape == (1, 4, 8)

# Re-weighting -------------------------------------------------------------------------------------

def test_difference_weights():
    "Against the formula written as a loop over pixels."
    torch.manual_seed(0)
    mask = torch.zeros(3, 1, 4, 4); mask[0, 0, 1:3, 1:3] = 1; mask[1, 0, :, 0] = 1         # the last is empty
    estimate, normal = torch.randn(3, 8, 4, 4), torch.randn(3, 8, 4, 4)
    wide = difference_weights(mask, estimate, normal, limit=100.)
    soft = difference_weights(mask, estimate, normal, softmax=True)
    for i in (0, 1):
        inside = [(y, x) for y in range(4) for x in range(4) if mask[i, 0, y, x]]
        d = [((estimate - normal)[i, :, y, x]**2).mean() for y, x in inside]
        total, peaks = sum(1/v for v in d), torch.stack([1/v for v in d]).softmax(0)
        for (y, x), v, p in zip(inside, d, peaks, strict=True):
            assert wide[i, 0, y, x].item() == pytest.approx(max(1, (len(d)/v/total).item()), rel=1e-4)
            assert soft[i, 0, y, x].item() == pytest.approx((len(d)*p).item(), rel=1e-4)
    narrow = difference_weights(mask, estimate, normal)
    assert narrow.min() >= 1 and narrow.max() <= 1.5
    for w in (wide, soft, narrow):
        assert (w[mask == 0] == 1).all() and torch.equal(w[2], torch.ones(1, 4, 4))
    same = difference_weights(mask, normal, normal)                 # no difference anywhere: all alike
    assert torch.allclose(same, torch.ones_like(same))

@torch.no_grad()
def test_reweighted_attention(backbone, inputs):
    "Weights of 1 are plain attention; a weight multiplies what attention reads, before its projection."
    unet, text = backbone.unet, backbone.text([backbone.prompt]*4)
    plain = unet(*inputs, text).sample
    with reweighted(unet, torch.ones(4, 1, 4, 4)): assert torch.equal(unet(*inputs, text).sample, plain)
    attention = next(m for name, m in unet.named_modules() if name.endswith('attn2'))
    queries = torch.randn(4, 4, attention.to_q.in_features)          # 2x2 pixels
    out, bias = attention(queries, text), attention.to_out[0].bias
    with reweighted(unet, torch.full((4, 1, 4, 4), 3.)): tripled = attention(queries, text)
    assert torch.allclose(tripled - bias, 3*(out - bias), atol=1e-5)
    assert torch.equal(unet(*inputs, text).sample, plain)           # outside, nothing is changed

def test_hooks_go_when_something_fails(backbone):
    with pytest.raises(ZeroDivisionError):
        with reweighted(backbone.unet, torch.ones(1, 1, 4, 4)): raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in backbone.unet.modules())

@torch.no_grad()
def test_off_is_plain_attention(gen, masks, inputs):
    cond, normal = gen.condition(masks), torch.randn(4, 8, 4, 4)
    region = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    kept = gen.with_kept(cond, normal, region)
    assert isinstance(kept, NormalCond) and torch.equal(kept.normal, normal)
    assert (gen(*inputs, kept) != gen(*inputs, cond)).any()
    gen.config['reweight'] = False
    assert gen.with_kept(cond, normal, region) is cond
    gen.config['reweight'] = True

@torch.no_grad()
def test_a_lesion_that_is_kept_takes_no_weight(gen, inputs, monkeypatch):
    "Two lesions, one kept in the image and already equal to it: the weights go to the new one."
    import medsyn.generate.anomaly as module
    seen = []
    def spy(unet, weights):
        seen.append(weights)
        return reweighted(unet, weights)
    monkeypatch.setattr(module, 'reweighted', spy)
    monkeypatch.setitem(gen.config, 'softmax', True)
    both = torch.zeros(4, 1, 16, 16)
    both[..., :4] = both[..., 12:] = 1
    region = torch.zeros(4, 1, 4, 4, dtype=torch.bool)
    region[..., :3] = True                                          # the left one is kept
    gen(*inputs, gen.with_kept(gen.condition(both), torch.randn(4, 8, 4, 4), region))
    assert (seen[0][..., :3] == 1).all()
    assert seen[0][..., 3].mean() == pytest.approx(1) and seen[0][..., 3].std() > .1

def test_the_sound_image_goes_where_the_condition_goes(masks):
    number = torch.arange(4.).reshape(4, 1, 1, 1)
    cond = with_normal(Cond(masks, torch.randn(4, 2, 8)), number, number/4)
    both = cond.without_mask().cat(cond)
    assert type(both) is NormalCond and both.normal.flatten().tolist() == [0, 1, 2, 3]*2
    assert both.fresh.flatten().tolist() == [0, .25, .5, .75]*2
    assert both.has_mask.tolist() == [0]*4 + [1]*4
    assert cond[1:3].normal.flatten().tolist() == [1, 2]

# The generator ------------------------------------------------------------------------------------

@torch.no_grad()
def test_without_an_anomaly_it_is_the_backbone(gen, backbone, masks, inputs):
    cond = gen.condition(masks)
    plain = Denoiser(backbone).eval()(*inputs, cond)
    for absent in (cond.without_mask(), gen.condition(masks*0)):
        assert torch.allclose(gen(*inputs, absent), plain, atol=1e-5)
    assert (gen(*inputs, cond) - plain).abs().max() > 1e-4
    some = gen.condition(masks)
    some.has_mask = torch.tensor([1., 0., 1., 0.])
    assert torch.allclose(gen(*inputs, some)[1::2], plain[1::2], atol=1e-5)
    assert torch.allclose(gen(*inputs, some)[::2], gen(*inputs, cond)[::2], atol=1e-5)

def test_only_the_tokens_are_trained(dls):
    backbone = small_backbone()
    frozen = {k: v.clone() for k, v in backbone.state_dict().items()}
    learn = anomaly_learner(dls, backbone, ema=None, **SMALL)
    before = {k: v.clone() for k, v in learn.model.embedding.state_dict().items()}
    fit_steps(learn, 2)
    after = learn.model.embedding.state_dict()
    assert all((after[k] != v).any() for k, v in before.items())
    assert all(torch.equal(v, frozen[k]) for k, v in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())

def test_the_loss_counts_inside_the_mask(trained):
    n, log = trained.noised, trained.history.frame()
    weights = torch.nn.functional.avg_pool2d(n.mask, 4)
    direct = (weights*(trained.kept - n.target)**2).mean().item()
    assert (log.loss + log.L_masked).iloc[-1] == pytest.approx(direct, rel=1e-4)

def test_batches_without_a_lesion_change_nothing(dls, backbone):
    "There is no anomaly to learn, and nothing breaks."
    class NoLesion(Callback):
        order = -10
        def before_batch(self): self.learn.yb = (self.yb[0]*0,)
    learn = anomaly_learner(dls, backbone, ema=None, wd=0., cbs=[NoLesion()], **SMALL)
    before = [p.clone() for p in learn.model.embedding.parameters()]
    fit_steps(learn, 2)
    assert all(torch.equal(a, b) for a, b in zip(before, learn.model.embedding.parameters(), strict=True))

def test_saved_opened_sampled(gen, masks, inputs, tmp_path):
    gen.save_pretrained(tmp_path)
    back = load_generator(tmp_path)
    assert type(back) is AnomalyGenerator and back.config == gen.config
    for name, v in gen.state_dict().items(): assert torch.equal(v, back.state_dict()[name]), name
    cond = gen.condition(masks)
    with torch.no_grad(): assert torch.equal(back(*inputs, cond), gen(*inputs, cond))
    images = torch.rand(4, 3, 16, 16)*2 - 1
    inside = dict(init=images, keep=1 - masks, steps=3, seeds=2)
    drawn = sample(gen, masks, **inside)
    assert (sample(back, masks, **inside) == drawn).all()
    one_by_one = sample(gen, masks, bs=1, **inside)
    assert abs(one_by_one.astype(int) - drawn).max() <= 1
    back.config['reweight'] = False
    assert (sample(back, masks, **inside) != drawn).any()
    assert (sample(back, masks, steps=3) == sample(gen, masks, steps=3)).all()  # no image, no weights

def test_it_judges_a_segmenter(gen, masks):
    rng = torch.Generator().manual_seed(0)
    draws = noised_images(gen, torch.rand(4, 3, 16, 16), rng, (200, 800), 1, None)
    value, grad = feedback(gen, draws, masks*.8 + .1)
    assert value > 0 and grad.abs().max() > 0

def test_on_stable_diffusion(tmp_path):
    stable = Backbone.from_pretrained(random_stable_diffusion(tmp_path/'sd', width=16), size=64)
    gen = AnomalyGenerator(stable, encoder='resnet10t').eval()
    assert gen.prompt_of(gen.condition(torch.ones(1, 1, 64, 64)))[0].shape == (1, 77 + 12, 32)
    gen.save_pretrained(tmp_path/'gen')
    mask = torch.zeros(1, 1, 64, 64); mask[..., 16:48, 16:48] = 1
    inside = dict(init=torch.zeros(1, 3, 64, 64), keep=1 - mask, steps=2)
    assert (sample(load_generator(tmp_path/'gen'), mask, **inside) == sample(gen, mask, **inside)).all()

def test_the_rate_suits_tokens_that_start_small(dls, backbone, tmp_path):
    stable = Backbone.from_pretrained(random_stable_diffusion(tmp_path/'sd', width=16), size=64)
    large = pair_dls(find_pairs(lesion_folder(tmp_path/'d', 8, size=64, seed=0)), 64, 4, device='cpu')
    def rate(*args, **kw): return np.max(generator_learner(*args, **kw).lr)
    assert rate('anomaly', large, stable, encoder='resnet10t') == 5e-3
    assert rate('anomaly', dls, backbone, encoder='resnet10t') == 5e-4
    assert rate('unconditional', large, stable, scratch=True) == 1e-4
    assert rate('unconditional', large, stable) == METHODS['control'].lr == 1e-5

def test_bad_input(dls, backbone, inputs):
    with pytest.raises(MedsynError, match='no cross-attention'):
        AnomalyGenerator(Backbone.pixels(16, (16, 32)))
    with pytest.raises(MedsynError, match="did you mean 'resnet18'"): AnomalyEmbedding(8, encoder='resnet81')
    with pytest.raises(MedsynError, match='give at least 1'): AnomalyEmbedding(8, tokens=0)
    with pytest.raises(MedsynError, match='pass masks'):
        AnomalyGenerator(backbone, encoder='resnet10t')(*inputs, Cond(text=backbone.text(['']*4)))
    with pytest.raises(MedsynError, match='reweight=False leaves out'):
        AnomalyGenerator(backbone, encoder='resnet10t', reweight=False, limit=3.)
    with pytest.raises(MedsynError, match="did you mean 'tokens'"):
        generator_learner('anomaly', dls, backbone, token=3)
