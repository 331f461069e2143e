"A folder with every fault that `check_pairs` knows: each is listed once, and nothing else is."
import numpy as np
import pytest
from PIL import Image

from medsyn.core import MedsynError
from medsyn.data.lesions import draw_lesions
from medsyn.data.pairs import Pair, check_pairs, find_pairs, read_pair

N = 24

def _faults(images, masks, x, m):
    "Spoil pairs; name of the fault -> (file, words in the problem, severity)."
    img, msk = (lambda i: images/f'{i:02d}.png'), (lambda i: masks/f'{i:02d}.png')
    grey = lambda i: Image.fromarray(m[i]*255)
    out = {}
    def fault(name, file, words, severity='error'): out[name] = f'{file.parent.name}/{file.name}', words, severity

    img(1).write_bytes(img(1).read_bytes()[:1500]);                                     fault('truncated image', img(1), 'unreadable')
    msk(2).write_text('this is no picture');                                            fault('unreadable mask', msk(2), 'unreadable')
    grey(3).resize((48, 48), 0).save(msk(3));                                           fault('size mismatch', msk(3), 'size mismatch: image 64x64, mask 48x48')
    msk(4).unlink(); grey(4).save(masks/'04.jpg', quality=70);                          fault('JPEG mask', masks/'04.jpg', 'likely JPEG artefacts')
    classes = Image.fromarray(np.where(np.arange(64) < 32, m[5], m[5]*2)); classes = classes.convert('P'); classes.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    classes.save(msk(5));                                                               fault('palette of classes', msk(5), 'several classes (0, 1, 2)')
    rgba = grey(6).convert('RGBA'); rgba.putalpha(grey(6)); rgba.save(msk(6));          fault('transparent mask', msk(6), 'transparency (RGBA)')
    Image.fromarray(m[7].astype(np.uint16)*np.linspace(9e3, 6e4, 64).astype(np.uint16)).save(msk(7)); fault('16-bit mask', msk(7), 'likely 16-bit values')
    Image.fromarray(m[8]).save(msk(8));                                                 fault('0/1 mask', msk(8), 'holds 0 and 1 instead of 0 and 255', 'warning')
    Image.fromarray(m[9]*0).save(msk(9));                                               fault('empty mask', msk(9), 'empty mask')
    Image.fromarray(m[10]*0 + 255).save(msk(10));                                       fault('full mask', msk(10), 'full mask')
    Image.fromarray(x[20]).save(img(11).with_suffix('.jpg'), quality=50); img(11).unlink(); fault('near-duplicate', images/'20.png', 'near-duplicate of images/11.jpg', 'warning')
    msk(12).unlink();                                                                   fault('unpaired image', img(12), 'unpaired image')
    img(13).unlink();                                                                   fault('unpaired mask', msk(13), 'unpaired mask')
    Image.fromarray(x[14]).save(images/'14.tif');                                       fault('duplicate stem', images/'14.tif', "2 images are called '14'")
    Image.fromarray(x[15]).resize((20, 20)).save(img(15)); grey(15).resize((20, 20), 0).save(msk(15)); fault('too small', img(15), "smaller than the network's stride 32")
    Image.fromarray(x[16]).convert('CMYK').save(images/'16.tif'); img(16).unlink();     fault('CMYK image', images/'16.tif', 'image is CMYK', 'warning')
    Image.fromarray(x[17][..., 0].astype(np.uint16)*200).save(img(17));                 fault('16-bit image', img(17), 'more than 8 bits')
    grey(18).resize((57, 57), Image.Resampling.BICUBIC).resize((64, 64), Image.Resampling.BICUBIC).save(msk(18)); fault('soft mask', msk(18), 'a soft edge')
    grey(19).convert('RGBA').save(msk(19));                                             fault('opaque RGBA mask', msk(19), 'alpha channel (RGBA)', 'warning')
    (images/'scan.dcm').write_bytes(b'DICM');                                           fault('unknown type', images/'scan.dcm', 'file type .dcm is not read')
    frames = [Image.fromarray(a) for a in x[21:23]]; frames[0].save(images/'21.tif', save_all=True, append_images=frames[1:]); img(21).unlink()
    fault('several frames', images/'21.tif', 'image holds 2 frames', 'warning')
    return out

@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "The spoilt folder, its faults, and the report on it."
    root = tmp_path_factory.mktemp('faults')
    images, masks = root/'images', root/'masks'
    images.mkdir(); masks.mkdir()
    x, m = draw_lesions(N, 64, seed=11)
    for i in range(N):
        Image.fromarray(x[i]).save(images/f'{i:02d}.png'); Image.fromarray(m[i]*255).save(masks/f'{i:02d}.png')
    for junk in ['.DS_Store', '._00.png', 'Thumbs.db']: (images/junk).write_bytes(b'junk')
    (root/'manifest.csv').write_text('id\n'); (root/'__MACOSX').mkdir()
    return root, _faults(images, masks, x, m), check_pairs(root)

def test_at_least_twelve(folder): assert len(folder[1]) >= 12

def test_every_fault_is_listed(folder):
    _, faults, report = folder
    for name, (file, words, severity) in faults.items():
        rows = report[(report.file == file) & report.problem.str.contains(words, regex=False)]
        assert len(rows) == 1, f"{name}: {file}\n{report.to_string()}"
        assert rows.severity.item() == severity and len(rows.remedy.item()) > 5, name

def test_nothing_else_is_listed(folder):
    _, faults, report = folder
    extra = set(zip(report.file, report.problem)) - {(f, p) for f, w, _ in faults.values() for p in report.problem if w in p}
    assert not extra and len(report) == len(faults), report.to_string()

def test_columns_and_order(folder):
    assert list(folder[2].columns) == ['file', 'problem', 'remedy', 'severity']
    assert set(folder[2].severity) == {'error', 'warning'}

def test_find_refuses_and_strict_false_leaves_out(folder):
    root, *_ = folder
    with pytest.raises(MedsynError, match=r'4 file\(s\) in .* do not pair up .*12.png: unpaired image.*; and 1 more') as e: find_pairs(root)
    assert '\n' not in str(e.value)
    names = [p.name for p in find_pairs(root, strict=False)]
    assert len(names) == N - 3 and not {'12', '13', '14'} & {*names}

def test_reading_agrees_with_the_report(folder):
    "What is an error in a file is a `MedsynError` with that file's name when it is read; a warning is not; near-duplicates and sizes apart."
    root, faults, report = folder
    errors = {f.split('/')[1].split('.')[0] for f, w, s in faults.values() if s == 'error' and 'empty' not in w and 'full' not in w and 'stride' not in w}
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
    assert report.problem.str.contains('two pairs have this name').any() and report.problem.str.contains('near-duplicate').any()

def test_no_pairs_at_all(tmp_path):
    (tmp_path/'photo.png').touch()
    for f in (check_pairs, find_pairs):
        with pytest.raises(MedsynError, match='known layouts are images/'): f(tmp_path)
        with pytest.raises(MedsynError, match='is not there'): f(tmp_path/'nowhere')
        with pytest.raises(MedsynError, match='is a file'): f(tmp_path/'photo.png')

def test_good_folder_is_clean(tmp_path):
    from medsyn.data.lesions import lesion_folder
    assert len(check_pairs(lesion_folder(tmp_path/'a', 12, 64))) == 0
