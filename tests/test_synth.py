"""Synthesis from noise and from real images: exact limits, resuming, filters, and what is refused."""
import json
import shutil

import numpy as np
import pytest
import torch

from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.paste import feathered
from medsyn.data.pairs import find_pairs, read_image, read_mask, read_pair
from medsyn.diffusion.backbone import Backbone
from medsyn.diffusion.learner import PairGenerator
from medsyn.diffusion.sample import sample
from medsyn.diffusion.schedule import SAMPLE_STEPS, SAMPLER, Schedule
from medsyn.generate.control import ControlGenerator
from medsyn.segment.mixing import find_partners
from medsyn.segment.streams import read_ignored
from medsyn.synth import Job, finished, from_inpaint, from_paste, keep_all, keep_new, synthesize

SIZE = 32
QUICK = dict(n=6, steps=3, bs=4, seed=3)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Real pairs, frames, and an untrained generator whose control branch is not zero."
    d = tmp_path_factory.mktemp('synth')
    pairs = find_pairs(lesion_folder(d/'real', 8, size=SIZE, seed=0))
    frames = [p.image for p in find_pairs(lesion_folder(d/'frames', 5, size=SIZE, seed=1))]
    x0 = torch.stack([torch.from_numpy(read_image(p.image)) for p in pairs]).permute(0, 3, 1, 2)/127.5 - 1
    generator = ControlGenerator(Backbone.tiny(x0, SIZE, channels=(16, 32)))
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in generator.parameters(): p += .02*torch.randn(p.shape, generator=rng)
    return pairs, frames, generator

def rows(folder): return [json.loads(line) for line in (folder/'manifest.jsonl').read_text().splitlines()]
def tree(folder):
    files = [f for f in sorted(folder.rglob('*')) if f.is_file()]
    return {f.relative_to(folder).as_posix(): f.read_bytes() for f in files}

STARTS = [dict(start='real', strength=.4), dict(start='paste'), dict(start='inpaint'),
          dict(start='inpaint', masks='real')]

@pytest.mark.parametrize('kw', STARTS, ids=str)
def test_a_run_resumes_with_the_same_bytes(made, tmp_path, kw):
    pairs, frames, generator = made
    if kw['start'] == 'paste': kw = dict(kw, into=frames)
    synthesize(generator, pairs, tmp_path/'a', **QUICK, **kw)
    lines = (tmp_path/'a'/'manifest.jsonl').read_text().splitlines(keepends=True)
    for cut in (0, 2, 5):
        shutil.copytree(tmp_path/'a', tmp_path/f'b{cut}')
        (tmp_path/f'b{cut}'/'manifest.jsonl').write_text(''.join(lines[:cut]) + lines[cut][:20])
        if cut == 2 and 'into' in kw: (tmp_path/'b2'/'ignored'/'000001.png').write_bytes(b'torn')
        synthesize(generator, pairs, tmp_path/f'b{cut}', **QUICK, **kw)
        assert tree(tmp_path/f'b{cut}') == tree(tmp_path/'a')
    with pytest.raises(MedsynError, match='holds another synth run'):
        synthesize(generator, pairs, tmp_path/'a', **QUICK, **dict(kw, strength=.9))

def test_a_manifest_of_two_processes(made, tmp_path):
    "Two that worked in one folder at once: each pair counts once; a gap ends what is trusted."
    pairs, _, generator = made
    first = synthesize(generator, pairs, tmp_path/'a', **QUICK)
    manifest, before = tmp_path/'a'/'manifest.jsonl', tree(tmp_path/'a')
    lines = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(''.join([*lines[:2], lines[0], *lines[2:], *lines]))
    assert synthesize(generator, pairs, tmp_path/'a', **QUICK) == first and tree(tmp_path/'a') == before
    manifest.write_text(''.join([lines[0], *lines[2:]]))
    assert finished(tmp_path/'a') == [lines[0].strip()]

def test_guidance_within_an_interval(made, tmp_path):
    "The whole interval is none, byte for byte; an empty one is no guidance; another one is neither."
    pairs, _, generator = made
    def run(name, **kw):
        synthesize(generator, pairs, tmp_path/name, **QUICK, **kw)
        return tree(tmp_path/name)
    plain = run('plain')
    assert run('whole', interval=(0, 1)) == plain
    def images(files): return {name: data for name, data in files.items() if name.startswith('images')}
    empty, part = run('empty', interval=(.5, .5)), run('part', interval=(.2, .7))
    assert images(empty) == images(run('unguided', guidance=1))
    assert images(part) != images(plain) and images(part) != images(empty)
    assert all(row['interval'] == [.2, .7] for row in rows(tmp_path/'part'))
    assert 'interval' not in rows(tmp_path/'plain')[0]
    with pytest.raises(MedsynError, match='holds another synth run'): run('part', interval=(.2, .6))

