"The bootstraps against scipy, their coverage on simulated studies, and the refusals of `compare_arms`."
import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats as sps

from medsyn.core import MedsynError
from medsyn.evaluate.stats import (
    compare_arms, compare_folds, compare_pooled, hierarchical_bootstrap, paired_bootstrap, plot_differences,
    sentence)


@pytest.mark.parametrize('n,images', [(2000, 7), (10_000, 150), (9999, 3000)])
def test_equals_scipy(n, images):
    "Percentile intervals from the same random stream; the largest case needs more than one chunk."
    rng = np.random.default_rng(5)
    a, b = rng.beta(3, 1, images), rng.beta(2, 1, images)
    got = paired_bootstrap(a, b, n=n, seed=11)
    ref = sps.bootstrap((a, b), lambda a, b, axis=-1: (a - b).mean(axis), paired=True, vectorized=True,
                        batch=500, n_resamples=n, method='percentile', rng=np.random.default_rng(11))
    np.testing.assert_allclose([got['lo'], got['hi']], ref.confidence_interval, atol=1e-12)


@pytest.mark.parametrize('level', [.8, .95])
@pytest.mark.parametrize('average,truth', [('overall', (60*.02 + 20*.08)/80), ('ave', .05)])
def test_coverage(level, average, truth):
    "Skewed differences (a few images gain a lot), two strata: coverage is near the nominal level."
    hits = []
    for s in range(300):
        rng = np.random.default_rng(s)
        d = np.r_[rng.gamma(2, .01, 60), rng.gamma(2, .04, 20)]
        r = paired_bootstrap(d, 0*d, [0]*60 + [1]*20, n=800, seed=s, level=level, average=average)
        hits.append(r['lo'] <= truth <= r['hi'])
    assert level - .08 < np.mean(hits) < level + .05


def test_strata_keep_their_size():
    "Two constant strata have no variance within: a stratified interval has no width."
    r = paired_bootstrap([1.]*10 + [0.]*30, [0.]*40, ['a']*10 + ['b']*30)
    assert r['diff'] == pytest.approx(.25) and r['lo'] == pytest.approx(.25) and r['hi'] == pytest.approx(.25)
    r = paired_bootstrap([1.]*10 + [0.]*30, [0.]*40)
    assert r['lo'] < .15 and r['hi'] > .35


# Images and runs ----------------------------------------------------------------------

def simulated(rng, subset, generator, seed, shape=(3, 2, 2), n=60):
    "Differences (R,N) around 0; standard deviations of subsets, of generators and of seeds in them."
    S, G, K = shape
    cells = itertools.product(range(S), range(G), range(K))
    runs = pd.DataFrame([dict(subset=s, generator=f'{s}{g}', seed=k) for s, g, k in cells])
    of_subsets, of_generators = rng.normal(0, subset, (S, 1, 1)), rng.normal(0, generator, (S, G, 1))
    of_runs = of_subsets + of_generators + rng.normal(0, seed, (S, 1, K))
    noise = rng.normal(0, .1, n) + rng.normal(0, .08, (len(runs), n))
    return of_runs.reshape(-1, 1) + noise, runs


@pytest.mark.parametrize('components,shape', [
    ((.02, .01, .01), (4, 2, 2)), ((0, .03, .02), (1, 3, 3)), ((0, 0, .03), (1, 1, 4))])
def test_covers_images_and_runs(components, shape):
    "Subsets with generators and seeds in them; one subset with generators and seeds crossed; seeds alone."
    hits = []
    for s in range(200):
        diff, runs = simulated(np.random.default_rng(s), *components, shape)
        both = hierarchical_bootstrap(diff, runs, n=200, seed=s)
        images = paired_bootstrap(diff.mean(0), 0*diff[0], n=200, seed=s)
        hits.append([r['lo'] <= 0 <= r['hi'] for r in (both, images)])
    both, images = np.mean(hits, 0)
    assert .89 < both <= .995 and images < both - .1, (both, images)


def test_one_factor_without_image_noise_is_the_t_test():
    "Differences that are the same on every image leave a one-sample t-interval over the runs."
    means = np.array([.01, .05, .03, .08])
    diff, runs = np.repeat(means[:, None], 30, 1), pd.DataFrame(dict(seed=range(4)))
    got = hierarchical_bootstrap(diff, runs, n=40_000)
    ref = sps.ttest_1samp(means, 0).confidence_interval(.95)
    np.testing.assert_allclose([got['lo'], got['hi']], [ref.low, ref.high], atol=2e-3)
    assert got['covers'] == 'images and runs'


def test_one_run_is_the_bootstrap_over_images():
    diff, runs = simulated(np.random.default_rng(0), 0, 0, 0, (1, 1, 1))
    assert hierarchical_bootstrap(diff, runs) == paired_bootstrap(diff[0], 0*diff[0])
    assert hierarchical_bootstrap(diff, runs)['covers'] == 'images'


