"""What several pages share: rows to compare with, tables, curves and figures.

The rows are of the same labelled images, test images, network and steps. The controls are those of `rivals` and
`does_it_pay`; the spread of runs is that of all pages of this regime. A run that two pages have counts once."""
import matplotlib.pyplot as plt
import pandas as pd

from medsyn.evaluate.stats import compare_folds, compare_pooled, plot_differences

SUBSET = 'n100-s0'

def stored_runs():
    "The rows of `does_it_pay` with 100 labels, of every arm and subset."
    rows = pd.read_csv('../results/does_it_pay/scores.csv.gz', dtype=dict(name=str))
    counted = (rows.labels == 100) & rows.testset.isin(['in distribution', 'C5'])
    return rows[counted].fillna(dict(generator=''))

def control_runs():
    "The runs of *two-passes* and of the real pairs as a stream, three each; seeds from 100 on as in `does_it_pay`."
    runs = pd.read_csv('../results/rivals/controls.csv', dtype=dict(name=str))
    return runs.assign(seed=runs.seed + 100, generator='', subset=SUBSET)

PAGES = 'rivals', 'siamese_masks', 'free_lunch_masks'

def all_runs(metric):
    "Every stored run with this score, once: they say how far another run of an arm may lie from it."
    own = [pd.read_csv(f'../results/{page}/scores.csv', dtype=dict(name=str)) for page in PAGES]
    own = [rows.assign(generator='own', subset=SUBSET) for rows in own]
    runs = pd.concat([stored_runs(), control_runs(), *own], ignore_index=True).dropna(subset=[metric])
    return runs.drop_duplicates(['arm', 'subset', 'generator', 'seed', 'testset', 'name'])

def with_controls(scores, runs):
    "A page's rows under the controls and FixMatch, which are among all runs."
    controls = ['two-passes', 'real pairs as the stream', 'fixmatch']
    found = runs.query('subset == @SUBSET and arm in @controls')
    return pd.concat([*(found[found.arm == arm] for arm in controls), scores.assign(generator='own', subset=SUBSET)],
                     ignore_index=True)

def beside_baseline(scores, metric):
    "A page's arms, the controls and FixMatch beside *two-passes*: means, runs and differences."
    runs, by = all_runs(metric), ['testset', 'arm']
    rows = with_controls(scores, runs)
    shown = (100*rows.groupby(by, sort=False)[metric].mean()).rename('mean').to_frame()
    shown['runs'] = rows.drop_duplicates([*by, 'generator', 'seed']).groupby(by).size()
    found = compare_pooled(rows, 'two-passes', metric, repeated=runs).set_index(by)
    return shown.join(found[['diff', 'lo', 'hi', 'shown']]).reset_index()

def points(row):
    "A difference in points with its interval; n.s. where the interval contains 0."
    if pd.isna(row['diff']): return ''
    told = f"{100*row['diff']:+.1f} ({100*row.lo:+.1f} to {100*row.hi:+.1f})"
    return told if row.shown else f'{told} n.s.'

def table_of(rows):
    "Rows of `beside_baseline` as people read them: means, differences in words, and the number of runs."
    table = rows.assign(difference=rows.apply(points, axis=1)).round(1)
    wide = table.pivot(index='arm', columns='testset', values=['mean', 'difference'])
    wide = wide.reindex(columns=list(dict.fromkeys(rows.testset)), level=1)
    return wide.loc[list(dict.fromkeys(rows.arm))].assign(runs=table.groupby('arm').runs.max())

def contrasts(scores, metric, questions):
    "The difference of two arms of a page for each question, (name, arm, other arm)."
    runs, told = all_runs(metric), {}
    rows = with_controls(scores, runs)
    for name, arm, other in questions:
        found = compare_pooled(rows[rows.arm.isin([arm, other])], other, metric, repeated=runs)
        told[name] = found.set_index('testset').apply(points, axis=1)
    return pd.DataFrame(told).T.reindex(columns=list(dict.fromkeys(rows.testset)))

def ends_of_curves(file, images):
    "How much the held-out Dice of each run, on so many images, changes in the last fifth of its 750 steps; in words."
    curves = pd.read_csv(file).pivot(index='run', columns='step', values='held-out dice@0.5')
    change = 100*(curves[750] - curves[600])
    mean = round(change.mean(), 1) + 0.     # no -0.0
    return (f"Held-out Dice in the last fifth of the steps ({images} images): {mean:+.1f} points on average,"
            f" {change.min():+.1f} to {change.max():+.1f} over the {len(change)} runs.")

def means_of_folds(scores):
    "Mean Dice@0.5 of each arm in each fold, in percent."
    return 100*scores.groupby(['arm', 'testset'], sort=False)['dice@0.5'].mean().unstack('testset')

def table_of_folds(scores):
    "Means of each fold, their mean, the number of runs, and the difference to two-passes."
    means = means_of_folds(scores)
    found = compare_folds(scores, 'two-passes').set_index('arm')
    told = found.apply(points, axis=1).rename('difference')
    runs = scores.drop_duplicates(['arm', 'testset', 'seed']).groupby('arm').size().rename('runs')
    return means.assign(mean=means.mean(axis=1)).round(1).join(runs).join(told).fillna('')

def plot_folds(scores):
    "The difference to two-passes in each fold, and their mean with its interval."
    means = means_of_folds(scores)
    gains = means.drop('two-passes') - means.loc['two-passes']
    _, ax = plt.subplots(figsize=(5, .9 + .45*len(gains)), dpi=75, layout='constrained')
    plot_differences(compare_folds(scores, 'two-passes'), ax=ax)
    for y, arm in enumerate(gains.index): ax.plot(gains.loc[arm], [y + .3]*gains.shape[1], '|', color=f'C{y}', ms=9)
