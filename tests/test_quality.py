"Synthetic images judged from the command line: filter, report, wrong inputs; readers against loops."
import base64
import io
import json
import re
import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cdist

from medsyn.cli import main
from medsyn.core import MedsynError, seeded
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import find_pairs, read_pair, save_list
from medsyn.diffusion.backbone import Backbone
from medsyn.evaluate.obedience import agreement, denoising_probe, obedience
from medsyn.evaluate.pictures import embed, opinions, reader_study, wilson
from medsyn.generate.control import ControlGenerator
from medsyn.segment.learner import predict
from medsyn.segment.models import segmenter
from medsyn.synth import synthesize

warnings.filterwarnings('ignore')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Pairs, a generator with something in its branch, its synthetic pairs, a segmenter; nothing is trained."
    d = tmp_path_factory.mktemp('quality')
    lesion_folder(d/'train', 16, size=32, seed=0); lesion_folder(d/'held', 8, size=48, seed=1)
    images = np.stack([read_pair(p)[0] for p in find_pairs(d/'train')])
    x0 = torch.from_numpy(images).permute(0, 3, 1, 2)/127.5 - 1
    with seeded(0):
        gen = ControlGenerator(Backbone.tiny(x0, 32, channels=(16, 32)))
        seg = segmenter('unet', 'resnet18', size=32, encoder_depth=3, decoder_channels=(32, 16, 8))
        with torch.no_grad():
            for p in gen.control.parameters(): p.add_(.1*torch.randn_like(p))
    gen.save_pretrained(d/'gen'); seg.save_pretrained(d/'seg')
    synthesize(gen.eval(), find_pairs(d/'train'), d/'syn', 9, steps=2, sampler='dpm++')
    return d

def fails(capsys, *argv):
    capsys.readouterr()
    status = main([str(a) for a in argv])
    err = capsys.readouterr().err
    lines = [l for l in err.splitlines() if l.startswith('medsyn: error: ')]
    assert status == 2 and len(lines) == 1 and 'Traceback' not in err, (status, err)
    return lines[0]

# Obedience ----------------------------------------

def outline(m):
    "Mask pixels with a neighbour outside, one by one."
    p = np.pad(m, 1)
    def inner(y, x): return p[y, x + 1] and p[y + 2, x + 1] and p[y + 1, x] and p[y + 1, x + 2]
    return np.array([(y, x) for y, x in zip(*np.nonzero(m)) if not inner(y, x)])

def test_agreement_by_loops(made):
    from medsyn.segment.models import Segmenter
    seg, pairs = Segmenter.from_pretrained(made/'seg'), find_pairs(made/'train')[:6]
    got = agreement(seg, pairs, bs=4)
    for p, r in zip(pairs, got.itertuples(index=False)):
        x, m = read_pair(p); q = predict(seg, [x])[0] > .5
        assert r.name == p.name and r.found == pytest.approx(q.mean(), abs=1e-3)
        assert r[1] == pytest.approx(2*(q & (m > 0)).sum()/max(q.sum() + m.sum(), 1), abs=5e-3)
        if q.any():
            d = cdist(outline(q), outline(m > 0))
            there, back = (np.percentile(d.min(axis), 95) for axis in (1, 0))
            assert r.hd95 == pytest.approx(max(there, back), abs=.5)

def test_images_of_several_sizes(made):
    from medsyn.segment.models import Segmenter
    seg = Segmenter.from_pretrained(made/'seg')
    mixed = find_pairs(made/'train')[:3] + find_pairs(made/'held')[:3]
    assert len(agreement(seg, mixed, bs=4)) == 6
    assert obedience(seg, mixed, made/'held').size == 32

def test_probe_does_not_depend_on_what_comes_after(made):
    "Noise depends on an image's place: the first eight of twelve have the losses of eight alone."
    from medsyn.generate.catalog import load_generator
    gen, pairs = load_generator(made/'gen'), find_pairs(made/'train')
    a, b = denoising_probe(gen, pairs[:12], ts=(200, 700)), denoising_probe(gen, pairs[:8], ts=(200, 700))
    for k in ('right', 'shifted'): assert np.allclose(a[k][:8], b[k], rtol=1e-4)
    assert np.allclose(a.another[1:8], b.another[1:], rtol=1e-4)
    assert not np.allclose(a.another[0], b.another[0], rtol=1e-5)

