"Overlap measures against slow, literal computations, and an evaluation of files."
import numpy as np
import pandas as pd
import pytest
import torch
from fastai.learner import Metric as FastaiMetric
from PIL import Image
from scipy import ndimage

from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs
from medsyn.evaluate.overlap import (CHEAP, METRICS, EMaxMetric, OverlapMetric, evaluate_segmenter,
                                     minmax, score, summarise, threshold_counts,
                                     dice_iou, weighted_f)


def maps(seed, shape=(31, 45)):
    "A smooth mask, and a prediction that has something to do with it."
    rng = np.random.default_rng(seed)
    f = ndimage.gaussian_filter(rng.normal(size=shape), 5)
    g = f > np.quantile(f, rng.uniform(.3, .95))
    p = 1/(1 + np.exp(-(f/f.std() + ndimage.gaussian_filter(rng.normal(0, 4, shape), 2))*rng.uniform(.3, 4)))
    return p, g


@pytest.mark.parametrize('seed', range(6))
@pytest.mark.parametrize('dtype', [np.float64, np.float32, np.float16])
def test_256_thresholds_against_a_loop(seed, dtype):
    p, g = maps(seed)
    p = p.astype(dtype)
    q, dice, iou = minmax(p), [], []
    for k in range(256):
        b = q >= k/255
        tp = (b & g).sum()
        dice.append(2*tp/(b.sum() + g.sum()) if tp else 0); iou.append(tp/(b | g).sum() if tp else 0)
    got = score(p, g)
    assert got['dice@256'] == pytest.approx(np.mean(dice), abs=1e-12)
    assert got['iou@256'] == pytest.approx(np.mean(iou), abs=1e-12)


def test_values_on_thresholds_are_counted_once():
    "k/255 reaches threshold k whatever the rounding of the product: an image that holds each of them."
    q = (np.arange(256)/255).reshape(16, 16)
    tp, fp = threshold_counts(q, np.ones((16, 16), bool))
    assert (tp == 256 - np.arange(256)).all() and not fp.any()
    tp, _ = threshold_counts(np.nextafter(q, -1).clip(0), np.ones((16, 16), bool))
    assert (tp[1:] == 255 - np.arange(1, 256)).all()


def naive_weighted_f(q, g):
    "Margolin et al.'s definition, neighbours by exhaustive search."
    e, fg = np.abs(q - g), np.argwhere(g)
    et, dist = e.copy(), np.zeros(g.shape)
    # the same choice among equals
    near = ndimage.distance_transform_edt(~g, return_distances=False, return_indices=True)
    for y, x in np.argwhere(~g):
        d = np.hypot(*(fg - (y, x)).T)
        dist[y, x] = d.min()
        assert np.hypot(near[0][y, x] - y, near[1][y, x] - x) == pytest.approx(d.min())
        et[y, x] = e[near[0][y, x], near[1][y, x]]
    k = np.array([[np.exp(-(i*i + j*j)/50) for j in range(-3, 4)] for i in range(-3, 4)]); k /= k.sum()
    pad = np.pad(et, 3)
    ea = np.array([[(pad[y:y+7, x:x+7]*k).sum() for x in range(g.shape[1])] for y in range(g.shape[0])])
    ew = np.where(g & (ea < e), ea, e)*np.where(g, 1, 2 - np.exp(np.log(.5)/5*dist))
    tp, fp, r = g.sum() - ew[g].sum(), ew[~g].sum(), 1 - ew[g].mean()
    p = tp/(tp + fp)
    return 2*p*r/(p + r)


@pytest.mark.parametrize('seed', range(4))
def test_weighted_f_against_the_definition(seed):
    p, g = maps(seed, (22, 27))
    assert weighted_f(minmax(p), g) == pytest.approx(naive_weighted_f(minmax(p), g), abs=1e-9)


