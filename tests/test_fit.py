"The main job: a plan that keeps the time, folds that leak nothing, a choice that resumes; predictions."
import json
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from medsyn import fit as module
from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs
from medsyn.fit import Synthesis, default_arms, fit, make_folds, plan_time, predict_images, verdict

SMALL = dict(encoder='mobilenetv3_small_050', size=32, bs=4, minutes=5, least_steps=1, most_steps=2,
             most_folds=2)

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Rendered pairs: labelled (12) and frames (5)."
    path = tmp_path_factory.mktemp('fit')
    lesion_folder(path/'labelled', 12, size=32, seed=0)
    lesion_folder(path/'frames', 5, size=32, seed=1)
    return path

@pytest.fixture(scope='module')
def labelled(folders): return find_pairs(folders/'labelled')

@pytest.fixture(scope='module')
def job(folders, tmp_path_factory):
    return fit(folders/'labelled', tmp_path_factory.mktemp('job')/'out', arms=['real', 'two-passes'], **SMALL)

def names(pairs): return {p.name for p in pairs}

def test_every_labelled_image_is_scored_once_by_a_model_that_has_not_seen_it(labelled, job):
    scores = pd.read_csv(job/'cv'/'scores.csv', dtype={'name': str})
    scored_by = scores.groupby('arm').name.apply(sorted).to_dict()
    assert scored_by == dict.fromkeys(['real', 'two-passes'], sorted(names(labelled)))
    k = json.loads((job/'plan.json').read_text())['folds']
    for i, split in enumerate(make_folds(labelled, k)):
        scored = set(pd.read_csv(job/'cv'/f'real_fold{i}_unet_0.csv', dtype={'name': str}).name)
        assert scored == names(split.held) and not scored & names(split.train)

def test_folds_keep_groups_together(folders, tmp_path):
    lesion_folder(tmp_path/'grouped', 12, size=16, seed=3)
    pairs = find_pairs(tmp_path/'grouped')
    patients = {p.name: f'patient {i//3}' for i, p in enumerate(pairs)}
    pd.Series(patients, name='group').rename_axis('name').to_csv(tmp_path/'grouped'/'manifest.csv')
    folds = make_folds(pairs, 4)
    assert sorted(p for f in folds for p in f.held) == pairs
    for f in folds: assert len({patients[p.name] for p in f.held}) == 1
    with pytest.raises(MedsynError, match='cannot be split'): make_folds(pairs, 5)

def test_generators_of_a_fold_do_not_see_what_it_holds_out(folders, labelled, tmp_path):
    "With time for a generator: one per fold, shared by arms, which draws from its training pairs alone."
    tiny = Synthesis(bs=4, channels=(16, 32), least_steps=1, most_steps=2, per_pair=1, sample_steps=1)
    arms = ['real', 'fixmatch+mcpmix-scheduled', 'stream-annealed,w=0.5']
    frames = folders/'frames'/'images'
    out = fit(folders/'labelled', tmp_path/'out', frames, arms=arms, synthesis=tiny, **SMALL)
    plan = json.loads((out/'plan.json').read_text())
    assert plan['folds'] == 2 and plan['generator_steps'] == 2 and plan['arms'] == arms
    assert set(pd.read_csv(out/'cv'/'scores.csv').arm) == set(arms)
    for i, split in enumerate(make_folds(labelled, 2)):
        lines = (out/'cv'/f'fold{i}'/'synthetic'/'manifest.jsonl').read_text().splitlines()
        assert {json.loads(line)['source'] for line in lines} == names(split.train)
    assert arms[1] in (out/'report.md').read_text() and (out/'model'/'model.safetensors').exists()

def test_a_job_that_is_stopped_resumes(folders, tmp_path, monkeypatch, job):
    "Stopped in its third run: the plan and the finished runs stay, and it ends as an unbroken one."
    original, runs = module.score_run, []
    def stopped(*args, **kw):
        if len(runs) == 2: raise KeyboardInterrupt
        runs.append(args[0])
        original(*args, **kw)
    call = folders/'labelled', tmp_path/'out'
    (tmp_path/'out').mkdir()
    for name in ('fit.json', 'speed.json'):                     # the same plan
        (tmp_path/'out'/name).write_bytes((job/name).read_bytes())
    monkeypatch.setattr(module, 'score_run', stopped)
    with pytest.raises(KeyboardInterrupt): fit(*call, arms=['real', 'two-passes'], **SMALL)
    monkeypatch.undo()
    stamps = [f.stat().st_mtime_ns for f in runs]
    assert not list((tmp_path/'out'/'cv').glob('*claim*')) and not (tmp_path/'out'/'model').exists()
    out = fit(*call, arms=['real', 'two-passes'], **SMALL)
    assert [f.stat().st_mtime_ns for f in runs] == stamps
    assert (out/'report.md').read_text() == (job/'report.md').read_text()
    assert (out/'model'/'model.safetensors').read_bytes() == (job/'model'/'model.safetensors').read_bytes()