def test_the_default_sampler(made, tmp_path):
    pairs, _, generator = made
    synthesize(generator, pairs, tmp_path/'a', 1)
    assert (rows(tmp_path/'a')[0]['sampler'], rows(tmp_path/'a')[0]['steps']) == (SAMPLER, SAMPLE_STEPS)
    masks = np.stack([read_mask(p.mask) for p in pairs[:2]])
    plain, named = sample(generator, masks), sample(generator, masks, 20, sampler='dpm++')
    assert (plain == named).all() and (plain != sample(generator, masks, 20, sampler='ddim')).any()

@pytest.mark.parametrize('start', ['real', 'paste', 'inpaint'])
def test_strength_zero_asks_no_generator(made, tmp_path, start):
    pairs, _, generator = made
    class Deaf(ControlGenerator):
        def forward(self, *args, **kw): raise AssertionError('was asked')
    deaf = Deaf(generator.backbone)
    pictures = synthesize(deaf, pairs, tmp_path/'a', start=start, strength=0, least_margin=.5, **QUICK)
    for p, row in zip(pictures, rows(tmp_path/'a')):
        source = next(q for q in pairs if q.name == row.get('into', row['source']))
        image, mask = read_pair(source, SIZE)
        if start != 'paste': assert np.array_equal(read_image(p.image), image)
        assert (read_mask(p.mask) >= mask).all()

def test_what_is_not_new_stays_as_it_was(made, tmp_path):
    pairs, _, generator = made
    job = Job(sorted(pairs, key=lambda p: p.name), SIZE, QUICK['seed'])
    for i, p in enumerate(synthesize(generator, pairs, tmp_path/'a', start='inpaint', **QUICK)):
        draft = from_inpaint(job, i)
        alpha = feathered(torch.from_numpy(draft.fresh)[None, None].float())[0, 0].numpy()
        image = read_image(p.image)
        assert np.array_equal(image[alpha == 0], draft.init[alpha == 0])
        assert not np.array_equal(image[draft.fresh > 0], draft.init[draft.fresh > 0])

def test_real_variants_are_partners(made, tmp_path):
    "Variants of real images under their own masks serve for mixing."
    pairs, _, generator = made
    for name, kw in dict(real=dict(start='real'), inplace=dict(start='inpaint', masks='real')).items():
        synthesize(generator, pairs, tmp_path/name, n=8, steps=2, seed=1, **kw)
        assert set(find_partners(tmp_path/name, pairs)) == {p.name for p in pairs}

def test_partners_where_images_were_dropped(made, tmp_path):
    "Lines without files are passed over; the images that were kept are partners."
    pairs, _, generator = made
    source = {read_pair(p)[0].tobytes(): p.name for p in pairs}
    def keep(image, mask): return source[image.tobytes()] != pairs[0].name, 'the first pair'
    synthesize(generator, pairs, tmp_path/'a', start='real', strength=0, keep=keep, **dict(QUICK, n=7))
    assert any('dropped' in row for row in rows(tmp_path/'a'))
    assert set(find_partners(tmp_path/'a', pairs)) == {p.name for p in pairs[1:]}

def test_frames_without_masks_mark_what_is_unknown(made, tmp_path):
    pairs, frames, generator = made
    out = synthesize(generator, pairs, tmp_path/'a', start='paste', into=frames, **QUICK)
    ignored = read_ignored(tmp_path/'a'/'ignored', out)
    for i, p in enumerate(out):
        draft = from_paste(Job(sorted(pairs, key=lambda q: q.name), SIZE, QUICK['seed'], 'real', frames), i)
        assert np.array_equal(ignored[p.name], draft.unknown > 0)
        assert not ignored[p.name][draft.mask > 0].any()
    assert {r['into'] for r in rows(tmp_path/'a')} <= {f.stem for f in frames}

def test_batch_size_and_hardness(made, tmp_path):
    pairs, _, generator = made
    a = synthesize(generator, pairs, tmp_path/'a', start='real', **QUICK)
    b = synthesize(generator, pairs, tmp_path/'b', start='real', **dict(QUICK, bs=2))
    for p, q in zip(a, b): assert np.abs(read_image(p.image).astype(int) - read_image(q.image)).max() <= 1
    only = {p.name: float(p is pairs[2]) for p in pairs}
    synthesize(generator, pairs, tmp_path/'c', start='real', strength=0, hardness=only, **QUICK)
    assert {r['source'] for r in rows(tmp_path/'c')} == {pairs[2].name}

