"Segmenters of several architectures and encoders: files, refusals, losses, predictions of real files."
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from safetensors.torch import save_file
from torch import nn

from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls, read_pair
from medsyn.segment.learner import (LOSSES, DiceMetric, cross_entropy, edge_weights, flip_averaged,
                                    foreground, predict, segment_learner, structure_loss, upsample)
from medsyn.segment.models import Segmenter, good_sizes, normalisation, segmenter
from medsyn.train import evaluating, fit_steps

TINY = dict(encoder='mobilenetv3_small_050')


@pytest.mark.filterwarnings('ignore')
# the diffusion U-Net takes no encoder: tests/test_semi.py has it
@pytest.mark.parametrize('name', ['unet', 'segformer'])
@pytest.mark.parametrize('encoder', ['resnet18', 'efficientnet-b0', 'mit_b0', 'tu-convnext_atto',
                                     'mobilenetv3_small_050'])
@pytest.mark.parametrize('classes', [1, 2])
def test_every_network(name, encoder, classes, tmp_path):
    torch.manual_seed(0)
    model = segmenter(name, encoder, classes=classes).eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad(): y = model(x)
    assert y.shape == (2, classes, 64, 96) and y.isfinite().all()
    if encoder in ('resnet18', 'mobilenetv3_small_050'):
        again = Segmenter.from_pretrained(model.save_pretrained(tmp_path/'m'))
        with torch.no_grad(): assert torch.equal(again(x), y)
        assert again.config == model.config


def test_default_weights_are_random_and_seeded():
    def make(seed):
        torch.manual_seed(seed)
        return next(segmenter(**TINY).parameters())
    assert torch.equal(make(0), make(0)) and not torch.equal(make(0), make(1))


@pytest.mark.parametrize('kw,text', [
    (dict(name='unets'), "did you mean 'unet'"),
    (dict(encoder='resnet_18'), 'did you mean resnet18'),
    (dict(encoder='mit_b9'), 'did you mean mit_b'),
    (dict(encoder='convnext_ato'), 'did you mean'),
    (dict(size=48), '32 or 64'),
    (dict(size=8), 'resize 8 to 32'),
    (dict(classes=0), 'give 1 or 2'),
    (dict(encoder_weights='image-net'), "did you mean 'imagenet'"),
    (dict(encoder_weights='missing.safetensors'), 'do not exist'),
    (dict(decoder_channel=(1, 2)), "did you mean 'decoder_channels'"),
    (dict(decoder_channels=(1, 2)), 'cannot use')])
def test_wrong_arguments(kw, text):
    with pytest.raises(MedsynError, match=text): segmenter(**kw)


def test_wrong_sizes_and_batches():
    model = segmenter(**TINY)
    with pytest.raises(MedsynError, match='resize 65 to 64 or 96'): model(torch.rand(2, 3, 65, 64))
    with pytest.raises(MedsynError, match='two or more images per batch'):
        segmenter().train()(torch.rand(1, 3, 32, 32))


def test_pretrained_encoder_from_a_path(tmp_path, trusts_pickles):
    import timm
    torch.manual_seed(1)
    whole = timm.create_model('resnet18', num_classes=7)
    save_file(whole.state_dict(), tmp_path/'r.safetensors')
    torch.save({'state_dict': {f'module.{k}': v for k, v in whole.state_dict().items()}}, tmp_path/'r.pth')
    for f in ('r.safetensors', 'r.pth'):
        got = segmenter('unet', 'resnet18', encoder_weights=tmp_path/f).net.encoder
        assert torch.equal(got.layer3[1].conv2.weight, whole.layer3[1].conv2.weight)
        assert torch.equal(got.bn1.running_mean, whole.bn1.running_mean)
    with pytest.raises(MedsynError, match='does not fit encoder resnet34'):
        segmenter('unet', 'resnet34', encoder_weights=tmp_path/'r.pth')


@pytest.mark.parametrize('name', ['mobilenetv3_small_050', 'convnext_atto', 'regnetx_002'])
def test_timm_files_fit_the_wrapped_encoder(name, tmp_path):
    "A file of timm's own classifier: every encoder tensor is taken over, and the features are its features."
    import timm
    torch.manual_seed(1)
    whole = timm.create_model(name).eval()
    save_file(whole.state_dict(), tmp_path/'t.safetensors')
    got = segmenter('unet', name, encoder_weights=tmp_path/'t.safetensors').eval().net.encoder
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        want = whole.forward_intermediates(x, intermediates_only=True)[-1]
        assert torch.allclose(got(x)[-1], want, atol=1e-4)


