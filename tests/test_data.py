"Rendered lesions, loaders and masks, where their notebooks stop; and the real sets of MEDSYN_DATA."
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fastai.torch_core import TensorImage, TensorMask

from medsyn.core import MedsynError
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.masks import MASK_KINDS, random_mask, transform_mask
from medsyn.data.pairs import (StrongAugment, _strong, _warped, check_pairs, find_images, find_pairs,
                               group_of, image_dls, pair_dls, random_stream, read_pair, same_images,
                               split_pairs)
from medsyn.viz import contour

REAL = os.environ.get('MEDSYN_DATA')
real = pytest.mark.skipif(not REAL, reason='MEDSYN_DATA is not set: no real image sets here')

@pytest.fixture(scope='module')
def pairs(tmp_path_factory):
    return find_pairs(lesion_folder(tmp_path_factory.mktemp('data')/'toy', 20, 48, seed=3))

# Lesions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [16, 32, 65, 200])
def test_lesions_at_any_size(size):
    x, m = draw_lesions(6, size, seed=4)
    assert x.shape == (6, size, size, 3) and x.dtype == np.uint8
    assert m.shape == (6, size, size) and set(np.unique(m)) == {0, 1}
    assert m.any((1, 2)).all() and .015 < m.mean((1, 2)).min() and m.mean((1, 2)).max() < .36
    assert x.std((1, 2)).min() > 8                                              # no flat picture

def test_lesions_keep_their_area_at_all_sizes():
    small, big = (draw_lesions(12, s, seed=9)[1].mean((1, 2)) for s in (32, 160))
    np.testing.assert_allclose(small, big, atol=.02)

def test_lesions_are_the_same_in_another_process():
    code = ("from medsyn.core import content_hash; from medsyn.data.lesions import draw_lesions; "
            "print(content_hash(*draw_lesions(3, 40, 5)))")
    def run(hash_seed):
        env = {**os.environ, 'PYTHONHASHSEED': str(hash_seed)}
        command = [sys.executable, '-c', code]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return done.stdout
    assert run(0) == run(1)

def test_lesion_folder_goes_on_and_refuses(tmp_path):
    f = lesion_folder(tmp_path/'a', 5, 32, seed=1)
    before = {p.name: p.read_bytes() for p in f.rglob('*.png')}
    (f/'images'/'0002.png').unlink()
    lesion_folder(f, 5, 32, seed=1)
    assert {p.name: p.read_bytes() for p in f.rglob('*.png')} == before
    with pytest.raises(MedsynError, match='n was 5, now 6'): lesion_folder(f, 6, 32, seed=1)
    (tmp_path/'b').mkdir(); (tmp_path/'b'/'mine.txt').touch()
    with pytest.raises(MedsynError, match='is not empty'): lesion_folder(tmp_path/'b', 5, 32)
    for bad in [dict(n=0), dict(n=3, size=8)]:
        with pytest.raises(MedsynError, match='cannot draw'): lesion_folder(tmp_path/'c', **bad)
    assert not (tmp_path/'c').exists()

def test_lesion_appearance_depends_on_the_mask():
    "Colour relative to the picture's median differs inside a lesion: there is something to learn."
    x, m = draw_lesions(120, 48, seed=8)
    chroma = x/np.maximum(x.sum(-1, keepdims=True), 12)
    own = abs(chroma - np.median(chroma.reshape(120, -1, 3), 1)[:, None, None]).sum(-1)
    lesion, rest = own[m == 1], own[m == 0]
    assert np.median(lesion) > 1.3*np.median(rest)

# Loaders ----------------------------------------------------------------------------------------------------

def first(dls): return [t.clone() for t in dls.one_batch()]

def test_training_and_validation_share_nothing(pairs):
    dls = pair_dls(pairs, 32, bs=4, valid=.25, device='cpu')
    assert not {*dls.pairs_train} & {*dls.pairs_valid}
    assert sorted(dls.pairs_train + dls.pairs_valid) == sorted(pairs)
    # none is dropped from validation
    assert len(dls.pairs_valid) == sum(len(b[0]) for b in dls.valid) == 5

