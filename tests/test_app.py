"""The pages of `medsyn view`: what a browser does, and what the server answers without one.

The tests with a browser need Chromium (Debian: apt-get install chromium) and the package playwright;
without them they are skipped. MEDSYN_BROWSER names another program."""
import asyncio
import base64
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from medsyn import paint
from medsyn.app import MOST_SENT, make_app, view
from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, read_pair
from medsyn.diffusion.backbone import Backbone
from medsyn.evaluate import gallery
from medsyn.experiment import Run, _save_tests, report, save_prediction
from medsyn.generate.control import ControlGenerator
from medsyn.pages.review import open_site
from medsyn.review import add_review, kappa, pair_content, read_reviews
from medsyn.synth import png_bytes

SIZE = 32
EVIL = "<img src=x onerror='window.hacked=1'>\"&"

# What is shown -------------------------------------------------------------------------------------

def write_results(folder, tests):
    "A comparison's folder as `compare` leaves it, with invented scores."
    rng, rows = np.random.default_rng(0), []
    for arm, mean in (('real', .6), ('two-passes', .7)):
        for seed in (0, 1):
            run = Run(arm, 'unet', seed)
            for p in tests:
                row = dict(arm=arm, segmenter='unet', seed=seed, testset='test', name=p.name)
                rows.append({**row, 'dice@0.5': float(np.clip(rng.normal(mean, .1), 0, 1))})
                mask = read_pair(p)[1].astype(float)
                save_prediction(folder/'runs'/f'{run.file}.predictions', SIZE, 'test', p, .9*mask)
    _save_tests(folder, {'test': tests})
    return report(pd.DataFrame(rows), folder)

def write_log(folder, steps, total):
    "The files of a training that has come so far."
    live = folder/'live'
    live.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(dict(step=range(1, steps + 1), loss=1/np.arange(1, steps + 1), L_align=.5, lr=1e-3))
    table.to_csv(live/'train.log.csv', index=False)
    pd.DataFrame(dict(step=[steps], margin=[.02])).to_csv(live/'train.evals.csv', index=False)
    (live/'train.json').write_text(json.dumps(dict(done=steps, total=total)))
    Image.fromarray(np.full((32, 64, 3), 200, np.uint8)).save(live/f'train-{steps:06d}.png')
    return folder

@pytest.fixture(scope='module')
def places(tmp_path_factory):
    "Synthetic and real pairs, a generator, a training that runs, a comparison."
    d = tmp_path_factory.mktemp('view')
    real = find_pairs(lesion_folder(d/'real', 12, size=SIZE, seed=1))
    lesion_folder(d/'made', 9, size=SIZE, seed=2)
    first = find_pairs(d/'made')[0]
    for file in (first.image, first.mask): file.rename(file.with_stem(EVIL.replace('/', '')))
    x0 = torch.from_numpy(np.stack([read_pair(p)[0] for p in real])).permute(0, 3, 1, 2)/127.5 - 1
    ControlGenerator(Backbone.tiny(x0, SIZE, (16, 32), seed=0)).save_pretrained(d/'generator')
    write_log(d/'run', 30, 60)
    write_results(d/'results', real[:6])
    return d

def site_of(d, **more):
    "Everything opened, as `medsyn view` does."
    named = dict(real=d/'real', generator=d/'generator', run=d/'run', results=d/'results')
    return open_site(d/'made', **{**named, **more})

@pytest.fixture
def copied(places, tmp_path):
    "The same with a folder of pairs of its own, that a test may change."
    for name in ('real', 'generator', 'run', 'results'): (tmp_path/name).symlink_to(places/name)
    shutil.copytree(places/'made', tmp_path/'made', ignore=shutil.ignore_patterns('.view', '*.jsonl'))
    return tmp_path

def client_of(site, who='Ada'):
    "Somebody who has opened the printed address and given a name."
    client = TestClient(make_app(site, ['testserver']), headers={'x-medsyn': '1'})
    client.get(f'/?token={site.token}')
    client.cookies.set('who', who)
    return client

# Without a browser ---------------------------------------------------------------------------------

PATHS = ['/', '/score', '/paint', '/training', '/results', '/static/app.js', '/measuring',
         '/thumbnail/x', '/picture/x', '/nearest/x', '/details/x', '/score/picture/x', '/training/state',
         '/training/figure', '/training/picture', '/results/case/x', '/results/picture/x', '/nowhere']
PICTURES = ['/thumbnail', '/picture', '/nearest', '/details', '/score/picture', '/results/case',
            '/results/picture']
SENT = ['/review', '/score', '/paint/mask', '/paint/into', '/paint/edit', '/paint/sample', '/paint/add']

def test_nothing_without_the_token(places):
    site = site_of(places)
    client = TestClient(make_app(site, ['testserver']), follow_redirects=False)
    for path in PATHS:
        for question in ('', '?token=', '?token=' + site.token[:-1], '?token=%00%ff'):
            answer = client.get(path + question)
            assert answer.status_code == 403 and 'Refused' in answer.text, path
    for path in SENT: assert client.post(path, json={}, headers={'x-medsyn': '1'}).status_code == 403
    client.cookies.set('medsyn-00000000', site.token)
    assert client.get('/').status_code == 403

