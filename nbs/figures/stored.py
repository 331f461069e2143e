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
