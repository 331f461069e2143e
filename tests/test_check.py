"A folder with every fault that `check_pairs` knows: each is listed once, and nothing else is."
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from medsyn.core import MedsynError
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.layouts import convert
from medsyn.data.pairs import (FITS, Geometry, Pair, auto_window, auto_windows, check_pairs, clean_masks,
                               find_images, find_masks, find_pairs, fitting_size, group_of, pair_dls,
                               pairs_hash, read_image, read_mask, read_pair, reading, save_list)
from medsyn.data.volumes import Volume, open_volume, save_masks, stack_of

N = 24

class Spoiler:
    "Spoils pairs of a folder one by one; `faults`: name -> (file, words in the problem, severity)."
    def __init__(self, root, x, m):
        self.images, self.masks, self.x, self.m, self.faults = root/'images', root/'masks', x, m, {}

    def image(self, i): return self.images/f'{i:02d}.png'
    def mask(self, i): return self.masks/f'{i:02d}.png'
    def grey(self, i): return Image.fromarray(self.m[i]*255)
    def picture(self, i): return Image.fromarray(self.x[i])
    def fault(self, name, file, words, severity='error'):
        self.faults[name] = f'{file.parent.name}/{file.name}', words, severity

    def damage(self):
        "Files that cannot be read, or do not pair up."
        self.image(1).write_bytes(self.image(1).read_bytes()[:1500])
        self.fault('truncated image', self.image(1), 'unreadable')
        self.mask(2).write_text('this is no picture')
        self.fault('unreadable mask', self.mask(2), 'unreadable')
        self.mask(12).unlink()
        self.fault('unpaired image', self.image(12), 'unpaired image')
        self.image(13).unlink()
        self.fault('unpaired mask', self.mask(13), 'unpaired mask')
        self.picture(14).save(self.images/'14.tif')
        self.fault('duplicate stem', self.images/'14.tif', "2 images are called '14'")
        (self.images/'scan.nrrd').write_bytes(b'NRRD')
        self.fault('unknown type', self.images/'scan.nrrd', 'a volume of a kind that is not read (.nrrd)')

    def spoil_masks(self):
        "Masks that are not two-valued, or unusual."
        self.grey(3).resize((48, 48), 0).save(self.mask(3))
        self.fault('size mismatch', self.mask(3), 'size mismatch: image 64x64, mask 48x48')
        self.mask(4).unlink()
        self.grey(4).save(self.masks/'04.jpg', quality=70)
        self.fault('JPEG mask', self.masks/'04.jpg', 'likely JPEG artefacts')
        classes = Image.fromarray(np.where(np.arange(64) < 32, self.m[5], self.m[5]*2)).convert('P')
        classes.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        classes.save(self.mask(5))
        self.fault('palette of classes', self.mask(5), 'several classes (0, 1, 2)')
        transparent = self.grey(6).convert('RGBA')
        transparent.putalpha(self.grey(6))
        transparent.save(self.mask(6))
        self.fault('transparent mask', self.mask(6), 'transparency (RGBA)')
        deep = self.m[7].astype(np.uint16)*np.linspace(9e3, 6e4, 64).astype(np.uint16)
        Image.fromarray(deep).save(self.mask(7))
        self.fault('16-bit mask', self.mask(7), 'likely 16-bit values')
        Image.fromarray(self.m[8]).save(self.mask(8))
        self.fault('0/1 mask', self.mask(8), 'holds 0 and 1 instead of 0 and 255', 'warning')
        Image.fromarray(self.m[9]*0).save(self.mask(9))
        self.fault('empty mask', self.mask(9), 'empty mask', 'warning')
        Image.fromarray(self.m[10]*0 + 255).save(self.mask(10))
        self.fault('full mask', self.mask(10), 'full mask')
        smooth = Image.Resampling.BICUBIC
        soft = self.grey(18).resize((57, 57), smooth).resize((64, 64), smooth)
        soft.save(self.mask(18))
        self.fault('soft mask', self.mask(18), 'a soft edge')
        self.grey(19).convert('RGBA').save(self.mask(19))
        self.fault('opaque RGBA mask', self.mask(19), 'alpha channel (RGBA)', 'warning')

    def spoil_images(self):
        "Images that are copies, too small, or not 8-bit RGB."
        self.picture(20).save(self.image(11).with_suffix('.jpg'), quality=50)
        self.image(11).unlink()
        self.fault('near-duplicate', self.image(20), 'near-duplicate of images/11.jpg', 'warning')
        self.picture(15).resize((20, 20)).save(self.image(15))
        self.grey(15).resize((20, 20), 0).save(self.mask(15))
        self.fault('too small', self.image(15), "smaller than the network's stride 32")
        self.picture(16).convert('CMYK').save(self.images/'16.tif')
        self.image(16).unlink()
        self.fault('CMYK image', self.images/'16.tif', 'image is CMYK', 'warning')
        Image.fromarray(self.x[17][..., 0].astype(np.uint16)*200).save(self.image(17))
        self.fault('16-bit image', self.image(17), 'more than 8 bits')
        self.picture(21).save(self.images/'21.tif', save_all=True, append_images=[self.picture(22)])
        self.image(21).unlink()
        self.fault('several frames', self.images/'21.tif', 'image holds 2 frames')

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The spoilt folder, its faults, and the report on it."
    root = tmp_path_factory.mktemp('faults')
    spoiler = Spoiler(root, *draw_lesions(N, 64, seed=11))
    spoiler.images.mkdir()
    spoiler.masks.mkdir()
    for i in range(N):
        spoiler.picture(i).save(spoiler.image(i))
        spoiler.grey(i).save(spoiler.mask(i))
    for junk in ['.DS_Store', '._00.png', 'Thumbs.db']: (spoiler.images/junk).write_bytes(b'junk')
    (root/'manifest.csv').write_text('id\n')
    (root/'__MACOSX').mkdir()
    spoiler.damage()
    spoiler.spoil_masks()
    spoiler.spoil_images()
    return root, spoiler.faults, check_pairs(root)