def test_strata_hold_for_runs_too():
    "Overall weights test sets by images, AVE evenly; images are drawn within their set."
    diff, runs = simulated(np.random.default_rng(1), .02, 0, 0, n=40)
    strata = ['a']*10 + ['b']*30
    overall, ave = (hierarchical_bootstrap(diff, runs, strata, average=w) for w in ('overall', 'ave'))
    assert overall['diff'] == pytest.approx(diff.mean())
    assert ave['diff'] == pytest.approx((diff[:, :10].mean() + diff[:, 10:].mean())/2)
    apart = diff + np.r_[[10.]*10, [0.]*30]     # a constant in one set moves the interval and keeps its width
    moved = hierarchical_bootstrap(apart, runs, strata)
    assert moved['hi'] - moved['lo'] == pytest.approx(overall['hi'] - overall['lo'])


# The table ----------------------------------------------------------------------------

def scores(arms=('real', 'synth'), seeds=3, n=20):
    rng = np.random.default_rng(0)
    keys = itertools.product(arms, ('unet', 'segformer'), range(seeds), ('A', 'B'), map(str, range(n)))
    table = pd.DataFrame(keys, columns=['arm', 'segmenter', 'seed', 'testset', 'name'])
    return table.assign(dice=rng.random(len(table)), hd95=rng.random(len(table))*9)


def test_table_shape_and_units():
    t = compare_arms(scores(), 'real', 'dice', n=500)
    assert list(t.testset) == ['A', 'B', 'Overall', 'AVE']*2 and set(t.segmenter) == {'unet', 'segformer'}
    assert set(t.seeds) == {3} and list(t.n[:4]) == [20, 20, 40, 40]
    one = scores().query("testset == 'A'")
    assert list(compare_arms(one, 'real', 'dice', n=500).testset) == ['A', 'A']  # one set: no averages
    assert 'hd95' in compare_arms(one, 'real', 'hd95', n=500).text[0]
    assert compare_arms(one[one.arm == 'real'], 'real', 'dice').empty               # nothing to compare with


def test_what_an_interval_covers_is_said_everywhere():
    s = scores()
    for table, covers in [(compare_arms(s, 'real', 'dice', n=500), 'images and runs'),
                          (compare_arms(s, 'real', 'dice', n=500, over='images'), 'images'),
                          (compare_arms(s[s.seed == 1], 'real', 'dice', n=500), 'images')]:
        assert set(table.covers) == {covers}
        assert table.text.str.contains(f'interval over {covers} -?[0-9]').all()
        assert plot_differences(table).get_xlabel().endswith(f'over {covers}')


def nested_scores():
    "Two subsets, two generators on each for the arm `synth`, none for `real`, which has one more subset."
    rng, rows = np.random.default_rng(0), []
    for subset in range(3):
        runs = [('real', None)]
        if subset < 2: runs += [('synth', f'{subset}-0'), ('synth', f'{subset}-1')]
        rows += [(arm, 'unet', subset, g, 0, 'A', str(i), rng.random()) for arm, g in runs for i in range(20)]
    columns = ['arm', 'segmenter', 'subset', 'generator', 'seed', 'testset', 'name', 'dice']
    return pd.DataFrame(rows, columns=columns)


def test_runs_are_paired_by_subset_and_seed(tmp_path):
    "The baseline's run on the same subset, not its further ones; the same after a trip through CSV."
    s = nested_scores()
    got = compare_arms(s, 'real', 'dice', n=500).iloc[0]
    means = s[s.subset < 2].groupby('arm').dice.mean()
    assert got['diff'] == pytest.approx(means['synth'] - means['real'])
    assert (got.subsets, got.generators, got.seeds, got.covers) == (2, 4, 1, 'images and runs')
    s.to_csv(tmp_path/'scores.csv', index=False)
    again = pd.read_csv(tmp_path/'scores.csv', dtype={'name': str})
    assert compare_arms(again, 'real', 'dice', n=500).iloc[0].text == got.text
    with pytest.raises(MedsynError, match="subset 1, seed 0, and baseline 'real' has none"):
        compare_arms(s[~((s.arm == 'real') & (s.subset == 1))], 'real', 'dice')


def test_refusals():
    s = scores()
    for bad, text in [(s.drop(columns='seed'), "no column 'seed'"), (s[1:], 'finish the missing runs'),
                      (pd.concat([s, s[3:4]]), 'scored twice'), (s.assign(dice=np.nan), 'no finite score'),
                      (s[~((s.arm == 'synth') & (s.name == '4'))], 'on the same images')]:
        with pytest.raises(MedsynError, match=text): compare_arms(bad, 'real', 'dice')
    with pytest.raises(MedsynError, match='did you mean'): compare_arms(s, 'reall', 'dice')


def test_sentence():
    said = sentence(.031, .012, .05, seeds=3, n=150)
    assert said == "+3.1 dice, 95% interval over images 1.2 to 5.0, 3 seeds, 150 images"
    assert sentence(.001, -.012, .05).startswith('difference not significant at 95% (')


