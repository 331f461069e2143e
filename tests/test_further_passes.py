"Further passes of a step through networks with loss terms of their own: every pass has the whole loss."
import numpy as np
import pytest
import torch
from fastai.callback.core import Callback
from torch import nn

from medsyn.core import MedsynError, seeded
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls, split_pairs
from medsyn.segment.annealing import RealAnchorCB
from medsyn.segment.learner import bce_dice, segment_learner
from medsyn.segment.mixing import PairedMixCB, partner_dls
from medsyn.segment.models import segmenter
from medsyn.segment.polyp_nets import MultiScaleCB, own_terms, prediction_of, with_own_terms
from medsyn.segment.semi import TeacherCB, UnlabelledCB
from medsyn.segment.streams import RealAgainCB, SynthTermCB
from medsyn.train import fit_steps

pytestmark = pytest.mark.filterwarnings('ignore')

SIZE = 64
NETWORKS = dict(unet='mobilenetv3_small_050', polyp_pvt='pvt_v2_b0', ctnet='mit_b0')
OWN = ['polyp_pvt', 'ctnet']
HEADS = dict(polyp_pvt=['out_CFM', 'out_SAM'], ctnet=['contrasthead', 'prediction'])

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Ten real pairs, ten others, and the image files of the others."
    d = tmp_path_factory.mktemp('passes')
    real, other = (find_pairs(lesion_folder(d/str(seed), 10, size=SIZE, seed=seed)) for seed in (0, 1))
    return real, other, [p.image for p in other]

class SpyCB(Callback):
    "Keeps the loss that is differentiated, and which parameters it reaches."
    def before_backward(self): self.total = self.learn.loss_grad.item()
    def after_backward(self): self.grads = {n: p.grad.clone() for n, p in self.model.named_parameters()
                                            if p.grad is not None and p.grad.abs().sum() > 0}

def learner(data, network, cbs, partners=False):
    train, held = split_pairs(data[0], .2)
    dls = pair_dls(train, SIZE, 2, valid=held, seed=1, device='cpu')
    if partners: dls = partner_dls(dls, {p.name: [other] for p, other in zip(train, data[1], strict=False)})
    with seeded(0): model = segmenter(network, NETWORKS[network], size=SIZE)
    spy = SpyCB()
    return segment_learner(dls, model, clip=None, cbs=[*cbs, spy]), spy

def without_dropping(model):
    "Dropped values and skipped blocks would differ from pass to pass."
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
        if hasattr(m, 'drop_prob'): m.drop_prob = 0.

def column(learn, name): return learn.history.frame()[name].iloc[0]

@pytest.mark.parametrize('network', NETWORKS)
def test_while_only_the_stream_counts_the_real_batch_adds_nothing(data, network):
    learn, spy = learner(data, network, [SynthTermCB(data[1], schedule='first')])
    fit_steps(learn, 1)
    assert spy.total == pytest.approx(column(learn, 'L_syn'), rel=1e-5)

@pytest.mark.parametrize('network', OWN)
def test_a_stream_alone_trains_every_head(data, network):
    learn, spy = learner(data, network, [SynthTermCB(data[1], schedule='first')])
    fit_steps(learn, 1)
    for head in HEADS[network]: assert any(f'.{head}.' in name for name in spy.grads), head

@pytest.mark.parametrize('network', OWN)
def test_a_second_pass_of_the_same_images_doubles_the_loss(data, network):
    "Two passes over one batch: the second is worth what the first is, own terms included."
    class SameAgainCB(RealAgainCB):
        def draw(self): return self.learn.xb[0], self.learn.yb[0]
    learn, spy = learner(data, network, [SameAgainCB()])
    without_dropping(learn.model)
    fit_steps(learn, 1)
    assert spy.total == pytest.approx(2*column(learn, 'L_again'), rel=1e-4)

@pytest.mark.parametrize('network', OWN)
def test_a_mixed_batch_has_the_whole_loss(data, network):
    "Mixed with next to nothing, the second pass is worth what the first is, own terms included."
    learn, spy = learner(data, network, [PairedMixCB(1e-6, 1.)], partners=True)
    without_dropping(learn.model)
    fit_steps(learn, 1)
    assert spy.total == pytest.approx(2*column(learn, 'L_mix'), rel=1e-2)

