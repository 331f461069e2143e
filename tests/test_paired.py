"""PIG against a naive reference in double precision, against two Gaussian variables, and on the command line.

The reference makes one pair at a time from its own equations: the noised mask and image, the guider's
estimate, the condition, the weighted error. Of the Gaussian variables the joint flow is known.
"""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from learners import check_two_steps, small_loaders
from PIL import Image
from torch import nn

from medsyn.cli import main
from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.diffusion.learner import PairGenerator
from medsyn.diffusion.schedule import Schedule
from medsyn.generate.catalog import load_generator
from medsyn.generate.paired import (
    GuidedNet,
    PairedGenerator,
    PairedProbeCB,
    Pixels,
    denoise_pair,
    paired_learners,
    sample_pairs,
)
from medsyn.synth import synthesize
from medsyn.train import fit_steps

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return lesion_folder(tmp_path_factory.mktemp('paired')/'data', 16, size=32, seed=0)

@pytest.fixture(scope='module')
def dls(folder): return pair_dls(find_pairs(folder), 32, 4, valid=.25, augment=False)

SCALES = {'latents': dict(latent=True, channels=(16, 32), attend=(4,)),
          'pixels': dict(latent=False, channels=(8, 16), layers=1, attend=(16,))}

# A naive reference --------------------------------------------------------------------------------

def five(m):
    "The released threshold of one mask (H,W), pixel by pixel."
    H, W = m.shape
    def mean_around(i, j): return m[max(i - 2, 0):i + 3, max(j - 2, 0):j + 3].mean()
    mean = torch.stack([mean_around(i, j) for i in range(H) for j in range(W)]).reshape(H, W)
    return torch.where(mean > .75*mean.max() + .25*mean.min(), 1., -1.).to(m)