def test_another_host_and_a_foreign_page_are_refused(places):
    "A name that an attacker points to 127.0.0.1, and a request that lacks the header of our own script."
    site = site_of(places)
    client = TestClient(make_app(site, ['127.0.0.1']), base_url='http://evil.example')
    assert client.get(f'/?token={site.token}').status_code == 400
    client = client_of(site)
    for path in SENT: assert client.post(path, json={}, headers={'x-medsyn': ''}).status_code == 403
    for question in ('//evil.example/', '/%2f/evil.example'):
        answer = client.get(f'{question}?token={site.token}', follow_redirects=False)
        assert not answer.headers.get('location', '/').startswith('//'), answer.headers

def test_every_answer_forbids_foreign_content(places):
    client = client_of(site_of(places))
    for path in PATHS:
        policy = client.get(path).headers['content-security-policy']
        assert "default-src 'none'" in policy and "script-src 'self'" in policy, path
        assert 'unsafe' not in policy, path

def test_names_stay_text(places):
    client = client_of(site_of(places))
    page = client.get('/').text
    assert '<img src=x' not in page and '&lt;img src=x' in page

@pytest.mark.parametrize('id', ['x', '...', '%2e%2e%2f%2e%2e%2fetc%2fpasswd', '0'*16])
def test_paths_outside_the_folder_are_refused(places, id):
    client = client_of(site_of(places))
    for path in PICTURES:
        answer = client.get(f'{path}/{id}', params=dict(arm='two-passes'))
        assert answer.status_code in (400, 404) and 'root:' not in answer.text, path
    answer = client.get('/training/picture', params=dict(name='train', stem='../../../../etc/passwd'))
    assert answer.status_code == 400 and 'no samples of this name' in answer.json()['error']

def test_links_that_leave_the_folder_are_refused(copied, tmp_path):
    "A pair, or a picture of samples, that is a link to a file elsewhere: a sentence, and not the file."
    (tmp_path/'private').mkdir()
    names = {}
    for kind in ('images', 'masks'):
        file = sorted((copied/'made'/kind).iterdir())[0]
        names[kind] = file.name
        shutil.move(file, tmp_path/'private'/f'{kind}.png')
        file.symlink_to(tmp_path/'private'/f'{kind}.png')
    shutil.copytree(copied/'run', tmp_path/'run2')
    (tmp_path/'run2'/'live'/'train-000007.png').symlink_to(tmp_path/'private'/'images.png')
    client = client_of(site_of(copied, run=tmp_path/'run2'))
    [id] = [id for id, p in site_of(copied).gallery.pairs.items() if p.image.name == names['images']]
    assert client.get('/').status_code == 200                       # the other pictures are shown
    for path in ('/thumbnail', '/picture', '/nearest', '/details'):
        answer = client.get(f'{path}/{id}')
        assert answer.status_code == 400 and 'leaves the folder' in answer.json()['error'], path
    refused = client.post('/review', json=dict(id=id, verdict='keep'))
    assert 'leaves the folder' in refused.json()['error'] and not len(read_reviews(copied/'made'))
    assert client.get('/score?n=9').status_code == 400
    answer = client.get('/training/picture', params=dict(name='train', stem='train-000007'))
    assert answer.status_code == 400 and 'no samples of this name' in answer.json()['error']
    listed = tmp_path/'list.csv'                                    # a list may name files anywhere
    listed.write_text(f'name,image,mask\na,{tmp_path}/private/images.png,{tmp_path}/private/masks.png\n')
    opened = open_site(listed)
    assert client_of(opened).get(f'/picture/{next(iter(opened.gallery.pairs))}').status_code == 200

@pytest.mark.parametrize('query, words', [
    ('sort=obedience', '--segmenter'), ('sort=nam', 'did you mean'), ('state=kept', 'did you mean'),
    ('page=1e9', 'is no number'), ('size=<b>', 'unknown size'), ('to=.5', '--segmenter'),
    ('to=<b>', 'is no number'), ('from=.9&to=.1', 'the smaller one first'), ('from=nan', 'from 0 to 1')])
def test_a_wrong_address_is_one_sentence(places, query, words):
    answer = client_of(site_of(places)).get('/?' + query)
    assert answer.status_code == 400 and words in answer.text and '<b>' not in answer.text

@pytest.mark.parametrize('sent, words', [
    (dict(verdict='keep'), 'no picture of this id'), (dict(id='ID'), 'without verdict and score'),
    (dict(id='ID', verdict='burn'), 'unknown verdict'), (dict(id='ID', score=11), 'from 1 to 10'),
    (dict(id='ID', score='<b>'), 'from 1 to 10'), (dict(id='ID', verdict=['keep']), 'unknown verdict')])