def test_at_least_twelve(folder): assert len(folder[1]) >= 12

def test_every_fault_is_listed(folder):
    _, faults, report = folder
    for name, (file, words, severity) in faults.items():
        rows = report[(report.file == file) & report.problem.str.contains(words, regex=False)]
        assert len(rows) == 1, f"{name}: {file}\n{report.to_string()}"
        assert rows.severity.item() == severity and len(rows.remedy.item()) > 5, name

def test_nothing_else_is_listed(folder):
    _, faults, report = folder
    known = {(file, p) for file, words, _ in faults.values() for p in report.problem if words in p}
    extra = set(zip(report.file, report.problem)) - known
    assert not extra and len(report) == len(faults), report.to_string()

def test_columns_and_order(folder):
    assert list(folder[2].columns) == ['file', 'problem', 'remedy', 'severity']
    assert set(folder[2].severity) == {'error', 'warning'}

def test_find_refuses_and_strict_false_leaves_out(folder):
    root, *_ = folder
    words = r'4 file\(s\) in .* do not pair up .*12.png: unpaired image.*; and 1 more'
    with pytest.raises(MedsynError, match=words) as e: find_pairs(root)
    assert '\n' not in str(e.value)
    names = [p.name for p in find_pairs(root, strict=False)]
    assert len(names) == N - 3 and not {'12', '13', '14'} & {*names}

def test_reading_agrees_with_the_report(folder):
    "An error in the report is a `MedsynError` with the file's name on reading; a warning is not."
    root, faults, report = folder
    errors = {file.split('/')[1].split('.')[0] for file, words, severity in faults.values()
              if severity == 'error' and 'full' not in words and 'stride' not in words}
    for p in find_pairs(root, strict=False):
        if p.name not in errors:
            image, mask = read_pair(p, 32)
            assert image.shape == (32, 32, 3) and mask.shape == (32, 32) and set(np.unique(mask)) <= {0, 1}
            continue
        with pytest.raises(MedsynError) as e: read_pair(p)
        assert p.name in str(e.value) and '\n' not in str(e.value)

def test_few_pairs_and_lists(folder):
    pairs = [p for p in find_pairs(folder[0], strict=False) if p.name in ('00', '22', '23')]
    report = check_pairs(pairs)
    assert report.problem.tolist() == ['only 3 pairs']
    report = check_pairs(pairs + [Pair('00', pairs[1].image, pairs[1].mask)])
    for words in ('two pairs have this name', 'near-duplicate'):
        assert report.problem.str.contains(words).any()

def test_no_pairs_at_all(tmp_path):
    (tmp_path/'photo.png').touch()
    for f in (check_pairs, find_pairs):
        with pytest.raises(MedsynError, match='known layouts are images/'): f(tmp_path)
        with pytest.raises(MedsynError, match='is not there'): f(tmp_path/'nowhere')
        with pytest.raises(MedsynError, match='is a file'): f(tmp_path/'photo.png')

def test_good_folder_is_clean(tmp_path):
    from medsyn.data.lesions import lesion_folder
    assert len(check_pairs(lesion_folder(tmp_path/'a', 12, 64))) == 0

# Inputs that are easily misread -----------------------------------------------------------------------------

def png_of_16_bit_colours(values):
    "A PNG file of 16-bit RGB, which pillow can read but not write."
    height, width, _ = values.shape
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    header = struct.pack('>IIBBBBB', width, height, 16, 2, 0, 0, 0)
    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in values)
    chunks = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks

def folder_of(path, images, masks):
    "A folder of pairs from bytes or pictures."
    for kind, files in (('images', images), ('masks', masks)):
        (path/kind).mkdir(parents=True)
        for name, content in files.items():
            if isinstance(content, bytes): (path/kind/name).write_bytes(content)
            else: content.save(path/kind/name)
    return path

LESION = np.zeros((48, 64), np.uint8)
LESION[10:30, 12:40] = 1
def noise(i): return Image.fromarray(np.random.default_rng(i).integers(0, 255, (48, 64, 3), dtype=np.uint8))
def mask_of(value): return Image.fromarray(LESION*value)

def pictures_and_masks(path, masks):
    "A folder of as many pictures of noise as there are masks."
    images = {f'{i}.png': noise(i) for i in range(len(masks))}
    return folder_of(path, images, {f'{i}.png': mask for i, mask in enumerate(masks)})