def test_keep_from_the_command_line(made, tmp_path, capsys):
    "The median Dice as the threshold: what is dropped is explained, a resumed run adds nothing."
    from medsyn.segment.models import Segmenter
    seg = Segmenter.from_pretrained(made/'seg')
    dice = agreement(seg, made/'syn')['dice@0.5']
    bar = round(float(dice.median()), 4)
    argv = ['synth', made/'gen', '--data', made/'train', '--out', tmp_path/'o', '-n', 4, '--steps', 2,
            '--anyway', '--sampler', 'dpm++', '--keep', made/'seg', '--least', bar]
    assert main([str(a) for a in argv]) == 0
    assert re.search(r'Made: 4 pairs.*; \d+ were dropped', capsys.readouterr().out)
    rows = [json.loads(l) for l in (tmp_path/'o'/'manifest.jsonl').read_text().splitlines()]
    gone = [r for r in rows if 'dropped' in r]
    assert gone
    for r in gone:
        assert r['dropped']['dice@0.5'] < bar and 'is below' in r['dropped']['why'] and 'seed' in r
        assert not (tmp_path/'o'/'images'/f"{r['index']:06d}.png").exists()
    assert (agreement(seg, tmp_path/'o')['dice@0.5'].round(4) >= bar).all()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path/'o'/'images').iterdir()}
    assert main([str(a) for a in argv]) == 0
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path/'o'/'images').iterdir()}
    assert 'keep was' in fails(capsys, *argv[:-1], bar/2)
    error = fails(capsys, *argv[:5], tmp_path/'p', *argv[6:-1], 1, '--tries', 2)
    assert 'keep dropped 8 of 8 images' in error
    assert 'give a Dice from 0 to 1' in fails(capsys, *argv[:5], tmp_path/'q', *argv[6:-1], 50)
    assert not (tmp_path/'q').exists()

def test_judgements_do_not_see_numpy_types(made, tmp_path):
    "Scores of any numpy kind reach the manifest as numbers."
    from medsyn.generate.catalog import load_generator
    gen = load_generator(made/'gen')
    keep = lambda image, mask: (np.bool_(True), dict(a=np.float32(.5), b=np.int64(3), c=np.float64(1)))
    synthesize(gen, find_pairs(made/'train'), tmp_path/'o', 1, steps=1, keep=keep)
    assert json.loads((tmp_path/'o'/'manifest.jsonl').read_text())['score'] == dict(a=.5, b=3, c=1.)

# The report ----------------------------------------

def test_report_from_the_command_line(made, tmp_path, capsys):
    save_list(tmp_path/'pool.csv', find_pairs(made/'train'))
    argv = ['score', made/'syn', '--real', tmp_path/'pool.csv', '--out', tmp_path/'r',
            '--segmenter', made/'seg', '--held', made/'held', '--generator', made/'gen']
    assert main([str(a) for a in argv]) == 0
    out = capsys.readouterr().out
    assert 'Novelty (pixel)' in out
    assert 'Obedience: a segmenter' in out
    assert 'LPIPS: give' in out
    assert 'report.html' in out
    got, text = json.loads((tmp_path/'r'/'report.json').read_text()), (tmp_path/'r'/'report.html').read_text()
    for r in got['numbers']:
        assert r['extractor'] and r['n_real'] + r['n_fake'] > 0 and 'torch ' in r['versions'], r
        assert r['value'] is None or np.isfinite(r['value']), r
    assert {'fidelity', 'variety', 'novelty', 'obedience'} == {r['section'] for r in got['numbers']}
    assert not re.search(r'https?://|<script|<link|@import', text)                        # nothing is fetched
    pictures = [Image.open(io.BytesIO(base64.b64decode(b))) for b in re.findall(r'base64,([^"]+)', text)]
    assert len(pictures) == 5 and min(p.size[0] for p in pictures) > 200
    assert len(pd.read_csv(tmp_path/'r'/'images.csv')) == 9
    again = json.dumps({k: v for k, v in got.items() if k != 'command'})
    assert main([str(a) for a in [*argv, '--cache', tmp_path/'c']]) == 0
    cached = json.loads((tmp_path/'r'/'report.json').read_text())
    assert json.dumps({k: v for k, v in cached.items() if k != 'command'}) == again

def test_report_with_a_segmenter_as_extractor_only(made, tmp_path):
    argv = ['score', made/'syn', '--real', made/'train', '--out', tmp_path/'r', '--extractor', made/'seg']
    assert main([str(a) for a in argv]) == 0
    got = json.loads((tmp_path/'r'/'report.json').read_text())
    assert {'KD-unet', 'FD-unet'} <= {r['metric'] for r in got['numbers']}
    assert any(s.startswith('Obedience: give a segmenter') for s in got['missing'])

def test_a_report_leaves_no_figure_open(made, tmp_path, monkeypatch):
    "Neither after an error in a late measurement nor at the end; other figures stay."
    import matplotlib.pyplot as plt

    from medsyn.evaluate import report as module
    from medsyn.segment.models import Segmenter
    def broken(*args, **kwargs): raise MedsynError('the last measurement failed')
    plt.close('all')
    mine, seg = plt.figure(), Segmenter.from_pretrained(made/'seg')
    with monkeypatch.context() as patched:
        patched.setattr(module, 'obedience', broken)
        with pytest.raises(MedsynError, match='the last measurement'):
            module.report(made/'syn', made/'train', tmp_path/'a', segmenter=seg)
    assert plt.get_fignums() == [mine.number]
    page = module.report(made/'syn', made/'train', tmp_path/'b', segmenter=seg)
    assert plt.get_fignums() == [mine.number]
    plt.close(mine)
    text = page.read_text()
    assert 'The share of images at or below each Dice.' in text and 'sorted' not in text