def test_a_wrong_review_is_refused_and_not_written(copied, sent, words):
    site = site_of(copied)
    id = next(iter(site.gallery.pairs))
    answer = client_of(site).post('/review', json={k: id if v == 'ID' else v for k, v in sent.items()})
    assert answer.status_code == 400 and words in answer.json()['error']
    assert not len(read_reviews(copied/'made'))
    nobody = client_of(site, '').post('/review', json=dict(id=id, verdict='keep'))
    assert 'give a name' in nobody.json()['error']

def address_of(data): return 'data:x;base64,' + base64.b64encode(data).decode()

@pytest.mark.parametrize('data, words', [
    (b'not an image', 'not an image'), (b'', '0 bytes'),
    (png_bytes(np.ones((16, 16), np.uint8)*255), '16x16 px'),
    (png_bytes(np.zeros((SIZE, SIZE), np.uint8)), 'empty'),
    (png_bytes(np.arange(SIZE*SIZE).reshape(SIZE, SIZE).astype(np.uint8)), 'the mask')])
def test_a_wrong_upload_is_refused(places, data, words):
    client = client_of(site_of(places))
    for path in ('/paint/mask', '/paint/edit', '/paint/sample'):
        answer = client.post(path, json=dict(mask=address_of(data)))
        assert answer.status_code == 400 and words in answer.json()['error'], path
        assert '/tmp' not in answer.json()['error']

def test_damaged_requests_are_refused(places):
    client = client_of(site_of(places))
    for content in (b'', b'[1]', b'{"mask": ', b'\xff', b'['*1_000_000, b'{"a":'*100_000):
        assert 'damaged' in client.post('/paint/edit', content=content).json()['error']
    big = client.post('/paint/mask', content=b'x'*41_000_000)
    assert 'over 40 MB' in big.json()['error']
    mask = address_of(png_bytes(np.eye(SIZE, dtype=np.uint8)*255))
    for wrong in (None, 'nan', 'x', '1e999'):
        sent = dict(mask=mask, dx=wrong, dy=0, scale=1, angle=0, bend=0, seed=0)
        assert 'dx' in client.post('/paint/edit', json=sent).json()['error']

@pytest.mark.parametrize('path, field, value', [
    ('edit', 'scale', 1e-300), ('edit', 'scale', 1e300), ('edit', 'angle', 1e300), ('edit', 'bend', -1),
    ('edit', 'seed', -1), ('edit', 'seed', 1e300), ('sample', 'seed', -1), ('sample', 'seed', 1e300),
    ('sample', 'count', 1e300), ('sample', 'count', -1), ('sample', 'steps', 0), ('sample', 'steps', 1e300),
    ('sample', 'guidance', -1), ('sample', 'sampler', '<b>'), ('sample', 'into', 'x')])
def test_absurd_numbers_are_one_sentence(places, path, field, value):
    "No number that a page can send ends in a failure of the server."
    mask = address_of(png_bytes(np.eye(SIZE, dtype=np.uint8)*255))
    fine = dict(edit=dict(dx=0, dy=0, scale=1, angle=0, bend=0, seed=0),
                sample=dict(seed=0, count=1, steps=1, guidance=1, sampler='ddim'))[path]
    answer = client_of(site_of(places)).post(f'/paint/{path}', json=dict(fine, mask=mask, **{field: value}))
    assert answer.status_code == 400 and answer.json()['error'], answer.text
    assert len(answer.json()['error']) < 300

def send(site, headers, part=b'x'*1_000_000):
    "POST an endless body to the application itself; the answer's status, and how much of it was read."
    read, answered = [0], []
    async def receive():
        read[0] += len(part)
        return dict(type='http.request', body=part, more_body=True)
    async def take(message): answered.append(message)
    named = {'host': 'testserver', 'x-medsyn': '1', **headers}
    scope = dict(type='http', method='POST', path='/paint/mask', raw_path=b'/paint/mask', scheme='http',
                 query_string=b'', http_version='1.1', server=('testserver', 80), client=('test', 1),
                 root_path='', headers=[(k.encode(), v.encode()) for k, v in named.items()])
    asyncio.run(make_app(site, ['testserver'])(scope, receive, take))
    return answered[0]['status'], read[0]

def test_an_endless_request_is_not_read_to_its_end(places):
    "Without the token nothing is read; with it, at most one part over the limit; nothing if it is announced."
    site = site_of(places)
    client = client_of(site)
    cookie = dict(cookie='; '.join(f'{k}={v}' for k, v in client.cookies.items()))
    assert send(site, {}) == (403, 0)
    status, read = send(site, cookie)
    assert status == 400 and MOST_SENT < read <= MOST_SENT + 1_000_000
    for length in (str(10**12), '9'*40, '-1', 'many'):
        assert send(site, {**cookie, 'content-length': length}) == (400, 0), length

