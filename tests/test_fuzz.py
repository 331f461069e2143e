"""Folders and files as they turn up: each is read rightly, or refused with a sentence that names the file.

Every case knows its truth before medsyn sees it. The end of the run prints how many cases were tried, how
many were refused, and how many were misread in silence: 0. Fewer than 2,000 fail a run of the whole file,
also of one that several workers share: see conftest.py."""
import io
import json
import os
import socket
import struct
import unicodedata
import warnings
import zlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FuzzCount
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medsyn.core import MedsynError
from medsyn.data.pairs import (check_pairs, clean_masks, find_pairs, pair_dls, read_image, read_mask,
                               read_pair, reading)

warnings.filterwarnings('ignore')
COUNT = Counter()

def tried(n):
    "Settings of a test with `n` cases; the same cases in every run."
    return settings(max_examples=n, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
                    suppress_health_check=list(HealthCheck))

@pytest.fixture(autouse=True)
def _counted(record_property):
    "Report what a test adds to the count; the report reaches the main process from any worker."
    before = Counter(COUNT)
    yield
    record_property('fuzz', {k: COUNT[k] - before[k] for k in ('cases', 'refusals', 'misread')})

@pytest.fixture(scope='module')
def place(tmp_path_factory):
    "Makes a new empty folder for every case."
    root, numbers = tmp_path_factory.mktemp('fuzz'), iter(range(10**6))
    def new():
        folder = root/str(next(numbers))
        folder.mkdir()
        return folder
    return new

def outcome(call, file):
    "What a call returns, or `None` if it refuses with one sentence that names the file."
    COUNT['cases'] += 1
    try: return call()
    except MedsynError as e:
        assert Path(file).name in str(e), f'the refusal does not name {file}: {e}'
        assert 'Traceback' not in str(e) and len(str(e)) < 2000
        COUNT['refusals'] += 1
        return None

def must(condition, what):
    "Count a silent misreading, and fail."
    if condition: return
    COUNT['misread'] += 1
    raise AssertionError(f'misread in silence: {what}')

# Image files ----------------------------------------------------------------------------------------

@dataclass
class Case:
    "A file and what it says; a truth of `None` means that it must be refused."
    ending: str
    data: bytes
    truth: np.ndarray = None
    options: dict = field(default_factory=dict)
    tolerance: float = 0

def saved(array, form, mode=None, **kw):
    "An array as the bytes of a picture file."
    with io.BytesIO() as f:
        image = Image.fromarray(array)
        (image.convert(mode) if mode else image).save(f, form, **kw)
        return f.getvalue()

def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

def png_of(width, height, bits, data):
    "A PNG of RGB that declares what it is told to."
    head = struct.pack('>IIBBBBB', width, height, bits, 2, 0, 0, 0)
    chunks = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(data)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks

def rows_of(values): return b''.join(b'\0' + row.tobytes() for row in values)

LOSSLESS = {'png': ('PNG', {}), 'bmp': ('BMP', {}), 'tif': ('TIFF', {}),
            'webp': ('WEBP', dict(lossless=True)),
            'tif (LZW)': ('TIFF', dict(compression='tiff_lzw')),
            'tif (deflate)': ('TIFF', dict(compression='tiff_adobe_deflate'))}

def lossless(draw, rng, rgb):
    kind = draw(st.sampled_from(sorted(LOSSLESS)))
    form, options = LOSSLESS[kind]
    mode = draw(st.sampled_from(['RGB', 'L', '1'])) if form != 'WEBP' else 'RGB'
    picture = Image.fromarray(rgb).convert(mode)
    data = saved(np.asarray(picture), form, **options)
    return Case(kind[:4].strip(), data, np.asarray(picture.convert('RGB')))

def jpeg(draw, rng, rgb):
    flat = np.full_like(rgb, rgb[0, 0])
    return Case('jpg', saved(flat, 'JPEG', quality=95), flat, tolerance=8)

def paletted(draw, rng, rgb):
    ending = draw(st.sampled_from(['gif', 'png']))
    picture = Image.fromarray(np.full_like(rgb, rgb[0, 0])).quantize(256)
    with io.BytesIO() as f:
        picture.save(f, ending.upper())
        return Case(ending, f.getvalue(), np.asarray(picture.convert('RGB')))