def test_report_takes_a_comparison_and_readers(made, tmp_path):
    rng = np.random.default_rng(0)
    images = [('unet', t, str(i), rng.uniform(.3, .8)) for t in ('C4', 'C5') for i in range(12)]
    base = pd.DataFrame(images, columns=['segmenter', 'testset', 'name', 'dice@0.5'])
    runs = []
    for arm, gain in (('real', 0), ('mine', .1)):
        for s in (0, 1): runs.append(base.assign(arm=arm, seed=s, **{'dice@0.5': base['dice@0.5'] + gain}))
    pd.concat(runs).to_csv(tmp_path/'scores.csv', index=False)
    reader_study(made/'train', made/'syn', tmp_path/'study', n=5)
    form = pd.read_csv(tmp_path/'study'/'answers.csv').assign(looks_real=1, confidence=5)
    form.to_csv(tmp_path/'a.csv', index=False)
    argv = ['score', made/'syn', '--real', made/'train', '--out', tmp_path/'r',
            '--scores', tmp_path/'scores.csv',
            '--answers', tmp_path/'a.csv', '--key', tmp_path/'study_key.csv']
    assert main([str(a) for a in argv]) == 0
    numbers = json.loads((tmp_path/'r'/'report.json').read_text())['numbers']
    n = pd.DataFrame(numbers).set_index(['section', 'metric'])
    assert n.value['differences', 'mine, unet, Overall'] == pytest.approx(10)
    assert n.value['readers', 'MOS'] == 1
    assert n.lo['readers', 'MOS'] == pytest.approx(wilson(1, 5)[0])

def test_report_on_a_comparison_without_an_arm_called_real(made, tmp_path):
    "The first arm is the baseline and is named; another can be chosen; an unknown one is refused."
    from medsyn.evaluate.report import report
    rng = np.random.default_rng(0)
    arms = ['control']*8 + ['siamese']*8
    rows = [(arm, 'unet', 0, 'C5', str(i % 8), rng.uniform(.3, .8)) for i, arm in enumerate(arms)]
    scores = pd.DataFrame(rows, columns=['arm', 'segmenter', 'seed', 'testset', 'name', 'dice@0.5'])
    scores.to_csv(tmp_path/'scores.csv', index=False)
    mean = scores.groupby('arm')['dice@0.5'].mean()
    settings = dict(scores=tmp_path/'scores.csv', device='cpu')
    gain = mean.siamese - mean.control
    for baseline, arm, expected in ((None, 'siamese', gain), ('siamese', 'control', -gain)):
        report(made/'syn', made/'train', tmp_path/arm, baseline=baseline, **settings)
        numbers = json.loads((tmp_path/arm/'report.json').read_text())['numbers']
        row = next(r for r in numbers if r['section'] == 'differences')
        assert row['metric'] == f'{arm}, unet, only' and row['value'] == pytest.approx(100*expected)
        assert row['note'].startswith(f'against {baseline or "control"}: ')
    with pytest.raises(MedsynError, match="unknown baseline arm 'real'"):
        report(made/'syn', made/'train', tmp_path/'no', baseline='real', **settings)
    assert not (tmp_path/'no').exists()