def test_the_sheet_does_not_tell(copied):
    "Address, size, type and length of the answers are no hint at the set; the scores are written with it."
    site = site_of(copied)
    client = client_of(site)
    for _ in range(8):
        page = client.get('/score?n=4&real=1').text
        item, where = re.search(r'data-item="(\w+)" data-where="([^"]+)"', page).groups()
        assert not re.search(r'synthetic/|real/|\.png|00000', page)
        picture = client.get(f'/score/picture/{item}?n=4&real=1')
        assert Image.open(io.BytesIO(picture.content)).size == (320, 320)
        assert not Image.open(io.BytesIO(picture.content)).info
        address = '/score?' + where.replace('&amp;', '&')
        assert client.post(address, json=dict(item=item, score=6)).status_code == 200
    reviews = read_reviews(copied/'made')
    assert sorted(reviews['set']) == ['real']*4 + ['synthetic']*4 and reviews.blinded.all()
    assert 'Mean scores' in client.get('/score?n=4&real=1').text
    for name in reviews.name: assert name not in page
    refused = client_of(site, 'Ben').post('/score?n=4', json=dict(item=item, score=6))
    assert 'not on your sheet' in refused.json()['error']       # a sheet is one reviewer's

def many(folder, n):
    "`n` pairs that share the files of a few rendered ones."
    few = find_pairs(lesion_folder(folder/'few', 8, size=SIZE, seed=3))
    for kind in ('images', 'masks'): (folder/'many'/kind).mkdir(parents=True)
    for i in range(n):
        pair = few[i % len(few)]
        os.link(pair.image, folder/'many'/'images'/f'{i:05d}.png')
        os.link(pair.mask, folder/'many'/'masks'/f'{i:05d}.png')
    return folder/'many'

def test_5000_pairs_are_paged_and_nothing_is_made_twice(tmp_path, monkeypatch):
    "What makes a large folder open at once: one page of tiles, thumbnails kept, no mask measured for it."
    site = open_site(many(tmp_path, 5000))
    client, read = client_of(site), []
    monkeypatch.setattr(gallery, 'read_pair', lambda pair: read.append(pair) or read_pair(pair))
    monkeypatch.setattr(gallery, 'mask_measures', lambda files: pytest.fail('masks are measured'))
    page = client.get('/').text
    ids = re.findall(r'data-id="(\w+)"', page)
    assert len(ids) == gallery.PAGE and '5000 of 5000 pairs, page 1 of 84' in page and len(page) < 60_000
    for _ in range(2):
        for id in ids: assert client.get(f'/thumbnail/{id}').headers['content-type'] == 'image/jpeg'
    assert len(read) == gallery.PAGE
    again = client_of(open_site(tmp_path/'many'))
    for id in ids: again.get(f'/thumbnail/{id}')
    assert len(read) == gallery.PAGE                            # another server finds them
    last = client.get('/?page=83').text
    assert len(re.findall('class="tile', last)) == 5000 - 83*gallery.PAGE

def test_a_measurement_does_not_hold_up_the_page(tmp_path, monkeypatch):
    "The first sort by size answers at once, says how far it is, and measures nothing but the masks, once."
    folder = many(tmp_path, 600)
    monkeypatch.setattr('medsyn.pages.review.RealSet', lambda pairs: pytest.fail('real images are opened'))
    client = client_of(open_site(folder, real=tmp_path/'few', segmenter=tmp_path/'few'))
    go_on, measure, asked = threading.Event(), gallery.mask_measures, []
    def slowly(pairs):
        asked.append(len(pairs))
        if len(asked) == 2: go_on.wait(60)
        return measure(pairs)
    monkeypatch.setattr(gallery, 'mask_measures', slowly)
    first = client.get('/?sort=size')                               # the thread stands in its second part
    assert len(re.findall('class="tile', first.text)) == gallery.PAGE
    assert 'Measuring lesion sizes: ' in first.text and 'of 600 pairs. Until then' in first.text
    part = 'Measuring lesion sizes: 250 of 600 pairs'
    while client.get('/measuring?sort=size').json()['text'] != part: pass
    assert 'Measuring' not in client.get('/?sort=name').text        # and this page needs none of it
    go_on.set()
    while client.get('/measuring?sort=size').json()['text']: pass
    page = client.get('/?sort=size').text
    assert 'Measuring' not in page and sum(asked) == 600
    share = {p.name: read_pair(p)[1].mean() for p in find_pairs(tmp_path/'few')}
    shown = [share[f'{int(name) % 8:04d}'] for name in re.findall(r'data-name="(\d+)"', page)]
    assert shown == sorted(shown) and len(shown) == gallery.PAGE
    again = client_of(open_site(folder))                            # another server reads the table
    assert 'Measuring' not in again.get('/?sort=size').text and sum(asked) == 600

def test_a_measurement_that_fails_is_one_sentence(places):
    "The segmenter cannot be opened: the page says so, each time that it is asked."
    client = client_of(site_of(places, segmenter=places/'run'))
    for _ in range(2):
        answer = client.get('/?sort=obedience')
        while answer.status_code == 200: answer = client.get('/?sort=obedience')
        assert answer.status_code == 400 and 'config.json' in answer.text

# Obedience -----------------------------------------------------------------------------------------