def deep(draw, rng, rgb):
    "More than 8 bits: right through a window, refused without."
    kind, windowed = draw(st.sampled_from(['png', 'float', 'white is zero', 'colours'])), draw(st.booleans())
    values = rng.integers(0, 6000, rgb.shape)
    lo, hi = sorted(rng.integers(0, 5000, 2) + [0, 100])
    shown = ((values - lo)/max(hi - lo, 1)).clip(0, 1)*255
    if kind == 'colours':
        data = png_of(rgb.shape[1], rgb.shape[0], 16, rows_of(values.astype('>u2')))
    else:
        shown = np.repeat(shown[..., :1], 3, 2)
        grey = values[..., 0].astype(np.float32 if kind == 'float' else np.uint16)
        tags = dict(tiffinfo={262: 0}) if kind == 'white is zero' else {}
        data = saved(grey, 'PNG' if kind == 'png' else 'TIFF', **tags)
        if kind == 'white is zero': shown = 255 - shown
    options = dict(window=(float(lo), float(max(hi, lo + 1)))) if windowed else {}
    ending = 'png' if kind in ('png', 'colours') else 'tif'
    return Case(ending, data, shown if windowed else None, options, .51)

def with_alpha(draw, rng, rgb):
    opaque = draw(st.booleans())
    alpha = np.full(rgb.shape[:2], 255) if opaque else rng.integers(0, 255, rgb.shape[:2])
    return Case('png', saved(np.dstack([rgb, alpha.astype(np.uint8)]), 'PNG'), rgb if opaque else None)

def several_pages(draw, rng, rgb):
    form, ending = draw(st.sampled_from([('TIFF', 'tif'), ('PNG', 'png'), ('GIF', 'gif')]))
    pages = [Image.fromarray(rng.integers(0, 255, rgb.shape, dtype=np.uint8)) for _ in range(2)]
    return Case(ending, saved(rgb, form, save_all=True, append_images=pages))

