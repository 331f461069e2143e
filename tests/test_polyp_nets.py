"SANet, Polyp-PVT and CTNet: sizes, gradients, parameters, learning by heart, settings, refusals."
from dataclasses import replace

import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from helpers import API, load, source
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from medsyn.core import MedsynError, load_json, seeded
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.evaluate.overlap import score
from medsyn.segment.learner import bce_dice, predict, segment_learner, structure_loss
from medsyn.segment.models import NETWORKS, Segmenter, segmenter
from medsyn.segment.polyp_nets import (PRESETS, ClipValuesCB, ColourExchangeCB, ContrastCB, MultiScaleCB,
                                       contrast_pixels, exchange_colours, pixel_contrast,
                                       probability_correction, published)
from medsyn.train import fit_steps

pytestmark = pytest.mark.filterwarnings('ignore')

NAMES = ['sanet', 'polyp_pvt', 'ctnet']
SLIM = dict(sanet='resnet18', polyp_pvt='pvt_v2_b0', ctnet='mit_b0')
# Million parameters, as printed beside the networks: Polyp-PVT in EMCAD (CVPR 2024), Table 1; the others in
# the public result tables of CRISP. The decoders are counted by hand from the layers of the released code.
PRINTED = dict(sanet=23.8, polyp_pvt=25.11, ctnet=44.2)
DECODERS = dict(sanet=230_145, polyp_pvt=257_748, ctnet=218_529)


@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return find_pairs(lesion_folder(tmp_path_factory.mktemp('lesions')/'d', 12, size=64, seed=0))

@pytest.fixture(scope='module')
def full():
    "The papers' networks, on their own encoders, built once."
    with seeded(0): return {name: segmenter(name) for name in NAMES}

@pytest.fixture(scope='module')
def slim():
    "Their decoders on small encoders."
    with seeded(0): return {name: segmenter(name, SLIM[name], size=64) for name in NAMES}

def loaders(pairs, bs=2, augment='none'):
    return pair_dls(pairs, size=64, bs=bs, valid=.2, augment=augment, device='cpu')

def count(module): return sum(p.numel() for p in module.parameters())


# The networks ------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', NAMES)
def test_parameters(name, full):
    net = full[name].net
    assert count(net) - count(net.encoder) == DECODERS[name]
    assert count(net)/1e6 == pytest.approx(PRINTED[name], rel=.02)

@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('shape', [(2, 3, 64, 64), (1, 3, 96, 128), (1, 3, 352, 352)])
def test_shapes(name, shape, full):
    with torch.no_grad(): y = full[name].eval()(torch.rand(shape))
    assert y.shape == (shape[0], 1, *shape[2:]) and y.isfinite().all()

class GradientsCB(Callback):
    "Keeps which parameters a step's gradient reaches; batch normalisation stands still, or biases cancel."
    def before_batch(self):
        for layer in self.learn.model.modules():
            if isinstance(layer, _BatchNorm): layer.eval()
    def after_backward(self):
        parameters = self.learn.model.named_parameters()
        self.missing = [name for name, p in parameters if p.grad is None or not p.grad.abs().sum() > 0]

@pytest.mark.parametrize('name', NAMES)
def test_every_parameter_gets_a_gradient(name, full, pairs):
    "With the network's own loss terms, as `segment_learner` adds them."
    model, gradients = full[name], GradientsCB()
    for module in model.modules():
        if hasattr(module, 'drop_prob'): module.drop_prob = 0.
    with seeded(1), torch.no_grad():
        for p in model.parameters(): p.add_(.01*torch.randn_like(p))    # some start at exactly 0
    fit_steps(segment_learner(loaders(pairs), model, lr=1e-6, cbs=[gradients]), 1)
    assert gradients.missing == []

@pytest.mark.parametrize('name', NAMES)
def test_two_channels(name):
    model = segmenter(name, 'resnet18', classes=2).eval()
    with torch.no_grad(): assert model(torch.rand(1, 3, 64, 64)).shape == (1, 2, 64, 64)

@pytest.mark.parametrize('name', NAMES)
def test_four_pairs_by_heart(name, tmp_path):
    folder = find_pairs(lesion_folder(tmp_path/'four', 4, size=64, seed=3))
    other = find_pairs(lesion_folder(tmp_path/'other', 1, size=64, seed=4))
    dls = pair_dls(folder*4, size=64, bs=4, valid=other, augment='none', device='cpu')
    plain = dict(colours=False) if name == 'sanet' else {}      # the four pictures as they are
    with seeded(0):
        learn = segment_learner(dls, segmenter(name, 'lcnet_075', size=64, **plain), lr=5e-3)
        fit_steps(learn, 180 if name == 'polyp_pvt' else 100, schedule='one_cycle')
    images, masks = draw_lesions(4, 64, seed=3)
    probabilities = predict(learn.model, images)
    dice = [score(p, m, ['dice@0.5'])['dice@0.5'] for p, m in zip(probabilities, masks)]
    assert np.mean(dice) > .95, dice