def test_16_bit_colours_are_not_cut_to_8_bits(tmp_path):
    values = np.random.default_rng(0).integers(0, 5000, (48, 64, 3)).astype(np.uint16)
    folder_of(tmp_path/'a', {'a.png': png_of_16_bit_colours(values)}, {'a.png': mask_of(255)})
    pair, = find_pairs(tmp_path/'a')
    with pytest.raises(MedsynError, match='more than 8 bits per channel'): read_pair(pair)
    image, _ = read_pair(pair, window=(1000, 4000))
    want = ((values.astype(float) - 1000)/3000).clip(0, 1)*255
    assert abs(image - want).max() <= .5
    report = check_pairs([pair], least=1)
    assert report.problem.tolist() == ['image has more than 8 bits per channel']
    assert '--window 20 4980 or --window auto' in report.remedy.item()
    assert not len(check_pairs([pair], least=1, window='auto'))
    assert [round(end) for end in auto_windows([pair])[pair.image]] == [20, 4980]

@pytest.mark.parametrize('order', ['II', 'MM'])
def test_a_16_bit_tiff_of_colours(tmp_path, order):
    "Classic TIFF of either byte order, one strip, 16 bits for each of three samples."
    h = w = 40
    end = '<' if order == 'II' else '>'
    values = np.random.default_rng(1).integers(0, 60000, (h, w, 3)).astype(np.uint16)
    tags = [(256, 4, 1, w), (257, 4, 1, h), (258, 3, 3, 8), (259, 4, 1, 1), (262, 4, 1, 2), (273, 4, 1, 200),
            (277, 4, 1, 3), (278, 4, 1, h), (279, 4, 1, h*w*6)]
    head = order.encode() + struct.pack(end + 'HIHHHH', 42, 16, 16, 16, 16, 0)
    directory = struct.pack(end + 'H', len(tags)) + b''.join(struct.pack(end + 'HHII', *t) for t in tags)
    data = values.astype(end + 'u2').tobytes()
    (tmp_path/'a.tif').write_bytes((head + directory + struct.pack(end + 'I', 0)).ljust(200, b'\0') + data)
    with pytest.raises(MedsynError, match='more than 8 bits'): read_image(tmp_path/'a.tif')
    image = read_image(tmp_path/'a.tif', window=(0, 60000))
    assert abs(image - values/60000*255).max() <= .5

@pytest.mark.parametrize('ending,dtype', [('png', np.uint16), ('tif', np.uint16), ('tif', np.float32),
                                          ('tif', np.int32)])
def test_deep_grey_images(tmp_path, ending, dtype):
    least = 0 if dtype == np.uint16 else -500
    values = np.linspace(least, 3000, 48*64).reshape(48, 64).astype(dtype)
    path = tmp_path/f'a.{ending}'
    Image.fromarray(values).save(path)
    with pytest.raises(MedsynError, match='more than 8 bits'): read_image(path)
    image = read_image(path, window=(0, 2000))
    assert abs(image[..., 1] - (values.astype(float)/2000).clip(0, 1)*255).max() <= .5

def test_not_a_number_becomes_black(tmp_path):
    values = np.full((40, 40), 5., np.float32)
    values[:20] = np.nan
    Image.fromarray(values).save(tmp_path/'a.tif')
    assert read_image(tmp_path/'a.tif', window=(0, 5))[[0, 39], 0, 0].tolist() == [0, 255]
    read_image(tmp_path/'a.tif', window='auto')

def test_a_16_bit_bitmap_has_8_bits_per_channel(tmp_path):
    "A width of 16 or 160 pixels, and grey images, are not taken for 16 bits per channel."
    for size in ((16, 16), (160, 160)):
        for ending in ('bmp', 'tif', 'png', 'gif', 'webp', 'jpg'):
            Image.new('RGB', size, (9, 9, 9)).save(tmp_path/f'a.{ending}')
            assert read_image(tmp_path/f'a.{ending}').shape == (*size, 3)

def test_one_class_per_file_is_not_merged(tmp_path):
    values = [1, 2, 3, 1, 2, 3, 1, 2, 3]
    pictures_and_masks(tmp_path/'a', [mask_of(value) for value in values])
    pairs = find_pairs(tmp_path/'a')
    words = r'several classes \(1 in 3 files, 2 in 3 files, 3 in 3 files\)'
    with pytest.raises(MedsynError, match=words): pair_dls(pairs, 32, device='cpu')
    assert check_pairs(tmp_path/'a').problem.str.contains(words).sum() == 1
    dls = pair_dls(pairs, 32, bs=4, valid=.5, label=[2, 3], augment=False, device='cpu')
    y = torch.cat([y for _, y in dls.valid])
    held_out = pair_dls(pairs, 32, bs=4, valid=.5, device='cpu', label=2).pairs_valid
    assert y.flatten(1).any(1).tolist() == [values[int(p.name)] in (2, 3) for p in held_out]

def test_one_colour_per_file_is_not_merged(tmp_path):
    "Red for one kind of polyp, green for another: each file alone is two-valued."
    def coloured(i):
        rgb = np.zeros((48, 64, 3), np.uint8)
        rgb[..., i % 2] = LESION*255
        return Image.fromarray(rgb)
    pictures_and_masks(tmp_path/'a', [coloured(i) for i in range(8)])
    pairs = find_pairs(tmp_path/'a')
    words = '#00ff00 in 4 files, #ff0000 in 4 files'
    with pytest.raises(MedsynError, match=words): pair_dls(pairs, 32, device='cpu')
    assert [read_pair(p, label='#ff0000')[1].any() for p in pairs] == [True, False]*4