class RedJudge(torch.nn.Module):
    "A segmenter that is always right here: a lesion is what is redder than green by a half."
    config = {}
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(40.))
    def forward(self, x): return self.weight*(x[:, :1] - x[:, 1:2] - .5)

def red_discs(columns):
    "Grey pictures with a red disc at each column, and the masks of these discs."
    rows, across = np.mgrid[:SIZE, :SIZE]
    masks = np.stack([(np.hypot(rows - 16, across - c) < 6).astype(np.uint8) for c in columns])
    images = np.where(masks[..., None] > 0, np.array([230, 20, 20]), 128).astype(np.uint8)
    return images, masks

@pytest.fixture
def judged(copied):
    "A site with six pairs, of which every second has its mask on the wrong side, and a judge that knows."
    shutil.rmtree(copied/'made')
    images, masks = red_discs([8, 24, 9, 23, 10, 22])
    for kind in ('images', 'masks'): (copied/'made'/kind).mkdir(parents=True)
    for i, (image, mask) in enumerate(zip(images, masks, strict=True)):
        shown = mask if i % 2 == 0 else mask[:, ::-1]
        (copied/'made'/'images'/f'{i}.png').write_bytes(png_bytes(image))
        (copied/'made'/'masks'/f'{i}.png').write_bytes(png_bytes(np.ascontiguousarray(shown)*255))
    site = site_of(copied, segmenter=copied/'run')
    site.__dict__['_judge'] = RedJudge().eval()         # where `open_site` would have opened a network
    return site

RIGHT, WRONG = 'the lesion is found where the mask is', 'the lesion is not found where the mask is'

def test_the_gallery_tells_right_masks_from_wrong_ones(judged):
    "Sorted by obedience the wrong ones come first; the sentence beside a picture says which it is."
    client = client_of(judged)
    table = judged.gallery.measures(['obedience'])
    dice = dict(zip(table.name, table.obedience, strict=True))
    assert all(dice[f'{i}'] == 1 for i in (0, 2, 4)) and all(dice[f'{i}'] == 0 for i in (1, 3, 5))
    shown = re.findall(r'data-name="(\d)"', client.get('/?sort=obedience').text)
    assert sorted(shown[:3]) == ['1', '3', '5'] and sorted(shown[3:]) == ['0', '2', '4']
    best = re.findall(r'data-name="(\d)"', client.get('/?sort=obedience&down=1').text)
    assert sorted(best[:3]) == ['0', '2', '4']
    low, high = client.get('/?from=0&to=.5').text, client.get('/?from=.5&to=1').text
    assert re.findall(r'data-name="(\d)"', low) == ['1', '3', '5'] and '3 of 6 pairs' in low
    assert re.findall(r'data-name="(\d)"', high) == ['0', '2', '4']
    assert 'No picture is left' in client.get('/?from=.2&to=.8').text
    for id, pair in judged.gallery.pairs.items():
        caption = client.get(f'/details/{id}').json()['caption']
        right = int(pair.name) % 2 == 0
        assert ('obedience 1.00 (Dice): ' + RIGHT if right else 'obedience 0.00 (Dice): ' + WRONG) in caption

def test_the_painter_tells_right_images_from_wrong_ones(judged, monkeypatch):
    "A generator that obeys for even seeds and mirrors the mask for odd ones; the verdicts alternate too."
    def sampled(generator, drafts, strength, settings):
        red = np.array([230, 20, 20], np.uint8)
        images = []
        for draft in drafts:
            lesion = draft.mask if draft.seed % 2 == 0 else draft.mask[:, ::-1]
            images.append(np.where(lesion[..., None] > 0, red, np.uint8(128)))
        return np.stack(images)
    monkeypatch.setattr(paint, 'render', sampled)
    client = client_of(judged)
    mask = red_discs([8])[1][0]
    sent = dict(mask=address_of(png_bytes(mask*255)), seed=4, count=4, steps=2, guidance=1, sampler='ddim')
    found = client.post('/paint/sample', json=sent).json()['images']
    assert [one['text'].split('; ')[1] for one in found] == 2*[f'obedience 1.00 (Dice): {RIGHT}',
                                                               f'obedience 0.00 (Dice): {WRONG}']
    assert [one['text'].split('; ')[0] for one in found] == ['seed 4', 'seed 5', 'seed 6', 'seed 7']
    client.post('/paint/add', json=dict(id=found[1]['id']))         # the verdict goes with the pair
    row = json.loads((judged.folder/'painted.jsonl').read_text())
    assert (row['seed'], row['verdicts']['obedience']) == (5, 0)

def test_compare_takes_reviewed_pairs(copied):
    "Two reviewers: the arm has what both keep."
    from medsyn.experiment import open_arm, split_once
    pairs = find_pairs(copied/'made')
    for p, verdicts in zip(pairs, ['kk', 'kd', 'ku', 'k', 'd']):
        for who, verdict in zip(('Ada', 'Ben'), verdicts):
            named = dict(k='keep', d='drop', u='unsure')[verdict]
            add_review(copied/'made', p.name, who, named, content=pair_content(p.image, p.mask))
    split = split_once(copied/'real')
    arm = open_arm(str(copied/'made'), split, reviewed=True)
    assert [p.name for p in arm.pairs] == [pairs[0].name, pairs[3].name]
    assert len(open_arm(str(copied/'made'), split).pairs) == 9
    assert kappa(read_reviews(copied/'made'), 'Ada', 'Ben')['n'] == 3