@pytest.mark.parametrize('name', NAMES)
def test_inference_is_deterministic(name, slim, tmp_path):
    model, images = slim[name].eval(), draw_lesions(3, 64, seed=1)[0]
    want = np.stack(predict(model, images))
    assert np.array_equal(np.stack(predict(model, images)), want)
    np.testing.assert_allclose(np.stack(predict(model, images, bs=1)), want, atol=1e-3)
    again = Segmenter.from_pretrained(model.save_pretrained(tmp_path/'m'))
    np.testing.assert_allclose(np.stack(predict(again, images)), want, atol=1e-3)
    assert again.config == model.config and again.config['encoder'] == SLIM[name]

@pytest.mark.parametrize('kw,text', [
    (dict(name='sanett'), "did you mean 'sanet'"),
    (dict(name='ctnet', encoder='resnet18', size=32), 'multiples of 32, 64 or more: resize 32 to 64'),
    (dict(name='sanet', encoder='resnet18', size=100), 'resize 100 to 96 or 128'),
    (dict(name='sanet', encoder='resnet18', widht=8), "did you mean 'width'"),
    (dict(name='polyp_pvt', encoder='resnet18', drop_path=.5), 'no blocks that could be skipped'),
    (dict(name='polyp_pvt', encoder='mobilenetv3_small_050'), 'choose one with 16 or more channels'),
    (dict(name='ctnet', encoder='vit_tiny_patch16_224'), 'ctnet cannot use the encoder'),
    (dict(name='sanet', encoder_weights='missing.pth'), 'do not exist')])
def test_wrong_arguments(kw, text):
    with pytest.raises(MedsynError, match=text): segmenter(**kw)

def test_one_image_is_too_few_for_training():
    with pytest.raises(MedsynError, match='two or more images per batch'):
        segmenter('ctnet', 'resnet18').train()(torch.rand(1, 3, 64, 64))


# Loss terms --------------------------------------------------------------------------------------

class KeepCB(Callback):
    "Keeps the loss of a step, its terms, and the prediction."
    def after_loss(self):
        self.prediction = self.learn.pred
        self.mask = self.learn.yb[0]
    def before_backward(self): self.total = self.learn.loss_grad.item()

def one_step(model, pairs, loss, **kw):
    keep = KeepCB()
    fit_steps(segment_learner(loaders(pairs), model, loss=loss, cbs=[keep], **kw), 1)
    return keep

def test_two_outputs_are_trained_alike(slim, pairs):
    keep = one_step(slim['polyp_pvt'], pairs, structure_loss)
    intermediate = keep.prediction.side['intermediate']
    want = structure_loss(keep.prediction, keep.mask) + structure_loss(intermediate, keep.mask)
    assert keep.total == pytest.approx(want.item(), rel=1e-5)

def test_contrast_has_a_tenth_of_the_weight(slim, pairs):
    keep = one_step(slim['ctnet'], pairs, structure_loss)
    contrast = keep.learn.terms['L_contrast'].item()
    plain = structure_loss(keep.prediction, keep.mask).item()
    assert contrast > 0 and keep.total == pytest.approx(plain + .1*contrast, rel=1e-5)

def test_terms_need_their_network(pairs):
    learn = segment_learner(loaders(pairs), segmenter('unet', 'mobilenetv3_small_050'), cbs=[ContrastCB()])
    with pytest.raises(MedsynError, match="has no 'embedding'"): fit_steps(learn, 1)

def test_contrast_without_a_pair_of_classes():
    one_class, none = torch.zeros(2, 16, 16, dtype=torch.bool), torch.zeros(2, 8, 8, dtype=torch.bool)
    pixels, labels = contrast_pixels(one_class, one_class, torch.Generator().manual_seed(0))
    assert len(pixels) == 200 and not labels.any()
    z = nn.functional.normalize(torch.randn(200, 4), dim=1)
    assert pixel_contrast(z, labels).item() == pytest.approx(0, abs=1e-6)
    assert not len(contrast_pixels(none, none, torch.Generator())[0])


# Probability correction and colours --------------------------------------------------------------

def test_correction_keeps_every_sign_and_every_order():
    torch.manual_seed(0)
    logit = torch.randn(5, 20, 30) - 1
    new = probability_correction(logit)
    assert torch.equal(new > 0, logit > 0)
    for old, corrected in zip(logit, new):
        assert torch.equal(old.flatten().argsort(), corrected.flatten().argsort())
        assert torch.allclose(probability_correction(old), corrected)       # no image sees another
        positive = old > 0
        want = old[positive].mean()*old.numel()             # as if every pixel were positive
        assert corrected[positive].sum().item() == pytest.approx(want.item(), rel=1e-4)