def test_lesion_free_images_are_legal(tmp_path):
    pictures_and_masks(tmp_path/'a', [mask_of(255*(i > 2)) for i in range(8)])
    report = check_pairs(tmp_path/'a')
    assert report.severity.tolist() == ['warning']*3 and report.problem.str.contains('empty mask').all()
    pair_dls(find_pairs(tmp_path/'a'), 32, device='cpu').one_batch()

def test_volumes_are_named_wherever_they_lie(tmp_path):
    pictures_and_masks(tmp_path/'a', [mask_of(255)]*8)
    for name in ('ct.nii.gz', 'images/scan.nii', 'masks/IM0001.dcm'): (tmp_path/'a'/name).touch()
    problems = check_pairs(tmp_path/'a').set_index('file').problem
    assert sorted(problems.index) == ['ct.nii.gz', 'images/scan.nii', 'masks/IM0001.dcm']
    with pytest.raises(MedsynError, match=r'3 file\(s\) in .* do not pair up'): find_pairs(tmp_path/'a')
    (tmp_path/'b').mkdir()
    (tmp_path/'b'/'ct.nii.gz').touch()
    for f in (check_pairs, find_pairs):
        words = r'but 1 volume\(s\) \(ct.nii.gz\).*medsyn convert'
        with pytest.raises(MedsynError, match=words): f(tmp_path/'b')

def test_links_are_named(tmp_path):
    "A broken link, a loop and a link to a folder are not passed over."
    d = pictures_and_masks(tmp_path/'a', [mask_of(255)]*8)
    (d/'images'/'x.png').symlink_to('nowhere.png')
    (d/'masks'/'x.png').symlink_to('x.png')
    (d/'images'/'more').symlink_to(d/'masks')
    problems = check_pairs(d).set_index('file').problem
    nowhere = 'a link that leads nowhere'
    assert problems.to_dict() == {'images/x.png': nowhere, 'masks/x.png': nowhere,
                                  'images/more': 'a link to a folder, which is not followed'}
    with pytest.raises(MedsynError, match='leads nowhere'): find_pairs(d)

# Volumes ----------------------------------------------------------------------------------------------------

def nifti_pair(path, dtype=np.int16, shift=0.):
    "A NIfTI image of one slice in Hounsfield units and its mask, which may lie elsewhere."
    nib = pytest.importorskip('nibabel')
    values = np.random.default_rng(0).integers(-1000, 1000, (64, 48, 1)).astype(dtype)
    affine = np.diag([-1., -1., 1., 1.])
    for kind, content in (('images', values), ('masks', LESION.T[..., None]*2)):
        (path/kind).mkdir(parents=True)
        affine[0, 3] = shift if kind == 'masks' else 0
        nib.save(nib.Nifti1Image(content, affine), path/kind/'p1.nii.gz')
    return values[..., 0].T

def test_a_slice_is_read_like_a_picture(tmp_path):
    values = nifti_pair(tmp_path/'a')
    pair, = find_pairs(tmp_path/'a', how=reading(window=[-200, 300], label='2'))
    image, mask = read_pair(pair)
    assert pair.name == 'p1' and (mask == LESION).all()
    assert abs(image[..., 0] - ((values + 200.)/500).clip(0, 1)*255).max() <= .5
    assert not len(check_pairs([pair], least=1))
    with pytest.raises(MedsynError, match='p1.nii.gz has more than 8 bits'):
        read_pair(*find_pairs(tmp_path/'a'))

def test_a_mask_on_another_grid_is_refused(tmp_path):
    nifti_pair(tmp_path/'a', shift=2.)
    pair, = find_pairs(tmp_path/'a', how=reading(window='auto'))
    with pytest.raises(MedsynError, match='another grid'): read_pair(pair)
    assert check_pairs([pair], least=1).problem.str.contains('another grid').any()

# Choices travel with the pairs ------------------------------------------------------------------------------

def test_choices_travel_with_the_pairs(tmp_path):
    "Through lists on disk, loaders and hashes."
    pictures_and_masks(tmp_path/'a', [mask_of(1 + i % 3) for i in range(9)])
    plain, labelled = (find_pairs(tmp_path/'a', how=how) for how in (None, reading(label=['2'], fit='pad')))
    assert plain == labelled and pairs_hash(plain) != pairs_hash(labelled)
    again = find_pairs(save_list(tmp_path/'list.csv', labelled))
    assert [p.reading for p in again] == [p.reading for p in labelled]
    dls = pair_dls(again[2:], 64, valid=again[:2], augment=False, device='cpu')
    y = torch.cat([y for _, y in dls.valid])
    assert y.flatten(1).any(1).tolist() == [False, True]
    assert not y[:, :8].any() and not y[:, -8:].any()           # the padding of 48x64 in 64x64
    with pytest.raises(MedsynError, match='label 7 is in none of the 9 masks'):
        pair_dls(plain, 64, label=7, device='cpu')

def test_images_with_choices(tmp_path):
    values = np.linspace(0, 3000, 48*64).reshape(48, 64).astype(np.uint16)
    (tmp_path/'a').mkdir()
    Image.fromarray(values).save(tmp_path/'a'/'x.png')
    assert find_images(tmp_path/'a') == [tmp_path/'a'/'x.png']
    frame, = find_images(tmp_path/'a', reading(window=[0, 3000]))
    assert abs(read_image(frame)[..., 0] - values/3000*255).max() <= .5
    assert open(frame, 'rb').read(4) == b'\x89PNG' and frame.stem == 'x'

