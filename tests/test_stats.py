"The bootstrap against scipy, its coverage on simulated studies, and the refusals of `compare_arms`."
import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sps

from medsyn.core import MedsynError
from medsyn.evaluate.stats import compare_arms, paired_bootstrap, sentence


@pytest.mark.parametrize('n,images', [(2000, 7), (10_000, 150), (9999, 3000)])
def test_equals_scipy(n, images):
    "Percentile intervals of the differences, the same random stream; the largest case needs more than one chunk."
    rng = np.random.default_rng(5)
    a, b = rng.beta(3, 1, images), rng.beta(2, 1, images)
    got = paired_bootstrap(a, b, n=n, seed=11)
    ref = sps.bootstrap((a, b), lambda a, b, axis=-1: (a - b).mean(axis), paired=True, vectorized=True, batch=500, n_resamples=n,
                        method='percentile', rng=np.random.default_rng(11)).confidence_interval
    np.testing.assert_allclose([got['lo'], got['hi']], [ref.low, ref.high], atol=1e-12)


@pytest.mark.parametrize('level', [.8, .95])
@pytest.mark.parametrize('average,truth', [('overall', (60*.02 + 20*.08)/80), ('ave', .05)])
def test_coverage(level, average, truth):
    "Skewed differences (a few images gain a lot), two strata: the interval covers the truth about as often as it says."
    hits = []
    for s in range(300):
        rng = np.random.default_rng(s)
        d = np.r_[rng.gamma(2, .01, 60), rng.gamma(2, .04, 20)] - np.r_[np.zeros(60), np.zeros(20)]
        r = paired_bootstrap(d, 0*d, [0]*60 + [1]*20, n=800, seed=s, level=level, average=average)
        hits.append(r['lo'] <= truth <= r['hi'])
    assert level - .08 < np.mean(hits) < level + .05


def test_strata_keep_their_size():
    "Two constant strata have no variance within: a stratified interval has no width, whatever the difference between them."
    r = paired_bootstrap([1.]*10 + [0.]*30, [0.]*40, ['a']*10 + ['b']*30)
    assert r['diff'] == pytest.approx(.25) and r['lo'] == pytest.approx(.25) and r['hi'] == pytest.approx(.25)
    r = paired_bootstrap([1.]*10 + [0.]*30, [0.]*40)
    assert r['lo'] < .15 and r['hi'] > .35


def test_fast():
    rng = np.random.default_rng(0)
    t = time.perf_counter(); paired_bootstrap(rng.random(400), rng.random(400)); t = time.perf_counter() - t
    assert t < 1


def scores(arms=('real', 'synth'), seeds=3, n=20):
    rng = np.random.default_rng(0)
    return pd.DataFrame([dict(arm=a, segmenter=g, seed=s, testset=t, name=f'{i}', dice=rng.random(), hd95=rng.random()*9)
                         for a in arms for g in ('unet', 'segformer') for s in range(seeds) for t in ('A', 'B') for i in range(n)])


def test_table_shape_and_units():
    t = compare_arms(scores(), 'real', 'dice', n=500)
    assert list(t.testset) == ['A', 'B', 'Overall', 'AVE']*2 and set(t.segmenter) == {'unet', 'segformer'}
    assert set(t.seeds) == {3} and list(t.n[:4]) == [20, 20, 40, 40]
    one = scores().query("testset == 'A'")
    assert list(compare_arms(one, 'real', 'dice', n=500).testset) == ['A', 'A']                 # one test set: no averages
    assert 'hd95' in compare_arms(one, 'real', 'hd95', n=500).text[0]
    assert compare_arms(one[one.arm == 'real'], 'real', 'dice').empty                           # nothing to compare with


def test_refusals():
    s = scores()
    for bad, text in [(s.drop(columns='seed'), "no column 'seed'"), (s[1:], 'finish the missing runs'),
                      (pd.concat([s, s[3:4]]), 'scored twice'), (s.assign(dice=np.nan), 'no finite score'),
                      (s[~((s.arm == 'synth') & (s.name == '4'))], 'on the same images')]:
        with pytest.raises(MedsynError, match=text): compare_arms(bad, 'real', 'dice')
    with pytest.raises(MedsynError, match='did you mean'): compare_arms(s, 'reall', 'dice')


def test_sentence():
    assert sentence(.031, .012, .05, seeds=3, n=150) == "+3.1 dice, 95% interval 1.2 to 5.0, 3 seeds, 150 images"
    assert sentence(.001, -.012, .05).startswith('no difference shown (')