def test_eight_labels_are_enough(labelled, tmp_path):
    out = fit(labelled[:8], tmp_path/'out', arms=['real', 'two-passes'], **SMALL)
    assert len(pd.read_csv(out/'cv'/'scores.csv')) == 16

def test_little_time_gives_one_arm(labelled, tmp_path, monkeypatch):
    "Nothing is compared, and the report says so."
    monkeypatch.setattr(module, 'seconds_a_step', lambda *a, **kw: 40.)
    out = fit(labelled, tmp_path/'out', arms=['real', 'two-passes'], **SMALL)
    assert not (out/'cv').exists() and (out/'model'/'model.safetensors').exists()
    text = (out/'report.md').read_text()
    assert 'nothing was compared' in text and 'two-passes was not tried' in text

def test_the_plan_keeps_the_time():
    "More minutes, never fewer arms, folds of at most five, and never more time than given."
    seconds = {'real': .5, 'two-passes': .9, 'fixmatch': 1.2, 'stream': .9}
    generator = dict(arms=['stream'], step=.2, drawing=60, least_steps=1500, most_steps=8000)
    plans = [plan_time(seconds, m, 60, 200, 3000, generator) for m in (2, 5, 15, 30, 60, 120, 240, 1000)]
    n_arms = [len(p.arms) for p in plans]
    assert n_arms == sorted(n_arms) and n_arms[0] == 1 and n_arms[-1] == 4
    for p, minutes in zip(plans, (2, 5, 15, 30, 60, 120, 240, 1000)):
        assert p.minutes <= minutes and 200 <= p.steps <= 3000 and p.folds in (0, 2, 3, 5)
        assert {*p.arms, *p.left_out} == set(seconds)

def test_arms_that_share_a_generator():
    "Where two of them do not fit, the first may; each that is left out names what it would take."
    seconds = {'real': .5, 'mcpmix-scheduled': .9, 'stream': 6.}
    generator = dict(arms=list(seconds)[1:], step=.2, drawing=60, least_steps=1500, most_steps=8000)
    plans = [plan_time(seconds, m, 60, 200, 3000, generator) for m in range(5, 400, 20)]
    tried = [tuple(p.arms) for p in plans]
    assert {('real',), ('real', 'mcpmix-scheduled'), tuple(seconds)} == set(tried)
    for p in plans:
        assert {*p.arms, *p.left_out} == set(seconds) and bool(p.generator_steps) == (len(p.arms) > 1)
        assert all(minutes > 0 for minutes in p.left_out.values())

def test_arms_worth_trying():
    assert default_arms(False) == ['two-passes', 'mcpmix-scheduled']
    assert default_arms(True) == ['two-passes', 'fixmatch', 'fixmatch+mcpmix-scheduled']

@pytest.mark.parametrize('named, baseline', [(['mixup'], 'two-passes'), (['mixup', 'real'], 'real')])
def test_real_images_alone_are_always_an_arm(folders, tmp_path, named, baseline):
    "Two passes, unless one pass is named; it comes first, and the other arms are compared with it."
    out = fit(folders/'labelled', tmp_path/'out', arms=named, **SMALL)
    assert json.loads((out/'plan.json').read_text())['arms'] == [baseline, 'mixup']
    assert list(pd.read_csv(out/'cv'/'differences.csv').arm.unique()) == ['mixup']
    assert f'dice@0.5 against {baseline} ' in (out/'report.md').read_text()

@pytest.mark.parametrize('changed, words', [
    (dict(start='paste'), r"start='paste' changes the masks: use start='real' or 'noise'"),
    (dict(method='paired'), "'paired' makes its own masks: use another method")])
def test_pairs_that_cannot_be_partners_are_refused_first(labelled, tmp_path, changed, words):
    "Before a generator is trained for hours."
    call = dict(arms=['real', 'mcpmix-scheduled'], synthesis=Synthesis(**changed), **SMALL)
    with pytest.raises(MedsynError, match=words): fit(labelled, tmp_path/'out', **call)
    assert not (tmp_path/'out').exists()