def naive_one(pair, x0, y0, eps_x, eps_y, t, role):
    "The weighted and the plain loss of one pair."
    config, abar, predicts_noise = pair.config, pair.schedule.abar[t], pair.schedule.prediction == 'epsilon'
    a, s = abar.sqrt().to(x0), (1 - abar).sqrt().to(x0)
    xt, yt = a*x0 + s*eps_x, a*y0 + s*eps_y
    def target(z0, eps): return eps if predicts_noise else a*eps - s*z0
    out = pair.guider.net(torch.cat([xt, yt], 1), t).sample
    if role == 'guider':
        plain = ((out - target(x0, eps_x))**2).mean()
        return plain, plain
    codec = pair.codecs[pair.parts[0]]
    estimate = ((xt - s*out)/a if predicts_noise else a*xt - s*out).detach()
    pixels = codec.decode(estimate).clamp(-1, 1)
    if config['binarise'] == 'both': guide = codec.encode(five(pixels[0, 0])[None, None])
    else: guide = dict(x0=codec.encode(pixels), xt=xt, clean=x0, none=0*xt)[config['guide']]
    squared = (pair.generator.net(torch.cat([yt, guide], 1), t).sample - target(y0, eps_y))**2
    weight, k, (H, W) = 1., codec.stride, pixels.shape[2:]
    if config['weight']: weight = (1/(1 + (-pixels).exp())).reshape(1, 1, H//k, k, W//k, k).mean((3, 5))
    return (weight*squared).mean(), squared.mean()

def naive(pair, n, role):
    "The loss of a batch, one pair after the other, and the part of it that is the plain loss."
    losses = []
    for i in range(len(n.t)):
        one = slice(i, i + 1)
        losses.append(naive_one(pair, n.x0[one], n.y0[one], n.eps_x[one], n.eps_y[one], n.t[one], role))
    weighted, plain = (torch.stack(parts).mean() for parts in zip(*losses))
    return weighted, plain

class Compare(Callback):
    "Largest relative difference of losses and gradients to the reference."
    order = 5       # before the gradients are clipped
    def __init__(self): self.off = []
    def before_fit(self): self.learn.diffusion.pair.double()
    def after_backward(self):
        d, n = self.learn.diffusion, self.learn.noised
        net = getattr(d.pair, d.role)
        total, plain = naive(d.pair, n, d.role)
        def off(a, b): return ((a - b).norm()/(b.norm() + 1e-9)).item()     # a key bias has no gradient
        grads = torch.autograd.grad(total, list(net.parameters()))
        self.off += [off(self.learn.loss_grad, total), off(self.learn.loss, plain)]
        self.off += [off(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True)]
        other = d.pair.guider if d.role == 'generator' else d.pair.generator
        assert all(p.grad is None for p in other.parameters())
        t = n.t.tolist()
        assert all(u + v == d.pair.schedule.T - 1 for u, v in zip(t[::2], t[1::2])) and len(set(t)) > 2
        self.learn.loss = self.learn.loss.float()       # fastai averages it in float32

@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('kw', [
    {}, dict(weight=False), dict(binarise='both'), dict(guide='xt'), dict(guide='clean'),
    dict(guide='none', weight=False), dict(first='image')], ids=str)
def test_loss_and_gradients(dls, scale, kw):
    "Every setting, both networks, both scales: the differentiated loss, the plain one and every gradient."
    check = Compare()
    guider, generator = paired_learners(dls, **SCALES[scale], **kw, ema=None, cbs=[check])
    generator.model.trained.add('guider'); generator.remove_cb(PairedProbeCB)
    fit_steps(generator, 1)
    assert len(check.off) > 20 and max(check.off) < 1e-6, max(check.off)
    if kw: return
    check = Compare(); guider.add_cb(check); guider.remove_cb(PairedProbeCB)
    fit_steps(guider, 1)
    assert len(check.off) > 20 and max(check.off) < 1e-6, max(check.off)

def test_the_reference_can_tell(dls):
    "The same comparison fails when the weight that is used is another one."
    check = Compare()
    _, generator = paired_learners(dls, **SCALES['latents'], ema=None, cbs=[check])
    generator.model.trained.add('guider')
    real = PairedGenerator.lesion_weight
    generator.model.lesion_weight = lambda est: real(generator.model, est)**2
    fit_steps(generator, 1)
    assert max(check.off) > 1e-2

# Two training steps, as they were before the code was rewritten -----------------------------------

LATENT = dict(latent=True, channels=(16, 32), attend=(2,))
PIXELS = dict(latent=False, channels=(8, 16), layers=1, attend=(8,))
DIGESTS = {
    'latents': (LATENT, dict(loss=[1.291233897, 1.039509416]), 7773.518253597633,
                dict(loss=[1.05253756, 1.067136765], L_w=[-0.70497793, -0.70869714]), 7800.693682362375),
    'pixels': (PIXELS, dict(loss=[1.066333175, 1.078075528]), 2872.0273703758303,
               dict(loss=[1.120833158, 1.125493646], L_w=[-0.635903895, -0.634740293]), 2868.550566374692),
    'image first': ({**LATENT, 'first': 'image'}, dict(loss=[1.075027585, 1.1624825]), 7798.471430794876,
                    dict(loss=[1.004401326, 1.18212831]), 7777.8892438934)}

@pytest.mark.parametrize('name', DIGESTS)
def test_two_steps(tmp_path, name):
    settings, guider_losses, guider_weights, generator_losses, generator_weights = DIGESTS[name]
    guider, generator = paired_learners(small_loaders(tmp_path), **settings)
    check_two_steps(guider, guider_losses, guider_weights)
    check_two_steps(generator, generator_losses, generator_weights)

def test_a_search_for_the_learning_rate_does_not_train_the_guider(tmp_path):
    "(That fastai's own fits run on both learners is in test_train.)"
    guider, generator = paired_learners(small_loaders(tmp_path/'data'), **LATENT)
    guider.path = tmp_path
    with guider.no_bar(), guider.no_logging(): guider.lr_find(num_it=2, show_plot=False, suggest_funcs=None)
    with pytest.raises(MedsynError, match='the guider is not trained yet'): fit_steps(generator, 1)
    with guider.no_bar(), guider.no_logging(): guider.fit(1)
    fit_steps(generator, 1)

def test_is_a_generator_of_pairs(dls):
    "What synthesis needs of such a generator, under the names of the base class."
    _, generator = paired_learners(dls, **SCALES['latents'])
    pair = generator.model
    assert isinstance(pair, PairGenerator) and (pair.size, pair.steps, pair.grey) == (32, 256, False)
    images, soft = pair.sample_pairs(2, steps=2)
    one_by_one = sample_pairs(pair, [0, 1], steps=2, bs=1)
    for a, b in zip(one_by_one, (images, soft), strict=True): assert np.abs(a - 1.*b).max() <= 1
    mask, done, reason = pair.clean_mask(soft[0])
    assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1} and set(done) == {'parts', 'removed'}
    with pytest.raises(MedsynError, match='do not fit these networks'): pair.check_size(36)