def test_what_the_report_refuses(made, tmp_path, capsys, trusts_pickles):
    out = tmp_path/'r'
    (tmp_path/'empty').mkdir(); (tmp_path/'one').mkdir(); (tmp_path/'mixed').mkdir()
    files = sorted((made/'syn'/'images').iterdir()); shutil.copy(files[0], tmp_path/'one')
    for i, f in enumerate(files): Image.open(f).resize((32 + i % 2*8,)*2).save(tmp_path/'mixed'/f.name)
    (tmp_path/'cut.png').write_bytes(files[0].read_bytes()[:90])
    torch.save({'fc.weight': torch.zeros(1000, 2)}, tmp_path/'imagenet.pth')
    torch.save({'a': torch.zeros(3)}, tmp_path/'other.pth')
    seg = json.loads((made/'seg'/'config.json').read_text())
    shutil.copytree(made/'seg', tmp_path/'sizeless')
    (tmp_path/'sizeless'/'config.json').write_text(json.dumps(dict(seg, size=None)))
    ask = lambda *a: fails(capsys, 'score', *a, '--out', out)
    assert 'no image in' in ask(tmp_path/'empty', '--real', made/'train')
    assert 'no image in' in ask(made/'syn', '--real', tmp_path/'empty')
    assert '1 synthetic image in' in ask(tmp_path/'one', '--real', made/'train')
    assert '1 real image in' in ask(made/'syn', '--real', tmp_path/'one')
    mixed_sizes = ask(tmp_path/'mixed', '--real', made/'train', '--extractor', tmp_path/'sizeless')
    assert 'different sizes' in mixed_sizes
    real = ('--real', made/'train')
    assert "ImageNet Inception" in ask(made/'syn', *real, '--extractor', tmp_path/'imagenet.pth')
    assert "does not fit FID's Inception" in ask(made/'syn', *real, '--extractor', tmp_path/'other.pth')
    assert 'is no feature extractor' in ask(made/'syn', '--real', made/'train', '--extractor', 'inception')
    assert 'is not a folder' in ask(made/'syn', '--real', made/'train', '--segmenter', tmp_path/'nowhere')
    assert 'holds no generator' in ask(made/'syn', '--real', made/'train', '--generator', made/'seg')
    assert 'without its key' in ask(made/'syn', '--real', made/'train', '--answers', tmp_path/'a.csv')
    assert 'scores.csv does not exist' in ask(made/'syn', *real, '--scores', tmp_path/'scores.csv')
    assert 'say what to score' in ask(made/'syn')
    assert 'say what to score' in ask(made/'seg', '--tests', made/'train', '--real', made/'train')
    shutil.copytree(made/'syn', tmp_path/'broken')
    shutil.copy(tmp_path/'cut.png', tmp_path/'broken'/'images'/'000003.png')
    assert '000003.png' in ask(tmp_path/'broken', '--real', made/'train', '--segmenter', made/'seg')
    assert not out.exists()

# Pictures ----------------------------------------

@pytest.mark.parametrize('how', ['pca', 'tsne'])
def test_maps_of_tiny_and_degenerate_sets(how):
    x = np.random.default_rng(0).normal(size=(3, 7))
    for a, b in ((x, x + 1), (x, x), (np.zeros((4, 5)), np.zeros((4, 5)))):
        p, q = embed(a, b, how)
        assert p.shape == q.shape == (len(a), 2) and np.isfinite(p).all() and np.isfinite(q).all()

def test_the_sheet_does_not_tell(tmp_path):
    "Real images four times as large look as sharp as synthetic ones on the sheet; no file is named."
    big, small = draw_lesions(12, size=128, seed=0)[0], draw_lesions(12, size=32, seed=1)[0]
    f = reader_study(big, small, tmp_path/'s', n=10, seed=3)
    key = pd.read_csv(tmp_path/'s_key.csv')
    a = np.asarray(Image.open(f/'sheet.png').convert('L')).astype(float)

    def rough(j):
        row, column = divmod(j, 8)
        picture = a[26 + row*218:218 + row*218, 8 + column*200:200 + column*200]
        return np.abs(np.diff(picture, 2, axis=1)).mean()

    r = {k: np.mean([rough(j) for j in g.index]) for k, g in key.groupby('truth')}
    assert .75 < r['real']/r['synthetic'] < 1.33, r
    assert sorted(p.name for p in f.iterdir()) == ['answers.csv', 'sheet.png']
    assert 'real' not in (f/'answers.csv').read_text().split('\n', 1)[1]

def test_opinions_by_loops(tmp_path):
    real, fake = draw_lesions(9, size=32, seed=0)[0], draw_lesions(9, size=32, seed=1)[0]
    f = reader_study(real, fake, tmp_path/'s', n=9); key = pd.read_csv(tmp_path/'s_key.csv')
    rng, forms = np.random.default_rng(0), []
    for k in range(3):
        # lines in any order
        form = key[['picture']].assign(looks_real=rng.integers(0, 2, 18), confidence=rng.integers(0, 11, 18))
        forms.append(form.sample(frac=1, random_state=k))
        # as a spreadsheet may save it
        forms[-1].to_csv(tmp_path/f'{k}.csv', index=False, sep=';' if k == 1 else ',')
    got = opinions([tmp_path/f'{k}.csv' for k in range(3)], tmp_path/'s_key.csv').set_index('set')
    truth = dict(zip(key.picture, key.truth))
    for s in ('real', 'synthetic'):
        votes = [(r.looks_real, r.confidence) for a in forms for r in a.itertuples() if truth[r.picture] == s]
        assert got.mos[s] == pytest.approx(np.mean([v for v, _ in votes]))
        assert got.confidence[s] == pytest.approx(np.mean([c for _, c in votes]))
        assert got.lo[s] < got.mos[s] < got.hi[s] and got.readers[s] == 3 and got.n[s] == 9
    with pytest.raises(MedsynError, match='fill in'): opinions(f/'answers.csv', tmp_path/'s_key.csv')
