"The shared training loop: fastai's own fits run on every learner, with the losses of `fit_steps`."
import pytest
import torch
from fastai.callback.core import Callback
from fastai.callback.schedule import SchedNo
from torch.nn import functional as F

from medsyn import train
from medsyn.core import MedsynError, seeded
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone
from medsyn.generate.alignment import alignment_learner
from medsyn.generate.control import control_learner
from medsyn.generate.paired import paired_learners
from medsyn.generate.siamese import siamese_learner
from medsyn.segment.learner import segment_learner
from medsyn.segment.models import segmenter
from medsyn.train import ORDER, WeightedLossCB, fit_steps, share_done

SIZE, BATCHES = 16, 2

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return find_pairs(lesion_folder(tmp_path_factory.mktemp('train')/'toy', 16, SIZE, seed=2))

def loaders(pairs): return pair_dls(pairs, SIZE, bs=6, valid=.25, seed=0, augment=False, device='cpu')

def backbone():
    images = torch.from_numpy(draw_lesions(8, SIZE, seed=1)[0])
    return Backbone.tiny(images.permute(0, 3, 1, 2)/127.5 - 1, SIZE, channels=(16, 32))

def control(dls): return control_learner(dls, backbone())
def siamese(dls): return siamese_learner(dls, backbone())
def alignment(dls): return alignment_learner(dls, backbone())
def pig(dls): return paired_learners(dls, channels=(16, 32), attend=())
def pig_guider(dls): return pig(dls)[0]
def pig_generator(dls):
    guider, generator = pig(dls)
    with quiet(guider): guider.fit(1)
    return generator
def segment(dls):
    with seeded(0): net = segmenter('unet', 'resnet18', encoder_depth=3, decoder_channels=(16, 8, 8))
    return segment_learner(dls, net)

LEARNERS = dict(control=control, siamese=siamese, alignment=alignment, pig_guider=pig_guider,
                pig_generator=pig_generator, segment=segment)
each = pytest.mark.parametrize('name', LEARNERS)

class quiet:
    "Without progress bar and table of epochs."
    def __init__(self, learn): self.contexts = learn.no_bar(), learn.no_logging()
    def __enter__(self): [c.__enter__() for c in self.contexts]
    def __exit__(self, *error): [c.__exit__(*error) for c in self.contexts]

def columns(learn):
    "Every loss of every step: name -> values."
    log = learn.history.frame().drop(columns=['step', 'lr'])
    return {name: values.tolist() for name, values in log.items()}

@each
def test_fit_gives_the_losses_of_fit_steps(pairs, name, monkeypatch):
    monkeypatch.setitem(train.SCHEDULES, 'flat', lambda lr: SchedNo(lr, lr))
    by_epochs, by_steps = (LEARNERS[name](loaders(pairs)) for _ in range(2))
    assert len(by_epochs.dls.train) == BATCHES
    torch.manual_seed(0)
    with quiet(by_epochs): by_epochs.fit(1, 1e-3)
    torch.manual_seed(0)
    fit_steps(by_steps, BATCHES, 1e-3, schedule='flat')
    assert columns(by_epochs) == columns(by_steps)
    assert len(columns(by_epochs)['loss']) == BATCHES
    for a, b in zip(by_epochs.model.parameters(), by_steps.model.parameters(), strict=True):
        assert torch.equal(a, b)

@each
def test_fit_one_cycle_runs(pairs, name):
    learn = LEARNERS[name](loaders(pairs))
    with quiet(learn): learn.fit_one_cycle(2, 1e-3)
    assert (learn.steps.done, learn.steps.total) == (2*BATCHES, 2*BATCHES)
    assert learn.history.frame().loss.notna().all()

@each
def test_lr_find_runs_and_leaves_no_trace(pairs, name, tmp_path):
    learn = LEARNERS[name](loaders(pairs))
    learn.path = tmp_path
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    rows = len(learn.history.steps)
    with quiet(learn): learn.lr_find(num_it=6, show_plot=False, suggest_funcs=None)
    assert 0 < learn.steps.done <= learn.steps.total == 6
    assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    assert len(learn.history.steps) == rows and not learn.history.rows
    fit_steps(learn, 2, 1e-3)                   # the averaged weights start afresh
    assert all(v.isfinite().all() for v in learn.model.state_dict().values())