# The joint flow of two Gaussian variables ---------------------------------------------------------

class Best(nn.Module):
    "The best linear network for Gaussian (x0, y0): what it predicts, regressed on what it is shown."
    def __init__(self, sigma, schedule, role, shown):
        super().__init__()
        self.full = torch.block_diag(sigma, torch.eye(2)).double()
        self.schedule, self.role, self.shown = schedule, role, shown
        self.p = nn.Parameter(torch.zeros((), dtype=torch.float64))
    def forward(self, inp, t):
        a, s = (v.reshape(()).double() for v in self.schedule.coefs(t[:1], inp))
        z = torch.cat([a*torch.eye(2), s*torch.eye(2)], 1).double()
        S = z if self.role == 'guider' else torch.stack([z[1], self.shown(self.full, z)])
        wanted = self.full[2 if self.role == 'guider' else 3]
        c = wanted @ S.T @ torch.linalg.pinv(S @ self.full @ S.T, rtol=1e-14)
        return SimpleNamespace(sample=c[0]*inp[:, :1] + c[1]*inp[:, 1:])

def posterior_mean(full, z): return full[:1] @ z.T @ torch.linalg.inv(z @ full @ z.T) @ z

def covariance(sigma, guide='x0', shown=posterior_mean, steps=256, **kw):
    sched = Schedule(1024, 1e-4, 0.02, 'linear')
    shown_ = lambda full, z: shown(full, z).reshape(4)
    nets = [GuidedNet(Best(sigma, sched, role, shown_)) for role in ('guider', 'generator')]
    pair = PairedGenerator(*nets, {'mask': Pixels(1), 'image': Pixels(1)}, sched, guide=guide, clip=False)
    unit = torch.eye(2, dtype=torch.float64).reshape(2, 2, 1, 1, 1)
    M = torch.stack([o.reshape(2) for o in denoise_pair(pair, unit[:, 0], unit[:, 1], steps, **kw)])
    return M @ M.T

@pytest.mark.parametrize('rho, vx, vy', [(.8, 1., 1.), (-.6, 1., .3), (.95, .5, 2.)])
def test_joint_covariance_comes_out(rho, vx, vy):
    sigma = torch.tensor([[vx, rho*(vx*vy)**.5], [rho*(vx*vy)**.5, vy]])
    coarse, fine = ((covariance(sigma, steps=s) - sigma).abs().max() for s in (64, 256))
    assert fine < 0.025*max(vx, vy) and coarse > 3*fine

def test_without_guidance_it_does_not():
    sigma = torch.tensor([[1., .8], [.8, 1.]])
    blind = covariance(sigma, 'none', lambda full, z: 0*z[0])
    assert blind[0, 1] < .5 and abs(blind[1, 1] - 1) < .02      # the image alone is right, the pair is not

def test_a_wrong_guider_shows():
    "Networks made for another covariance give that one: the sampler does not know the answer."
    sigma, other = (torch.tensor([[1., r], [r, 1.]]) for r in (.8, .2))
    assert abs(covariance(other)[0, 1] - .2) < .02 < abs(covariance(sigma)[0, 1] - .2)

# From end to end ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def made(folder, tmp_path_factory):
    "A pair trained for two steps on the command line, without a backbone."
    d = tmp_path_factory.mktemp('cli')
    options = ['--method', 'paired', '--size', '32', '--steps', '2', '--bs', '4']
    assert main(['train', str(folder), '--out', str(d/'gen'), *options]) == 0
    return d

class Ragged(PairedGenerator):
    "Masks that a threshold can work on after two steps of training: some of them empty."
    def sample_pairs(self, seeds, *args, **kw):
        x, soft = super().sample_pairs(seeds, *args, **kw)
        empty = np.array([4.*(s % 3 == 0) for s in seeds])[:, None, None]
        return x, soft - soft.mean((1, 2), keepdims=True) - empty

