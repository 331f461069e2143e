"Comparisons: one split for everything, equal real streams, runs shared by processes, and factors."
import json
import os
import socket
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback

from medsyn import experiment
from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_images, find_pairs
from medsyn.experiment import (HeldOutCurveCB, compare, open_arm, quickstart, run_log, split_once,
                               train_segmenter)
from medsyn.results import Results
from medsyn.segment.catalog import Arm

SMALL = dict(segmenters=[dict(network='unet', encoder='mobilenetv3_small_050')], size=32, bs=4)
TWO = dict(SMALL, jobs=2, seeds=(0,), steps=1)          # two processes, next to nothing to do

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Rendered pairs: train (20), test (4) and extra (8)."
    path = tmp_path_factory.mktemp('pairs')
    for seed, (name, n) in enumerate(dict(train=20, test=4, extra=8).items()):
        lesion_folder(path/name, n, size=32, seed=seed)
    return path

@pytest.fixture(scope='module')
def train(folders): return find_pairs(folders/'train')

@pytest.fixture(scope='module')
def test(folders): return find_pairs(folders/'test')

def names(pairs): return {p.name for p in pairs}

def test_nothing_learns_from_the_held_out_pairs(tmp_path, monkeypatch):
    "Backbone, codec, generator, synthesis and segmenter of one quickstart: each gets the same split."
    taught = {}
    def watch(name, position):
        original = getattr(experiment, name)
        def watched(*args, **kw):
            taught.setdefault(name, []).append(names(args[position]))
            return original(*args, **kw)
        monkeypatch.setattr(experiment, name, watched)
    watch('ImageStream', 0)                  # the codec
    watch('pair_dls', 0)                    # backbone, generator, segmenters
    watch('synthesize', 1)
    quickstart(tmp_path/'q', n_train=20, n_test=4, size=32, pretrain_steps=1, train_steps=1, segment_steps=1,
               n_synth=4, sample_steps=1, channels=(16, 32), seeds=(0,))
    split = split_once(tmp_path/'q'/'data'/'train.csv')
    held, real = names(split.held), names(split.train)
    assert len(held) == 2 and set(taught) == {'ImageStream', 'pair_dls', 'synthesize'}
    assert len(taught['pair_dls']) == 5                         # backbone, generator, three arms
    assert all(real <= given and not held & given for calls in taught.values() for given in calls)
    manifest = (tmp_path/'q'/'synthetic'/'manifest.jsonl').read_text().splitlines()
    assert not held & {json.loads(line)['source'] for line in manifest}

class _Batches(Callback):
    "Keeps the real images of every step."
    order = -100            # before anything could change them
    def __init__(self): self.kept = []
    def before_batch(self):
        if self.training: self.kept.append(self.x.clone())

def test_arms_get_the_same_real_stream(train, folders):
    "What an arm adds does not change the real batches: not their order, and not their augmentation."
    frames = find_images(folders/'extra'/'images')
    split = split_once(train)
    def batches(form):
        kept, arm = _Batches(), open_arm(form, split, frames)
        with_batches = replace(arm, cbs=lambda: [kept, *arm.cbs()])
        train_segmenter(split, with_batches, encoder='mobilenetv3_small_050', size=32, steps=6, bs=4)
        return torch.stack(kept.kept)
    real = batches('real')
    for form in ('two-passes', f"stream:{folders}/extra", 'fixmatch'):
        assert torch.equal(batches(form), real), form

def test_the_held_out_curve_changes_nothing(train):
    "Measured twice or six times, the run is the same; the log has the measured steps."
    kw = dict(encoder='mobilenetv3_small_050', size=32, steps=6, bs=4)
    sparse, dense = (train_segmenter(train, 'real', curve_every=k, **kw) for k in (3, 1))
    logs = [run_log(learn) for learn in (sparse, dense)]
    assert [log[HeldOutCurveCB.column].notna().sum() for log in logs] == [2, 6]
    assert torch.equal(torch.tensor(logs[0].loss), torch.tensor(logs[1].loss))
    with_ema = train_segmenter(train, 'real', ema=.9, **kw)
    assert not torch.equal(next(with_ema.model.parameters()), next(sparse.model.parameters()))

def test_two_processes_share_a_comparison(folders, tmp_path):
    "Every run once, the table as one process makes it, and nothing of the claims is left."
    arms = {'real': 'real', 'extra': f'{folders}/extra'}
    kw = dict(SMALL, seeds=(0, 1), steps=2)
    sets = folders/'train', {'t': folders/'test'}, arms
    shared = compare(*sets, tmp_path/'shared', jobs=2, **kw)
    assert not list((shared/'runs').glob('*claim*')) and len(list((shared/'jobs').iterdir())) == 2
    alone = compare(*sets, tmp_path/'alone', **kw)
    tables = [pd.read_csv(f/'scores.csv') for f in (shared, alone)]
    pd.testing.assert_frame_equal(*tables, atol=1e-3)