@pytest.mark.parametrize('network', OWN)
def test_learned_mixing_reaches_every_head(data, network):
    learn, spy = learner(data, network, [PairedMixCB(.5, .8), RealAnchorCB(every=1)], partners=True)
    fit_steps(learn, 2)
    assert np.isfinite(learn.history.frame()[['L_mix', 'force_s', 'force_w']]).all(None)
    for head in HEADS[network]: assert any(f'.{head}.' in name for name in spy.grads), head

@pytest.mark.parametrize('network', OWN)
def test_one_batch_of_real_and_mixed_images_is_refused(data, network):
    learn, _ = learner(data, network, [PairedMixCB(passes=1)], partners=True)
    with pytest.raises(MedsynError, match='give passes=2'): fit_steps(learn, 1)

@pytest.mark.parametrize('method', ['fixmatch', 'mean-teacher'])
@pytest.mark.parametrize('network', OWN)
def test_frames_without_masks(data, network, method):
    student = UnlabelledCB(data[2], method, ramp=0, threshold=.5)
    learn, _ = learner(data, network, [TeacherCB(.9), student])
    fit_steps(learn, 2)
    disagreement = learn.history.frame().L_u
    assert np.isfinite(disagreement).all() and (disagreement > 0).all()

def test_student_and_teacher_are_compared_on_what_both_predict(data):
    "Without batch statistics and skipped blocks a network agrees with itself in training and in evaluation."
    with seeded(0): model = segmenter('polyp_pvt', NETWORKS['polyp_pvt'], size=SIZE, drop_path=0.)
    x = torch.rand(2, 3, SIZE, SIZE)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.eval()
    model.training = model.net.training = True
    out = model(x)
    with torch.no_grad(): evaluated = model.eval()(x)
    assert torch.allclose(prediction_of(out), evaluated, atol=1e-4)
    assert not torch.allclose(out, evaluated, atol=1e-2)

def test_a_stream_is_prepared_as_the_real_batch(data):
    "Colours are exchanged among the stream's own images, and both batches of a step have one size."
    class KeepCB(Callback):
        order = 50
        def before_batch(self): self.real = self.x
    class KeptStreamCB(SynthTermCB):
        def draw(self):
            self.drawn_x, y = super().draw()
            return self.drawn_x, y
        def as_the_real_batch(self, x, y):
            self.given = super().as_the_real_batch(x, y)
            return self.given
    train, held = split_pairs(data[0], .2)
    dls = pair_dls(train, SIZE, 2, valid=held, seed=1, device='cpu')
    with seeded(0): model = segmenter('sanet', 'resnet18', size=SIZE)
    stream, keep = KeptStreamCB(data[1]), KeepCB()
    learn = segment_learner(dls, model, cbs=[MultiScaleCB((1.5,)), stream, keep])
    fit_steps(learn, 1)
    x, y = stream.given
    assert x.shape[-2:] == y.shape[-2:] == keep.real.shape[-2:] == (96, 96)
    means = stream.drawn_x.mean((2, 3))
    assert torch.allclose(x.mean((2, 3)), means.flip(0), atol=.01)      # of two images, each has the other's
    assert not torch.allclose(x.mean((2, 3)), means, atol=.01)
    plain = segmenter('sanet', 'resnet18', size=SIZE, colours=False)
    assert plain.net.training_cbs() == [] and len(model.net.training_cbs()) == 1

def test_a_network_without_own_terms_has_the_plain_loss(data):
    learn, _ = learner(data, 'unet', [])
    out, mask = torch.randn(2, 1, 8, 8), torch.randint(0, 2, (2, 8, 8))
    assert own_terms(learn) == [] and torch.equal(with_own_terms(learn)(out, mask), bce_dice(out, mask))

def test_pixels_without_a_label_are_in_no_term(data):
    "A mask of which nothing is known: the stream's loss has no gradient."
    train, _ = split_pairs(data[0], .2)
    unknown = {p.name: np.ones((SIZE, SIZE), bool) for p in data[1]}
    for network in OWN:
        learn, spy = learner(data, network, [SynthTermCB(data[1], schedule='first', ignore=unknown)])
        fit_steps(learn, 1)
        assert not spy.grads, (network, list(spy.grads)[:3])
