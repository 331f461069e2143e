"Distances between image sets against torchmetrics, scipy and sums; extractors, the cache, bad input."
import json
import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy import linalg
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from medsyn.core import MedsynError
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import find_pairs
from medsyn.evaluate.fidelity import (
    InceptionFID, as_extractor, clip_extractor, cmmd, extract, fidelity, frechet_distance,
    image_list, inception_extractor, inception_score, kernel_distance, lpips, lpips_network)

pytestmark = pytest.mark.filterwarnings('ignore:Metric .* will save all extracted features:UserWarning')


class AsIs(nn.Identity):
    def __init__(self, d): super().__init__(); self.num_features = d


def sets(n, m, d, seed=0):
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(d, d, generator=g, dtype=torch.float64)/math.sqrt(d)
    a = torch.randn(n, d, generator=g, dtype=torch.float64) @ w
    return a, .3 + 1.5*torch.randn(m, d, generator=g, dtype=torch.float64)


@pytest.mark.parametrize('n,m,d', [(500, 300, 16), (60, 500, 32), (33, 32, 32), (20, 25, 64), (2, 3, 40)])
def test_frechet_distance(n, m, d):
    a, b = sets(n, m, d)
    ours = frechet_distance(a, b)
    fid = FrechetInceptionDistance(feature=AsIs(d)); fid.update(a, real=True); fid.update(b, real=False)
    assert ours == pytest.approx(float(fid.compute()), rel=1e-5)
    root = linalg.sqrtm(np.cov(a.numpy().T) @ np.cov(b.numpy().T))
    spread = np.trace(np.cov(a.numpy().T) + np.cov(b.numpy().T) - 2*np.real(root))
    want = float((a.mean(0) - b.mean(0)).square().sum()) + spread
    assert ours == pytest.approx(want, rel=1e-4)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-7)
    assert ours == pytest.approx(frechet_distance(b, a))


@pytest.mark.parametrize('subset', [10, 40, 1000])
def test_kernel_distance(subset):
    a, b = sets(70, 55, 12)
    kid = KernelInceptionDistance(feature=AsIs(12), subset_size=min(subset, 55), subsets=20)
    kid.update(a, real=True); kid.update(b, real=False)
    torch.manual_seed(9)
    want = [float(v) for v in kid.compute()]
    assert kernel_distance(a, b, subset, 20, seed=9) == pytest.approx(want, rel=1e-9)


def test_kernel_distance_is_unbiased():
    pairs = [torch.randn(2, 15, 20, generator=torch.Generator().manual_seed(s)) for s in range(300)]
    d = [kernel_distance(a, b)[0] for a, b in pairs]
    assert abs(np.mean(d)) < 4*np.std(d)/math.sqrt(300)


def test_cmmd_against_kernel_sums():
    a, b = sets(17, 23, 8)
    u, v = (x/x.norm(dim=1, keepdim=True) for x in (a, b))
    k = lambda x, y: np.mean([[math.exp(-float((p - q).square().sum())/200) for q in y] for p in x])
    assert cmmd(a, b) == pytest.approx(1000*(k(u, u) + k(v, v) - 2*k(u, v)), rel=1e-7)
    assert cmmd(a, b) == pytest.approx(cmmd(3*a, b)) and cmmd(a, a) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize('splits', [1, 4, 10])
def test_inception_score(splits):
    l = 2*torch.randn(50, 9, dtype=torch.float64)
    m = InceptionScore(feature=AsIs(9), splits=splits); m.update(l)
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        mean, std = m.compute()
    got = inception_score(l, splits, seed=2)
    assert got[0] == pytest.approx(float(mean))
    assert splits == 1 and math.isnan(got[1]) or got[1] == pytest.approx(float(std))


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "FID's Inception with random weights and statistics, as a file."
    torch.manual_seed(0)
    net = InceptionFID().net
    state = {k: torch.rand_like(v) + .5 if 'running_var' in k else v for k, v in net.state_dict().items()}
    f = tmp_path_factory.mktemp('w')/'inception.safetensors'
    save_file(state, f)
    return f