def tagged(draw, rng, rgb):
    exif, turn = Image.Exif(), draw(st.integers(0, 9))
    exif[0x0112] = turn
    turned = {2: rgb[:, ::-1], 3: rgb[::-1, ::-1], 4: rgb[::-1], 5: rgb.transpose(1, 0, 2),
              6: np.rot90(rgb, -1), 7: rgb[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(rgb)}
    return Case('png', saved(rgb, 'PNG', exif=exif), turned.get(turn, rgb))

def with_notes(draw, rng, rgb):
    notes = PngInfo()
    notes.add_text('Patient', draw(st.text(max_size=20).filter(lambda t: chr(0) not in t)))
    return Case('png', saved(rgb, 'PNG', pnginfo=notes), rgb)

def cmyk(draw, rng, rgb):
    converted = np.asarray(Image.fromarray(rgb).convert('CMYK').convert('RGB'))
    return Case('tif', saved(rgb, 'TIFF', 'CMYK'), converted)

def cut(draw, rng, rgb):
    "A file that ends within its pixels."
    form, ending = draw(st.sampled_from([('PNG', 'png'), ('BMP', 'bmp'), ('TIFF', 'tif'), ('JPEG', 'jpg')]))
    whole = saved(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8), form)
    return Case(ending, whole[:draw(st.integers(0, len(whole)*6//10))])

def flipped_bits(draw, rng, rgb):
    data = bytearray(saved(rgb, 'PNG'))
    data[draw(st.integers(8, 32))] ^= draw(st.integers(1, 255))         # of the header, under its checksum
    return Case('png', bytes(data))

def lying(draw, rng, rgb):
    "More rows are declared than there are."
    height, width, _ = rgb.shape
    return Case('png', png_of(width, height + draw(st.integers(1, 50)), 8, rows_of(rgb)))

def bomb(draw, rng, rgb):
    side = draw(st.integers(20_000, 10**6))
    return Case('png', png_of(side, side, 8, bytes(999)))

def wrong_ending(draw, rng, rgb):
    return Case(draw(st.sampled_from(['jpg', 'tif', 'bmp', 'gif'])), saved(rgb, 'PNG'), rgb)

def no_picture(draw, rng, rgb):
    ending = draw(st.sampled_from(['png', 'jpg', 'tif', 'bmp', 'gif', 'webp']))
    return Case(ending, draw(st.binary(max_size=60)))

IMAGES = [lossless, lossless, lossless, jpeg, paletted, deep, deep, with_alpha, several_pages, tagged,
          with_notes, cmyk, cut, cut, flipped_bits, lying, bomb, wrong_ending, no_picture]

@st.composite
def image_files(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    size = draw(st.integers(1, 40)), draw(st.integers(1, 40)), 3
    return draw(st.sampled_from(IMAGES))(draw, rng, rng.integers(0, 256, size, dtype=np.uint8))

def judge(result, case):
    "Compare what was read with the truth."
    if case.truth is None: must(result is None, f'a {case.ending} that cannot be read rightly')
    elif result is None: raise AssertionError(f'a good {case.ending} was refused')
    else:
        must(result.shape == case.truth.shape, f'{case.ending}: {result.shape}, not {case.truth.shape}')
        must(abs(result.astype(float) - case.truth).max() <= case.tolerance, f'{case.ending}: other values')

@tried(900)
@given(case=image_files())
def test_images(place, case):
    file = place()/f'x.{case.ending}'
    file.write_bytes(case.data)
    judge(outcome(lambda: read_image(file, **case.options), file), case)

# Masks ----------------------------------------------------------------------------------------------

def two_values(draw, rng, mask):
    value = draw(st.integers(1, 255))
    files = [saved(mask*np.uint8(value), 'PNG'), saved(mask > 0, 'PNG'),
             saved(mask*np.uint8(255), 'PNG', 'RGBA'),
             saved(mask.astype(np.uint16)*np.uint16(value*257), 'PNG'),
             saved(mask[..., None]*np.uint8([value, 3, 0]), 'PNG')]
    return Case('png', draw(st.sampled_from(files)), mask)

def empty_mask(draw, rng, mask): return Case('png', saved(mask*0, 'PNG'), mask*0)

def palette_mask(draw, rng, mask):
    value, picture = draw(st.integers(1, 255)), Image.fromarray(mask).convert('P')
    picture.putpalette([0, 0, 0, value, 255 - value, 7])
    with io.BytesIO() as f:
        picture.save(f, 'PNG')
        return Case('png', f.getvalue(), mask)

def classes_of(mask):
    "Classes 0, 1 and 2; each is there."
    height, width = mask.shape
    classes = np.where(np.roll(mask, (height//3 + 1, width//3 + 1), (0, 1)), 2, mask).astype(np.uint8)
    classes[:3, 0] = [0, 1, 2]
    return classes

def several_classes(draw, rng, mask):
    classes = classes_of(mask)
    if draw(st.booleans()): classes[0, :] = 255                     # a void border
    return Case('png', saved(classes, 'PNG'))

def labelled(draw, rng, mask):
    classes = classes_of(mask)
    label, wanted = draw(st.sampled_from([(2, classes == 2), ([1, '2'], classes > 0), (9, classes > 9)]))
    return Case('tif', saved(classes, 'TIFF'), wanted.astype(np.uint8), dict(label=label))

def coloured(draw, rng, mask):
    classes = classes_of(mask)
    data = saved(np.uint8([[0, 0, 0], [255, 0, 0], [0, 255, 0]])[classes], 'PNG')
    if draw(st.booleans()): return Case('png', data)
    return Case('png', data, (classes == 1).astype(np.uint8), dict(label='#ff0000'))

def photograph(draw, rng, mask):
    noise = rng.integers(0, 256, mask.shape, dtype=np.uint8)
    noise[0, :3] = [0, 100, 255]
    return Case('png', saved(noise, 'PNG'))

def smeared(draw, rng, mask):
    "A mask that was resized smoothly, or saved as JPEG."
    soft = Image.fromarray(mask*np.uint8(255)).resize((53, 47), Image.Resampling.BICUBIC)
    soft = np.maximum(np.asarray(soft), rng.integers(0, 60, (47, 53), dtype=np.uint8))
    if draw(st.booleans()): return Case('png', saved(soft, 'PNG'))
    return Case('jpg', saved(soft, 'JPEG', quality=60))

MASKS = [two_values, two_values, empty_mask, palette_mask, several_classes, labelled, labelled, coloured,
         photograph, smeared, cut, lying, no_picture]

@st.composite
def mask_files(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    h, w = draw(st.integers(8, 40)), draw(st.integers(8, 40))
    mask = np.zeros((h, w), np.uint8)
    top, left = draw(st.integers(0, h - 3)), draw(st.integers(1, w - 3))
    mask[top:top + draw(st.integers(1, h)), left:left + draw(st.integers(1, w))] = 1
    kind = draw(st.sampled_from(MASKS))
    rgb = rng.integers(1, 255, (h, w, 3), dtype=np.uint8)
    return kind(draw, rng, rgb if kind in (cut, lying, no_picture) else mask)

@tried(700)
@given(case=mask_files())
def test_masks(place, case):
    file = place()/f'y.{case.ending}'
    file.write_bytes(case.data)
    judge(outcome(lambda: read_mask(file, **case.options), file), case)

# Folders --------------------------------------------------------------------------------------------

def coded(i, h=12, w=12):
    "Image number `i` and its mask: the number is in the colour of one and in the area of the other."
    image = np.full((h, w, 3), [i*7 % 256, (255 - 10*i) % 256, 9], np.uint8)
    mask = np.zeros(h*w, np.uint8)
    mask[:i + 1] = 255
    return image, mask.reshape(h, w)

WORDS = ['a', 'A', 'b', 'lesion 1', '007', 'NA', 'null', 'x.y', 'é', 'e\u0301', '病', "o'clock", 'a"b',
         'new\nline', '-n', '%s', '{0}', 'tab\t', 'true', '1e5', ' lead', 'trail ', 'très long ' + 'x'*80]
NAMES = st.one_of(st.sampled_from(WORDS), st.text('abAB01 _-é', min_size=1, max_size=6)).filter(
    lambda n: n not in ('.', '..') and '/' not in n and '\0' not in n and not n.startswith('.')
    and not n.lower().endswith('_superpixels'))
LAYOUT = {'folders': ('images/{}.png', 'masks/{}.png'), 'single': ('image/{}.bmp', 'mask/{}.png'),
          'flat': ('{}.jpg', '{}_mask.png'),
          'isic': ('set_Input/{}.png', 'set_GroundTruth/{}_segmentation.png'),
          'nested': ('train/images/{}.png', 'train/masks/{}.png'), 'same stem': ('{}.jpg', '{}.png'),
          'tif': ('imgs/{}.tif', 'labels/{}.tif')}
EXTRAS = ['none', 'none', 'none', 'lone image', 'lone mask', 'broken link', 'loop', 'linked folder', 'hidden',
          'note', 'volume', 'two masks', 'unknown', 'two images']

@st.composite
def folders(draw):
    names = draw(st.lists(NAMES, min_size=1, max_size=4, unique_by=lambda n: unicodedata.normalize('NFC', n)))
    return draw(st.sampled_from(sorted(LAYOUT))), names, draw(st.sampled_from(EXTRAS))

def broken_link(file): file.symlink_to('nowhere.png')
def loop(file): file.symlink_to(file.name)
def linked_folder(file): file.symlink_to(file.parent.parent)
def stray(file): file.write_bytes(b'x')
def picture(file): Image.fromarray(coded(99)[0]).save(file)
def mask(file): Image.fromarray(coded(99)[1]).save(file)

# what is added: in the folder of images or masks, under which name, how, and whether it has to be refused
EXTRA = {'lone image': ('images', 'zz lone.bmp', picture, True),
         'lone mask': ('masks', 'zz_mask.png', mask, True),
         'broken link': ('images', 'zz.png', broken_link, True), 'loop': ('masks', 'zz.png', loop, True),
         'linked folder': ('images', 'zz linked', linked_folder, True),
         'volume': ('images', 'zz.mha', stray, True), 'unknown': ('masks', 'zz.xyz', stray, True),
         'two images': ('images', '{}.gif', picture, True),
         'two masks': ('masks', '{}_mask2.png', mask, True),
         'hidden': ('images', '.DS_Store', stray, False), 'note': ('images', 'notes.txt', stray, False)}

def build(root, layout, names, extra):
    "Write the folder; returns the file that makes a refusal necessary (or `None`)."
    places = dict(zip(('images', 'masks'), LAYOUT[layout], strict=True))
    for i, name in enumerate(names):
        for place, array in zip(places.values(), coded(i), strict=True):
            file = root/place.format(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            options = dict(quality=100, subsampling=0) if file.suffix == '.jpg' else {}
            Image.fromarray(array).save(file, **options)
    if extra not in EXTRA: return None
    kind, name, write, refused = EXTRA[extra]
    file = (root/places[kind].format(names[0])).parent/name.format(names[0])
    write(file)
    # where no folder is looked into
    one_level = extra == 'linked folder' and layout in ('flat', 'same stem')
    return file if refused and not one_level else None

def pictures_in(root):
    "Every picture below a folder."
    endings = ('.png', '.bmp', '.jpg', '.tif', '.gif')
    return [f for f in root.rglob('*') if f.is_file() and f.suffix in endings]

@tried(450)
@given(case=folders())
def test_folders(place, case):
    "Every image meets the mask of its number; no image is dropped without a word."
    layout, names, extra = case
    root = place()
    try: spoiled = build(root, layout, names, extra)
    except OSError: return                                      # this file system does not take the name
    COUNT['cases'] += 1
    images = pictures_in(root)
    try: pairs = find_pairs(root)
    except MedsynError as e:
        COUNT['refusals'] += 1
        text = str(e)
        blamed = [*images, *([spoiled] if spoiled else [])]
        assert 'no image/mask pairs' in text or any(f.stem in text for f in blamed), text
        return
    used = {p.image for p in pairs} | {p.mask for p in pairs}
    must(spoiled is None or spoiled in used, f'{extra} was passed over in {layout}')
    must(used == {*images}, f'dropped: {sorted({*images} - used)}')
    for p in pairs:
        try: image, mask = read_pair(p)
        except MedsynError: continue
        number = round(np.median(255 - image[..., 1].astype(int))/10)
        must(mask.sum() == number + 1, f'{p.name} of {layout} has the mask of another image')

@tried(60)
@given(case=folders(), classes=st.lists(st.integers(1, 3), min_size=8, max_size=8))
def test_loaders_and_copies(place, case, classes):
    "`pair_dls`, `check_pairs` and `clean_masks`: classes are never merged, and a copy says the same."
    layout, names, _ = case
    root = place()
    numbered = [f'{i} {names[0]}'.strip() for i in range(8)]
    try: build(root, layout, numbered, 'none')
    except OSError: return
    _, mask_place = LAYOUT[layout]
    for i, value in enumerate(classes):
        mask = (coded(i)[1] > 0)*np.uint8(value)
        Image.fromarray(mask).save(root/mask_place.format(numbered[i]))
    COUNT['cases'] += 1
    try:
        pairs = find_pairs(root)
        dls = pair_dls(pairs[1:], 16, bs=7, valid=pairs[:1], augment=False, device='cpu')
    except MedsynError as e:
        COUNT['refusals'] += 1
        assert len({*classes} - {1}) and 'several classes' in str(e) or 'no image/mask pairs' in str(e), e
        if 'several classes' in str(e): assert check_pairs(root).problem.str.contains('several classes').any()
        return
    must(len({*classes}) == 1, f'classes {classes} were merged')
    must(len(dls.train.dataset) == 7, 'pairs were dropped')
    clean_masks(root, root/'copy of all')
    for a, b in zip(pairs, find_pairs(root/'copy of all'), strict=True):
        must(np.array_equal(read_mask(a), read_mask(b)), f'the copy of {a.name} differs')

# Predictions ----------------------------------------------------------------------------------------

class Bright(torch.nn.Module):
    "Marks what is bright: a stand-in for a network, whose answer is known."
    def __init__(self, fit, size):
        super().__init__()
        self.config, self.stride = dict(size=size, fit=fit, name='bright'), 1
        self.weight = torch.nn.Parameter(torch.zeros(1))
    def forward(self, x): return (x.mean(1, keepdim=True) - .5)*60 + self.weight

@tried(60)
@given(fit=st.sampled_from(['stretch', 'pad', 'crop']), factor=st.integers(1, 3), h=st.integers(4, 24),
       w=st.integers(4, 24), bad=st.booleans(), seed=st.integers(0, 999))
def test_predictions(place, fit, factor, h, w, bad, seed):
    "At a multiple of the image's size every fit returns the image's own bright pixels."
    from medsyn import fit as module
    root = place()
    (root/'in').mkdir()
    blocks = np.random.default_rng(seed).integers(0, 2, (6, 6))
    bright = np.kron(blocks, np.ones((4, 4)))[:h, :w] > 0
    image = np.repeat((bright*np.uint8(255))[..., None], 3, 2)
    Image.fromarray(image).save(root/'in'/'very good.png')
    if bad: (root/'in'/'bad.png').write_bytes(saved(image, 'PNG')[:40])
    real, module.Segmenter = module.Segmenter, type('Fake', (), dict(
        from_pretrained=staticmethod(lambda folder: Bright(fit, (h*factor, w*factor)))))
    try: out = outcome(lambda: module.predict_images('model', root/'in', root/'out', bs=1), 'bad.png')
    finally: module.Segmenter = real
    must((out is None) == bad, 'a damaged image was passed over')
    if bad: return
    mask = np.asarray(Image.open(root/'out'/'masks'/'very good.png')) > 0
    must(mask.shape == bright.shape and (factor > 1 or np.array_equal(mask, bright)), f'{fit}: other pixels')
    must(abs(mask.mean() - bright.mean()) < .35, f'{fit}: another area')

@pytest.fixture(scope='module')
def network(tmp_path_factory):
    "A real network with random weights, saved; it is opened once."
    from medsyn.segment.models import Segmenter, segmenter
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('network')/'model'
    small = dict(size=32, decoder_channels=(16, 8, 8, 8, 8))
    segmenter('unet', 'mobilenetv3_small_050', **small).save_pretrained(folder)
    return Segmenter.from_pretrained(folder)

@tried(40)
@given(case=image_files())
def test_predictions_of_a_network(place, network, case):
    "Any picture file through a real network: the mask of its true pixels at its own size, or a refusal."
    from medsyn import fit as module
    from medsyn.segment.learner import predict
    root = place()
    (root/'in').mkdir()
    (root/'in'/f'x.{case.ending}').write_bytes(case.data)
    how = reading(**case.options)
    real, module.Segmenter = module.Segmenter, type('Opened', (), dict(
        from_pretrained=staticmethod(lambda folder: network)))
    call = lambda: module.predict_images('model', root/'in', root/'out', how=how)
    try: out = outcome(call, f'x.{case.ending}')
    finally: module.Segmenter = real
    must((out is None) == (case.truth is None), f'a {case.ending} was passed over, or a good one refused')
    if out is None: return
    found = np.asarray(Image.open(out/'probabilities'/'x.png'))
    must(found.shape == case.truth.shape[:2], f'{case.ending}: a mask of another size')
    if case.tolerance == 0:
        expected = predict(network, [np.ascontiguousarray(case.truth)])[0]*255
        must(abs(found - expected).max() <= 1, f'{case.ending}: the prediction of other pixels')

# Hostile files --------------------------------------------------------------------------------------

NO_JSON = ['', '{', '[]', 'null', '3', '"x"', '['*100_000, '\ufeff{}', '{"a": NaN}']
SETTINGS = ['"name": 7', '"name": ["unet"]', '"encoder": null', '"encoder_weights": "/etc/passwd"',
            '"size": "big"', '"mean": [1]', '"classes": 10000000', '"size": -5', '"os.system": "x"', '"a": 1']
JSON_TEXTS = NO_JSON + ['{"kind": "segmenter"}'] + ['{"kind": "segmenter", %s}' % line for line in SETTINGS]

@pytest.mark.parametrize('text', JSON_TEXTS, ids=range(len(JSON_TEXTS)))
def test_hostile_json(tmp_path, text):
    from medsyn.segment.models import Segmenter
    (tmp_path/'m').mkdir()
    (tmp_path/'m'/'config.json').write_text(text)
    COUNT['cases'] += 1
    with pytest.raises(MedsynError) as e: Segmenter.from_pretrained(tmp_path/'m')
    COUNT['refusals'] += 1
    assert str(tmp_path/'m') in str(e.value)

def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path):
    "A synthetic set whose manifest names files elsewhere is not finished, and its partners are refused."
    from medsyn.core import file_hash
    from medsyn.synth import finished
    Image.new('L', (8, 8)).save(tmp_path/'secret.png')
    (tmp_path/'set').mkdir()
    row = dict(file='../secret.png', mask='../secret.png', index=0, source='a', transform=dict(kind='real'))
    row.update({f'{k}_hash': file_hash(tmp_path/'secret.png') for k in ('file', 'mask')})
    (tmp_path/'set'/'manifest.jsonl').write_text(json.dumps(row) + '\n')
    COUNT['cases'] += 1
    assert finished(tmp_path/'set') == []

def test_a_pickle_is_not_opened(tmp_path, monkeypatch):
    "Weights as a pickle need --trust-pickle, and a torch without CVE-2026-24747; code in them never runs."
    from medsyn.segment.models import read_weights
    class Evil:
        def __reduce__(self): return os.system, (f'touch {tmp_path}/owned',)
    torch.save({'a': torch.zeros(2)}, tmp_path/'good.pth')
    torch.save({'a': Evil()}, tmp_path/'evil.pth')
    monkeypatch.delenv('MEDSYN_TRUST_PICKLE', raising=False)
    COUNT['cases'] += 3
    with pytest.raises(MedsynError, match='good.pth is a pickle.*--trust-pickle'):
        read_weights(tmp_path/'good.pth')
    monkeypatch.setenv('MEDSYN_TRUST_PICKLE', '1')
    assert read_weights(tmp_path/'good.pth')['a'].tolist() == [0, 0]
    with pytest.raises(MedsynError, match='evil.pth'): read_weights(tmp_path/'evil.pth')
    monkeypatch.setattr(torch, '__version__', '2.9.1')
    with pytest.raises(MedsynError, match='CVE-2026-24747.*2.10'): read_weights(tmp_path/'good.pth')
    assert not (tmp_path/'owned').exists()

def test_no_network(tmp_path, monkeypatch):
    "The whole path, from rendering to the table, with sockets forbidden."
    from medsyn.experiment import quickstart
    def refused(*a, **k): raise AssertionError('the network was asked')
    for name in ('connect', 'connect_ex', 'bind'): monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, 'getaddrinfo', refused)
    out = quickstart(tmp_path/'q', n_train=10, n_test=4, n_synth=4, size=32, pretrain_steps=1, train_steps=1,
                     segment_steps=1, sample_steps=1, channels=(16, 32), seeds=(0,))
    assert (out/'results'/'table.md').exists()

def test_the_count_of_several_workers():
    "Too few cases fail a run of the whole file, and only that."
    count = FuzzCount()
    count.add('tests/test_fuzz.py::test_images', dict(cases=900, refusals=200, misread=0))
    part = count.verdict()
    assert not part.failed and 'cases tried 900' in part.text and 'by 1 of' in part.text
    for name in count.all_tests() - {'test_images'}:
        count.add(f'tests/test_fuzz.py::{name}[0]', dict(cases=1, refusals=0, misread=0))
    assert count.verdict().failed and 'FAILED, fewer than 2000' in count.verdict().text
    count.add('tests/test_fuzz.py::test_masks', dict(cases=1100, refusals=0, misread=0))
    assert not count.verdict().failed
    count.add('tests/test_fuzz.py::test_masks', dict(cases=0, refusals=0, misread=1))
    assert count.verdict().failed