def test_command_line(made, folder, capsys):
    assert json.loads((made/'gen'/'generator.json').read_text())['class'] == 'PairedGenerator'
    log = pd.read_csv(made/'gen'/'log.csv')
    assert log.groupby('network').step.max().to_dict() == dict(guider=2, generator=2)
    assert log[log.network == 'generator'].L_w.notna().all()
    assert set(pd.read_csv(made/'gen'/'probe.csv').network) == {'guider', 'generator'}
    capsys.readouterr()
    options = ['-n', '3', '--steps', '2', '--bs', '4', '--tries', '20']
    status = main(['synth', str(made/'gen'), '--out', str(made/'syn'), *options])
    out, err = capsys.readouterr()
    rows = [json.loads(l) for l in (made/'syn'/'manifest.jsonl').read_text().splitlines()]
    assert all(('file' in r) != ('dropped' in r) for r in rows)
    assert {'seed', 'steps', 'guide', 'binarise', 'generator', 'versions', 'tidied'} <= set(rows[0])
    if status == 0: assert sum('file' in r for r in rows) == len(find_pairs(made/'syn')) == 3
    else:
        assert 'empty or full masks' in err and {r['dropped'] for r in rows} <= {'empty mask', 'full mask'}

@pytest.mark.parametrize('argv, words', [
    (('train', '{f}', '--out', '{t}', '--method', 'control'), "'control' stands on a pretrained backbone"),
    (('train', '{f}', '--out', '{t}', '--method', 'paired', '--size', '40'), 'images of 40 px do not fit'),
    (('synth', '{d}/gen', '--out', '{t}', '--masks', 'real'), 'draws its own masks'),
    (('synth', '{d}/gen', '--out', '{t}', '--guidance', '2'), 'draws its own masks'),
    (('synth', '{d}/gen', '--out', '{t}', '--sampler', 'dpm'), "did you mean 'dpm++'"),
    (('synth', '{d}/gen', '--out', '{t}', '--size', '36'), 'do not fit these networks')])
def test_refusals(made, folder, tmp_path, capsys, argv, words):
    capsys.readouterr()
    assert main([a.format(f=folder, d=made, t=tmp_path/'out') for a in argv]) == 2
    assert words in capsys.readouterr().err and not (tmp_path/'out').exists()

def test_interrupted_synthesis_goes_on(made, tmp_path):
    gen = load_generator(made/'gen'); gen.__class__ = Ragged
    kw = dict(n=5, steps=2, bs=4)
    synthesize(gen, None, tmp_path/'a', **kw)
    tree = lambda p: {str(f.relative_to(p)): f.read_bytes() for f in sorted(p.rglob('*')) if f.is_file()}
    lines = (tmp_path/'a'/'manifest.jsonl').read_text().splitlines(keepends=True)
    assert any('"dropped": "empty mask"' in l for l in lines)
    for k in range(len(lines)):
        shutil.rmtree(tmp_path/'b', ignore_errors=True)
        shutil.copytree(tmp_path/'a', tmp_path/'b')
        (tmp_path/'b'/'manifest.jsonl').write_text(''.join(lines[:k]) + lines[k][:20])
        synthesize(gen, None, tmp_path/'b', **kw)
        assert tree(tmp_path/'a') == tree(tmp_path/'b')
    other = synthesize(gen, None, tmp_path/'c', n=5, steps=2, bs=3)
    for p in other:
        x, y = (np.asarray(Image.open(tmp_path/q/'images'/p.image.name)).astype(int) for q in 'ac')
        assert np.abs(x - y).max() <= 1

def test_damaged_or_foreign_folder(made, tmp_path):
    shutil.copytree(made/'gen', tmp_path/'g')
    f = tmp_path/'g'/'guider'/'diffusion_pytorch_model.safetensors'; f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(MedsynError, match='cannot open the guider'): load_generator(tmp_path/'g')
    conf = json.loads((tmp_path/'g'/'generator.json').read_text()); conf['class'] = 'ControlGenerator'
    (tmp_path/'g'/'generator.json').write_text(json.dumps(conf))
    with pytest.raises(MedsynError, match='holds a ControlGenerator'):
        PairedGenerator.from_pretrained(tmp_path/'g')

def test_saved_and_opened(made, tmp_path):
    a = load_generator(made/'gen'); b = PairedGenerator.from_pretrained(a.save_pretrained(tmp_path/'g'))
    for u, v in zip(sample_pairs(a, 3, steps=3), sample_pairs(b, 3, steps=3)): assert (u == v).all()