def few_runs(means, images=80, noise=.05, seed=0):
    "Scores on two test sets: `means` is (arm, subset) -> the mean of each run."
    rng, rows = np.random.default_rng(seed), []
    difficulty = rng.normal(.6, .2, images)
    for (arm, subset), values in means.items():
        for run, mean in enumerate(values):
            rows.append(pd.DataFrame({
                'arm': arm, 'segmenter': 'unet', 'subset': subset, 'seed': run,
                'testset': ['C4']*30 + ['C5']*(images - 30), 'name': [f'{i:03d}' for i in range(images)],
                'dice@0.5': difficulty + mean + rng.normal(0, noise, images)}))
    return pd.concat(rows)


def test_pooled_intervals_cover_an_arm_with_one_run_a_subset():
    "Two subsets, an arm with one run on each: 300 studies; the truth is about the subsets of the study."
    hits = []
    for s in range(300):
        real, other, single = np.split(np.random.default_rng(s).normal(0, .03, 8), [4, 6])
        scores = few_runs({('real', 'a'): real[:3], ('real', 'b'): real[3:], ('other', 'a'): other,
                           ('single', 'a'): single[:1] + .02, ('single', 'b'): single[1:] + .04}, seed=s)
        found = compare_pooled(scores, 'real').set_index(['arm', 'testset'])
        hits.append([found.lo[a] <= .03 <= found.hi[a] for a in (('single', 'C5'), ('single', 'Overall'))])
    assert (np.mean(hits, 0) > .91).all() and (np.mean(hits, 0) < .985).all()


def test_pooled_differences_do_not_depend_on_the_order_of_rows():
    "Shuffled rows, other names of runs: the same table."
    scores = few_runs({('real', 'a'): [0, .05], ('other', 'a'): [.03], ('other', 'b'): [.1],
                       ('real', 'b'): [.02]})
    expected = compare_pooled(scores, 'real')
    shuffled = scores.sample(frac=1, random_state=1).assign(seed=lambda d: d.seed + 7)
    found, wanted = (t.set_index(['arm', 'testset']) for t in (compare_pooled(shuffled, 'real'), expected))
    columns = ['diff', 'lo', 'hi']
    np.testing.assert_allclose(found.loc[wanted.index, columns], wanted[columns])
    assert set(expected.subsets) == {2} and expected.text.str.contains('over images and runs').all()


def test_the_spread_may_come_from_other_runs():
    "Runs on the same images, of another comparison: only their spread counts."
    once = few_runs({('real', 'a'): [0], ('other', 'a'): [.03]})
    with pytest.raises(MedsynError, match='no arm has two runs on one subset'): compare_pooled(once, 'real')
    steady, wild = (few_runs({('x', 'c'): list(m)}, noise=0) for m in ([0, 0, 0], [0, .1, -.1]))
    width = [(found.hi - found.lo).mean() for found in
             (compare_pooled(once, 'real', repeated=r) for r in (steady, wild))]
    assert width[1] > 3*width[0]
    fewer = steady[steady.name != '005']
    with pytest.raises(MedsynError, match="'005' of 'C4' first.*score all arms on the same images"):
        compare_pooled(once, 'real', repeated=fewer)


def in_folds(gains, sizes, runs=1, seed=0, noise=.05):
    "Scores of two arms in folds of some sizes; `gains` is the true gain of each fold."
    rng, rows = np.random.default_rng(seed), []
    for i, (gain, n) in enumerate(zip(gains, sizes, strict=True)):
        for arm, run in itertools.product(('real', 'other'), range(runs)):
            found = .6 + gain*(arm == 'other') + rng.normal(0, noise, n)
            rows.append(pd.DataFrame({'arm': arm, 'segmenter': 'unet', 'seed': run, 'testset': f'fold{i}',
                                      'name': [f'{i}-{k}' for k in range(n)], 'dice@0.5': found}))
    return pd.concat(rows)


def test_intervals_over_folds_cover():
    "Runs vary from fold to fold; the truth is the mean gain. Over images alone the interval is too short."
    hits = []
    for s in range(150):
        gains = np.random.default_rng(900 + s).normal(.02, .03, 5)
        scores = in_folds(gains, [40]*5, seed=s)
        folds, images = compare_folds(scores, 'real').iloc[0], compare_arms(scores, 'real', n=100).iloc[-2]
        hits.append([row.lo <= .02 <= row.hi for row in (folds, images)])
    folds, images = np.mean(hits, 0)
    assert .91 < folds < .99 and images < .7


def test_folds_weigh_alike_and_runs_are_averaged():
    "A large fold counts as much as a small one; two runs of a fold are one difference."
    found = compare_folds(in_folds([.1, .0], [90, 10], runs=2, noise=0), 'real').iloc[0]
    assert found['diff'] == pytest.approx(.05) and found.n == 100 and found.seeds == 2
    assert found.hi - found['diff'] == pytest.approx(sps.t.isf(.025, 1)*.05) and found.covers == 'folds'
    with pytest.raises(MedsynError, match="one test set, 'fold0'.*two folds or more"):
        compare_folds(in_folds([.1], [20]), 'real')