def matlab_s(q, g):
    "S_alpha as the toolbox writes it, with 1-based indices."
    obj = lambda v: 2*v.mean()/(v.mean()**2 + 1 + v.std(ddof=1))
    rows, cols = g.shape
    cx = int(np.floor((g.sum(0)*np.arange(1, cols + 1)).sum()/g.sum() + .5))
    cy = int(np.floor((g.sum(1)*np.arange(1, rows + 1)).sum()/g.sum() + .5))
    def ssim(p, m):
        m = m.astype(float); n = p.size - 1
        x, y = p.mean(), m.mean()
        a = 4*x*y*((p - x)*(m - y)).sum()/n
        b = (x*x + y*y)*(((p - x)**2).sum() + ((m - y)**2).sum())/n
        return a/b if a else float(b == 0)
    area = rows*cols
    reg = (cx*cy*ssim(q[:cy, :cx], g[:cy, :cx]) + (cols - cx)*cy*ssim(q[:cy, cx:], g[:cy, cx:])
           + cx*(rows - cy)*ssim(q[cy:, :cx], g[cy:, :cx])
            + (cols - cx)*(rows - cy)*ssim(q[cy:, cx:], g[cy:, cx:]))/area
    u = g.mean()
    return max(0, .5*(u*obj(q[g]) + (1 - u)*obj(1 - q[~g])) + .5*reg)


@pytest.mark.parametrize('seed', range(6))
def test_s_and_e_against_the_toolbox(seed):
    p, g = maps(seed)
    q, got = minmax(p), score(p, g)
    assert got['s_alpha'] == pytest.approx(matlab_s(q, g), abs=1e-9)
    es = []
    for k in range(256):
        b = (q >= k/255).astype(float)
        x, y = b - b.mean(), g - g.mean()
        es.append((((2*x*y/(x*x + y*y + 2.2e-16)) + 1)**2/4).sum()/(g.size - 1))
    assert got['e_mean'] == pytest.approx(np.mean(es), abs=1e-9)
    assert got['e_max'] == pytest.approx(max(es), abs=1e-9)


def test_no_metric_is_nan_or_raises_in_the_corners():
    z, one = np.zeros((5, 7)), np.eye(7)[:5]
    for p in (z, z + 1, z + .5, one, 1 - one):
        for m in (z, z + 1, one, 1 - one):
            s = score(p, m)
            assert set(s) == set(METRICS) and np.isfinite(list(s.values())).all(), (p, m, s)
    assert score(z, z)['dice@0.5'] == 1 and score(z, z)['dice@256'] == 0


def test_mask_forms_are_the_same():
    p, g = maps(1)
    for m in (g, g.astype(np.uint8), g*np.uint8(255), torch.from_numpy(g).long(), torch.from_numpy(g)):
        assert score(p, m) == score(p, g)


def test_logits_are_enlarged_before_the_sigmoid():
    l = torch.randn(8, 8)*4
    g = np.zeros((32, 32), bool); g[4:20, 4:20] = True
    big = torch.nn.functional.interpolate(l[None, None], (32, 32), mode='bilinear', align_corners=False)
    big = big[0, 0].sigmoid()
    assert score(l, g, logits=True) == score(big, g) == score(torch.stack([0*l, l]), g, logits=True)


@pytest.mark.parametrize('metric', list(METRICS))
def test_metric_class_is_the_mean_of_scores(metric):
    torch.manual_seed(0)
    l, m = torch.randn(5, 1, 16, 16), (torch.rand(5, 16, 16) > .6).long()
    o = OverlapMetric(metric)
    assert isinstance(o, FastaiMetric)
    assert o.name == metric
    assert o.higher_is_better == (metric not in ('mae', 'hd95'))
    o.update(l[:2], m[:2]); o.update(l[2:], m[2:, None])
    want = np.mean([score(a[0], b, [metric], logits=True)[metric] for a, b in zip(l, m)])
    assert float(o.compute()) == pytest.approx(want, rel=1e-6) == o.value