def test_validation_is_not_augmented_and_in_order(pairs):
    dls = pair_dls(pairs[4:], 32, bs=4, valid=pairs[:4], device='cpu')
    x, y = next(iter(dls.valid))
    for i, p in enumerate(pairs[:4]):
        image, mask = read_pair(p, 32)
        np.testing.assert_allclose(x[i].permute(1, 2, 0).numpy(), image/255, atol=1e-6)
        np.testing.assert_array_equal(y[i].numpy(), mask)

@pytest.mark.parametrize('augment', [True, 'strong', 'flip', False])
def test_seeded_whatever_else_draws(pairs, augment):
    runs = []
    for noise in range(2):
        torch.manual_seed(noise); random.seed(noise); np.random.seed(noise)
        dls = pair_dls(pairs, 32, bs=4, seed=5, augment=augment, device='cpu')
        if noise: dls.one_batch(); dls.show_batch(show=False)
        epochs = []
        for _ in range(2):
            for x, y in dls.train:
                epochs.append(np.concatenate([x.numpy().ravel(), y.numpy().ravel()]))
                if noise: torch.rand(3); random.random()
        runs.append(np.stack(epochs))
    np.testing.assert_array_equal(*runs)

def test_the_loader_leaves_the_global_generators_alone(pairs):
    dls = pair_dls(pairs, 32, bs=4, device='cpu', num_workers=0)
    it = iter(dls.train); next(it)
    random.seed(1); torch.manual_seed(1)
    want = random.random(), torch.rand(1).item()
    random.seed(1); torch.manual_seed(1)
    next(it)
    assert (random.random(), torch.rand(1).item()) == want

def test_every_training_pair_is_seen(pairs):
    dls = pair_dls(pairs, 32, bs=3, augment=False, device='cpu')
    seen = {x.numpy().tobytes() for b in dls.train for x in b[0]}
    # drop_last drops less than a batch, each epoch another
    assert len(seen) == len(dls.pairs_train)//3*3

@pytest.mark.parametrize('n,bs,want', [(8, 16, 7), (9, 4, 4), (20, 64, 18)])
def test_small_sets_shrink_the_batch(pairs, n, bs, want):
    dls = pair_dls(pairs[:n], 32, bs=bs, device='cpu')
    assert dls.train.bs == want and len(dls.train) >= 1

def test_cache_and_no_cache_agree(pairs):
    cached, decoded = (first(pair_dls(pairs, 32, bs=4, cache=cache, device='cpu')) for cache in (True, False))
    for a, b in zip(cached, decoded, strict=True): assert (a == b).all()

def test_a_damaged_pair_shows_before_training(tmp_path):
    f = lesion_folder(tmp_path/'a', 9, 32)
    p = f/'images'/'0004.png'; p.write_bytes(p.read_bytes()[:300])
    with pytest.raises(MedsynError, match='0004.png'): pair_dls(find_pairs(f), 32, device='cpu')

def test_augmentation_stays_in_range_and_moves(pairs):
    plain, moved = (first(pair_dls(pairs, 48, bs=16, augment=a, device='cpu')) for a in (False, True))
    assert moved[0].min() >= 0 and moved[0].max() <= 1
    assert set(moved[1].unique().tolist()) == {0, 1} and moved[1].dtype == torch.int64
    assert (moved[1].numpy() != plain[1].numpy()).any((1, 2)).mean() > .6        # most masks move
    before, after = plain[1].float().mean().item(), moved[1].float().mean().item()
    assert .7 < after/before < 1.7                                               # and stay in the picture

def test_strong_augmentation_keeps_masks_two_valued_and_every_lesion(pairs):
    dls = pair_dls(pairs, 48, bs=18, augment='strong', device='cpu')
    masks = [dls.one_batch()[1]]
    for x, y in dls.train:
        assert x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1
        masks.append(y)
    for y in masks:
        assert y.dtype == torch.int64 and set(y.unique().tolist()) == {0, 1}
        assert y.flatten(1).any(1).all()

def test_strong_augmentation_is_seeded_by_the_epoch(pairs):
    a, b = (pair_dls(pairs, 32, bs=18, augment='strong', device='cpu') for _ in range(2))
    (x0, y0), (x1, y1) = a.train.one_batch(), b.train.one_batch()
    assert (x0 == x1).all() and (y0 == y1).all()
    first, second = (next(iter(a.train)) for _ in range(2))
    assert (first[0] != second[0]).any() and (first[1] != second[1]).any()