# Rotation tags and notes ------------------------------------------------------------------------------------

def tagged(path, turn, size=(60, 40)):
    "A photograph of noise that is stored in one direction and shown in another."
    exif = Image.Exif()
    exif[0x0112], exif[0x010e] = turn, 'patient Jane Doe'
    pixels = np.random.default_rng(0).integers(0, 255, (*size[::-1], 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif)
    return pixels

def test_rotation_tags_are_honoured_or_refused(tmp_path):
    pixels = tagged(tmp_path/'a'/'images'/'1.png', 6)
    (tmp_path/'a'/'masks').mkdir()
    Image.new('L', (40, 60), 255).save(tmp_path/'a'/'masks'/'1.png')
    pair, = find_pairs(tmp_path/'a')
    assert (read_pair(pair)[0] == np.rot90(pixels, -1)).all()
    report = check_pairs([pair], least=1)
    assert report.problem.str.contains('read turned').sum() == 1
    Image.new('L', (60, 40), 255).save(tmp_path/'a'/'masks'/'1.png')    # drawn on the stored picture
    with pytest.raises(MedsynError, match='carries a rotation tag and is stored 60x40'): read_pair(pair)
    assert check_pairs([pair], least=1).problem.str.contains('rotation tag').any()

def test_a_rotation_tag_that_can_mean_two_things(tmp_path):
    pixels = tagged(tmp_path/'a'/'images'/'1.png', 3)
    (tmp_path/'a'/'masks').mkdir()
    lower_half = np.pad(np.full((20, 60), 255, np.uint8), ((20, 0), (0, 0)))
    Image.fromarray(lower_half).save(tmp_path/'a'/'masks'/'1.png')
    pair, = find_pairs(tmp_path/'a')
    with pytest.raises(MedsynError, match='fits it turned and as it is stored'): read_pair(pair)
    assert check_pairs([pair], least=1).severity.tolist().count('error') == 1
    with pytest.raises(MedsynError, match='--exif'): clean_masks(tmp_path/'a', tmp_path/'no')
    for exif, wanted in (('turn', np.rot90(pixels, 2)), ('ignore', pixels)):
        table = clean_masks(tmp_path/'a', tmp_path/exif, exif=exif)
        assert 'rotation tag' in table.changes.item()
        assert (read_pair(*find_pairs(tmp_path/exif))[0] == wanted).all()

def test_notes_are_not_carried_over(tmp_path):
    "Neither EXIF nor text chunks nor comments reach a copy."
    tagged(tmp_path/'a'/'images'/'1.png', 1)
    notes = PngInfo()
    notes.add_text('Patient', 'Jane Doe')
    noise(2).save(tmp_path/'a'/'images'/'2.png', pnginfo=notes)
    noise(3).save(tmp_path/'a'/'images'/'3.jpg', comment=b'Jane Doe')
    (tmp_path/'a'/'masks').mkdir()
    for i, size in ((1, (60, 40)), (2, (64, 48)), (3, (64, 48))):
        Image.new('L', size, 255).save(tmp_path/'a'/'masks'/f'{i}.png', pnginfo=notes)
    table = clean_masks(tmp_path/'a', tmp_path/'b').set_index('name')
    files = [f for f in (tmp_path/'b').rglob('*.png')]
    assert len(files) == 6 and not any(b'Jane' in f.read_bytes() for f in files)
    assert table.changes['2'].startswith('notes inside the file left out')
    a, b = (read_image(tmp_path/k/'images'/name) for k, name in (('a', '3.jpg'), ('b', '3.png')))
    assert (a == b).all()

def test_transparency_and_white_is_zero(tmp_path):
    see_through = noise(0).convert('RGBA')
    see_through.putalpha(128)
    see_through.save(tmp_path/'a.png')
    with pytest.raises(MedsynError, match='a.png has transparency'): read_image(tmp_path/'a.png')
    values = np.linspace(0, 60000, 48*64).reshape(48, 64).astype(np.uint16)
    Image.fromarray(values).save(tmp_path/'b.tif', tiffinfo={262: 0})
    shown = read_image(tmp_path/'b.tif', window=(0, 60000))[..., 0]
    with Image.open(tmp_path/'b.tif') as im: white_is_zero = im.tag_v2[262] == 0
    assert white_is_zero and abs(255 - values/60000*255 - shown).max() <= 1

def test_clean_refuses_what_it_would_have_to_guess(tmp_path):
    "A photograph is no mask, and classes are not merged by a threshold."
    pictures_and_masks(tmp_path/'a', [noise(9).convert('L')]*8)
    with pytest.raises(MedsynError, match='a grey picture'): clean_masks(tmp_path/'a', tmp_path/'b')
    classes = LESION*100 + np.roll(LESION, 5, 0)*50
    pictures_and_masks(tmp_path/'c', [Image.fromarray(classes)]*7 + [mask_of(255)])
    with pytest.raises(MedsynError, match='several classes'): clean_masks(tmp_path/'c', tmp_path/'d')
    table = clean_masks(tmp_path/'c', tmp_path/'d', leave_out=True)     # no trace of the refusal
    assert table.changes.str.startswith('left out').tolist() == [True]*7 + [False]
    assert [p.name for p in find_pairs(tmp_path/'d')] == ['7']

def test_names_that_differ_in_case_only(tmp_path):
    masks = {'a.png': mask_of(255), 'A.png': mask_of(255)}
    folder_of(tmp_path/'a', {'a.png': noise(0), 'A.png': noise(1)}, masks)
    if len(list((tmp_path/'a'/'images').iterdir())) < 2:
        pytest.skip('this file system takes them for the same')
    assert len(find_pairs(tmp_path/'a')) == 2
    with pytest.raises(MedsynError, match='take for the same'): clean_masks(tmp_path/'a', tmp_path/'b')

def test_several_pages_need_a_choice(tmp_path):
    pages = [noise(i) for i in range(3)]
    folder_of(tmp_path/'a', {}, {'a.png': mask_of(255)})
    pages[0].save(tmp_path/'a'/'images'/'a.tif', save_all=True, append_images=pages[1:])
    pair, = find_pairs(tmp_path/'a')
    with pytest.raises(MedsynError, match='holds 3 frames: choose one with --page'): read_pair(pair)
    assert (read_pair(pair, page=2)[0] == np.asarray(pages[2])).all()
    table = clean_masks(tmp_path/'a', tmp_path/'clean', page=1)
    assert (read_pair(*find_pairs(tmp_path/'clean'))[0] == np.asarray(pages[1])).all()
    assert table.masks.tolist() == [1]

def test_several_masks_of_an_image_are_united_and_said(tmp_path):
    parts = [LESION.copy() for _ in range(3)]
    for i, part in enumerate(parts): part[np.arange(48) % 3 != i] = 0
    masks = {f'a_mask{i}.png': Image.fromarray(part*255) for i, part in enumerate(parts)}
    folder_of(tmp_path/'a', {'a.png': noise(0)}, masks)
    with pytest.raises(MedsynError, match="3 masks of one image 'a'"): find_pairs(tmp_path/'a')
    assert check_pairs(tmp_path/'a').remedy.str.contains('clean_masks').sum() == 1
    assert clean_masks(tmp_path/'a', tmp_path/'b').masks.tolist() == [3]
    assert (read_pair(*find_pairs(tmp_path/'b'))[1] == LESION).all()

# The way to the network's size and back ---------------------------------------------------------------------

@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('size', [64, (48, 96), (33, 17)])
@pytest.mark.parametrize('shape', [(48, 64), (64, 48), (50, 50), (7, 90)])
def test_geometry_is_inverted_up_to_the_resolution(fit, size, shape):
    "Each pixel comes back from the pixel that covers it, and what was not shown comes back empty."
    geometry = Geometry(shape, size, fit)
    (top, left, height, width), (ptop, pleft, pheight, pwidth) = geometry.boxes
    numbers = np.arange(geometry.size[0]*geometry.size[1], dtype=np.int32).reshape(geometry.size) + 1
    back = geometry.to_original(numbers)
    assert back.shape == shape
    shown = back[top:top + height, left:left + width]
    assert (shown > 0).all() and (back > 0).sum() == shown.size
    row, column = np.divmod(shown - 1, geometry.size[1])
    want_row = ptop + (np.arange(height) + .5)*pheight/height
    want_column = pleft + (np.arange(width) + .5)*pwidth/width
    assert abs(row + .5 - want_row[:, None]).max() < .51
    assert abs(column + .5 - want_column).max() < .51
    if fit != 'crop': assert (top, left, height, width) == (0, 0, *shape)
    if fit != 'pad': assert (pheight, pwidth) == geometry.size

@pytest.mark.parametrize('fit', FITS)
@pytest.mark.parametrize('factor', [1, 2, 3])
def test_a_mask_comes_back_to_the_pixel(fit, factor):
    mask = np.random.default_rng(0).integers(0, 2, (20, 30), dtype=np.uint8)
    geometry = Geometry((20, 30), (20*factor, 30*factor), fit)
    assert (geometry.to_original(geometry.mask(mask)) == mask).all()

def test_image_and_mask_share_the_geometry():
    image = np.repeat(LESION[..., None]*255, 3, 2)
    for fit in FITS:
        geometry = Geometry(LESION.shape, (96, 96), fit)
        small, mask = geometry.image(image), geometry.mask(LESION)
        assert ((small[..., 0] > 127) != mask).mean() < .02, fit

def test_training_on_sizes_that_are_not_square(tmp_path):
    pictures_and_masks(tmp_path/'a', [mask_of(255)]*8)
    size = fitting_size((48, 64), 64)
    assert size == (64, 96)
    for augment in ('full', 'strong'):
        dls = pair_dls(find_pairs(tmp_path/'a'), size, bs=4, fit='pad', augment=augment, device='cpu')
        x, y = dls.one_batch()
        assert x.shape == (4, 3, *size) and y.shape == (4, *size)

# Volumes that are not read ---------------------------------------------------------------------------

@pytest.mark.parametrize('ending', ['.nrrd', '.mha', '.mhd'])
def test_other_volumes_are_refused_with_the_remedy(tmp_path, ending):
    "In a folder of pairs, alone, in a list, and as the one file to predict."
    from medsyn.fit import predict_images
    folder = lesion_folder(tmp_path/'data', 8, size=32, seed=0)
    stray = folder/'masks'/f'scan{ending}'
    stray.write_bytes(b'NRRD0004')
    table = check_pairs(folder)
    row = table[table.file == f'masks/scan{ending}'].iloc[0]
    assert 'of a kind that is not read' in row.problem and 'convert it to NIfTI' in row.remedy
    alone = tmp_path/'alone'
    alone.mkdir()
    stray.rename(alone/stray.name)
    said = rf'scan{ending}.*not read.*convert it to NIfTI'
    with pytest.raises(MedsynError, match=said): find_pairs(alone)
    with pytest.raises(MedsynError, match=said): check_pairs(alone)
    for images in (alone, alone/stray.name):
        with pytest.raises(MedsynError, match=said): predict_images('nowhere', images, tmp_path/'p')
    assert not (tmp_path/'p').exists()

def test_a_dicom_segmentation_is_refused_with_the_remedy(tmp_path):
    pydicom = pytest.importorskip('pydicom')
    from pydicom.dataset import FileMetaDataset
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = '1.2.840.10008.5.1.4.1.1.66.4'
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = '1.2.3'
    dataset.Modality, dataset.Rows, dataset.Columns, dataset.NumberOfFrames = 'SEG', 32, 32, 1
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, 'MONOCHROME2'
    dataset.PixelRepresentation = 0
    dataset.BitsAllocated = dataset.BitsStored = 8
    dataset.HighBit, dataset.PixelData = 7, bytes(32*32)
    folder = lesion_folder(tmp_path/'data', 8, size=32, seed=0)
    (folder/'masks'/'0003.png').unlink()
    dataset.save_as(folder/'masks'/'0003.dcm', enforce_file_format=True)
    pair = next(p for p in find_pairs(folder) if p.name == '0003')
    said = '0003.dcm is a segmentation object.*convert it to NIfTI'
    with pytest.raises(MedsynError, match=said): read_mask(pair)
    row = check_pairs(folder).query("file == 'masks/0003.dcm'").iloc[0]
    assert 'DICOM SEG' in row.problem and 'convert it to NIfTI' in row.remedy

def test_a_label_does_not_empty_masks_that_know_no_classes(tmp_path):
    "Masks of 0 and 255 beside one of classes 1 and 2: label 1 would read the former as empty."
    folder = lesion_folder(tmp_path/'data', 9, size=32, seed=0)
    classes = np.zeros((32, 32), np.uint8)
    classes[4:9, 4:9], classes[20:25, 20:25] = 1, 2
    Image.fromarray(classes).save(folder/'masks'/'0002.png')
    said = '8 of the masks hold 0 and 255 alone.*0000.png first.*choose --label 1 255 to take both'
    with pytest.raises(MedsynError, match=said): clean_masks(folder, tmp_path/'no', label=1)
    assert not (tmp_path/'no').exists()
    assert check_pairs(folder, label=1).problem.str.contains('hold 0 and 255 alone').any()
    clean_masks(folder, tmp_path/'clean', label=[1, 255])
    areas = {p.name: int(read_mask(p).sum()) for p in find_pairs(tmp_path/'clean')}
    assert areas['0002'] == 25 and all(areas.values())

def test_a_copy_keeps_the_groups_of_its_source(tmp_path):
    folder = lesion_folder(tmp_path/'a', 4, 32)
    lines = [f'{i:04d},patient{i//2},C{1 + i%2}\n' for i in range(4)]
    (folder/'manifest.csv').write_text('id,group,centre\n' + ''.join(lines))
    clean_masks(folder, tmp_path/'clean')
    convert(folder, tmp_path/'converted', to='pairs')
    for copy in ('clean', 'converted'):
        groups = [group_of(p) for p in find_pairs(tmp_path/copy)]
        assert groups == ['patient0', 'patient0', 'patient1', 'patient1']
    assert len(find_pairs(tmp_path/'clean', where=dict(centre='C2'))) == 2
    (folder/'masks'/'0003.png').write_bytes(b'no picture')
    clean_masks(folder, tmp_path/'fewer', leave_out=True)
    assert '0003' not in (tmp_path/'fewer'/'manifest.csv').read_text()

def write_masks(folder, *names):
    "Masks with a square, as PNG."
    folder.mkdir(parents=True)
    square = np.pad(np.full((8, 8), 255, np.uint8), 8)
    for name in names: Image.fromarray(square).save(folder/f'{name}.png')

def test_folders_without_a_counterpart_are_listed(tmp_path):
    lesion_folder(tmp_path/'a', 8, 32)
    assert not len(check_pairs(tmp_path/'a'))
    lesion_folder(tmp_path/'a'/'extra', 1, 32)
    write_masks(tmp_path/'a'/'masks_C2', '0000')
    write_masks(tmp_path/'a'/'ignored', '0000')             # medsyn's own: no word for images or masks
    listed = check_pairs(tmp_path/'a')
    assert listed.file.tolist() == ['extra', 'masks_C2'] and set(listed.severity) == {'warning'}
    assert len(find_pairs(tmp_path/'a')) == 8

def test_folders_with_different_numbers_are_no_pairs(tmp_path):
    write_masks(tmp_path/'a'/'images_1', '0')
    write_masks(tmp_path/'a'/'masks_2', '0')
    with pytest.raises(MedsynError, match='no image/mask pairs'): find_pairs(tmp_path/'a')
    write_masks(tmp_path/'a'/'images_2', '0')
    write_masks(tmp_path/'a'/'masks_1', '0')
    assert [p.mask.parent.name for p in find_pairs(tmp_path/'a')] == ['masks_1', 'masks_2']

@pytest.mark.parametrize('name', ['x_mask', 'x_segmentation', 'x'])
def test_masks_alone_under_any_name(tmp_path, name):
    write_masks(tmp_path/'flat', name)
    write_masks(tmp_path/'below'/'masks', name)
    for folder in ('flat', 'below'): assert [p.name for p in find_masks(tmp_path/folder)] == [name]
    (tmp_path/'empty').mkdir()
    with pytest.raises(MedsynError, match='no image in'): find_masks(tmp_path/'empty')

@pytest.mark.parametrize('value', [0, 100., -3e4, 1e13])
def test_a_constant_image_has_a_window(value):
    lo, hi = auto_window(np.full((4, 4), value, np.float32))
    assert lo == np.float32(value) and lo < hi

def dicom_series(folder, n=4):
    "A series of black slices 8x8, and its mask as NIfTI."
    import nibabel
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid
    images, masks = folder/'images'/'scan', folder/'masks'
    for place in (images, masks): place.mkdir(parents=True)
    for k in range(n):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        d = FileDataset(images/f'{k}.dcm', {}, file_meta=meta, preamble=bytes(128))
        d.SeriesInstanceUID, d.Rows, d.Columns, d.SamplesPerPixel = '1.2.3', 8, 8, 1
        d.PhotometricInterpretation, d.PixelRepresentation = 'MONOCHROME2', 0
        d.BitsAllocated, d.BitsStored, d.HighBit = 16, 16, 15
        d.ImageOrientationPatient, d.PixelSpacing = [1, 0, 0, 0, 1, 0], [1, 1]
        d.ImagePositionPatient, d.PixelData = [0, 0, k], bytes(128)
        d.save_as(images/f'{k}.dcm', enforce_file_format=True)
    mask = np.zeros((8, 8, n), np.uint8)
    mask[2:5, 2:5] = 1
    nibabel.save(nibabel.Nifti1Image(mask, np.diag([-1, -1, 1, 1])), masks/'scan.nii.gz')
    return folder

def test_nothing_beside_a_dicom_series_is_dropped(tmp_path):
    "Notes and hidden files are no data; pictures, volumes and masks of no series are named."
    folder, how = dicom_series(tmp_path/'data'), reading('auto')
    for name in ('images/.DS_Store', 'masks/notes.txt'): (folder/name).touch()
    assert len(convert(folder, tmp_path/'plain', how=how)) == 4
    for name in ('images/a.png', 'images/scan/deep/b.dcm', 'images/IM7', 'masks/a.png', 'masks/ct.nii.gz'):
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).touch()
        with pytest.raises(MedsynError, match=rf'beside them files that belong to none \({name}\)'):
            convert(folder, tmp_path/'no', how=how)
        (folder/name).unlink()
    for i in range(5): (folder/'images'/f'{i}.png').touch()
    with pytest.raises(MedsynError, match='images/2.png and 2 more'): convert(folder, tmp_path/'no', how=how)
    assert not (tmp_path/'no').exists()

