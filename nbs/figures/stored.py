"""Rows of `does_it_pay` that other pages compare with: the same labelled images, test images, network and steps."""
import pandas as pd

from medsyn.evaluate.stats import compare_pooled

SUBSET = 'n100-s0'

def stored_runs():
    "The rows with 100 labels, of every arm and subset: they say how much a run varies."
    rows = pd.read_csv('../results/does_it_pay/scores.csv.gz', dtype=dict(name=str))
    counted = (rows.labels == 100) & rows.testset.isin(['in distribution', 'C5'])
    return rows[counted].fillna(dict(generator=''))

def beside_baseline(scores, metric, arms=()):
    "A page's arms, and some stored ones, beside the stored runs of *two-passes*: means, runs and differences."
    runs = stored_runs()
    first = runs[(runs.subset == SUBSET) & runs.arm.isin(['two-passes', *arms])]
    own = scores.assign(subset=SUBSET, generator='own')
    all_rows = pd.concat([first, own], ignore_index=True)
    by = ['testset', 'arm']
    shown = (100*all_rows.groupby(by, sort=False)[metric].mean()).rename('mean').to_frame()
    shown['runs'] = all_rows.drop_duplicates([*by, 'generator', 'seed']).groupby(by).size()
    found = compare_pooled(all_rows, 'two-passes', metric, repeated=runs).set_index(by)
    return shown.join(found[['diff', 'lo', 'hi', 'shown']]).reset_index()

def table_of(rows):
    "Rows of `beside_baseline` as people read them: means, differences in words, and the number of runs."
    def points(row):
        if pd.isna(row['diff']): return ''
        return f"{100*row['diff']:+.1f} ({100*row.lo:+.1f} to {100*row.hi:+.1f})" + ' n.s.'*(not row.shown)
    table = rows.assign(difference=rows.apply(points, axis=1)).round(1)
    wide = table.pivot(index='arm', columns='testset', values=['mean', 'difference'])
    wide = wide.reindex(columns=list(dict.fromkeys(rows.testset)), level=1)
    return wide.loc[list(dict.fromkeys(rows.arm))].assign(runs=table.groupby('arm').runs.max())