def test_inception_equals_torch_fidelity(weights, tmp_path):
    pytest.importorskip('torch_fidelity', reason='torch-fidelity, the oracle, is not installed')
    from safetensors.torch import load_file
    from torchmetrics.image.fid import NoTrainInceptionV3
    torch.save(load_file(weights), tmp_path/'w.pth')
    theirs = NoTrainInceptionV3('inception-v3-compat', ['2048', 'logits_unbiased'], str(tmp_path/'w.pth'))
    x = np.random.default_rng(0).integers(0, 256, (3, 80, 64, 3), dtype=np.uint8)
    ours = inception_extractor(weights)(list(x))
    with torch.no_grad(): f, l = theirs._torch_fidelity_forward(torch.from_numpy(x).permute(0, 3, 1, 2))
    assert torch.allclose(ours['features'], f, rtol=1e-3, atol=1e-4*float(f.abs().max()))
    assert torch.allclose(ours['logits'], l, rtol=1e-3, atol=1e-4*float(l.abs().max()))
    assert f.std(0).max() > 0


def test_inception_against_its_own_average_pools(weights):
    "Every average pool of the network leaves out the padding: seen by computing one block by hand."
    net = inception_extractor(weights).net.net
    x = torch.rand(1, 192, 35, 35)
    got = net.Mixed_5b(x)[:, -32:]
    want = net.Mixed_5b.branch_pool
    pooled = nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    with torch.no_grad(): want = torch.relu(want.bn(want.conv(pooled)))
    assert torch.allclose(got, want, atol=1e-5)


def test_one_pass_equals_the_classes_of_torchmetrics(weights):
    "FID, KID and IS from one extraction are what torchmetrics computes by running the network three times."
    real, fake = (draw_lesions(8, size=64, seed=s)[0] for s in (1, 2))
    ex = inception_extractor(weights)
    class Run(nn.Module):
        num_features = 2048
        def __init__(self, what): super().__init__(); self.what = what
        def forward(self, x): return ex(list(x.permute(0, 2, 3, 1).numpy()))[self.what]
    r, f = (torch.from_numpy(x).permute(0, 3, 1, 2) for x in (real, fake))
    fid = FrechetInceptionDistance(feature=Run('features'))
    kid = KernelInceptionDistance(feature=Run('features'), subset_size=8)
    isc = InceptionScore(feature=Run('logits'), splits=4)
    for m in (fid, kid): m.update(r, real=True); m.update(f, real=False)
    isc.update(f)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        t = fidelity(real, fake, ex, device='cpu').set_index('metric').value
    assert t['FID'] == pytest.approx(float(fid.compute()), rel=1e-3)
    assert t['KID'] == pytest.approx(float(kid.compute()[0]), rel=1e-3, abs=1e-6)
    torch.manual_seed(0)
    assert t['IS'] == pytest.approx(float(isc.compute()[0]), rel=1e-3)


def test_weights_that_do_not_fit(tmp_path, weights, trusts_pickles):
    save_file({'conv1.weight': torch.zeros(3)}, tmp_path/'a.safetensors')
    with pytest.raises(MedsynError, match="a.safetensors does not fit FID's Inception"):
        as_extractor(tmp_path/'a.safetensors')
    import torchvision
    imagenet = torchvision.models.inception_v3(weights=None, init_weights=False)
    save_file(imagenet.state_dict(), tmp_path/'tv.safetensors')
    with pytest.raises(MedsynError, match="torchvision's ImageNet Inception"):
        as_extractor(tmp_path/'tv.safetensors')
    (tmp_path/'b.pth').write_bytes(b'hello')
    with pytest.raises(MedsynError, match='b.pth is not a plain PyTorch state dict'):
        as_extractor(tmp_path/'b.pth')
    save_file({'features.0.weight': torch.zeros(3)}, tmp_path/'c.safetensors')
    with pytest.raises(MedsynError, match='c.safetensors does not fit the alex backbone'):
        lpips_network(tmp_path/'c.safetensors')


@pytest.fixture(scope='module')
def clip(tmp_path_factory):
    "A tiny CLIP with random weights in transformers' layout."
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    torch.manual_seed(0)
    small = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=1, num_attention_heads=2)
    d = tmp_path_factory.mktemp('clip')/'tiny'
    text, vision = dict(**small, vocab_size=50), dict(**small, image_size=24, patch_size=8)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).save_pretrained(d)
    CLIPImageProcessor().save_pretrained(d)
    return d


