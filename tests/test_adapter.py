"T2I-Adapter: limit cases, diffusers as the oracle, what is trained, and the way to disk and back."
import copy

import pytest
import torch
from learners import small_backbone, small_loaders

from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone, random_stable_diffusion
from medsyn.diffusion.learner import Cond, Denoiser
from medsyn.diffusion.sample import defaults_of, sample
from medsyn.generate.adapter import AdapterGenerator, CubicTimeCB, adapter_learner, cubic_times
from medsyn.generate.catalog import generator_learner, load_generator
from medsyn.segment.feedback import feedback, noised_images
from medsyn.train import fit_steps


@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('pairs')

@pytest.fixture
def dls(folder): return small_loaders(folder)

@pytest.fixture(scope='module')
def backbone(): return small_backbone()

@pytest.fixture(scope='module')
def masks():
    torch.manual_seed(0)
    return torch.rand(4, 1, 16, 16).round()

@pytest.fixture(scope='module')
def inputs():
    torch.manual_seed(1)
    return torch.randn(4, 8, 4, 4), torch.tensor([0, 300, 600, 999])

@pytest.fixture(scope='module')
def trained(folder, backbone): return fit_steps(adapter_learner(small_loaders(folder), backbone, seed=0), 3)

@torch.no_grad()
def test_without_weight_or_mask_it_is_the_backbone(backbone, masks, inputs):
    gen = AdapterGenerator(backbone)
    cond = gen.condition(masks)
    plain = Denoiser(backbone)(*inputs, cond)
    assert (gen(*inputs, cond) - plain).abs().max() > 1e-3
    assert torch.allclose(gen(*inputs, cond.without_mask()), plain, atol=1e-6)
    assert torch.allclose(AdapterGenerator(backbone, weight=0.)(*inputs, cond), plain, atol=1e-6)
    zeroed = copy.deepcopy(gen)
    for p in zeroed.adapter.parameters(): p.zero_()
    assert torch.allclose(zeroed(*inputs, cond), plain, atol=1e-6)

@torch.no_grad()
def test_only_the_samples_without_mask_lose_their_features(backbone, masks, inputs):
    gen = AdapterGenerator(backbone)
    cond = gen.condition(masks)
    cond.has_mask = torch.tensor([1., 0., 1., 0.])
    mixed, all_given = gen(*inputs, cond), gen(*inputs, gen.condition(masks))
    plain = Denoiser(backbone)(*inputs, cond)
    assert torch.allclose(mixed[::2], all_given[::2], atol=1e-6)
    assert torch.allclose(mixed[1::2], plain[1::2], atol=1e-6)

@pytest.fixture(scope='module')
def stable(tmp_path_factory):
    path = random_stable_diffusion(tmp_path_factory.mktemp('sd'), width=16)
    return Backbone.from_pretrained(path, size=64)

@torch.no_grad()
def test_diffusers_gives_the_same_on_stable_diffusion(stable):
    gen = AdapterGenerator(stable).eval()
    torch.manual_seed(0)
    zt, t = torch.randn(2, 4, 8, 8), torch.tensor([20, 900])
    cond = gen.condition(torch.rand(2, 1, 64, 64).round())
    features = gen.features(cond)
    assert [tuple(f.shape[1:]) for f in features] == [(16, 8, 8), (32, 4, 4), (64, 2, 2), (64, 1, 1)]
    oracle = stable.unet(zt, t, cond.text, down_intrablock_additional_residuals=features).sample
    assert torch.allclose(gen(zt, t, cond), oracle, atol=1e-5)
    assert defaults_of(gen) == (7.5, 'prompt')

def test_stable_diffusion_is_trained_sampled_and_opened(stable, tmp_path):
    pairs = find_pairs(lesion_folder(tmp_path/'pairs', 8, size=64))
    dls = pair_dls(pairs, size=64, bs=2, valid=2/8, seed=0, augment=False, device='cpu')
    gen, masks = fit_steps(adapter_learner(dls, stable, probe=9), 1).model.eval(), torch.ones(1, 1, 64, 64)
    assert gen.backbone is stable
    gen.save_pretrained(tmp_path/'gen')
    drawn = sample(gen, masks, steps=2, guidance=1)
    assert (sample(load_generator(tmp_path/'gen'), masks, steps=2, guidance=1) == drawn).all()