def test_the_toolbox_maximum_is_not_the_mean_of_maxima():
    torch.manual_seed(0)
    l = torch.randn(5, 1, 16, 16)*torch.linspace(.1, 4, 5)[:, None, None, None]
    m = (torch.rand(5, 16, 16) > .6).long()
    a, b = EMaxMetric(), OverlapMetric('e_max')
    a.update(l, m); b.update(l, m)
    assert a.value < b.value


class Threshold(torch.nn.Module):
    "A 'network' that finds red pixels: its prediction is known."
    stride, config = 1, dict(name='red', size=None)
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x): return 40*(x[:, :1] - .5)


def test_evaluation_of_files(tmp_path):
    "Masks of three sizes, painted red into the images: everything is found, at the size on disk."
    rng = np.random.default_rng(0)
    for k in ('images', 'masks'): (tmp_path/k).mkdir()
    for i, s in enumerate([(40, 40), (60, 30), (80, 80)]):
        m = np.zeros(s, np.uint8); m[5:20, 5:25] = 255
        im = rng.integers(0, 90, (*s, 3), dtype=np.uint8); im[m > 0, 0] = 255
        Image.fromarray(m).save(tmp_path/'masks'/f'{i}.png')
        Image.fromarray(im).save(tmp_path/'images'/f'{i}.png')
    df = evaluate_segmenter(Threshold(), {'red': tmp_path}, size=240, metrics=[*CHEAP, 'hd95'])
    assert list(df.name) == ['0', '1', '2'] and (df['dice@0.5'] > .97).all() and (df.hd95 <= 1).all()
    with pytest.raises(MedsynError, match='do not fit|is empty|no image'):
        evaluate_segmenter(Threshold(), {'a': []})


def test_fastai_uses_the_metric(tmp_path):
    from medsyn.data.pairs import pair_dls
    from medsyn.segment.learner import segment_learner
    from medsyn.segment.models import segmenter
    pairs = find_pairs(lesion_folder(tmp_path/'d', 12, size=32))
    dls = pair_dls(pairs[:8], size=32, bs=4, valid=pairs[8:], device='cpu')
    net = segmenter('unet', 'mobilenetv3_small_050', classes=2)
    metrics = [OverlapMetric('dice@256'), EMaxMetric()]
    learn = segment_learner(dls, net, loss='cross_entropy', metrics=metrics)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    df = evaluate_segmenter(learn.model, {'v': pairs[8:]}, size=32)
    assert learn.recorder.metric_names[-3:-1] == ['dice@256', 'e_max']
    assert learn.recorder.values[-1][-2] == pytest.approx(df['dice@256'].mean(), abs=1e-3)


def test_published_averages():
    n = dict(zip('EVKCT', (60, 62, 100, 380, 196)))
    def rows(values):
        images = [(testset, str(i), v) for (testset, k), v in zip(n.items(), values) for i in range(k)]
        return pd.DataFrame(images, columns=['testset', 'name', 'dice@256'])

    sanet, free_lunch = (summarise(rows(v))['dice@256'] for v in ([88.8, 91.6, 90.4, 75.3, 75.0],
                                                                   [93.2, 81.8, 92.0, 90.6, 80.4]))
    assert sanet['Overall'] == pytest.approx(79.40, abs=.005)
    assert free_lunch['AVE'] == pytest.approx(87.59, abs=.011)
    assert list(summarise(rows([88.8, 91.6, 90.4, 75.3, 75.0]).query("testset == 'E'")).index) == ['E']


def test_seeds_may_be_stacked():
    one = pd.DataFrame(dict(testset=['a']*3 + ['b'], name=list('0123')))
    df = pd.concat([one.assign(seed=s, **{'dice@0.5': [.1*s, .2, .3, 1]}) for s in range(3)])
    t = summarise(df)
    assert list(t.n) == [3, 1, 4, 4] and t.loc['Overall', 'dice@0.5'] == pytest.approx(df['dice@0.5'].mean())


def test_dice_iou_of_counts():
    np.testing.assert_allclose(dice_iou(3, 1, 5), (6/9, 3/6))
    np.testing.assert_allclose(dice_iou(0, 0, 0), (0, 0))