# Normalisation ------------------------------------------------------------------------------------

IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])

@pytest.fixture
def lite0(tmp_path):
    "Random weights of EfficientNet-Lite0 in the published layout, and the network they belong to."
    import timm
    torch.manual_seed(1)
    whole = timm.create_model('tf_efficientnet_lite0').eval()
    save_file(whole.state_dict(), tmp_path/'lite0.safetensors')
    return tmp_path/'lite0.safetensors', whole

@pytest.mark.parametrize('encoder', ['tf_efficientnet_lite0', 'tu-tf_efficientnet_lite0',
                                     'timm-tf_efficientnet_lite0'])
def test_a_file_brings_its_normalisation(encoder, lite0, tmp_path):
    file, whole = lite0
    model = segmenter('unet', encoder, encoder_weights=file).eval()
    assert model.config['mean'] == model.config['std'] == [0.5]*3
    received = []
    model.net.encoder.register_forward_pre_hook(lambda module, args: received.append(args[0]))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): model(x)
    assert torch.allclose(received[0], 2*x - 1, atol=1e-6)
    stem = next(v for k, v in model.net.encoder.state_dict().items() if k.endswith('conv_stem.weight'))
    assert torch.equal(stem, whole.conv_stem.weight)
    again = Segmenter.from_pretrained(model.save_pretrained(tmp_path/'m'))
    with torch.no_grad(): assert again.config == model.config and torch.equal(again(x), model(x))

def test_timms_lite0_is_the_published_network(lite0):
    "From an image in [0,1] to the deepest features, with the file alone to say how to normalise."
    file, whole = lite0
    model = segmenter('unet', 'tf_efficientnet_lite0', encoder_weights=file).eval()
    features = []
    model.net.encoder.register_forward_hook(lambda module, args, out: features.extend(out))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        model(x)
        want = whole.forward_intermediates((x - 0.5)/0.5, intermediates_only=True)[-1]
    assert torch.allclose(features[-1], want, atol=1e-5)

def test_random_and_other_weights_get_imagenets(tmp_path):
    for model in (segmenter(**TINY), segmenter('unet', 'tf_efficientnet_lite0')):
        assert {k: model.config[k] for k in IMAGENET} == IMAGENET
    assert normalisation('efficientnet-b0', tmp_path/'w.pth') == (IMAGENET['mean'], IMAGENET['std'])

def test_published_weights_bring_smps_values(monkeypatch):
    import segmentation_models_pytorch as smp

    from medsyn.segment import models
    values = dict(mean=[.1, .2, .3], std=[.4, .5, .6])
    def random_encoder(encoder, weights): return smp.Unet(encoder, encoder_weights=None).encoder
    monkeypatch.setattr(smp.encoders, 'get_preprocessing_params', lambda encoder, weights: values)
    monkeypatch.setattr(smp.encoders, 'get_encoder', random_encoder)
    monkeypatch.setattr(models, 'announce_download', lambda *args, **kwargs: None)
    model = segmenter('unet', 'resnet18', encoder_weights='imagenet')
    assert model.config['mean'] == [.1, .2, .3]
    assert model.std.flatten().tolist() == pytest.approx([.4, .5, .6])

def test_published_weights_of_a_shallower_encoder(monkeypatch):
    "It takes its part of the whole encoder; weights that lack one of its tensors are refused."
    from medsyn.segment import models
    name = 'tu-convnext_atto'
    whole = models.smp.encoders.get_encoder(name, weights=None)
    monkeypatch.setattr(models.smp.encoders, 'get_encoder', lambda encoder, weights: whole)
    monkeypatch.setattr(models, 'announce_download', lambda *args, **kwargs: None)
    monkeypatch.setattr(models, 'normalisation', lambda *args: ([.5]*3, [.5]*3))
    shallow = dict(encoder_depth=3, decoder_channels=(32, 16, 8))
    def build(): return models.unet(name, 1, **shallow)
    net = build()
    models._load_encoder(net, name, 'imagenet')
    given, own = whole.state_dict(), net.encoder.state_dict()
    assert len(own) < len(given) and all(torch.equal(v, given[key]) for key, v in own.items())
    lost = next(iter(own))
    monkeypatch.setattr(whole, 'state_dict', lambda: {key: v for key, v in given.items() if key != lost})
    with pytest.raises(MedsynError, match=f"1 of {len(own)} tensors are missing, '{lost}' first"):
        models._load_encoder(build(), name, 'imagenet')

