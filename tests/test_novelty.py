"Planted copies are found, in rendered and real images; precision, recall, density, coverage against loops."
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance
from torch import nn

from medsyn.core import MedsynError
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.evaluate.fidelity import FLIPS
from medsyn.evaluate.novelty import nearest, novelty, pixel_vectors, prdc, reduced, show_closest


def jpeg(a, quality=70):
    import io
    b = io.BytesIO(); Image.fromarray(a).save(b, 'jpeg', quality=quality)
    return np.asarray(Image.open(b))


def enhanced(kind, a, factor):
    return np.asarray(kind(Image.fromarray(np.ascontiguousarray(a))).enhance(factor))

def noisy(a): return (a + np.random.default_rng(0).normal(0, 8, a.shape)).clip(0, 255).astype(np.uint8)

COPIES = {'copy': lambda a: a, 'mirrored': lambda a: a[:, ::-1],
          'upside down': lambda a: a[::-1], 'turned': lambda a: a[::-1, ::-1],
          'brightened': lambda a: np.asarray(ImageEnhance.Brightness(Image.fromarray(a)).enhance(1.15)),
          'darkened and mirrored': lambda a: enhanced(ImageEnhance.Brightness, a[:, ::-1], .85),
          'contrast': lambda a: enhanced(ImageEnhance.Contrast, a, .7), 'jpeg': jpeg,
          'noisy': noisy,
          'shifted': lambda a: np.roll(a, 1, axis=1)}


@pytest.fixture(scope='module')
def drawn(): return draw_lesions(50, size=64, seed=0)[0], draw_lesions(20, size=64, seed=77)[0]


@pytest.mark.parametrize('kind', list(COPIES))
def test_a_planted_copy_is_the_closest(drawn, kind):
    real, fake = drawn[0], drawn[1].copy()
    fake[5] = COPIES[kind](real[33])
    f = novelty(real, fake).frame
    assert f.d_pixel.idxmin() == 5 and f.index_pixel[5] == 33 and f.close[5] and f.rank_pixel[5] == 0
    flips = {'mirrored': 'h', 'upside down': 'v', 'turned': 'hv', 'darkened and mirrored': 'h'}
    assert f.flip_pixel[5] == flips.get(kind, '')


@pytest.mark.parametrize('kind', ['copy', 'mirrored', 'upside down', 'turned', 'brightened'])
def test_in_features_too(drawn, kind):
    from medsyn.segment.models import segmenter
    torch.manual_seed(0)
    real, fake = drawn[0], drawn[1].copy()
    # features are not blind to light
    fake[5] = np.minimum(real[33]*1.04, 255).round() if kind == 'brightened' else COPIES[kind](real[33])
    n = novelty(real, fake, segmenter('unet', 'resnet18', size=64), device='cpu')
    assert n.frame.d_feature.idxmin() == 5 and n.frame.index_feature[5] == 33 and n.frame.close_feature[5]
    assert list(n.summary.space) == ['pixel', 'feature'] and n.summary.extractor[1].startswith('unet ')


def test_files_and_names(drawn, tmp_path):
    f = lesion_folder(tmp_path/'real', 12, size=64, seed=0)
    (tmp_path/'fake').mkdir()
    for i in range(4): Image.fromarray(drawn[1][i]).save(tmp_path/'fake'/f's{i}.png')
    copy = Image.open(f/'images'/'0007.png').transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    copy.save(tmp_path/'fake'/'s9.png')
    n = novelty(f, tmp_path/'fake', nn.Conv2d(3, 6, 5), cache=tmp_path/'cache', device='cpu')
    row = n.frame.set_index('name').loc['s9.png']
    assert row.nearest_pixel == '0007.png'
    assert row.flip_pixel == 'h'
    assert row.close
    assert row.nearest_feature == '0007.png'
    again = novelty(f, tmp_path/'fake', nn.Conv2d(3, 6, 5), device='cpu')
    assert again.frame.d_pixel.equals(n.frame.d_pixel)
    out = show_closest(n, n=3, path=tmp_path/'closest.png')
    assert Image.open(out).size[0] > 100