def test_a_linked_dicom_series(tmp_path):
    folder = dicom_series(tmp_path/'data')
    (folder/'images'/'scan').rename(tmp_path/'elsewhere')
    (folder/'images'/'scan').symlink_to(tmp_path/'elsewhere')
    assert len(convert(folder, tmp_path/'plain', how=reading('auto'))) == 4

def test_frames_without_a_position_make_no_volume(tmp_path):
    "Nor do slices of another size; a volume made in Python is saved in its own order."
    frames = Volume(np.zeros((3, 4, 5), np.uint8))
    masks = [np.zeros((4, 5), np.uint8)]*3
    for f in (lambda: stack_of(frames, masks), lambda: save_masks(tmp_path/'m.nii.gz', frames, masks)):
        with pytest.raises(MedsynError, match='frames without a position in the body'): f()
    assert not (tmp_path/'m.nii.gz').exists()
    values = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)
    volume = Volume(values, np.diag([1., 2., 3., 1.]))
    slices = [volume.slice(k) for k in range(5)]
    with pytest.raises(MedsynError, match=r'slice 1 is \(3, 4\) and the volume'):
        stack_of(volume, [slices[0], slices[1].T, *slices[2:]])
    assert (open_volume(save_masks(tmp_path/'m.nii.gz', volume, slices)).values == values).all()

def test_names_of_volumes_stay_behind(tmp_path):
    "A name of a patient is in no name and no group; groups of a manifest are kept."
    folder = tmp_path/'data'
    for name in ('Doe_Jane', 'Roe_Richard'): nifti_pair(folder/name)
    pairs = tmp_path/'pairs'
    for kind in ('images', 'masks'):
        (pairs/kind).mkdir(parents=True)
        for name in ('Doe_Jane', 'Roe_Richard'):
            source, = (folder/name/kind).iterdir()
            source.rename(pairs/kind/f'{name}.nii.gz')
    table = convert(pairs, tmp_path/'slices', how=reading('auto'))
    assert set(table.group) == {'case000', 'case001'}
    assert 'Doe' not in (tmp_path/'slices'/'manifest.csv').read_text()
    (pairs/'manifest.csv').write_text('name,group\nDoe_Jane,g1\nRoe_Richard,g1\n')
    assert set(convert(pairs, tmp_path/'grouped', how=reading('auto')).group) == {'g1'}