def test_a_port_in_use_and_missing_folders_are_one_sentence(places):
    with socket.socket() as taken:
        taken.bind(('127.0.0.1', 0))
        taken.listen()
        with pytest.raises(MedsynError, match='--port 0'): view(places/'made', port=taken.getsockname()[1])
    with pytest.raises(MedsynError, match='correct --generator'): view(places/'made', generator=places/'no')
    with pytest.raises(MedsynError, match='no image/mask pairs'): view(places/'run')

# With a browser ------------------------------------------------------------------------------------

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync']

def find_browser():
    "The browser's program, or why there is none."
    program = os.environ.get('MEDSYN_BROWSER') or next(filter(None, map(shutil.which, NAMES)), None)
    if not program: return None, 'no Chromium on this machine (Debian: apt-get install chromium)'
    try: import playwright.sync_api  # noqa: F401
    except ImportError: return None, "the package playwright is missing (pip install 'medsyn[dev]')"
    return program, ''

BROWSER, REASON = find_browser()
in_browser = pytest.mark.skipif(not BROWSER, reason=REASON)

@pytest.fixture(scope='module')
def chromium():
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=BROWSER, args=FLAGS)
        yield browser
        browser.close()

class Served:
    "A server of this process, on a free port."
    def __init__(self, site):
        import uvicorn
        self.site, self.socket = site, socket.socket()
        self.socket.bind(('127.0.0.1', 0))
        self.port = self.socket.getsockname()[1]
        app = make_app(site, ['127.0.0.1'])
        self.server = uvicorn.Server(uvicorn.Config(app, log_level='error', access_log=False))
        sockets = dict(sockets=[self.socket])
        self.thread = threading.Thread(target=self.server.run, kwargs=sockets, daemon=True)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)

    def address(self, path='/'): return f'http://127.0.0.1:{self.port}{path}'

def until(page, expression):
    "Wait for something in the page; Playwright's own way is `eval`, which the page's policy forbids."
    for _ in range(400):
        if page.evaluate(expression): return
        page.wait_for_timeout(50)
    pytest.fail(f'does not come true: {expression}')

def enter(browser, address, token, who='Ada', width=1280, path='/'):
    "A page of a reviewer's own browser, past the token."
    context = browser.new_context(viewport=dict(width=width, height=900))
    context.set_default_timeout(20_000)
    origin = address.rstrip('/')
    if who: context.add_cookies([dict(name='who', value=who, url=origin)])
    page = context.new_page()
    page.on('dialog', lambda dialog: pytest.fail(f'the page asks: {dialog.message}'))
    page.on('pageerror', lambda error: pytest.fail(f'the script fails: {error}'))
    page.goto(f'{origin}{path}{"&" if "?" in path else "?"}token={token}')
    return page

@pytest.fixture(scope='module')
def served(places):
    with Served(site_of(places)) as server: yield server

def opened(chromium, served, path='/', **more):
    return enter(chromium, served.address(''), served.site.token, path=path, **more)

@in_browser
def test_the_token_leaves_the_address_bar_and_is_needed(chromium, served):
    page = opened(chromium, served)
    assert 'token' not in page.url and page.locator('.tile').count() == 9
    stranger = chromium.new_context().new_page()
    assert stranger.goto(served.address('/')).status == 403
    assert 'Refused' in stranger.inner_text('body')

@in_browser
def test_a_hostile_name_does_nothing(chromium, served):
    page = opened(chromium, served)
    page.locator('.tile[data-name*=onerror]').click()
    until(page, "document.getElementById('caption').textContent.includes('onerror')")
    assert page.evaluate('window.hacked') is None and page.locator('[src=x]').count() == 0

def serve(folder, messages):
    "A server in a process of its own; what it prints goes through the queue."
    import builtins
    builtins.print = lambda text, **kw: messages.put(text)
    view(folder, port=0)

@pytest.fixture(scope='module')
def processes():
    "Starts servers that can be killed; the imports are made once. All are killed at the end."
    context, started = multiprocessing.get_context('forkserver'), []
    context.set_forkserver_preload(['medsyn.app', 'medsyn.experiment'])
    def start(folder):
        messages = context.Queue()
        started.append(context.Process(target=serve, args=(folder, messages), daemon=True))
        started[-1].start()
        printed = messages.get(timeout=120)
        return started[-1], *re.search(r'(http://\S+?)/\?token=(\S+)', printed).groups()
    yield start
    for process in started: process.kill()