def test_a_process_that_fails_is_reported(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)                 # where the new interpreters find a medsyn that does not work
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    (tmp_path/'medsyn').mkdir()
    (tmp_path/'medsyn'/'__init__.py').write_text('raise SystemExit("no such luck")')
    with pytest.raises(MedsynError, match='no such luck'):
        compare(folders/'train', {'t': folders/'test'}, {'real': 'real'}, tmp_path/'out', **TWO)

def test_python_objects_stay_in_their_process(folders, tmp_path):
    with pytest.raises(MedsynError, match='cannot be handed to another process'):
        compare(folders/'train', {'t': folders/'test'}, {'real': Arm()}, tmp_path/'out', **TWO)

def test_a_killed_run_is_taken_over(train, test, tmp_path):
    "The claim of a process that was killed in the middle of a run does not hold up the others."
    result = tmp_path/'runs'/'real_unet_0.csv'
    code = f"import time; from pathlib import Path; from medsyn.experiment import claimed\n" \
           f"with claimed(Path({str(result)!r})): print('mine', flush=True); time.sleep(600)"
    child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == 'mine'
    with experiment.claimed(result) as ours: assert not ours
    child.kill()
    child.wait()
    with experiment.claimed(result) as ours: assert ours
    with experiment.claimed(result) as ours: assert ours        # and again: released

def test_subsets_and_generators_are_factors(train, test, folders, tmp_path):
    subsets = {'a': train[:10], 'b': train[10:]}
    arms = {'mine': 'real', 'drawn': f'{folders}/{{generator}}', 'own': {'a': 'real', 'b': 'mixup'}}
    out = compare(None, {'t': test}, arms, tmp_path/'out', subsets=subsets, generators=('extra',), seeds=(0,),
                  steps=1, **SMALL)
    scores = pd.read_csv(out/'scores.csv', keep_default_na=False)
    assert scores.groupby(['arm', 'subset', 'generator'])['name'].count().to_dict() == {
        ('drawn', 'a', 'extra'): 4, ('drawn', 'b', 'extra'): 4, ('mine', 'a', ''): 4, ('mine', 'b', ''): 4,
        ('own', 'a', ''): 4, ('own', 'b', ''): 4}
    assert 'against mine' in (out/'table.md').read_text()       # no arm is called real: the first
    marks = json.loads((out/'compare.json').read_text())['arms']
    assert marks['own_a']['cbs'] == [] and 'MixUpCB' in marks['own_b']['cbs'][0]

def test_folds(train, tmp_path):
    "Every image is tested once, by a network that did not learn from it; arms need files of the fold alone."
    learned = {}
    def made(subset): return learned.setdefault(subset, 'real-twice')
    arms = {'real': 'real', 'made': made}
    out = compare(train, {}, arms, tmp_path/'out', folds=2, seeds=(0,), steps=1, **SMALL)
    scores = pd.read_csv(out/'scores.csv', dtype=dict(name=str))
    for _, rows in scores.groupby('arm'): assert sorted(rows.name) == sorted(p.name for p in train)
    assert 'subset' not in scores and {*scores.testset} == {'folds'}
    assert [*learned] == ['fold1', 'fold2']
    runs = {f: next((out/'runs').glob(f'real_{f}_unet-*_0.csv')) for f in learned}
    tested = {f: {*pd.read_csv(run).name} for f, run in runs.items()}
    assert sum(map(len, tested.values())) == len(train)
    marks = json.loads((out/'run.json').read_text())['train']
    for fold, names in tested.items():
        assert marks[fold]['training'] + marks[fold]['held_out'] == len(train) - len(names)

def test_wrong_folds(train, test, tmp_path, monkeypatch):
    lesion_folder(tmp_path/'pool', 4, size=32, seed=3)
    monkeypatch.chdir(tmp_path)
    kw = dict(out=tmp_path/'x', seeds=(0,), steps=1, **SMALL)
    for words, arms, changed in [
        ('write .subset. for its name', {'real': 'real', 'drawn': 'stream:somewhere'}, {}),
        ('write .subset. for its name', {'real': 'real', 'drawn': [*test]}, {}),
        ('write .subset. for its name', {'real': 'real', 'drawn': 'pool'}, {}),
        ("did you mean 'two-passes'", {'real': 'real', 'more': 'two-pases'}, {}),
        ('leave tests and subsets out', {'real': 'real'}, dict(tests={'t': test})),
        ('2 or more', {'real': 'real'}, dict(folds=1)),
        ('no tests', {'real': 'real'}, dict(folds=None)),
    ]:
        with pytest.raises(MedsynError, match=words):
            compare(train, arms=arms, **{'tests': {}, 'folds': 3, **kw, **changed})
    assert not (tmp_path/'x').exists()