@pytest.mark.parametrize('classes', [1, 2])
def test_prediction_is_corrected_training_is_not(classes):
    with seeded(0): model = segmenter('sanet', 'resnet18', classes=classes, size=64)
    images = draw_lesions(2, 64, seed=2)[0]
    corrected = predict(model, images, logits=True)
    model.net.correction = False
    plain = predict(model, images, logits=True)
    for new, old in zip(corrected, plain):
        np.testing.assert_allclose(new, probability_correction(torch.from_numpy(old)), rtol=1e-5)
        assert not np.allclose(new, old)
    assert segmenter('sanet', 'resnet18', correction=False).net.correction is False

class SeenCB(Callback):
    "Keeps the images of every step, as the network gets them."
    order = 50
    def __init__(self): self.batches = []
    def before_batch(self): self.batches.append(self.learn.xb[0].clone())

def test_colours_do_not_depend_on_names(tmp_path):
    "The same pictures under names of digits and under others."
    images = sorted(lesion_folder(tmp_path/'a', 8, size=64, seed=0).glob('*/*.png'))
    for file in images:
        renamed = tmp_path/'b'/file.parent.name/f'polyp_{file.name}'
        renamed.parent.mkdir(parents=True, exist_ok=True)
        renamed.write_bytes(file.read_bytes())
    found = []
    for folder in ('a', 'b'):
        dls, keep = loaders(find_pairs(tmp_path/folder), bs=4), SeenCB()
        with seeded(0): model = segmenter('unet', 'mobilenetv3_small_050')
        fit_steps(segment_learner(dls, model, cbs=[ColourExchangeCB(), keep]), 2)
        found.append(torch.stack(keep.batches))
    assert torch.equal(*found)

def test_an_exchange_within_a_batch_moves_the_colours_only():
    x = torch.from_numpy(draw_lesions(3, 64, seed=5)[0]).permute(0, 3, 1, 2).float()/255
    assert torch.allclose(exchange_colours(x, torch.arange(3)), x, atol=1e-3)
    dark = torch.cat([x, .5*x[:1]])
    new = exchange_colours(dark, torch.tensor([3, 0, 1, 2]))
    assert new[0].mean() < x[0].mean() - .1
    both = torch.stack([new[0].flatten(), x[0].flatten()])
    assert torch.corrcoef(both)[0, 1] > .95
    assert exchange_colours(torch.zeros(2, 3, 8, 8), torch.tensor([1, 0])).isfinite().all()


# Settings ----------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', NAMES)
def test_another_size_is_refused(name, pairs):
    from medsyn.experiment import train_segmenter
    assert published(name, 352) is PRESETS[name]
    with pytest.raises(MedsynError, match=f'published settings of {name} are for 352 pixels, and 96'):
        train_segmenter(pairs, 'real', name, preset='paper')

def test_values_of_the_gradient_are_clipped(pairs):
    "Each element on its own: small ones stay as they are."
    class SpyCB(Callback):
        order = ClipValuesCB.order + 1
        def after_backward(self): self.found = self.values()
        def before_step(self): self.clipped = self.values()
        def values(self):
            return torch.cat([p.grad.flatten() for p in self.model.parameters() if p.grad is not None])
    with seeded(0): model = segmenter('polyp_pvt', SLIM['polyp_pvt'], size=64)
    spy = SpyCB()
    fit_steps(segment_learner(loaders(pairs), model, clip=None, cbs=[ClipValuesCB(1e-3), spy]), 1)
    assert spy.found.abs().max() > 1e-3 and torch.equal(spy.clipped, spy.found.clamp(-1e-3, 1e-3))

@pytest.mark.parametrize('kw,text', [
    (dict(network='unet', preset='paper'), 'unet has no published settings'),
    (dict(network='sanet', preset='papre'), "did you mean 'paper'")])
def test_wrong_presets(kw, text, pairs):
    from medsyn.experiment import train_segmenter
    with pytest.raises(MedsynError, match=text): train_segmenter(pairs, 'real', size=352, **kw)