@in_browser
def test_review_by_keyboard_survives_a_kill(chromium, copied, processes):
    "K, D, U, a score and an undo by keys alone; the server is killed; a new one shows all of it."
    process, address, token = processes(copied/'made')
    page = enter(chromium, address, token)
    page.keyboard.press('ArrowLeft')
    names = [tile.get_attribute('data-name') for tile in page.locator('.tile').all()]
    for i, key in enumerate('kdukkz'):
        until(page, f"document.querySelectorAll('.tile')[{min(i, 5)}].ariaPressed === 'true'")
        if key == 'z': page.keyboard.press('ArrowLeft')
        page.keyboard.press(key)
        said = json.dumps(names[i - (key == 'z')] + ': ')
        until(page, f"document.getElementById('status').textContent.startsWith({said})")
    page.keyboard.press('7')
    until(page, "document.getElementById('status').textContent.includes('score 7, saved')")
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    page.keyboard.press('k')                                    # not saved, and said so
    page.wait_for_selector('#message:has-text("nothing was saved")')
    process, address, token = processes(copied/'made')
    page = enter(chromium, address, token)
    badges = [tile.inner_text() for tile in page.locator('.badge').all()]
    assert badges == ['keep', 'drop', 'unsure', 'keep'] + ['open']*5
    reviews = read_reviews(copied/'made')
    assert reviews.verdict.dropna().to_list() == ['keep', 'drop', 'unsure', 'keep', 'keep', 'clear']
    assert reviews.score.dropna().to_list() == [7]
    assert [p.name for p in find_pairs(copied/'made', reviewed=True)] == [names[0], names[3]]

@in_browser
def test_two_reviewers_at_once(chromium, copied):
    "Both judge the same pictures at the same time; nothing is lost, and their agreement is shown."
    with Served(site_of(copied)) as server:
        pages = [opened(chromium, server, who=who) for who in ('Ada', 'Ben')]
        for i in range(6):
            for k, page in enumerate(pages): page.keyboard.press('d' if i == 5 and k else 'kd'[i % 2])
            for page in pages:
                until(page, f"document.querySelectorAll('.tile')[{i + 1}].ariaPressed === 'true'")
        pages[0].reload()
        row = pages[0].locator('tbody tr').inner_text().split('\t')
    found = kappa(read_reviews(copied/'made'), 'Ada', 'Ben')
    assert found['n'] == 6 and row[:4] == ['Ada', 'Ben', '6', f"{found['agree']:.2f}"]

@in_browser
def test_scoring_by_keyboard(chromium, copied):
    "Each digit scores one picture and shows the next one; 0 is 10; at the end the means are shown."
    keys = '7310'
    with Served(site_of(copied)) as server:
        page = opened(chromium, server, '/score?n=2')
        for i, key in enumerate(keys):
            assert page.inner_text('#progress') == f'{i} of 4 scored.'
            until(page, "document.getElementById('item').naturalWidth === 320")
            page.keyboard.press(key)
            page.wait_for_selector(f'#progress:has-text("{i + 1} of 4 scored")')
        assert 'Mean scores' in page.inner_text('main') and page.locator('#item').count() == 0
    assert list(read_reviews(copied/'made').score) == [7, 3, 1, 10]

@in_browser
def test_a_stroke_becomes_images_and_one_joins_the_set(chromium, copied):
    with Served(site_of(copied)) as server:
        page = opened(chromium, server, '/paint')
        box = page.locator('#canvas').bounding_box()
        page.mouse.move(box['x'] + .3*box['width'], box['y'] + .5*box['height'])
        page.mouse.down()
        page.mouse.move(box['x'] + .6*box['width'], box['y'] + .5*box['height'], steps=4)
        page.mouse.up()
        painted = page.locator('#canvas').get_attribute('aria-label')
        assert int(re.search(r'(\d+) painted', painted)[1]) > 20
        for field, value in dict(steps='2', count='2', scale='1.5').items(): page.fill(f'#{field}', value)
        page.click('#edit')
        page.wait_for_selector('#status:has-text("changed")')
        assert page.locator('#canvas').get_attribute('aria-label') != painted
        page.click('#sample')
        page.wait_for_selector('#drawn img')
        assert page.locator('#drawn img').count() == 2
        assert 'nearest real image' in page.locator('#drawn p').first.inner_text()
        page.locator('#drawn button').first.click()
        page.wait_for_selector('#status:has-text("Added as painted-")')
        pairs = find_pairs(copied/'made')
        assert len(pairs) == 10 and read_pair(pairs[-1])[1].any()
        row = json.loads((copied/'made'/'painted.jsonl').read_text())
        assert (row['who'], row['seed'], row['steps']) == ('Ada', 0, 2)
        page.goto(server.address('/'))
        assert page.locator('.tile').count() == 10