def test_old_folders_keep_the_old_normalisation(lite0, tmp_path):
    "A folder that names no normalisation was trained with ImageNet's, whatever its weights expected."
    model = segmenter('unet', 'tf_efficientnet_lite0', encoder_weights=lite0[0], **IMAGENET).eval()
    model.save_pretrained(tmp_path/'m')
    config = json.loads((tmp_path/'m'/'config.json').read_text())
    for key in IMAGENET: del config[key]
    (tmp_path/'m'/'config.json').write_text(json.dumps(config))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad(): assert torch.equal(Segmenter.from_pretrained(tmp_path/'m')(x), model(x))

@pytest.mark.parametrize('kw', [dict(mean=[.5]), dict(std=[1, 1, 0])])
def test_wrong_normalisation(kw):
    with pytest.raises(MedsynError, match='give three numbers each, the std above 0'): segmenter(**TINY, **kw)


def test_unreachable_hub_is_one_sentence(monkeypatch):
    def offline(*a, **k): raise OSError('offline')
    import segmentation_models_pytorch.encoders as enc
    monkeypatch.setattr(enc, 'hf_hub_download', offline)
    with pytest.raises(MedsynError, match="cannot fetch the 'imagenet' weights of resnet18"):
        segmenter(encoder_weights='imagenet')


def test_a_download_is_announced_before_it_starts(monkeypatch, capsys):
    "What, from where, how large; nothing if it is here; offline one sentence. No network is touched."
    import huggingface_hub
    from medsyn.diffusion.backbone import Backbone
    from medsyn.segment import models
    asked, started = [], []
    class FakeApi:
        def model_info(self, repo, **kw):
            asked.append(repo)
            files = dict.fromkeys(('model.safetensors', 'unet/a.safetensors', 'pytorch_model.bin'), 3*2**20)
            return SimpleNamespace(siblings=[SimpleNamespace(rfilename=k, size=v) for k, v in files.items()])
    def fetched(name, weights):
        started.append(capsys.readouterr().err)
        return whole
    whole = models.smp.encoders.get_encoder('resnet18', weights=None)
    monkeypatch.setattr(huggingface_hub, 'HfApi', FakeApi)
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda *a, **k: None)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    monkeypatch.setattr(models.smp.encoders, 'get_encoder', fetched)
    monkeypatch.setattr(models, 'normalisation', lambda *a: ([.5]*3, [.5]*3))
    segmenter('unet', 'resnet18', 'imagenet')
    assert started == ["downloading the 'imagenet' weights of resnet18 from"
                       " https://huggingface.co/smp-hub/resnet18.imagenet, 3.0 MiB\n"]
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda *a, **k: '/here')
    segmenter('unet', 'resnet18', 'imagenet')
    assert started[1] == '' and asked == ['smp-hub/resnet18.imagenet']
    monkeypatch.setattr(huggingface_hub, 'try_to_load_from_cache', lambda *a, **k: None)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(MedsynError, match='cannot fetch the backbone owner/name from https.*switched off'):
        Backbone.from_pretrained('owner/name')
    def unreachable(self, repo, **kw): raise ConnectionError('no route\nto the host')
    monkeypatch.setattr(FakeApi, 'model_info', unreachable)
    monkeypatch.setattr(huggingface_hub.constants, 'HF_HUB_OFFLINE', False)
    with pytest.raises(MedsynError, match='check the name and the network, or give a folder') as e:
        Backbone.from_pretrained('owner/name')
    assert '\n' not in str(e.value)

def test_files_of_others_are_refused(tmp_path):
    m = segmenter(**TINY)
    m.save_pretrained(tmp_path/'a')
    config = json.loads((tmp_path/'a'/'config.json').read_text())
    assert config['kind'] == 'segmenter' and 'mobilenetv3_small_050' in config['encoder']
    changes = [(dict(encoder='resnet18'), 'another architecture'),
               (dict(kind='generator'), 'holds a generator'),
               (dict(name='unt'), 'unknown segmenter')]
    for change, text in changes:
        (tmp_path/'a'/'config.json').write_text(json.dumps({**config, **change}))
        with pytest.raises(MedsynError, match=text): Segmenter.from_pretrained(tmp_path/'a')
    (tmp_path/'a'/'config.json').write_text(json.dumps(config))
    f = tmp_path/'a'/'model.safetensors'
    f.write_bytes(f.read_bytes()[:1000])
    with pytest.raises(MedsynError, match='not a complete safetensors file'):
        Segmenter.from_pretrained(tmp_path/'a')
    f.unlink()
    with pytest.raises(MedsynError, match='do not exist'): Segmenter.from_pretrained(tmp_path/'a')