def test_clip_rows(clip):
    real, fake = (draw_lesions(5, size=40, seed=s)[0] for s in (1, 2))
    t = fidelity(real, fake, clip, device='cpu').set_index('metric')
    assert list(t.index) == ['CMMD', 'CLIP-I']
    assert 'all against all' in t.note['CLIP-I']
    assert 'clip tiny' in t.extractor['CMMD']
    a, b = (extract(x, clip, device='cpu')['features'].double() for x in (real, fake))
    a, b = (nn.functional.normalize(x, dim=1) for x in (a, b))
    assert t.value['CLIP-I'] == pytest.approx(float((a @ b.T).mean()), abs=1e-6)
    m = fidelity(real, fake, clip, match=[4, 3, 2, 1, 0], device='cpu').set_index('metric')
    assert m.value['CLIP-I'] == pytest.approx(float((a.flip(0)*b).sum(1).mean()), abs=1e-6)
    assert 'matched' in m.note['CLIP-I']


def test_clip_refusals(clip, tmp_path):
    with pytest.raises(MedsynError, match='cannot open a CLIP from the folder'): clip_extractor(tmp_path)
    config = json.loads((clip/'config.json').read_text())
    (tmp_path/'cut').mkdir(); (tmp_path/'cut'/'config.json').write_text(json.dumps(config))
    save_file({'logit_scale': torch.zeros(())}, tmp_path/'cut'/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(MedsynError, match='not a whole CLIP'): clip_extractor(tmp_path/'cut')


def test_names_follow_the_extractor(clip):
    real, fake = (draw_lesions(4, size=32, seed=s)[0] for s in (1, 2))
    own = nn.Sequential(nn.Conv2d(3, 5, 3))
    t = fidelity(real, fake, [as_extractor(own, name='FID'), clip], device='cpu')
    assert list(t.metric) == ['KD-FID', 'FD-FID', 'CMMD', 'CLIP-I']
    assert (t.n_real == 4).all() and (t.n_fake == 4).all() and t.extractor.str.len().min() > 10
    with pytest.raises(MedsynError, match='unknown metric'):
        fidelity(real, fake, own, metrics=['KID'], device='cpu')
    chosen = fidelity(real, fake, own, metrics=['KD-Sequential'], device='cpu')
    assert list(chosen.metric) == ['KD-Sequential']


def test_small_fid_warns(weights):
    real = draw_lesions(3, size=32)[0]
    with pytest.warns(UserWarning, match='FID from 3 real and 3 synthetic images is biased'):
        t = fidelity(real, real, weights, device='cpu')
    assert np.isfinite(t.value).all() and t.note[1].startswith('biased upwards')


@pytest.mark.parametrize('n', [2, 3])
def test_tiny_sets_give_real_numbers(n, clip):
    real, fake = (draw_lesions(n, size=32, seed=s)[0] for s in (1, 2))
    t = fidelity(real, fake, [nn.Conv2d(3, 7, 3), clip], device='cpu')
    assert np.isfinite(t.value).all() and (t.value[t.metric.str.startswith('FD')] >= 0).all()


def test_bad_image_sets(tmp_path):
    net = nn.Conv2d(3, 4, 3)
    ok = lesion_folder(tmp_path/'ok', 3, size=32)
    (tmp_path/'empty').mkdir()
    with pytest.raises(MedsynError, match='no image in'): fidelity(tmp_path/'empty', ok, net)
    with pytest.raises(MedsynError, match='is not a folder'): fidelity(ok, tmp_path/'missing', net)
    with pytest.raises(MedsynError, match='3 real and 1 synthetic'):
        fidelity(ok, draw_lesions(1, size=32)[0], net)
    with pytest.raises(MedsynError, match='different sizes'):
        fidelity(ok, lesion_folder(tmp_path/'big', 3, size=48).joinpath('images'), net, bs=2, device='cpu')
    with pytest.raises(MedsynError, match='is no feature extractor'): fidelity(ok, ok, 'inception')
    Image.new('I;16', (32, 32)).save(tmp_path/'ok'/'images'/'deep.png')
    with pytest.raises(MedsynError, match='deep.png has more than 8 bits'):
        fidelity(ok, ok, net, device='cpu')
    with pytest.raises(MedsynError, match='not finite'):
        bad = nn.Conv2d(3, 4, 3); nn.init.constant_(bad.weight, math.nan)
        fidelity(*[draw_lesions(3, size=32)[0]]*2, bad, device='cpu')


def test_image_lists_agree(tmp_path):
    f = lesion_folder(tmp_path/'d', 4, size=32)
    files = sorted((f/'images').glob('*.png'))
    names = [str(x) for x in files]
    for same in (f/'images', files, names, find_pairs(f)): assert image_list(f) == image_list(same)


class Counting(nn.Module):
    def __init__(self): super().__init__(); self.c, self.seen = nn.Conv2d(3, 4, 3), 0
    def forward(self, x):
        self.seen += len(x)
        if self.seen > getattr(self, 'limit', 1e9): raise KeyboardInterrupt
        return self.c(x)


def test_cache_survives_an_interruption(tmp_path):
    ims, net = draw_lesions(9, size=32)[0], Counting()
    net.limit = 6
    with pytest.raises(KeyboardInterrupt): extract(ims, net, bs=3, device='cpu', cache=tmp_path)
    net.seen, net.limit = 0, 1e9
    a = extract(ims, net, bs=3, device='cpu', cache=tmp_path)['features']
    assert net.seen == 3 and torch.allclose(a, extract(ims, net, device='cpu')['features'], atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_knows_weights_size_and_flips(tmp_path):
    ims = draw_lesions(3, size=32)[0]
    torch.manual_seed(0); a = Counting(); b = Counting()
    one = lambda net, **kw: extract(ims, net, device='cpu', cache=tmp_path, **kw)['features']
    assert not torch.allclose(one(a), one(b)) and len(list(tmp_path.iterdir())) == 2
    one(as_extractor(a, size=16)); assert len(list(tmp_path.iterdir())) == 3
    mirrored = extract(ims[:, :, ::-1].copy(), a, device='cpu')['features']
    assert torch.allclose(one(a, flip='h'), mirrored, atol=1e-6)
    seen = a.seen
    one(a, flip='h'); one(a); assert a.seen == seen


def test_repeated_images_are_computed_once():
    ims, net = draw_lesions(3, size=32)[0], Counting()
    out = extract(np.concatenate([ims, ims]), net, device='cpu')['features']
    assert net.seen == 3 and torch.equal(out[:3], out[3:])


def test_segmenter_as_extractor():
    from medsyn.segment.models import segmenter
    ims = draw_lesions(3, size=64)[0]
    m = segmenter('unet', 'mobilenetv3_small_050', size=64)
    ex = as_extractor(m)
    x = torch.from_numpy(ims).permute(0, 3, 1, 2)/255
    m.eval()
    with torch.no_grad(): want = m.net.encoder((x - m.mean)/m.std)[-1].mean((2, 3))
    assert ex.name == 'unet' and ex.size == 64 and torch.allclose(ex(list(ims))['features'], want, atol=1e-5)


def test_lpips_rows():
    torch.manual_seed(0)
    net = lpips_network(None)
    ims = draw_lesions(4, size=64)[0]
    t = fidelity(ims, ims, nn.Conv2d(3, 4, 3), lpips_weights=net, match=range(4), device='cpu')
    t = t.set_index('metric')
    assert t.value['LPIPS'] == pytest.approx(0, abs=1e-7) and t.note['LPIPS'] == '4 matched pairs'
    assert t.extractor['LPIPS'] == 'alexnet, 256 px bilinear antialiased'
    once, again = (lpips(ims, ims, net, n_pairs=6, size=64, device='cpu', seed=1) for _ in range(2))
    assert (once == again).all()


def test_lpips_rows_name_their_network():
    class Distance(nn.Module):
        def forward(self, a, b): return (a - b).abs().flatten(1).mean(1)
    ims = draw_lesions(2, size=64)[0]
    def named(net):
        t = fidelity(ims, ims, nn.Conv2d(3, 4, 3), lpips_weights=net, match=range(2), device='cpu')
        return t.set_index('metric').extractor['LPIPS']
    assert named(lpips_network(None, 'vgg')) == 'vgg16, 256 px bilinear antialiased'
    assert named(Distance()) == 'Distance, 256 px bilinear antialiased'