@in_browser
def test_painting_by_keyboard_and_refused_files(chromium, served, tmp_path):
    page = opened(chromium, served, '/paint')
    label = lambda: page.locator('#canvas').get_attribute('aria-label')
    page.focus('#canvas')
    for key in ('Shift+ArrowRight', 'ArrowUp', 'Space'): page.keyboard.press(key)
    assert 'painted' in label()
    page.click('#undo')
    assert 'empty' in label()
    page.click('#ellipse')
    assert 'painted' in label()
    before = label()
    (tmp_path/'text.png').write_text('<script>alert(1)</script>')
    Image.new('L', (16, 16), 255).save(tmp_path/'small.png')
    for name, words in (('text.png', 'not an image that can be read'), ('small.png', '16x16 px')):
        page.set_input_files('#mask-file', tmp_path/name)
        page.wait_for_selector(f'#message:has-text("{words}")')
    page.set_input_files('#into-file', tmp_path/'text.png')
    page.wait_for_selector('#message:has-text("the picture is not an image")')
    assert label() == before

@in_browser
def test_a_training_is_watched_while_it_runs(chromium, served, places):
    write_log(places/'run', 30, 60)         # just now, however long ago the fixture was made
    page = opened(chromium, served, '/training')
    assert 'running, 30 of 60 steps' in page.inner_text('#progress')
    page.wait_for_selector('#samples li')
    assert page.locator('#samples img').count() == 1
    first = page.get_attribute('#curves', 'src')
    write_log(places/'run', 60, 60)
    page.wait_for_selector('#progress:has-text("finished, 60 of 60 steps")')
    page.wait_for_selector('#samples li:nth-child(2)')
    assert page.get_attribute('#curves', 'src') != first and 'margin' in page.inner_text('#progress')
    until(page, "[...document.querySelectorAll('#samples img')].every(o => o.naturalWidth >= 300)")
    table = pd.DataFrame(dict(step=[1], loss=[.5]))                 # the next stage begins: the page follows
    table.to_csv(places/'run'/'live'/'next.log.csv', index=False)
    (places/'run'/'live'/'next.json').write_text(json.dumps(dict(done=1, total=9)))
    page.wait_for_selector('#run-name:has-text("next")')
    assert 'running, 1 of 9 steps' in page.inner_text('#progress')
    assert page.locator('#samples li').count() == 0
    assert page.locator('#name option').all_inner_texts() == ['the latest', 'train', 'next']
    until(page, "document.getElementById('curves').naturalWidth > 100")

@in_browser
def test_a_point_of_the_results_shows_its_image(chromium, served):
    page = opened(chromium, served, '/results')
    assert page.locator('.point').count() == 6 and '95%' in page.inner_text('main')
    page.locator('.point').nth(2).click()
    page.wait_for_selector('#case-text:has-text("difference")')
    id = page.locator('.point').nth(2).get_attribute('data-id')
    assert page.input_value('#cases') == id
    for name in ('mask', 'baseline', 'arm'):
        until(page, f"document.getElementById('case-{name}').naturalWidth >= 300")
    page.focus('#cases')                                        # and by keyboard
    page.keyboard.press('Home')
    until(page, f"document.querySelector('.point.chosen').dataset.id !== '{id}'")

VISITED = ['/', '/score', '/paint', '/training', '/results']

@in_browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('path', VISITED)
def test_axe_finds_nothing(chromium, served, path, scheme):
    "axe-core's rules for WCAG 2.1 A and AA, among them contrast, on both widths."
    axe = pytest.importorskip('axe_playwright_python.sync_playwright').Axe()
    page = opened(chromium, served, path)
    page.emulate_media(color_scheme=scheme)
    rules = dict(runOnly=['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa'])
    if path == '/':                                         # a picture under review, a verdict of each kind
        for key in ('k', 'd', 'u'):
            page.keyboard.press(key)
            until(page, "document.getElementById('status').textContent.includes('saved')")
    for width in (1280, 390):
        page.set_viewport_size(dict(width=width, height=900))
        found = axe.run(page, options=rules).response
        assert {rule['id'] for rule in found['passes']} >= {'color-contrast', 'html-has-lang'}
        told = [(rule['id'], node['html'][:80]) for rule in found['violations'] for node in rule['nodes']]
        assert told == [], width

UNLABELLED = """() => {
    const all = [...document.querySelectorAll('input, select, textarea, button, a, canvas, img')]
    const labels = o => [...(o.labels || [])].map(label => label.textContent).join('')
    const named = o => o.ariaLabel || o.alt || o.textContent.trim() || labels(o)
    const decoration = o => o.tagName === 'IMG' && o.hasAttribute('alt') && o.closest('button')
    return all.filter(o => !o.closest('[hidden]') && !named(o) && !decoration(o)).map(o => o.outerHTML)
}"""

@in_browser
@pytest.mark.parametrize('path', VISITED)
def test_labels_and_widths(chromium, served, path):
    "Every control has a name for screen readers, one main heading, and no page is wider than the window."
    page = opened(chromium, served, path)
    assert page.evaluate(UNLABELLED) == [] and page.locator('h1').count() == 1
    for width in (1280, 390):
        page.set_viewport_size(dict(width=width, height=900))
        assert page.evaluate('document.documentElement.scrollWidth') <= width, width
    page.keyboard.press('Tab')
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != 'none'
    assert page.locator('html[lang=en]').count() == 1