def test_pickled_code_never_runs(tmp_path, trusts_pickles):
    class Evil:
        def __reduce__(self): return (os.system, (f'touch {tmp_path}/ran',))
    torch.save({'conv1.weight': Evil()}, tmp_path/'w.pth')
    with pytest.raises(MedsynError, match='not a plain PyTorch state dict'):
        segmenter(encoder_weights=tmp_path/'w.pth')
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('loss', list(LOSSES))
def test_losses(loss):
    f = LOSSES[loss]
    torch.manual_seed(0)
    y = (torch.rand(3, 16, 16) > .7).long()
    good, bad = 16.*y[:, None] - 8, 8 - 16.*y[:, None]
    assert f(good, y) < .01 < 1 < f(bad, y)
    two = torch.randn(3, 2, 16, 16)
    assert torch.allclose(f(two, y), f(foreground(two)[:, None], y))
    assert torch.allclose(f(two, y), f(two, y[:, None].float()))
    out = (torch.randn(3, 1, 16, 16, dtype=torch.bfloat16)*100).requires_grad_()
    f(out, y).backward()
    assert out.grad.isfinite().all()  # saturated logits, half precision
    alone = torch.stack([f(two[i:i+1], y[i:i+1]) for i in range(3)]).mean()
    assert torch.allclose(f(two, y), alone, atol=1e-6)  # no image sees another


@pytest.mark.parametrize('loss', list(LOSSES))
def test_elements_of_losses(loss):
    "Without reduction: one number a pixel or an image, of which the loss is the mean."
    f = LOSSES[loss]
    out, y = torch.randn(3, 1, 16, 16), (torch.rand(3, 16, 16) > .7).long()
    elements = f(out, y, reduction='none')
    assert elements.shape == ((3, 16, 16) if loss == 'cross_entropy' else (3,))
    assert torch.allclose(elements.mean(), f(out, y), atol=1e-6)

@pytest.mark.parametrize('m', [torch.zeros(1, 40, 40), torch.ones(1, 40, 40)])
def test_edge_weights_of_flat_masks(m):
    "Weight 1 away from the border, where a full mask has an edge: zeros are outside."
    w = edge_weights(m, 7)
    assert torch.allclose(w[:, 3:-3, 3:-3], torch.ones(1, 34, 34), atol=1e-5)
    assert w[0, 0, 0].item() == pytest.approx(1 + 5*m[0, 0, 0].item()*(1 - 16/49), rel=1e-5)

def test_metric_of_nothing():
    "No image, no number; empty masks left empty count as right."
    metric = DiceMetric()
    metric.reset()
    assert metric.value is None
    for logit, want in ((-1., 1.), (1., 0.)):
        metric.reset()
        metric.accumulate(SimpleNamespace(pred=torch.full((2, 1, 4, 4), logit), y=torch.zeros(2, 4, 4)))
        assert metric.value == want

@pytest.mark.parametrize('side,want', [(1, [32]), (31, [32]), (32, [32]), (33, [32, 64]), (64, [64])])
def test_good_sizes(side, want): assert good_sizes(side) == want

def test_upsampling_to_the_same_size_is_the_identity():
    out = torch.randn(2, 5, 7)
    assert torch.equal(upsample(out, (5, 7)), foreground(out[None])[0])
    assert upsample(out[:1], (50, 3)).shape == (50, 3)

def test_structure_loss_against_loops():
    torch.manual_seed(0)
    l, m = torch.randn(2, 1, 9, 11), (torch.rand(2, 9, 11) > .6).float()
    total = 0
    for k in range(2):
        wb = w_ = wi = wu = 0
        for y in range(9):
            for x in range(11):
                mean = m[k, max(0, y-2):y+3, max(0, x-2):x+3].sum()/25
                w, t, p = 1 + 5*abs(mean - m[k, y, x]), m[k, y, x], torch.sigmoid(l[k, 0, y, x])
                wb += w*-(t*torch.log(p) + (1-t)*torch.log(1-p))
                w_ += w
                wi += w*p*t
                wu += w*(p + t)
        total += wb/w_ + 1 - (wi + 1)/(wu - wi + 1)
    assert structure_loss(l, m, kernel=5).item() == pytest.approx(float(total/2), rel=1e-5)