def test_strong_augmentation_differs_from_sample_to_sample():
    image = TensorImage(torch.rand(1, 3, 32, 32).expand(6, -1, -1, -1).clone())
    mask = TensorMask((image[:, 0] > .5).long())
    with random_stream(1): x, y = StrongAugment()((image, mask), split_idx=0)
    for i in range(5): assert (x[i] != x[i + 1]).any() and (y[i] != y[i + 1]).any()

def test_strong_augmentation_treats_two_images_of_a_sample_alike():
    image, mask = TensorImage(torch.rand(4, 3, 32, 32)), TensorMask(torch.ones(4, 32, 32).long())
    twice = image, TensorImage(image.clone()), mask
    with random_stream(2): x, partner, _ = StrongAugment()(twice, split_idx=0)
    assert (x == partner).all()

def test_strong_augmentation_of_an_image_that_is_not_square():
    image, mask = TensorImage(torch.rand(4, 3, 32, 64)), TensorMask((torch.rand(4, 32, 64) > .5).long())
    with random_stream(2): x, y = StrongAugment()((image, mask), split_idx=0)
    assert x.shape == image.shape and y.shape == mask.shape

def drawn_by_a_first_pass(batch):
    "The strong augmentation in two passes: kornia draws while it augments, then repeats the draws."
    image = batch[0].as_subclass(torch.Tensor)
    geometry, colour = _strong(*image.shape[-2:])
    colour(geometry(image))
    draws, colour_draws = geometry._params, colour._params
    moved = [_warped(part, geometry, draws) for part in batch]
    lost = (batch[-1] > 0).flatten(1).any(1) & ~(moved[-1] > 0).flatten(1).any(1)
    assert 0 < lost.sum() < len(lost)
    new = [torch.where(lost.reshape(-1, *[1]*(a.ndim - 1)), torch.Tensor(a).to(b), b)
           for a, b in zip(batch, moved, strict=True)]
    coloured = [colour(part, params=colour_draws, data_keys=['image']).clamp(0, 1) for part in new[:-1]]
    return [*coloured, new[-1]]

def test_strong_augmentation_warps_once_with_the_draws_of_two_passes():
    mask = torch.zeros(24, 32, 48, dtype=torch.long)
    mask[:, :4, :4] = 1                                     # in a corner: some draws lose it
    batch = *[TensorImage(torch.rand(24, 3, 32, 48)) for _ in range(2)], TensorMask(mask)
    with random_stream(5): expected, after = drawn_by_a_first_pass(batch), torch.rand(1)
    with random_stream(5): found, then = StrongAugment()(batch, split_idx=0), torch.rand(1)
    for a, b in zip(expected, found, strict=True): assert (a == b).all()
    assert after == then                                    # as many random numbers are used

def test_images_alone_are_seeded(pairs):
    files = [p.image for p in pairs]
    epochs = []
    for _ in range(2):
        dl = image_dls(files, 32, bs=6, seed=4, augment='full', device='cpu')
        epochs.append(torch.cat([x for _ in range(2) for x, in dl]))
    assert (epochs[0] == epochs[1]).all()
    assert (epochs[0][:18] != epochs[0][18:]).any()

@pytest.mark.parametrize('valid', [.05, .1, .5, .9])
def test_split_sizes(pairs, valid):
    a, b = split_pairs(pairs, valid)
    assert len(a) + len(b) == 20 and len(a) >= 1 and abs(len(b) - max(1, 20*valid)) <= 1

@pytest.mark.parametrize('valid', [0, 1, -1, 2])
def test_split_refuses(pairs, valid):
    with pytest.raises(MedsynError, match='no share'): split_pairs(pairs, valid)

def test_a_learner_trains_on_it(pairs):
    from fastai.learner import Learner
    dls = pair_dls(pairs, 32, bs=6, device='cpu')
    net = torch.nn.Conv2d(3, 1, 3, padding=1)
    def loss(p, y):
        p, y = p.as_subclass(torch.Tensor)[:, 0], y.as_subclass(torch.Tensor).float()
        return torch.nn.functional.binary_cross_entropy_with_logits(p, y)
    learn = Learner(dls, net, loss, train_bn=False)
    learn.logger = lambda *_: None
    learn.fit(8, 1e-2)
    assert learn.recorder.values[-1][0] < learn.recorder.values[0][0]