@pytest.mark.parametrize('name', NAMES)
def test_preset_is_applied(name, pairs, monkeypatch):
    "At 64 pixels on a small encoder, otherwise as published."
    import medsyn.experiment as experiment
    monkeypatch.setitem(PRESETS, name, replace(PRESETS[name], size=64))
    augmented = []
    def spy(*args, augment, **kw):
        augmented.append(augment)
        return pair_dls(*args, augment=augment, **kw)
    monkeypatch.setattr(experiment, 'pair_dls', spy)
    kw = dict(size=64, steps=2, bs=4, preset='paper', device='cpu')
    learn = experiment.train_segmenter(pairs, 'real', name, SLIM[name], **kw)
    groups = learn.opt.opt.param_groups
    assert augmented == ['flip' if name == 'sanet' else 'none']
    sizes, = [c for c in learn.cbs if isinstance(c, MultiScaleCB)]
    clips = [c.limit for c in learn.cbs if isinstance(c, ClipValuesCB)]
    if name == 'sanet': assert sizes.rates[-1] == 1 and sizes.shares == (.1, .2, .3, .4) and clips == []
    else: assert sizes.rates == (.75, 1., 1.25) and sizes.shares is None and clips == [.5]
    if name == 'sanet':
        assert isinstance(learn.opt.opt, torch.optim.SGD) and groups[0]['nesterov']
        assert learn.history.frame().lr.tolist() == pytest.approx([.4, .2])     # halved after half of the run
        assert groups[1]['lr'] == pytest.approx(10*groups[0]['lr']) and groups[0]['weight_decay'] == 5e-4
        assert learn.loss_func is bce_dice and any(isinstance(c, ColourExchangeCB) for c in learn.cbs)
    else:
        assert isinstance(learn.opt.opt, torch.optim.AdamW) and groups[0]['weight_decay'] == 1e-4
        assert learn.history.frame().lr.tolist() == pytest.approx([1e-4]*2)
        assert learn.loss_func is structure_loss
    assert {p for group in groups for p in group['params']} == set(learn.model.parameters())


def test_a_comparison_stores_what_the_preset_used(pairs, tmp_path, monkeypatch):
    from medsyn.experiment import compare
    monkeypatch.setitem(PRESETS, 'sanet', replace(PRESETS['sanet'], size=64))
    test = lesion_folder(tmp_path/'t', 2, size=64, seed=9)
    out = compare(pairs, {'t': test}, {'real': 'real'}, tmp_path/'c', ['sanet'], seeds=[0], size=64, steps=1,
                  bs=4, encoder=SLIM['sanet'], preset='paper')
    stored = load_json(out/'compare.json')['nets']['sanet']
    assert (stored['lr'], stored['loss'], stored['augment']) == (.4, 'bce_dice', 'flip')


# By name -----------------------------------------------------------------------------------------

def test_catalog_names_them_all():
    assert list(NETWORKS)[:5] == ['unet', 'segformer', 'sanet', 'polyp_pvt', 'ctnet']

def test_command_line(tmp_path, capsys):
    "A comparison of networks, and one trained alone, from the command line."
    from medsyn.cli import main
    train, test = (lesion_folder(tmp_path/str(seed), 10, size=64, seed=seed) for seed in (0, 1))
    def medsyn(*words):
        try: return main([str(w) for w in words])
        except SystemExit as e: return e.code
    common = ['--steps', 1, '--bs', 4, '--size', 64, '--encoder', 'lcnet_075']
    assert not medsyn('compare', train, '--tests', test, '--out', tmp_path/'c', '--arms', 'real',
                      '--network', 'unet', *NAMES, '--seeds', 0, *common)
    assert all(name in (tmp_path/'c'/'table.md').read_text() for name in NAMES)
    assert not medsyn('segment', train, '--out', tmp_path/'s', '--network', 'ctnet', *common)
    assert Segmenter.from_pretrained(tmp_path/'s').config['name'] == 'ctnet'
    capsys.readouterr()
    assert medsyn('segment', train, '--out', tmp_path/'p', '--network', 'sanet', '--preset', 'paper', *common)
    assert 'are for 352 pixels, and 64 were asked for' in capsys.readouterr().err
    assert not (tmp_path/'p').exists()

def test_semi_supervised_terms_do_not_disturb_the_network(slim, pairs):
    "A second pass through the network in the same step leaves the first one's tensors alone."
    class SecondPassCB(Callback):
        order = -1
        def after_pred(self): self.learn.model(self.learn.xb[0].flip(-1))
    keep = KeepCB()
    fit_steps(segment_learner(loaders(pairs), slim['polyp_pvt'], cbs=[SecondPassCB(), keep]), 1)
    want = bce_dice(keep.prediction.side['intermediate'], keep.mask).item()
    assert keep.learn.terms['L_intermediate'].item() == pytest.approx(want, rel=1e-5)

def test_no_section_is_cited_of_papers_that_were_not_read():
    "The notebook says that the full text was not available, so it names no section."
    notebook = next(path for path in API if path.stem == '51_segment.polyp_nets')
    prose = ' '.join(source(cell) for cell in load(notebook)['cells'] if cell['cell_type'] == 'markdown')
    assert 'full text of the three papers was not available' in prose.replace('\n', ' ')
    assert 'Sec.' not in prose and '\u00a7' not in prose