def test_cross_entropy_is_torchs():
    out, y = torch.randn(2, 2, 5, 5), torch.randint(0, 2, (2, 5, 5))
    assert torch.allclose(cross_entropy(out, y), torch.nn.functional.cross_entropy(out, y))


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return find_pairs(lesion_folder(tmp_path_factory.mktemp('les')/'d', 20, size=32, seed=3))


@pytest.mark.parametrize('loss,classes', [('bce_dice', 1), ('structure_loss', 1), ('cross_entropy', 2)])
def test_learning_and_repeating(pairs, loss, classes):
    "The loss falls; the same seed gives the same weights."
    def run():
        dls = pair_dls(pairs[:16], size=32, bs=8, valid=pairs[16:], seed=1, device='cpu')
        torch.manual_seed(5)
        learn = segment_learner(dls, segmenter(classes=classes, size=32, **TINY), loss=loss, lr=3e-3)
        fit_steps(learn, 12)
        return learn
    a, b = run(), run()
    log = a.history.frame().loss
    assert log[-3:].mean() < log[:3].mean() - .05
    for p, q in zip(a.model.parameters(), b.model.parameters()): assert torch.equal(p, q)


def test_learner_refuses_sizes_that_do_not_fit(pairs):
    dls = pair_dls(pairs, size=40, bs=4, device='cpu')
    with pytest.raises(MedsynError, match='resize 40 to 32 or 64'): segment_learner(dls, segmenter(**TINY))


def test_predict_pairs_and_arrays_agree(pairs):
    model = segmenter(**TINY).eval()
    a = predict(model, pairs[:5], size=64, bs=2)
    b = predict(model, [read_pair(p)[0] for p in pairs[:5]], size=64, bs=5)
    np.testing.assert_allclose(np.stack(a), np.stack(b), atol=1e-5)
    same = model(torch.tensor(read_pair(pairs[0], 64)[0]).permute(2, 0, 1)[None]/255)
    want = nn.functional.interpolate(same, (32, 32), mode='bilinear', align_corners=False).sigmoid()[0, 0]
    np.testing.assert_allclose(a[0], want.detach(), atol=1e-5)


def test_predict_says_what_it_needs():
    model = segmenter(**TINY)
    with pytest.raises(MedsynError, match='give pairs, or uint8 arrays'):
        predict(model, np.zeros((2, 32, 32), np.uint8))
    assert predict(model, []) == [] and model.training


# Memory format, averaged weights, flips -----------------------------------------------------------

def spatial(model):
    "The convolution weights whose memory format shows."
    return [p for p in model.parameters() if p.ndim == 4 and min(p.shape[:2]) > 1 and p.shape[-1] > 1]

def is_channels_last(p): return p.is_contiguous(memory_format=torch.channels_last)

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name,encoder', [('unet', 'mobilenetv3_small_050'), ('segformer', 'mit_b0')])
def test_channels_last_changes_rounding_alone(pairs, name, encoder):
    "In float64 the first step's loss and gradients agree; the default is channels last."
    class Keep(Callback):
        order = 5
        def before_batch(self): self.learn.xb = (self.x.double(),)
        def after_backward(self):
            named = self.model.named_parameters()
            self.learn.first = {k: p.grad.clone() for k, p in named if p.grad is not None}
    def run(channels_last):
        dls = pair_dls(pairs[:16], size=32, bs=8, valid=pairs[16:], seed=1, device='cpu')
        torch.manual_seed(5)
        model = segmenter(name, encoder, size=32).double()
        return fit_steps(segment_learner(dls, model, channels_last=channels_last, cbs=[Keep()]), 1)
    plain, default = run(False), run(None)
    assert spatial(default.model) and all(map(is_channels_last, spatial(default.model)))
    assert not any(map(is_channels_last, spatial(plain.model)))
    assert default.history.frame().loss[0] == pytest.approx(plain.history.frame().loss[0], rel=1e-6)
    for key, grad in plain.first.items():
        assert torch.allclose(grad, default.first[key], rtol=1e-4, atol=1e-7), key

def test_a_saved_file_does_not_show_the_memory_format(pairs, tmp_path):
    dls = pair_dls(pairs[:8], size=32, bs=8, valid=pairs[16:], seed=1, device='cpu')
    learn = segment_learner(dls, segmenter(size=32, **TINY))
    again = Segmenter.from_pretrained(learn.model.eval().save_pretrained(tmp_path/'m'))
    assert not any(map(is_channels_last, spatial(again)))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad(): assert torch.allclose(again(x), learn.model(x), atol=1e-5)