def test_cubic_times():
    "Their distribution function is known: P(t <= T x) = 1 - (1 - x)^(1/3)."
    t = cubic_times(torch.arange(1000), 1000)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() == 999
    for x in (.25, .5, .9):
        share = (t < 1000*x).double().mean().item()
        assert share == pytest.approx(1 - (1 - x)**(1/3), abs=2e-3)

def test_cubic_times_in_training(dls, backbone, trained):
    "Same image, noise and random stream; another timestep and what follows from it."
    n, schedule = trained.noised, backbone.schedule
    uniform = fit_steps(adapter_learner(dls, backbone, seed=0, cubic=False), 3).noised
    assert torch.equal(n.eps, uniform.eps) and torch.equal(n.t, cubic_times(uniform.t, schedule.T))
    assert not torch.equal(n.t, uniform.t) and torch.equal(n.zt, schedule.noise(n.z0, n.eps, n.t))
    assert torch.equal(n.target, schedule.target(n.z0, n.eps, n.t))
    assert any(isinstance(c, CubicTimeCB) for c in trained.cbs)

def test_only_the_adapter_is_trained(dls, backbone, inputs, masks):
    frozen = {k: v.clone() for k, v in backbone.state_dict().items()}
    learn = adapter_learner(dls, backbone, seed=0, ema=None)
    before = {k: v.clone() for k, v in learn.model.adapter.state_dict().items()}
    fit_steps(learn, 2)
    after = learn.model.adapter.state_dict()
    assert all((after[k] != v).any() for k, v in before.items())
    assert all(torch.equal(v, frozen[k]) for k, v in backbone.state_dict().items())
    assert all(p.grad is None for p in backbone.parameters())

def test_saved_and_opened(trained, masks, inputs, tmp_path):
    gen = trained.model.eval()
    gen.config['weight'] = .5
    gen.save_pretrained(tmp_path)
    back = load_generator(tmp_path)
    gen_cond = gen.condition(masks)
    with torch.no_grad(): assert torch.equal(back(*inputs, gen_cond), gen(*inputs, gen_cond))
    assert type(back) is AdapterGenerator and back.config == gen.config
    for name, v in gen.state_dict().items(): assert torch.equal(v, back.state_dict()[name]), name
    assert (sample(gen, masks, steps=2, seeds=3) == sample(back, masks, steps=2, seeds=3)).all()
    gen.config['weight'] = 1.

GUIDANCE = [dict(guidance=1), dict(guidance=2., guide='mask'), dict(guidance=2., guide='prompt')]

@pytest.mark.parametrize('kw', GUIDANCE, ids=str)
def test_sampling_runs_the_adapter_once(backbone, masks, monkeypatch, kw):
    "Once a batch, whatever the number of steps; the images are those of an adapter that runs in every step."
    gen, calls = AdapterGenerator(backbone).eval(), []
    forward = type(gen.adapter).forward
    def counted(self, x):
        calls.append(len(x))
        return forward(self, x)
    monkeypatch.setattr(type(gen.adapter), 'forward', counted)
    images = sample(gen, masks, steps=3, bs=2, **kw)
    assert len(calls) == 2
    gen.steady_parts = list
    assert (sample(gen, masks, steps=3, bs=2, **kw) == images).all()
    assert len(calls) == 2 + 2*3

def test_it_judges_a_segmenter(trained, masks):
    "As an arm it gives feedback: a gradient for the mask, none for its weights."
    gen = trained.model.eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    draws = noised_images(gen, torch.rand(4, 3, 16, 16), rng, (200, 800), 1, None)
    value, grad = feedback(gen, draws, masks)
    assert value > 0 and grad.shape == masks.shape and grad.abs().max() > 0
    assert all(p.grad is None for p in gen.backbone.parameters())
    trained.model.freeze_rest()

def test_bad_input(dls, backbone, inputs):
    with pytest.raises(MedsynError, match='give 0 or more'): AdapterGenerator(backbone, weight=-1)
    with pytest.raises(MedsynError, match='give at least 1'): AdapterGenerator(backbone, res_blocks=0)
    gen = AdapterGenerator(backbone)
    with pytest.raises(MedsynError, match='pass masks'): gen(*inputs, Cond(text=backbone.text(['']*4)))
    with pytest.raises(MedsynError, match="did you mean 'weight'"):
        generator_learner('adapter', dls, backbone, wieght=1.)
    with pytest.raises(MedsynError, match='stands on a pretrained backbone'):
        generator_learner('adapter', dls, None)