def test_the_averaged_weights_span_a_tenth_of_each_fit():
    model = torch.nn.Linear(1, 1)
    data = torch.utils.data.TensorDataset(torch.ones(4, 1), torch.ones(4, 1))
    batches = torch.utils.data.DataLoader(data, 4)
    learn = train.Learner(train_loaders(batches), model, loss_func=F.mse_loss, lr=1e-3,
                          cbs=train.common_cbs('cpu'))
    for steps, decay in ((160, 1 - 1/16), (110, 1 - 1/11)):
        fit_steps(learn, steps)
        assert learn.ema.avg.decay == pytest.approx(decay), steps

def train_loaders(batches):
    from fastai.data.core import DataLoaders
    return DataLoaders(batches, batches)

def test_share_done_in_every_fit(pairs):
    class Shares(Callback):
        def before_batch(self):
            if self.training: seen.append(share_done(self.learn))
    learn = segment(loaders(pairs))
    learn.add_cb(Shares())
    for fit in (lambda: learn.fit(2), lambda: learn.fit_one_cycle(2), lambda: fit_steps(learn, 4)):
        seen = []
        with quiet(learn): fit()
        assert seen == [0, .25, .5, .75]

# A weighted loss --------------------------------------------------------------------------------------------

class Weights(WeightedLossCB):
    def __init__(self, f, weight=1.): super().__init__(weight); self.f = f
    def weights(self): return self.f(self.learn)

def gradients(pairs, f=None, weight=1.):
    "Gradients of one batch of a denoiser, with the loss weighted by f(learner)."
    grads = []
    class Keep(Callback):
        order = ORDER['gates']
        def after_backward(self):
            grads.extend(p.grad.clone() for p in self.model.parameters() if p.grad is not None)
    learn = control(loaders(pairs))
    learn.add_cbs([Keep(), *([Weights(f, weight)] if f else [])])
    fit_steps(learn, 1)
    return grads, learn

def test_weights_of_one_change_nothing(pairs):
    plain, _ = gradients(pairs)
    for f in (lambda learn: torch.ones(6), lambda learn: torch.ones(6, 1, SIZE, SIZE)):
        got, learn = gradients(pairs, f)
        assert all(torch.equal(a, b) for a, b in zip(plain, got, strict=True))
        assert learn.history.frame().L_weighted.tolist() == [0]

def test_weights_scale_the_gradient(pairs):
    plain, _ = gradients(pairs)
    triple, learn = gradients(pairs, lambda learn: torch.full((6,), 3.))
    for a, b in zip(plain, triple, strict=True): torch.testing.assert_close(3*a, b, rtol=1e-4, atol=1e-7)
    none, _ = gradients(pairs, lambda learn: torch.full((6,), 3.), weight=0.)
    assert all(torch.equal(a, b) for a, b in zip(plain, none, strict=True))

class MoreWeights(Weights):
    name = 'L_more'

def test_weights_of_two_callbacks_multiply(pairs):
    small, large = torch.tensor([.1, .2, .3, .4, .5, .6]), torch.full((6,), 3.)
    product, _ = gradients(pairs, lambda learn: small*large)
    both = []
    class Keep(Callback):
        order = ORDER['gates']
        def after_backward(self):
            both.extend(p.grad.clone() for p in self.model.parameters() if p.grad is not None)
    learn = control(loaders(pairs))
    learn.add_cbs([Keep(), Weights(lambda learn: small), MoreWeights(lambda learn: large)])
    fit_steps(learn, 1)
    for a, b in zip(product, both, strict=True): torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)

def test_weights_may_depend_on_the_noised_batch(pairs):
    "The gradient of a loss weighted by the mask is that of the formula."
    got, learn = gradients(pairs, lambda learn: learn.noised.mask*4)
    n, model = learn.noised, learn.model
    model = control(loaders(pairs)).model                   # its weights before the step
    pred = model(n.zt, n.t, n.cond)
    w = F.adaptive_avg_pool2d(n.mask*4, pred.shape[-2:])
    loss = (w*(pred - n.target)**2).mean()
    params = [p for p in model.parameters() if p.requires_grad]
    want = [g for g in torch.autograd.grad(loss, params, allow_unused=True) if g is not None]
    for a, b in zip(want, got, strict=True): torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

def test_a_loss_that_cannot_be_weighted(pairs):
    learn = segment(loaders(pairs))
    learn.loss_func = lambda out, mask: (out[:, 0] - mask).abs().mean()
    learn.add_cb(Weights(lambda learn: torch.ones(6)))
    with pytest.raises(MedsynError, match="takes no reduction='none'"): fit_steps(learn, 1)