@pytest.mark.parametrize('decay', [0.5, 0.98])
def test_averaged_statistics(pairs, decay):
    "Weights are exponential averages; statistics look back as far, and stay raw where ten steps suffice."
    class Naive(Callback):
        order = 56
        def before_fit(self): self.k, self.weights, self.statistics = 0, *self.values()
        def values(self):
            state = {k: v.detach().double().clone() for k, v in self.model.state_dict().items()}
            weights = {k: state[k] for k, _ in self.model.named_parameters()}
            return weights, {k: v for k, v in state.items() if 'running' in k}
        def after_step(self):
            self.k += 1
            d = min(decay, self.k/(9 + self.k)) if self.k > 1 else 0.
            share = 1/max(1/(1 - d) - 10, 1)
            weights, statistics = self.values()
            self.weights = {k: d*v + (1 - d)*weights[k] for k, v in self.weights.items()}
            self.statistics = {k: (1 - share)*v + share*statistics[k] for k, v in self.statistics.items()}
        def check(self, values):
            for got, want in zip(values, (self.weights, self.statistics), strict=True):
                for k in want: assert torch.allclose(got[k], want[k], atol=1e-5, rtol=1e-4), k
        def after_batch(self):
            if not self.training or self.k % 40: return
            raw = self.values()
            with evaluating(self.learn): self.check(self.values())
            for before, after in zip(raw, self.values(), strict=True):  # restored
                assert all(torch.equal(before[k], after[k]) for k in before)
    dls = pair_dls(pairs[:16], size=32, bs=8, valid=pairs[16:], seed=1, device='cpu')
    layers = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 3, padding=1)
    model = nn.Sequential(*layers)
    naive = Naive()
    learn = fit_steps(segment_learner(dls, model, ema=decay, lr=1e-2, cbs=[naive]), 160)
    naive.check(naive.values())
    fit_steps(learn, 3)  # a second fit starts anew
    naive.check(naive.values())

def test_an_average_without_batch_normalisation(pairs):
    dls = pair_dls(pairs[:16], size=32, bs=8, valid=pairs[16:], seed=1, device='cpu')
    learn = fit_steps(segment_learner(dls, nn.Conv2d(3, 1, 3, padding=1), ema=0.9), 3)
    assert learn.ema.statistics() == learn.ema.avg_statistics == []

def test_averaging_does_not_touch_training(pairs):
    "The raw weights of a run with an average are those of a run without."
    def losses(ema):
        dls = pair_dls(pairs[:16], size=32, bs=8, valid=pairs[16:], seed=1, device='cpu')
        torch.manual_seed(5)
        learn = segment_learner(dls, segmenter(size=32, **TINY), ema=ema)
        return fit_steps(learn, 4).history.frame().loss.tolist()
    assert losses(None) == losses(0.9)

def test_flips(pairs):
    model = segmenter(**TINY).eval()
    images = np.stack([read_pair(p)[0] for p in pairs[:3]])
    x = torch.tensor(images).permute(0, 3, 1, 2)/255
    with torch.no_grad():
        horizontal, vertical = model(x.flip(3)).flip(3), model(x.flip(2)).flip(2)
        want = (model(x) + horizontal + vertical + model(x.flip(2, 3)).flip(2, 3))/4
        assert torch.allclose(flip_averaged(model, x), want, atol=1e-6)
    got = predict(model, images, size=32, flips=True, bs=2)
    np.testing.assert_allclose(np.stack(got), want[:, 0].sigmoid(), atol=1e-5)
    for axis in (1, 2):                                                         # mirrored in, mirrored out
        mirrored = predict(model, np.flip(images, axis).copy(), size=32, flips=True)
        np.testing.assert_allclose(np.flip(np.stack(mirrored), axis), np.stack(got), atol=1e-5)
    by_default = np.stack(predict(model, images, size=32))
    assert not np.allclose(by_default, np.stack(got), atol=1e-4)


@pytest.mark.data
@pytest.mark.skipif('MEDSYN_DATA' not in os.environ, reason='MEDSYN_DATA is not set')
@pytest.mark.parametrize('name', ['polypgen', 'dsb2018', 'magtile'])
def test_real_files_go_through(name):
    from medsyn.evaluate.overlap import evaluate_segmenter
    pairs = find_pairs(Path(os.environ['MEDSYN_DATA'])/name)[:6]
    df = evaluate_segmenter(segmenter(**TINY), {name: pairs}, size=96)
    assert len(df) == 6 and df.drop(columns=['testset', 'name']).apply(np.isfinite).all().all()
