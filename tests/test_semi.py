"""Teacher, pseudo-labels and the diffusion U-Net as a segmenter, on a real network."""
import numpy as np
import pytest
import torch
from PIL import Image

from medsyn.core import MedsynError, seeded
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls, read_image
from medsyn.diffusion.backbone import Backbone
from medsyn.segment.learner import segment_learner
from medsyn.segment.models import Segmenter, segmenter
from medsyn.segment.semi import TeacherCB, UnlabelledCB, check_unlabelled, diffusion_segmenter
from medsyn.segment.semi import dropped_features, mix_boxes, move_labels, pseudo_labels, ramp_up, small_moves
from medsyn.segment.streams import IGNORE
from medsyn.train import evaluating, fit_steps

SIZE = 32

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    d = tmp_path_factory.mktemp('semi')
    real = find_pairs(lesion_folder(d/'real', 16, size=SIZE, seed=0))
    return real, [p.image for p in find_pairs(lesion_folder(d/'frames', 12, size=SIZE, seed=1))]

def train(data, cbs=(), steps=3, model=None, **kw):
    dls = pair_dls(data[0], SIZE, 4, valid=.25, seed=1, augment='strong', device='cpu')
    with seeded(0):
        model = model or segmenter('unet', 'mobilenetv3_small_050', size=SIZE)
        return fit_steps(segment_learner(dls, model, cbs=list(cbs), **kw), steps, 1e-3)

def state(model): return torch.cat([v.double().flatten() for v in model.state_dict().values()])

@pytest.mark.parametrize('method', ['fixmatch', 'mean-teacher'])
def test_limits_bit_for_bit(data, method):
    plain = state(train(data).model)
    student = dict(threshold=.5, ramp=0.)
    for term in (UnlabelledCB([], method), UnlabelledCB(data[1], method, w=0)):
        assert torch.equal(state(train(data, [TeacherCB(0.), term]).model), plain)
    tiny = UnlabelledCB(data[1], method, w=1e-30, drop=.3, **student)
    traces = state(train(data, [TeacherCB(0.), tiny]).model) - plain
    assert traces.abs().max() < 1e-20           # the term itself where the real gradient is 0, nothing else
    full = UnlabelledCB(data[1], method, **student)
    assert not torch.equal(state(train(data, [TeacherCB(0.), full]).model), plain)

def test_the_teacher_is_what_is_evaluated_and_kept(data):
    learn = train(data, [TeacherCB(.9)], ema=.99)
    assert torch.equal(state(learn.model), state(learn.ema.teacher))
    assert sum(isinstance(c, TeacherCB) for c in learn.cbs) == 1
    with evaluating(learn) as model: assert torch.equal(state(model), state(learn.ema.teacher))
    assert not any(p.requires_grad for p in learn.ema.teacher.parameters())

def test_labels_follow_every_move():
    "A random label map goes through moves and boxes as an image of itself does."
    rng = torch.Generator().manual_seed(0)
    blocks = torch.rand(6, 1, 4, 4, generator=rng).round().repeat_interleave(8, 2).repeat_interleave(8, 3)
    moves = small_moves(6, rng)
    from medsyn.data.paste import move
    image, labels = move(blocks.expand(-1, 3, -1, -1), moves), move_labels(blocks[:, 0].long(), moves)
    image, labels = mix_boxes(image, labels, torch.Generator().manual_seed(1), 1.)
    known = labels != IGNORE
    sharp = known & ((image[:, 0] - .5).abs() > .45)            # away from interpolated borders
    assert sharp.float().mean() > .5
    assert torch.equal((image[:, 0] > .5)[sharp], (labels == 1)[sharp])

def test_confidence_and_ramp():
    p = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = pseudo_labels(p, .8)
    assert ((labels == 1) == (p >= .8)).all() and ((labels == 0) == (1 - p >= .8)).all()
    values = [ramp_up(s, .5) for s in np.linspace(0, 1, 11)]
    assert values == sorted(values) and values[5:] == [1.]*6

def test_features_are_dropped_only_inside(data):
    model = segmenter('unet', 'mobilenetv3_small_050', size=SIZE).eval()
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(x)
        with dropped_features(model, .5): inside = model(x)
        assert torch.equal(model(x), before) and not torch.equal(inside, before)
        with dropped_features(model, 0.): assert torch.equal(model(x), before)

def test_frames_that_are_labelled_or_test_images_are_refused(data, tmp_path):
    "By content: another name and another file format make no other image."
    copy = tmp_path/'other.bmp'
    Image.fromarray(read_image(data[0][3].image)).save(copy)
    with pytest.raises(MedsynError, match='1 unlabelled frame'):
        train(data, [TeacherCB(), UnlabelledCB([*data[1], copy])])
    with pytest.raises(MedsynError, match='test images'): check_unlabelled([copy], data[0], 'test')
    check_unlabelled(data[1], data[0], 'test')

def test_a_diffusion_backbone_as_a_segmenter(data, tmp_path):
    x0 = torch.stack([torch.from_numpy(read_image(p.image)) for p in data[0]]).permute(0, 3, 1, 2)/127.5 - 1
    bb = Backbone.tiny(x0, SIZE, channels=(16, 32))
    before = state(bb)
    model = diffusion_segmenter(bb, classes=2)
    assert model(torch.rand(2, 3, SIZE, SIZE)).shape == (2, 2, SIZE, SIZE)
    learn = train(data, model=diffusion_segmenter(bb), steps=2)
    assert torch.equal(state(bb), before)                       # the backbone is copied
    learn.model.eval().save_pretrained(tmp_path/'seg')
    again = Segmenter.from_pretrained(tmp_path/'seg')
    x = torch.rand(1, 3, SIZE, SIZE)
    with torch.no_grad(): assert torch.allclose(again(x), learn.model(x), atol=1e-5)
    with pytest.raises(MedsynError, match='multiples of'): model(torch.rand(1, 3, SIZE + 2, SIZE))