# Masks ------------------------------------------------------------------------------------------------------

def test_random_masks_are_valid_and_seeded():
    m = draw_lesions(30, 48, seed=2)[1]
    for i, k in enumerate(m):
        (a, p), (b, q) = (random_mask(k, np.random.default_rng(i)) for _ in range(2))
        assert p == q and (a == b).all()
        assert a.dtype == np.uint8 and set(np.unique(a)) == {0, 1} and a.flags.c_contiguous
        assert (a == transform_mask(k, **{o: v for o, v in p.items() if o not in ('kind', 'tries')})[0]).all()

def test_refused_random_masks_say_why():
    "Too large, too small and outside the picture are three things, with three remedies."
    mask = np.zeros((64, 64), np.uint8)
    mask[10:54, 10:54] = 1
    for kw, words in ((dict(scale=(1.3, 1.31), shift=0), '50 were too large: lower `scale` or raise'),
                      (dict(least=.4, scale=(.7, .8), shift=0), '50 were too small: raise `scale`'),
                      (dict(scale=(9, 9.1)), '50 left the picture: lower `shift`')):
        with pytest.raises(MedsynError, match=words) as e: random_mask(mask, np.random.default_rng(0), **kw)
        assert 'lost the lesion' not in str(e.value)
    with pytest.raises(MedsynError, match=r'\d+ left the picture: .*; \d+ were too large'):
        random_mask(mask, np.random.default_rng(0), scale=(1.3, 1.4))

def test_contour_names_the_picture_whose_size_differs():
    image, mask = np.zeros((3, 8, 9, 3), np.uint8), np.ones((8, 9), np.uint8)
    with pytest.raises(MedsynError, match=r'image 3 of 3 has the size \(8, 9\) and its mask \(4, 9\)'):
        contour(list(image), [mask, mask, mask[:4]])
    with pytest.raises(MedsynError, match=r'3 image\(s\) and 2 mask\(s\)'): contour(list(image), [mask, mask])

def test_masks_of_any_shape():
    m = np.zeros((30, 70), np.uint8); m[10:14, 60:] = 1
    new, _ = random_mask(m, np.random.default_rng(0))
    assert new.shape == (30, 70) and new.any()

def test_mask_kinds_share_a_signature():
    m = draw_lesions(1, 32)[1][0]
    for kind, f in MASK_KINDS.items():
        new, params = f(m, np.random.default_rng(0))
        assert params['kind'] == kind and new.shape == m.shape

# Real sets --------------------------------------------------------------------------------------------------

@real
@pytest.mark.data
def test_polypgen():
    path = Path(REAL)/'polypgen'
    pairs = find_pairs(path)
    pool = find_pairs(path, where=dict(centre=['C1', 'C2', 'C3']))
    assert (len(pairs), len(pool), len(find_pairs(path, where=dict(centre='C5')))) == (916, 570, 203)
    report = check_pairs(pool)
    assert (report.severity == 'error').sum() == 0, report.to_string()
    dls = pair_dls(pool[:40], 64, bs=8, device='cpu')
    x, y = dls.one_batch()
    assert x.shape == (8, 3, 64, 64) and y.max() == 1

@real
@pytest.mark.data
def test_polypgen_is_split_by_group():
    pool = find_pairs(Path(REAL)/'polypgen', where=dict(centre=['C1', 'C2', 'C3']))
    assert len({group_of(p) for p in pool}) < len(pool)
    for seed in range(4):
        train, held_out = split_pairs(pool, .2, seed)
        assert not {group_of(p) for p in train} & {group_of(p) for p in held_out}
        assert abs(len(held_out)/len(pool) - .2) < .1

@real
@pytest.mark.data
def test_images_that_two_sets_share():
    files = find_images(Path(REAL)/'dsb2018')[:12]
    assert same_images(files[:8], files[5:]) == files[5:8]

@real
@pytest.mark.data
@pytest.mark.parametrize('name,n', [('dsb2018', 300), ('magtile', 159)])
def test_other_sets(name, n):
    pairs = find_pairs(Path(REAL)/name)
    assert len(pairs) == n
    image, mask = read_pair(pairs[0], 64)
    assert image.shape == (64, 64, 3) and mask.any()