def test_duplicates_inside_the_training_set_do_not_hide_a_copy(drawn):
    # every image twice: the line is at 0
    real = np.concatenate([drawn[0][:20], drawn[0][:20]])
    fake = drawn[1].copy(); fake[2] = real[4]
    n = novelty(real, fake)
    assert n.summary.threshold[0] == pytest.approx(0, abs=1e-6)
    assert n.frame.close[2]
    assert n.frame.close.sum() == 1


def test_mixed_sizes_and_grey(tmp_path, drawn):
    (tmp_path/'r').mkdir()
    for i, s in enumerate([64, 48, 100, 64]):
        image = Image.fromarray(drawn[0][i]).resize((s, s)).convert('L' if i % 2 else 'RGB')
        image.save(tmp_path/'r'/f'{i}.png')
    n = novelty(tmp_path/'r', drawn[0][:3])
    assert n.frame.index_pixel[0] == 0 and n.frame.d_pixel[0] < .02


def test_distances_by_brute_force(drawn):
    real, fake = (reduced(x[:9], 16) for x in drawn)
    d, i, f = nearest(pixel_vectors(fake), {k: pixel_vectors(real, k) for k in FLIPS}, cosine=True, chunk=4)
    for m, a in enumerate(fake):
        best = []
        for j, b in enumerate(real):
            for k, flip in FLIPS.items():
                x, y = (o.astype(float) - o.mean((0, 1)) for o in (a, flip(b)))
                best.append((1 - (x*y).sum()/np.sqrt((x**2).sum()*(y**2).sum()), j, k))
        assert min(best)[0] == pytest.approx(d[m], abs=1e-5) and min(best)[1:] == (i[m], f[m])


def test_refusals(drawn):
    with pytest.raises(MedsynError, match='at least three'): novelty(drawn[0][:2], drawn[1])
    with pytest.raises(MedsynError, match='from 0 to 100'): novelty(*drawn, q=-1)
    with pytest.raises(MedsynError, match='is not a folder'): novelty('nowhere', drawn[1])
    with pytest.raises(MedsynError, match='need more than 5 of each'):
        prdc(torch.rand(4, 2), torch.rand(9, 2))
    with pytest.raises(MedsynError, match='choose pixel'): show_closest(novelty(*drawn), space='feature')


@pytest.mark.parametrize('seed', range(3))
@pytest.mark.parametrize('k', [1, 3, 5])
def test_prdc_by_loops(seed, k):
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(25, 3, generator=g, dtype=torch.float64)
    b = torch.randn(31, 3, generator=g, dtype=torch.float64)*.8 + .3
    dist = lambda x, y: float((x - y).norm())
    ra = [sorted(dist(x, y) for y in a)[k] for x in a]
    rb = [sorted(dist(x, y) for y in b)[k] for x in b]
    want = dict(precision=np.mean([any(dist(y, x) <= r for x, r in zip(a, ra)) for y in b]),
                recall=np.mean([any(dist(x, y) <= r for y, r in zip(b, rb)) for x in a]),
                density=sum(dist(y, x) <= r for y in b for x, r in zip(a, ra))/k/len(b),
                coverage=np.mean([min(dist(x, y) for y in b) <= r for x, r in zip(a, ra)]))
    assert prdc(a, b, k, chunk=8) == pytest.approx(want)


@pytest.mark.data
@pytest.mark.skipif('MEDSYN_DATA' not in os.environ, reason='MEDSYN_DATA is not set')
def test_copies_among_real_polyps():
    "60 frames of three hospitals to train on; frames of a fourth as synthetic ones, copies among them."
    import pandas as pd
    root = Path(os.environ['MEDSYN_DATA'])/'polypgen'
    table = pd.read_csv(root/'manifest.csv', dtype=str)
    files = sorted((root/'images').glob('*.jpg'))
    load = lambda p: np.asarray(Image.open(p).convert('RGB').resize((128, 128)))
    real, fake = np.stack([load(p) for p in files[0:480:8]]), np.stack([load(p) for p in files[700:900:8]])
    assert len(table) >= len(files) > 880
    for i, f in enumerate(COPIES.values()): fake[2*i] = f(real[5*i])
    got = novelty(real, fake).frame
    assert got.close[[2*i for i in range(len(COPIES))]].all()
    assert list(got.index_pixel[[2*i for i in range(len(COPIES))]]) == [5*i for i in range(len(COPIES))]
    print(got.close.drop([2*i for i in range(len(COPIES))]).mean())