def test_tests_go_together_and_the_teacher_is_named(made, tmp_path):
    pairs, _, generator = made
    def teacher(image, mask): return True, dict(dice=.9)
    teacher.about = dict(kind='obedient', segmenter='0123456789abcdef')
    keep = keep_all(teacher, keep_new(lambda image: image.mean(), 0.))
    synthesize(generator, pairs, tmp_path/'a', start='real', keep=keep, **QUICK)
    assert {r['teacher'] for r in rows(tmp_path/'a')} == {'0123456789abcdef'}
    assert set(rows(tmp_path/'a')[0]['score']) == {'obedient', 'new'}
    none = keep_new(lambda image: 0., 1.)
    with pytest.raises(MedsynError, match='keep dropped 12 of 12 images'):
        synthesize(generator, pairs, tmp_path/'b', keep=none, tries=2, **QUICK)

def test_every_test_of_keep_all_is_heard(made, tmp_path):
    "Two tests of one kind have an entry each; a test that does not say why is one sentence."
    pairs, _, generator = made
    def distance(value): return lambda image: value
    two = keep_all(keep_new(distance(3.), 1.), keep_new(distance(5.), 1.))
    synthesize(generator, pairs, tmp_path/'a', keep=two, **QUICK)
    assert rows(tmp_path/'a')[0]['score'] == {'new': {'distance': 3.}, 'new 2': {'distance': 5.}}
    second = keep_all(keep_new(distance(3.), 1.), keep_new(distance(.5), 1.))
    assert second(None, None) == (False, {'new 2': {'distance': .5}})
    def bare(image, mask): return True
    with pytest.raises(MedsynError, match=r"bare' of keep_all returned True: it must return \(True or"):
        synthesize(generator, pairs, tmp_path/'b', keep=keep_all(bare), **QUICK)

class EverySecond(PairGenerator):
    "Its second, fourth, ... image has a mask; the others are empty."
    grey, size, steps, schedule, config = True, SIZE, 2, Schedule(), {}
    def check_size(self, size): pass
    def sample_pairs(self, seeds, steps, sampler, size, bs):
        soft = np.stack([np.full((size, size), k % 2) for k in range(len(seeds))])
        return np.zeros((len(seeds), size, size, 3), np.uint8), soft
    def clean_mask(self, soft): return soft.astype(np.uint8), {}, None if soft.any() else 'nothing drawn'

def test_only_drawn_masks_count_as_drawn_masks(made, tmp_path):
    "A reason of `keep` may contain the word mask."
    def keep(image, mask): return False, 'outside its mask'
    with pytest.raises(MedsynError, match='keep dropped 6 of 6') as refused:
        synthesize(made[2], made[0], tmp_path/'a', 3, steps=1, bs=2, keep=keep, tries=2)
    assert 'drawn mask' not in str(refused.value)
    with pytest.raises(MedsynError, match='keep dropped 6 of 6.*, 3 for their drawn mask'):
        synthesize(EverySecond(), None, tmp_path/'b', 3, bs=2, keep=keep, tries=2)
    by = [(r['dropped'], r.get('dropped_by')) for r in rows(tmp_path/'b')]
    assert by == 3*[('nothing drawn', 'mask'), ('outside its mask', None)]

def test_healthy_needs_pictures(made, tmp_path):
    pairs, frames, generator = made
    for source, kw in ((generator, {}), (generator, dict(start='paste')), (EverySecond(), {})):
        with pytest.raises(MedsynError, match='healthy says that the pictures of into have no lesion'):
            synthesize(source, pairs, tmp_path/'a', healthy=True, **QUICK, **kw)
    with pytest.raises(MedsynError, match='into are pairs, whose masks say where lesions are'):
        synthesize(generator, pairs, tmp_path/'a', start='paste', into=pairs, healthy=True, **QUICK)
    assert not (tmp_path/'a').exists()
    synthesize(generator, pairs, tmp_path/'a', start='paste', into=frames, healthy=True, **QUICK)
    assert not any('ignored' in row for row in rows(tmp_path/'a'))

def test_a_generator_that_ignores_its_mask_is_refused(made, tmp_path):
    pairs, _, generator = made
    ignorant = ControlGenerator(generator.backbone)
    with pytest.raises(MedsynError, match='hardly follows its mask'):
        synthesize(ignorant, pairs, tmp_path/'a', least_margin=.001, **QUICK)
    assert not (tmp_path/'a').exists()
    assert len(synthesize(ignorant, pairs, tmp_path/'a', least_margin=.001, anyway=True, **QUICK)) == 6