def test_what_the_verdict_says():
    row = lambda lo: pd.DataFrame([dict(arm='fixmatch', lo=lo, text='+2.0 dice')])
    def sentence(winner, lo): return verdict(winner, 'two-passes', row(lo), pd.Series({'two-passes': .5}))
    assert 'Real images alone (two-passes) are best: dice 50.0' in sentence('two-passes', .1)
    assert 'fixmatch has the highest mean Dice' in sentence('fixmatch', -.1)
    assert 'fixmatch is best in cross-validation: against two-passes, +2.0 dice' in sentence('fixmatch', .1)

CURVES = [(3., 'more steps would still help'), (-2., 'it falls'), (.1, 'it is flat')]

@pytest.mark.parametrize('gain, words', CURVES)
def test_what_the_curve_says(gain, words):
    job = SimpleNamespace(plan=SimpleNamespace(left_out={}), unlabelled=['frame'])
    assert words in module._advice(job, 'real', gain)[0]

def test_bad_input_is_one_sentence(folders, labelled, tmp_path):
    "And nothing is written."
    again = tmp_path/'frames'
    again.mkdir()
    Image.open(labelled[3].image).save(again/'renamed.bmp')         # another file, the same pixels
    for words, changed in {
        'only 7 pairs: at least 8 are needed': dict(labelled=labelled[:7]),
        r'1 of 1 images without masks are labelled images \(renamed.bmp': dict(unlabelled=again),
        "did you mean 'two-passes'": dict(arms=['two-pases']),
        'needs images without masks': dict(arms=['real', 'paste-onto']),
        "arm 'stream' has no setting 'wx'": dict(arms=['real', 'stream,wx=1']),
        'unknown encoder': dict(encoder='resnet81'),
        'must be multiples of 32': dict(size=40),
        "unknown loss 'dice'": dict(loss='dice'),
    }.items():
        call = {'labelled': labelled, 'out': tmp_path/'out', **SMALL, **changed}
        with pytest.raises(MedsynError, match=words): fit(**call)
    assert not (tmp_path/'out').exists()

def test_too_few_minutes(labelled, tmp_path):
    kw = {**SMALL, 'minutes': .0001, 'least_steps': 1000, 'most_steps': 1000}
    with pytest.raises(MedsynError, match='0.0001 minutes are too few for 1000 training steps'):
        fit(labelled, tmp_path/'out', arms=['real'], **kw)

def test_predictions_resume_and_average(folders, job, tmp_path, monkeypatch):
    "Stopped after the first batch; in the end the same files as an unbroken run."
    images = folders/'frames'/'images'
    whole = predict_images(job/'model', images, tmp_path/'whole', bs=2)
    original, calls = module.predict, []
    def stopped(*args, **kw):
        calls.append(args)
        if len(calls) == 2: raise KeyboardInterrupt
        return original(*args, **kw)
    monkeypatch.setattr(module, 'predict', stopped)
    with pytest.raises(KeyboardInterrupt): predict_images(job/'model', images, tmp_path/'part', bs=2)
    monkeypatch.undo()
    assert len(pd.read_csv(tmp_path/'part'/'predictions.csv')) == 2
    part = predict_images(job/'model', images, tmp_path/'part', bs=2)
    files = {f.relative_to(whole) for f in whole.rglob('*') if f.is_file()}
    assert len(files) == 5*3 + 2 and all((part/f).read_bytes() == (whole/f).read_bytes() for f in files)
    mean = predict_images([job/'model', job/'model'], images, tmp_path/'mean')
    for f in ('0000.png', '0004.png'): assert (mean/'masks'/f).read_bytes() == (whole/'masks'/f).read_bytes()
    with pytest.raises(MedsynError, match='holds another predict run'):
        predict_images([job/'model', job/'model'], images, whole)

def test_predictions_have_the_size_of_the_image(job, tmp_path):
    (tmp_path/'in').mkdir()
    Image.fromarray(np.zeros((37, 61, 3), np.uint8)).save(tmp_path/'in'/'wide.png')
    out = predict_images(job/'model', tmp_path/'in', tmp_path/'out')
    assert {Image.open(out/k/'wide.png').size for k in ('masks', 'probabilities', 'overlays')} == {(61, 37)}
    row = pd.read_csv(out/'predictions.csv').iloc[0]
    mask = np.array(Image.open(out/'masks'/'wide.png'))
    assert (row.height, row.width) == (37, 61)
    assert abs(row.area - (mask > 0).mean()) < 1e-4 and 0 <= row.confidence <= 1
