"Images that are not square: backbones, every generator, synthesis, quickstart and fit at 32x48 pixels."
import json

import numpy as np
import pytest
import torch
from PIL import Image

from medsyn.cli import main
from medsyn.core import MedsynError
from medsyn.data.lesions import draw_lesions
from medsyn.data.pairs import find_pairs, read_pair
from medsyn.data.paste import affine_moves, move
from medsyn.diffusion.backbone import Backbone
from medsyn.diffusion.sample import sample
from medsyn.experiment import draws_pairs, make_backbone, make_generator, quickstart, split_once
from medsyn.fit import fit
from medsyn.generate.catalog import METHODS, load_generator
from medsyn.paint import Painter
from medsyn.segment.models import Segmenter
from medsyn.synth import synthesize

SIZE = 32, 48       # height and width
SMALL = dict.fromkeys(('arsdm', 'ddpm', 'paired'), dict(channels=(16, 32)))

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Sixteen pairs whose files are 48 pixels wide and 32 high, with a lesion in each."
    folder = tmp_path_factory.mktemp('wide')
    for kind in ('images', 'masks'): (folder/kind).mkdir()
    images, masks = draw_lesions(40, 48, seed=3)
    with_lesion = [i for i in range(40) if masks[i, 8:40].any()][:16]
    assert len(with_lesion) == 16
    for i in with_lesion:
        Image.fromarray(images[i, 8:40]).save(folder/'images'/f'{i:02}.png')
        Image.fromarray(masks[i, 8:40]*255).save(folder/'masks'/f'{i:02}.png')
    return folder

@pytest.fixture(scope='module')
def split(data): return split_once(find_pairs(data))

@pytest.fixture(scope='module')
def backbone(split, tmp_path_factory):
    return make_backbone(split, tmp_path_factory.mktemp('b')/'backbone', SIZE, 2, 8, channels=(16, 32))

def size_of(generator): return generator.size if draws_pairs(generator) else generator.backbone.size

def test_a_backbone_keeps_its_size(backbone):
    assert backbone.size == SIZE and Backbone.from_pretrained(backbone.source).size == SIZE

@pytest.mark.parametrize('method', METHODS)
def test_every_generator_trains_and_samples(method, split, backbone, tmp_path):
    needs = METHODS[method].backbone
    made = make_generator(split, backbone if needs else None, tmp_path/'g', method, 2, 4, probe=2,
                          size=None if needs else SIZE, settings=SMALL.get(method))
    generator = load_generator(tmp_path/'g')
    assert size_of(made) == size_of(generator) == SIZE
    masks = 'real' if generator.needs_image else None
    if generator.needs_mask:
        pairs = synthesize(generator, split.train, tmp_path/'s', 2, steps=2, masks=masks)
        for pair in pairs:
            assert Image.open(pair.image).size == Image.open(pair.mask).size == SIZE[::-1]
    elif draws_pairs(generator):
        images, soft = generator.sample_pairs(2, steps=2)
        assert images.shape == (2, *SIZE, 3) and soft.shape == (2, *SIZE)
    else: assert sample(generator, torch.ones(2, *SIZE), steps=2).shape == (2, *SIZE, 3)

def test_pairs_make_the_round_trip_at_their_own_size(split, backbone, tmp_path):
    generator = make_generator(split, backbone, tmp_path/'g', 'concat', 1, 4)
    originals = {p.name: read_pair(p) for p in split.train}
    kept = synthesize(generator, split.train, tmp_path/'s', 3, start='real', strength=0)
    rows = [json.loads(line) for line in (tmp_path/'s'/'manifest.jsonl').read_text().splitlines()]
    for pair, row in zip(kept, rows, strict=True):
        for found, original in zip(read_pair(pair), originals[row['source']], strict=True):
            assert found.shape[:2] == SIZE and (found == original).all()        # to the pixel
    for start in ('paste', 'inpaint'):
        new, = synthesize(generator, split.train, tmp_path/start, 1, start=start, steps=2,
                          into=[p.image for p in split.train])
        assert read_pair(new)[0].shape == (*SIZE, 3)

def test_a_turn_keeps_the_shape_of_a_lesion():
    mask = torch.zeros(1, 1, 40, 80)
    mask[..., 15:25, 30:50] = 1                                 # 10 high, 20 wide, in the middle
    one, none = torch.ones(1), torch.zeros(1)
    turned = affine_moves(torch.zeros(1, 2), one, 90*one, none, torch.zeros(1, 2), aspect=2.)
    rows, columns = np.nonzero(move(mask, turned, 'nearest')[0, 0].numpy())
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (20, 10)

def test_a_size_that_does_not_fit_is_refused_before_anything_is_written(data, split, backbone, tmp_path):
    out = tmp_path/'x'
    for call, sentence in (
        (lambda: make_backbone(split, out, (32, 50), 1, channels=(16, 32)), 'is 8: use 32x48 or 32x56'),
        (lambda: make_generator(split, backbone, out, steps=1, size=(36, 48)), 'use 32x48 or 40x48 px'),
        (lambda: make_generator(split, None, out, 'paired', 1, size=(32, 50)), 'use 32x48 or 32x64 px'),
        (lambda: quickstart(out, size=SIZE), 'rendered images are square, not 32x48'),
        (lambda: quickstart(out, data, size=SIZE), 'multiples of 32')):
        with pytest.raises(MedsynError, match=sentence): call()
        assert not out.exists()

def test_the_canvas_is_for_squares(split, backbone, tmp_path):
    generator = make_generator(split, backbone, tmp_path/'g', 'concat', 1, 4)
    with pytest.raises(MedsynError, match='the canvas is square and this generator samples 32x48 px'):
        Painter(generator)

def test_the_command_line_takes_height_and_width(data, tmp_path, capsys):
    b, g, s = (str(tmp_path/name) for name in 'bgs')
    small = ['--steps', '1', '--bs', '4']
    assert main(['pretrain', str(data), '--out', b, '--size', '32x48', '--channels', '16', '32', *small]) == 0
    assert main(['train', str(data), '--backbone', b, '--out', g, *small]) == 0
    assert main(['synth', g, '--data', str(data), '--out', s, '-n', '1', '--steps', '1', '--anyway']) == 0
    assert {p.size for p in map(Image.open, (tmp_path/'s').glob('*/*.png'))} == {(48, 32)}
    assert main(['train', str(data), '--backbone', b, '--out', str(tmp_path/'y'), '--size', '32x44']) == 2
    assert 'use 32x40 or 32x48 px' in capsys.readouterr().err

def test_quickstart(data, tmp_path):
    out = quickstart(tmp_path/'q', data, n_synth=2, size=(32, 64), pretrain_steps=1, train_steps=1,
                     segment_steps=1, sample_steps=1, channels=(16, 32), seeds=(0,))
    assert '--size 32x64' in (out/'commands.sh').read_text()
    assert {p.size for p in map(Image.open, (out/'synthetic').glob('*/*.png'))} == {(64, 32)}
    assert load_generator(out/'generator').backbone.size == (32, 64)

def test_fit(data, tmp_path):
    made = fit(find_pairs(data), tmp_path/'f', minutes=1, size=(32, 64), bs=4, arms=['real'], least_steps=1,
               most_steps=1)
    assert tuple(Segmenter.from_pretrained(made/'model').config['size']) == (32, 64)