def test_a_folder_gains_arms(train, test, tmp_path):
    "A second call adds an arm and a seed, and leaves finished runs alone; other settings are refused."
    def run(arms, **kw):
        return compare(train, {'t': test}, arms, tmp_path/'res', **{**SMALL, 'steps': 2, 'seeds': (0,), **kw})
    out = run({'real': 'real'})
    first, = (out/'runs').glob('real_*_0.csv')
    before = first.stat().st_mtime_ns
    run({'mixup': 'mixup', 'real': 'real'}, seeds=(0, 1))
    assert first.stat().st_mtime_ns == before
    scores = pd.read_csv(out/'scores.csv')
    assert set(scores.groupby(['arm', 'seed']).groups) == {(a, s) for a in ('real', 'mixup') for s in (0, 1)}
    assert run({'real': 'real'}) == out                     # fewer arms: nothing is forgotten
    assert set(json.loads((out/'compare.json').read_text())['arms']) == {'real', 'mixup'}
    with pytest.raises(MedsynError, match='holds another compare run .arms was'):
        run({'real': 'real-twice'})
    with pytest.raises(MedsynError, match='holds another compare run .steps was'):
        run({'real': 'real'}, steps=3)

def test_scores_without_arms_are_no_comparison(tmp_path):
    (tmp_path/'scores.csv').write_text('testset,name,dice@0.5\nt,a,0.5\n')
    with pytest.raises(MedsynError, match='has no column arm'): Results(tmp_path)

def test_the_baseline_is_that_of_the_comparison(train, test, tmp_path):
    "It is kept, a second call changes it, older folders without the column are read, and others refused."
    arms = {'real': 'real', '2': 'two-passes', 'mixup': 'mixup'}
    def run(baseline):
        settings = dict(SMALL, steps=1, seeds=(0,), baseline=baseline)
        return compare(train, {'t': test}, arms, tmp_path/'res', **settings)
    for baseline, others in (('2', {'real', 'mixup'}), (None, {'2', 'mixup'})):
        results = Results(run(baseline))
        assert results.baseline == (baseline or 'real') and set(results.differences.arm) == others
        case = results.cases('mixup')[0]
        row = results.scores.query("name == @case.name and arm == @results.baseline")
        assert case.x == row['dice@0.5'].item()

    run('mixup')
    file = tmp_path/'res'/'differences.csv'
    table = pd.read_csv(file)
    table.drop(columns='baseline').to_csv(file, index=False)            # as older versions wrote it
    assert Results(tmp_path/'res').baseline == 'mixup'
    table.assign(baseline='cutmix').to_csv(file, index=False)
    with pytest.raises(MedsynError, match='belong to different comparisons'): Results(tmp_path/'res')
    file.unlink()
    assert Results(tmp_path/'res').baseline == 'real'

def test_wrong_factors_are_refused(train, test, tmp_path):
    kw = dict(SMALL, seeds=(0,), steps=1)
    for words, changed in {
        'no generators are named': dict(arms={'a': 'pooled:x_{generator}'}),
        "unknown labelled subset of an arm 'b'":
            dict(arms={'real': {'a': 'real'}}, subsets={'a': train, 'b': train}),
        "did you mean 'bce_dice'": dict(loss='bce_dise'),
        'unknown segmenter': dict(segmenters=['unett']),
        'no subsets': dict(subsets={}),
    }.items():
        with pytest.raises(MedsynError, match=words):
            compare(train, {'t': test}, out=tmp_path/'x', **{'arms': {'real': 'real'}, **kw, **changed})
    assert not (tmp_path/'x').exists()

def test_large_sets_are_read_in_part(train):
    assert experiment.images_of(train, 16, most=6).shape == (6, 3, 16, 16)
    assert torch.equal(experiment.images_of(train, 16), experiment.images_of(train, 16, most=20))

def test_what_a_killed_process_left_is_removed(tmp_path):
    "Its run is written, its claim and its states are not removed; those of a process at work stay."
    ended = subprocess.Popen([sys.executable, '-c', ''])
    ended.wait()
    for name, pid in (('dead', ended.pid), ('alive', os.getpid())):
        (tmp_path/f'{name}.csv').touch()
        (tmp_path/f'{name}.state').mkdir()
        claim = dict(host=socket.gethostname(), pid=pid)
        (tmp_path/f'{name}.csv.claim-0000').write_text(json.dumps(claim))
    experiment.share_runs(['dead', 'alive'], lambda run: tmp_path/f'{run}.csv', None, 'test')
    left = sorted(f.name for f in tmp_path.iterdir())
    assert left == ['alive.csv', 'alive.csv.claim-0000', 'alive.state', 'dead.csv']
