"The command line as a stranger uses it: every command end to end at its smallest, and every wrong input."
import json
import os
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file

from medsyn.cli import COMMANDS, main, options_of, parser_of
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, save_list
from medsyn.diffusion.backbone import random_stable_diffusion
from medsyn.generate.catalog import ALIASES, METHODS, load_generator, method_name

warnings.filterwarnings('ignore')

def medsyn(line):
    "The exit status of a command, written as one line."
    return main(shlex.split(line))

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with pairs, a backbone, a generator, synthetic pairs and a segmenter, made by the commands."
    d = tmp_path_factory.mktemp('cli')
    lesion_folder(d/'train', 16, size=32, seed=0)
    lesion_folder(d/'test', 8, size=32, seed=1)
    assert medsyn(f'pretrain {d}/train --out {d}/bb --size 32 --steps 2 --channels 16 32') == 0
    assert medsyn(f'train {d}/train --backbone {d}/bb --out {d}/gen --steps 2') == 0
    drawn = f'synth --anyway {d}/gen --data {d}/train --out {d}/syn'
    assert medsyn(f'{drawn} -n 9 --steps 2 --sampler dpm++') == 0
    assert medsyn(f'segment {d}/train --out {d}/seg --synthetic {d}/syn --size 32 --steps 2') == 0
    return d

def fails(capsys, line):
    "Runs a command that must be refused: status 2, one line, no traceback; returns the line."
    capsys.readouterr()
    status = medsyn(line)
    _, err = capsys.readouterr()
    lines = [text for text in err.splitlines() if text.startswith('medsyn: error: ')]
    assert status == 2 and len(lines) == 1 and 'Traceback' not in err, (status, err)
    return lines[0]

def manifest(folder):
    "The lines of a synthetic set."
    return [json.loads(line) for line in (folder/'manifest.jsonl').read_text().splitlines()]

# What the commands leave ---------------------------------------------------------------------------

def test_every_command_leaves_what_it_says(made):
    for file in ('bb/backbone.json', 'gen/generator.json', 'seg/model.safetensors', 'seg/log.csv'):
        assert (made/file).exists()
    rows = manifest(made/'syn')
    assert len(rows) == 9
    assert all((made/'syn'/r['file']).exists() and (made/'syn'/r['mask']).exists() for r in rows)
    told = 'file mask source transform seed sampler steps guidance prompt generator versions'.split()
    assert set(told) <= set(rows[0])
    assert {'step', 'right', 'shuffled', 'margin'} <= set(pd.read_csv(made/'gen'/'probe.csv'))

def test_siamese_from_the_command_line(made, tmp_path):
    "Trained, drawn from and compared like any other generator; nothing of the image branch is in its folder."
    gen, syn, results = tmp_path/'gen', tmp_path/'syn', tmp_path/'r'
    assert medsyn(f'train {made}/train --backbone {made}/bb --out {gen} --method siamese --steps 3'
                  ' --bs 4') == 0
    assert json.loads((gen/'generator.json').read_text())['class'] == 'SiameseGenerator'
    assert {'L_i', 'L_c', "L_m'", 'w_i', 'augmented'} <= set(pd.read_csv(gen/'log.csv'))
    assert medsyn(f'synth --anyway {gen} --data {made}/train --out {syn} -n 3 --steps 2 --sampler dpm++') == 0
    assert medsyn(f'compare {made}/train --tests {made}/test --arms real {syn} --out {results}'
                  ' --size 32 --steps 2 --seeds 0') == 0
    assert set(pd.read_csv(results/'scores.csv').arm) == {'real', 'syn'}

def test_settings_reach_the_method(made, tmp_path, capsys):
    train = f'train {made}/train --backbone {made}/bb --method siamese --steps 2 --bs 4'
    assert medsyn(f'{train} --out {tmp_path}/gen --set w_c=0.5') == 0
    assert json.loads((tmp_path/'gen'/'train.json').read_text())['settings'] == {'w_c': .5}
    assert 'not of the form name=value' in fails(capsys, f'{train} --out {tmp_path}/x --set w_c')
    assert "did you mean 'w_c'?" in fails(capsys, f'{train} --out {tmp_path}/x --set wc=1')
    assert not (tmp_path/'x').exists()

def test_score_prints_both_conventions_and_both_averages(made, capsys):
    capsys.readouterr()
    assert medsyn(f'score {made}/seg --tests a={made}/test b={made}/train --out {made}/s.csv') == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ('dice@0.5', 'dice@256', 'Overall', 'AVE'))
    assert len(pd.read_csv(made/'s.csv')) == 24

def test_compare_takes_folders_as_arms(made):
    out = made/'cmp'
    assert medsyn(f'compare {made}/train --tests {made}/test --arms real real-twice mine={made}/syn'
                  f' --out {out} --size 32 --steps 2 --seeds 0') == 0
    assert set(pd.read_csv(out/'scores.csv').arm) == {'real', 'real-twice', 'mine'}
    assert set(json.loads((out/'run.json').read_text())) >= {'command', 'hardware', 'versions', 'seconds'}
    assert (out/'figure.png').stat().st_size > 1000

QUICK = ('--size 32 --pretrain-steps 2 --train-steps 2 --segment-steps 2 --sample-steps 2'
         ' --channels 16 32 --seeds 0')

def lines_of(script, tmp_path):
    "What bash makes of a script's commands of medsyn: they are noted, to be run in this process."
    noted = tmp_path/'noted'
    program = tmp_path/'bin'/'medsyn'
    program.parent.mkdir()
    program.write_text(f'#!/usr/bin/env bash\nprintf "%q " "$@" >> {noted}\necho >> {noted}\n')
    program.chmod(0o755)
    env = dict(os.environ, PATH=f'{program.parent}{os.pathsep}{os.environ["PATH"]}')
    subprocess.run(['bash', '-e', str(script)], check=True, env=env, capture_output=True)
    return noted.read_text().splitlines()

def test_quickstart_leaves_everything_and_its_commands_run(tmp_path):
    "The images that the commands sample again are the same to the byte: their hashes are in the manifest."
    q = tmp_path/'q'
    assert medsyn(f'quickstart --out {q} --n-train 12 --n-test 8 {QUICK}') == 0
    files = ('pairs.png', 'probe.png', 'commands.sh', 'quickstart.json', 'synthetic/manifest.jsonl',
             'results/table.md', 'results/run.json')
    for f in files: assert (q/f).exists(), f
    lines = lines_of(q/'commands.sh', tmp_path)
    assert [line.split()[0] for line in lines] == ['check', 'pretrain', 'train', 'synth', 'compare']
    for line in lines: assert medsyn(line) == 0, line
    assert manifest(q/'synthetic') == manifest(q/'again'/'synthetic')
    first, again = (pd.read_csv(folder/'results'/'scores.csv') for folder in (q, q/'again'))
    assert list(first.arm.unique()) == ['real', 'two-passes', 'mcpmix-scheduled']
    pd.testing.assert_frame_equal(first, again)

def test_quickstart_on_a_folder(made, tmp_path):
    assert medsyn(f'quickstart --data {made}/train --out {tmp_path}/q --n-synth 4 {QUICK}') == 0
    lists = [tmp_path/'q'/'data'/f'{k}.csv' for k in ('train', 'test')]
    train, test = (set(pd.read_csv(f, dtype=str).name) for f in lists)
    assert len(test) == 4 and len(train) == 12 and not train & test

def test_a_list_of_pairs_stands_for_a_folder(made, tmp_path, capsys):
    save_list(tmp_path/'some.csv', find_pairs(made/'train')[:9])
    assert medsyn(f'check {tmp_path}/some.csv') == 0
    assert capsys.readouterr().out.startswith('9 pairs, 0 errors')

# Wrong data ----------------------------------------------------------------------------------------

@pytest.fixture
def data(tmp_path): return lesion_folder(tmp_path/'data', 10, size=32, seed=3)

def pretrain(data, out): return f'pretrain {data} --out {out} --size 32 --steps 1 --channels 16 32'

def test_truncated_image(data, tmp_path, capsys):
    f = data/'images'/'0004.png'
    f.write_bytes(f.read_bytes()[:200])
    e = fails(capsys, pretrain(data, tmp_path/'out'))
    assert '0004.png' in e and 'again' in e
    assert not (tmp_path/'out').exists()

def test_image_and_mask_of_different_size(data, tmp_path, capsys):
    mask = data/'masks'/'0002.png'
    Image.open(mask).resize((40, 40), Image.NEAREST).save(mask)
    e = fails(capsys, pretrain(data, tmp_path/'out'))
    assert '0002' in e and '32x32' in e and '40x40' in e

def as_jpeg(f, m):
    f.unlink()
    Image.fromarray(m).resize((32, 32), Image.BILINEAR).save(f.with_suffix('.jpg'), quality=30)

def with_grey(f, m):
    m[::2], m[1::4] = 77, 130
    Image.fromarray(m).save(f)

def with_alpha(f, m):
    alpha = np.random.default_rng(0).integers(0, 255, m.shape, np.uint8)
    Image.fromarray(np.dstack([m, m, m, alpha])).save(f)

@pytest.mark.parametrize('spoil, word', [(as_jpeg, 'jpeg'), (with_grey, 'values'), (with_alpha, 'alpha')])
def test_mask_that_is_not_two_valued(data, tmp_path, capsys, spoil, word):
    f = data/'masks'/'0001.png'
    spoil(f, np.array(Image.open(f)))
    e = fails(capsys, pretrain(data, tmp_path/'out'))
    assert '0001' in e and word in e.lower(), e

def test_unpaired_file_and_duplicate_stem(data, tmp_path, capsys):
    images = data/'images'
    shutil.copy(images/'0000.png', images/'extra.png')
    e = fails(capsys, pretrain(data, tmp_path/'out'))
    assert 'extra.png' in e and 'mask' in e
    (images/'extra.png').unlink()
    shutil.copy(images/'0000.png', images/'0000.bmp')
    e = fails(capsys, pretrain(data, tmp_path/'out'))
    assert '0000.bmp' in e and '0000.png' in e

def test_folder_without_pairs_and_too_few(tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert 'no image/mask pairs' in fails(capsys, pretrain(tmp_path/'empty', tmp_path/'out'))
    lesion_folder(tmp_path/'few', 5, size=32)
    assert 'only 5 pairs' in fails(capsys, pretrain(tmp_path/'few', tmp_path/'out'))
    assert not (tmp_path/'out').exists()

def test_size_that_does_not_fit_the_network(data, tmp_path, capsys):
    out = tmp_path/'o'
    assert 'stride' in fails(capsys, f'pretrain {data} --out {out} --size 30 --steps 1 --channels 16 32')
    for size in (40, 16):
        assert 'multiples of 32' in fails(capsys, f'segment {data} --out {out} --size {size} --steps 1')
    assert not out.exists()

def test_masks_without_a_lesion(made, data, tmp_path, capsys):
    for f in (data/'masks').iterdir(): Image.new('L', (32, 32)).save(f)
    e = fails(capsys, f'synth {made}/gen --data {data} --out {tmp_path}/o -n 2')
    assert 'none of the 9 masks has a lesion' in e              # nine of ten: one is held out
    assert not (tmp_path/'o').exists()

def test_a_generator_that_ignores_its_mask(made, tmp_path, capsys):
    "Two steps teach nothing: refused before anything is written."
    e = fails(capsys, f'synth {made}/gen --data {made}/train --out {tmp_path}/o -n 2')
    assert 'hardly follows its mask' in e and 'at least 0.50% is asked' in e and '--anyway' in e
    assert not (tmp_path/'o').exists()

# Folders that are not free -------------------------------------------------------------------------

def test_output_folder_of_another_run(made, capsys):
    before = (made/'syn'/'manifest.jsonl').read_bytes()
    line = f'synth --anyway {made}/gen --data {made}/train --out {made}/syn'
    e = fails(capsys, f'{line} -n 9 --steps 3 --sampler dpm++')
    assert 'steps was 2, now 3' in e
    assert 'is not empty' in fails(capsys, pretrain(made/'train', made/'test'))
    assert (made/'syn'/'manifest.jsonl').read_bytes() == before

def test_unwritable_output(made, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    e = fails(capsys, pretrain(made/'train', tmp_path/'file'/'out'))
    assert 'a file stands where a folder is needed' in e

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_full_disk_leaves_what_is_complete(made, tmp_path, monkeypatch, capsys):
    "The disk fills up during the fourth pair; with space again the run ends as an unbroken one, to the byte."
    real, count = os.fsync, [0]
    def fsync(fd):
        count[0] += 1
        if count[0] == 14: raise OSError(28, 'No space left on device')
        return real(fd)
    line = f'synth --anyway {made}/gen --data {made}/train --out {tmp_path}/o -n 9 --steps 2 --sampler dpm++'
    monkeypatch.setattr(os, 'fsync', fsync)
    assert 'the disk is full' in fails(capsys, line)
    monkeypatch.undo()
    assert not list((tmp_path/'o').rglob('.*.png*'))
    assert medsyn(line) == 0
    def tree(p): return {str(f.relative_to(p)): f.read_bytes() for f in sorted(p.rglob('*')) if f.is_file()}
    assert tree(tmp_path/'o') == tree(made/'syn')

# Wrong names ---------------------------------------------------------------------------------------

@pytest.mark.parametrize('line, words', [
    ('segment {d}/train --out {t} --encoder resnet81 --size 32', ("unknown encoder 'resnet81'", 'resnet18')),
    ('segment {d}/train --out {t} --network unett --size 32', ("did you mean 'unet'",)),
    ('segment {d}/train --out {t} --loss dice --size 32', ("unknown loss 'dice'",)),
    ('segment {d}/train --out {t} --arm two-pases --size 32', ("did you mean 'two-passes'",)),
    ('segment {d}/train --out {t} --arm fixmatch --size 32', ('needs images without masks',)),
    ('synth {d}/gen --data {d}/train --out {t} --sampler ddmi', ("did you mean 'ddim'",)),
    ('synth {d}/gen --data {d}/train --out {t} --masks rand', ("did you mean 'random'",)),
    ('synth {d}/bb --data {d}/train --out {t}', ('holds no generator', 'medsyn train')),
    ('synth {d}/gen --data {d}/train --out {t} --prompt "a cat"', ("does not know the prompt 'a cat'",)),
    ('train {d}/train --backbone {d}/nowhere --out {t}', ('is not a folder', 'medsyn pretrain')),
    ('train {d}/train --backbone {d}/bb --out {t} --method controll', ("did you mean 'control'",)),
    ('train {d}/train --backbone {d}/bb --out {t} --steps 0', ('0 training steps',)),
    ('score {d}/gen --tests {d}/test', ('{d}/gen',)),
    ('score {d}/seg --tests {d}/nowhere', ('nowhere',)),
    ('compare {d}/train --tests {d}/train --out {t} --size 32', ('are training images too',)),
    ('compare {d}/train --tests {d}/test --arms real {d}/nope --out {t} --size 32', ('nope',)),
    ('compare {d}/train --tests {d}/test --unlabelled {d}/test --out {t} --size 32', ('test (test) images',)),
    ('fit {d}/train --out {t} --unlabelled {d}/train --size 32', ('16 of 16 images without masks',)),
    ('train {d}/train --method ddpm --size 32 --prompt "a cat" --out {t}', ('leave --prompt out',)),
    ('train {d}/train --backbone {d}/bb --method anomaly --set encoder=resnet81 --out {t}', ('resnet10t',)),
    ('train {d}/train --backbone {d}/bb --method uncond --set lesion_weight=true --out {t}',
     ("has no setting 'lesion_weight'",)),
    ('train {d}/train --backbone {d}/bb --bs 0 --out {t}', ('batches of 0 images',)),
    ('pretrain {d}/train --lr -1 --out {t}', ('learning rate -1.0',)),
    ('segment {d}/train --bs 0 --size 32 --out {t}', ('batches of 0 images',)),
    ('segment {d}/train --lr -1 --size 32 --out {t}', ('learning rate -1.0',)),
    ('segment {d}/train --encoder-weights {d}/no.pth --size 32 --out {t}', ('no.pth do not exist',)),
    ('compare {d}/train --tests {d}/test --encoder-weights {d}/no.pth --size 32 --out {t}',
     ('no.pth do not exist',)),
    ('compare {d}/train --tests {d}/test --seeds 0 0 --size 32 --out {t}', ('a seed is given twice (0, 0)',)),
    ('compare {d}/train --tests {d}/test --metrics dice@0.6 --size 32 --out {t}',
     ("unknown metric 'dice@0.6'",)),
    ('compare {d}/train --tests {d}/test --metrics mae --size 32 --out {t}',
     ('not among the metrics (mae)',)),
    ('compare {d}/train --tests {d}/test --bs 0 --size 32 --out {t}', ('batches of 0 images',)),
    ('compare {d}/train --tests {d}/test --network unet unet --encoder lcnet_050 --size 32 --out {t}',
     ('the network unet was given twice',)),
    ('synth --anyway {d}/gen --data {d}/train --steps 2000 --out {t}',
     ('2000 sampler steps: choose 1 to 1000',)),
    ('synth --anyway {d}/gen --data {d}/train --bs 0 --out {t}', ('batches of 0 images',)),
    ('quickstart --method uncond --out {t}', ("'unconditional' draws images without masks",)),
    ('quickstart --bs 0 --out {t}', ('batches of 0 images',)),
    ('quickstart --seeds 1 1 --out {t}', ('a seed is given twice (1, 1)',)),
    ('quickstart --sampler ddmi --out {t}', ("did you mean 'ddim'",)),
    ('fit {d}/train --bs 0 --size 32 --out {t}', ('batches of 0 images',)),
    ('fit {d}/train --encoder-weights {d}/no.pth --size 32 --out {t}', ('no.pth do not exist',)),
    ('predict {d}/gen {d}/test --out {t}', ('{d}/gen',)),
    ('predict {d}/seg {d}/nowhere --out {t}', ('nowhere',)),
    ('quickstart --data {d}/nowhere --out {t}', ('nowhere',)),
    ('bench --what siamees', ("did you mean 'siamese'",)),
    ('check {d}/nowhere', ('nowhere',))])
def test_wrong_names_and_folders(made, tmp_path, capsys, line, words):
    out = tmp_path/'out'
    def fill(text): return text.replace('{d}', str(made)).replace('{t}', str(out))
    e = fails(capsys, fill(line))
    assert all(fill(w) in e for w in words), e
    assert not out.exists()                                 # nothing half-written

def test_checkpoint_of_another_architecture(made, tmp_path, capsys):
    shutil.copytree(made/'seg', tmp_path/'seg')
    config = tmp_path/'seg'/'config.json'
    config.write_text(json.dumps({**json.loads(config.read_text()), 'encoder': 'resnet34'}))
    assert str(tmp_path/'seg') in fails(capsys, f'score {tmp_path}/seg --tests {made}/test')
    shutil.copytree(made/'gen', tmp_path/'gen')
    shutil.copy(made/'gen'/'codec'/'model.safetensors', tmp_path/'gen'/'prompts'/'model.safetensors')
    e = fails(capsys, f'synth --anyway {tmp_path}/gen --data {made}/train --out {tmp_path}/o -n 1')
    assert 'belongs to another model' in e and not (tmp_path/'o').exists()

# Every method, every network -----------------------------------------------------------------------

SMALLEST = {'arsdm': 'channels=(16,32) hidden=8', 'anomaly': 'encoder=resnet10t',
            'ddpm': 'channels=(16,32)', 'paired': 'channels=(16,32)'}

@pytest.fixture(scope='module')
def polyps(made):
    "Sixteen pairs: real polyps where MEDSYN_DATA has them, else rendered lesions."
    root = os.environ.get('MEDSYN_DATA')
    if not root: return made/'train'
    return save_list(made/'polyps.csv', find_pairs(Path(root)/'polypgen', where=dict(centre=['C1']))[:16])

@pytest.mark.parametrize('method', [*METHODS, *ALIASES])
def test_every_method_trains(made, polyps, tmp_path, method):
    name = method_name(method)
    source = f'--backbone {made}/bb' if METHODS[name].backbone else '--size 32'
    given = f'--set {SMALLEST[name]}' if SMALLEST.get(name) else ''
    line = f'train {polyps} {source} --out {tmp_path}/g --method {method} --steps 1 --bs 4 {given}'
    assert medsyn(line) == 0
    assert type(load_generator(tmp_path/'g')) is METHODS[name].opens
    assert pd.read_csv(tmp_path/'g'/'log.csv').loss.notna().all()

def test_two_names_of_a_method_are_one_run(made, tmp_path):
    line = f'train {made}/train --backbone {made}/bb --out {tmp_path}/g --steps 1 --bs 4 --method'
    assert medsyn(f'{line} uncond') == 0
    before = (tmp_path/'g'/'log.csv').stat().st_mtime_ns
    assert medsyn(f'{line} unconditional') == 0
    assert (tmp_path/'g'/'log.csv').stat().st_mtime_ns == before
    e = json.loads((tmp_path/'g'/'train.json').read_text())
    assert e['method'] == 'unconditional'

@pytest.mark.parametrize('given,said', [
    ('--set adaptive=maybe', "setting 'adaptive' of method 'arsdm' is 'maybe': give True or False"),
    ('--set hidden=0', "setting 'hidden' of method 'arsdm' is 0: give a number, 1 or more"),
    ('--set drop_mask=1.5', "is 1.5: give a number in [0,1]"),
    ('--set channels=64', "is 64: give a tuple, such as (1, 2)"),
    ('--set channels=(10,20)', "channels (10, 20): give a multiple of 16 for each level"),
    ('--set ema=2', "decay 2 of the averaged weights: give a number in [0,1), or 'auto'"),
    ('--set lr=0.1', "'lr' belongs to the run and is no setting of a method"),
    ('--lr -1', "learning rate -1.0: give one above 0")])
def test_settings_out_of_range(made, tmp_path, capsys, given, said):
    "A value that does not fit is named before anything is written."
    line = f'train {made}/train --method arsdm --size 32 --steps 2 --bs 4 --out {tmp_path}/g'
    assert said in fails(capsys, f'{line} {given}') and not (tmp_path/'g').exists()

def test_a_switch_is_turned_off_in_any_case(made, tmp_path):
    "false, False: the switch is off, and is stored so."
    line = f'train {made}/train --method arsdm --size 32 --steps 1 --bs 4 --out {tmp_path}/g'
    assert medsyn(f'{line} --set hidden=8 channels=(16,32) adaptive=false') == 0
    assert json.loads((tmp_path/'g'/'train.json').read_text())['settings']['adaptive'] is False

def test_another_prompt_or_backbone_is_another_run(made, tmp_path, capsys):
    "The generator is not opened as if it were the one that was asked for."
    shutil.copytree(made/'bb', tmp_path/'bb')
    line = f'train {made}/train --backbone {tmp_path}/bb --out {tmp_path}/g --steps 1 --bs 4'
    assert medsyn(line) == 0 and medsyn(line) == 0
    weights = tmp_path/'bb'/'unet'/'diffusion_pytorch_model.safetensors'
    tensors = load_file(weights)
    save_file({name: 2*v for name, v in tensors.items()}, weights)
    assert 'holds another train run (weights was' in fails(capsys, line)
    stable = random_stable_diffusion(tmp_path/'sd', width=16)
    line = f'train {made}/train --backbone {stable} --size 64 --out {tmp_path}/s --steps 1 --bs 2'
    assert medsyn(f'{line} --prompt "one polyp"') == 0
    e = fails(capsys, f'{line} --prompt "another thing"')
    assert "(prompt was 'one polyp', now 'another thing')" in e

def test_guidance_where_nothing_guides(made, tmp_path, capsys):
    "A pixel model without mask and prompt; and a folder of pairs, which it would not look at."
    train = f'train {made}/train --size 32 --method ddpm --steps 1 --bs 4 --out {tmp_path}/g'
    assert medsyn(f'{train} --set channels=(16,32)') == 0
    synth = f'synth {tmp_path}/g -n 1 --steps 2 --out {tmp_path}/x'
    assert 'leave guidance out' in fails(capsys, f'{synth} --guidance 4')
    assert 'leave --label out' in fails(capsys, f'{synth} --label 1')
    assert not (tmp_path/'x').exists() and medsyn(synth) == 0

def test_a_quickstart_of_mask_and_image(made, tmp_path):
    "Its picture from noise needs the images too."
    line = f'quickstart --data {made}/train --method control-mi --size 32 --out {tmp_path}/q --bs 4'
    steps = '--pretrain-steps 2 --train-steps 2 --segment-steps 2 --sample-steps 2'
    assert medsyn(f'{line} {steps} --n-synth 4 --seeds 0 --channels 16 32') == 0
    assert (tmp_path/'q'/'pairs.png').exists()

def test_masks_without_a_lesion_train_nothing(made, tmp_path, capsys):
    "All masks empty: a generator under masks would learn from none."
    shutil.copytree(made/'train', tmp_path/'empty')
    for f in (tmp_path/'empty'/'masks').iterdir():
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(f)
    e = fails(capsys, f'train {tmp_path}/empty --method arsdm --size 32 --steps 2 --bs 4 --out {tmp_path}/g')
    assert 'training masks has a lesion at 32 px' in e and not (tmp_path/'g').exists()

def test_an_encoder_of_a_fixed_size_is_refused(made, tmp_path, capsys):
    e = fails(capsys, f'segment {made}/train --network sanet --encoder tu-swin_tiny_patch4_window7_224'
                      f' --size 64 --steps 2 --bs 4 --out {tmp_path}/s')
    assert 'sanet cannot use the encoder' in e and 'with images of 64x64 px' in e
    assert not (tmp_path/'s').exists()

def test_a_preset_and_its_own_learning_rate(made, tmp_path, capsys):
    "A preset's settings are stored as they are used; another learning rate beside them is refused."
    line = (f'segment {made}/train --network sanet --preset paper --size 352 --steps 1 --bs 2'
            f' --out {tmp_path}/s')
    e = fails(capsys, f'{line} --lr 9')
    assert 'the published settings of sanet have lr=0.4, and 9.0 was asked for' in e
    assert not (tmp_path/'s').exists()
    assert medsyn(f'{line} --encoder resnet18') == 0
    stored = json.loads((tmp_path/'s'/'segment.json').read_text())
    assert (stored['lr'], stored['augment'], stored['preset']) == (.4, 'flip', 'paper')

def test_refinement_from_the_command_line(made, tmp_path, capsys):
    "ArSDM's refinement takes a segmenter's folder: its term is logged, and without it the run is another."
    line = f'train {made}/train --size 32 --method arsdm --steps 4 --bs 4 --out {tmp_path}'
    small = '--set hidden=8 channels=(16,32)'
    assert medsyn(f'{line}/g {small} refine={made}/seg') == 0
    assert pd.read_csv(tmp_path/'g'/'log.csv').L_refine.iloc[-1] > 0
    assert 'holds another train run' in fails(capsys, f'{line}/g {small}')
    e = fails(capsys, f'{line}/h {small} refine={made}/bb')
    assert "setting 'refine' of method 'arsdm' needs a segmenter" in e and not (tmp_path/'h').exists()

def test_generators_and_networks_are_crossed(made, tmp_path):
    "Every synthetic set with every network, in one command."
    for name in ('one', 'two'): shutil.copytree(made/'syn', tmp_path/name)
    networks = 'unet segformer sanet polyp_pvt ctnet'
    line = (f'compare {made}/train --tests {made}/test --out {tmp_path}/c --size 64 --steps 1 --bs 2'
            f' --seeds 0 --arms made=stream:{tmp_path}/{{generator}} --generators one two --encoder lcnet_050'
            f' --network {networks}')
    assert medsyn(line) == 0
    scores = pd.read_csv(tmp_path/'c'/'scores.csv', keep_default_na=False)
    runs = {*zip(scores.segmenter, scores.arm, scores.generator, strict=True)}
    cells = [('made', 'one'), ('made', 'two')]
    assert runs == {(network, *cell) for network in networks.split() for cell in cells}

def test_what_a_method_lacks(made, tmp_path, capsys):
    "A mask, an image: one sentence each, and nothing is written."
    train = f'train {made}/train --backbone {made}/bb --steps 1 --bs 4'
    assert medsyn(f'{train} --method uncond --out {tmp_path}/u') == 0
    assert medsyn(f'{train} --method control-mi --out {tmp_path}/mi') == 0
    out, data = f'--out {tmp_path}/x', f'{made}/train'
    refused = {
        f'train {data}/images --backbone {made}/bb --steps 1 {out}': 'no image/mask pairs',
        f'train {data}/images --method uncond --backbone {made}/bb --steps 1 {out}': 'medsyn pretrain',
        f'compare {data} --tests {made}/test --arms diffusion-init:{made}/bb --network sanet {out}':
            "trains the backbone's U-Net, not sanet",
        f'segment {data} --network diffusion-unet --size 32 {out}': 'use the arm diffusion-init:BACKBONE',
        f'segment {data} --encoder-weights {made}/gen --size 32 {out}': 'this is a folder',
        f'synth {tmp_path}/u --data {data} --start real {out}': 'from a seed: leave --data, --start out',
        f'synth {made}/gen {out}': 'say whose with --data',
        f'synth {tmp_path}/mi --anyway --data {data} {out}': "samples under a real image's own mask",
        f'synth {tmp_path}/mi --anyway --masks real --data {data}/masks {out}': 'sees both: give pairs',
        f'compare {data} --tests {made}/test --arms feedback:{tmp_path}/u --size 32 {out}':
            'cannot judge one',
    }
    for line, words in refused.items(): assert words in fails(capsys, line), line
    assert not (tmp_path/'x').exists()

def test_a_generator_without_masks(made, tmp_path, capsys):
    "It draws images alone, which an arm can use that learns from images without masks."
    train = f'train {made}/train --backbone {made}/bb --method uncond --steps 2 --bs 4 --out {tmp_path}/u'
    assert medsyn(train) == 0
    assert f'Next: medsyn synth {tmp_path}/u --out synthetic' in capsys.readouterr().out
    assert medsyn(f'synth {tmp_path}/u --out {tmp_path}/x -n 9 --steps 2 --seed 3') == 0
    assert 'Made: 9 images without masks' in capsys.readouterr().out
    assert len(list((tmp_path/'x'/'images').iterdir())) == 9 and not (tmp_path/'x'/'masks').exists()
    segment = f'segment {made}/train --arm fixmatch --unlabelled {tmp_path}/x --out {tmp_path}/s'
    assert medsyn(f'{segment} --size 32 --steps 2 --bs 2 --encoder lcnet_050') == 0
    arms = f'compare {made}/train --tests {made}/test --size 32 --out {tmp_path}/c --arms'
    assert 'no image/mask pairs' in fails(capsys, f'{arms} stream:{tmp_path}/x')
    assert 'has no mask, so it is no partner' in fails(capsys, f'{arms} mcpmix-learned:{tmp_path}/x')

# Help ----------------------------------------------------------------------------------------------

HEAVY = ('torch', 'numpy', 'pandas', 'matplotlib', 'fastai', 'diffusers')

@pytest.mark.parametrize('argv', [['--help'], *[[name, '--help'] for name in COMMANDS]], ids=' '.join)
def test_help_needs_nothing_heavy(argv):
    "What makes help quick: it imports no heavy library. (Seconds depend on the machine.)"
    code = f"""import sys
from medsyn.cli import main
try: main({argv!r})
except SystemExit: pass
sys.exit(any(m in sys.modules for m in {HEAVY}))"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0

@pytest.mark.parametrize('name', COMMANDS)
def test_help_fits_one_screen(name):
    "Every option has a sentence, what is required comes first, and an example ends the page."
    lines = parser_of(name, common=True).format_help().splitlines()
    assert len(lines) <= 36 and max(map(len, lines)) <= 120
    assert lines[0].startswith(f'usage: medsyn {name}') and lines[-1].startswith(f'Example: medsyn {name}')
    options = COMMANDS[name].options.values()
    assert all(o.about for o in options), [o.name for o in options if not o.about]
    required = [o.required for o in options]
    assert required == sorted(required, reverse=True)

def test_help_of_a_method_and_of_everything(capsys):
    assert medsyn('train --method siamese --help') == 0
    assert 'w_c=' in capsys.readouterr().out
    assert medsyn('compare --help') == 0
    assert '--help-all' in (common := capsys.readouterr().out) and '--curve-every' not in common
    assert medsyn('compare --help-all') == 0
    assert '--curve-every' in capsys.readouterr().out

def test_the_help_of_clean_states_its_own_defaults(capsys):
    "clean reads deep images through windows of their own; the other commands refuse them."
    for command, window in (('clean', 'auto'), ('check', 'refused')):
        assert medsyn(f'{command} --help') == 0
        shown, = [line for line in capsys.readouterr().out.splitlines() if ' --window' in line]
        assert shown.endswith(f'(default: {window})')
    assert options_of('data.pairs.clean_masks')['window'].default == 'auto'
    assert COMMANDS['clean'].options['label'].type is str       # a colour too

def test_choices_reach_every_command_that_reads_pairs():
    readers = 'check clean convert quickstart pretrain train synth segment fit predict score compare'.split()
    for name in readers: assert {'window', 'page'} <= {*COMMANDS[name].options}, name
    for name in set(readers) - {'predict'}: assert 'label' in COMMANDS[name].options, name
    trainers = 'quickstart pretrain train segment fit compare'.split()
    assert all('fit' in COMMANDS[name].options for name in trainers)

def test_a_deep_set_with_classes_from_check_to_prediction(tmp_path, capsys):
    "16-bit images of another shape with two classes: refused as they are, right with three options."
    folder, rng = tmp_path/'deep', np.random.default_rng(0)
    for kind in ('images', 'masks'): (folder/kind).mkdir(parents=True)
    for i in range(10):
        Image.fromarray(rng.integers(0, 3000, (40, 56)).astype(np.uint16)).save(folder/'images'/f'{i}.png')
        mask = np.zeros((40, 56), np.uint8)
        mask[5:25, 8 + i:30] = 1 + i % 2
        Image.fromarray(mask).save(folder/'masks'/f'{i}.png')
    small = '--size 64 --steps 1 --bs 4 --encoder mobilenetv3_small_050'
    segment = f'segment {folder} {small} --out {tmp_path}'
    assert 'several classes' in fails(capsys, f'{segment}/no')
    assert not (tmp_path/'no').exists()
    assert 'more than 8 bits' in fails(capsys, f'{segment}/no --label 2')
    choices = '--window 0 3000 --label 1 2'
    assert medsyn(f'check {folder} {choices}') == 0
    assert medsyn(f'{segment}/m {choices} --fit pad') == 0
    assert json.loads((tmp_path/'m'/'config.json').read_text())['fit'] == 'pad'
    assert (tmp_path/'m'/'README.md').read_text().startswith('---')
    assert medsyn(f'predict {tmp_path}/m {folder}/images --out {tmp_path}/p --window 0 3000 --flips') == 0
    assert Image.open(tmp_path/'p'/'masks'/'3.png').size == (56, 40)
    assert medsyn(f'score {tmp_path}/m --tests {folder} {choices}') == 0
    assert '95% interval over 10 images' in (tmp_path/'m'/'README.md').read_text()

def exits(capsys, line):
    "A command that its parser refuses: status 2; returns what it says."
    with pytest.raises(SystemExit) as e: medsyn(line)
    assert e.value.code == 2
    return capsys.readouterr().err

def test_sizes_that_are_not_square(made, tmp_path, capsys):
    "--size 32x64 to the prediction at the image's own size; a size that does not fit is one sentence."
    small = '--steps 1 --bs 4 --encoder mobilenetv3_small_050'
    segment = f'segment {made}/train {small} --out {tmp_path}/m'
    assert 'multiples of 32: resize 40 to 32 or 64' in fails(capsys, f'{segment} --size 40x64')
    assert not (tmp_path/'m').exists()
    assert medsyn(f'{segment} --size 32x64') == 0
    assert json.loads((tmp_path/'m'/'config.json').read_text())['size'] == [32, 64]
    assert medsyn(f'predict {tmp_path}/m {made}/test/images --out {tmp_path}/p') == 0
    assert {Image.open(f).size for f in (tmp_path/'p'/'masks').iterdir()} == {(32, 32)}
    compare = f'compare {made}/train --tests {made}/test --out {tmp_path}/c {small} --seeds 0'
    assert medsyn(f'{compare} --size 32x64 --arms real stream:{made}/syn') == 0
    train = f'train {made}/train --backbone {made}/bb --out {tmp_path}/g'
    assert 'px do not fit this network' in fails(capsys, f'{train} --size 32x60')
    assert not (tmp_path/'g').exists()
    synth = f'synth --anyway {made}/gen --data {made}/train --out {tmp_path}/s -n 1 --steps 1 --size 32x64'
    assert medsyn(synth) == 0
    assert Image.open(tmp_path/'s'/'images'/'000000.png').size == (64, 32)
    assert "'64xx' is no size" in exits(capsys, f'{segment} --size 64xx')

def test_encoders_of_several_networks(made, tmp_path, capsys):
    line = f'compare {made}/train --tests {made}/test --out {tmp_path}/c --size 32 --network unet segformer'
    e = fails(capsys, f'{line} --encoder resnet18 resnet34 resnet50')
    assert '3 values of encoder for 2 networks (unet, segformer): give one for all' in e
    assert 'unknown encoder' in fails(capsys, f'{line} --encoder resnet18 resnet99')
    assert '2 values of encoder_weights for 1 network' in fails(
        capsys, f'{line.replace(" segformer", "")} --encoder-weights imagenet imagenet')
    assert not (tmp_path/'c').exists()
    from medsyn.experiment import _networks
    two = _networks(['unet', 'unet'], ['resnet18', 'mobilenetv3_small_050'], None, 32)
    assert [n['encoder'] for n in two.values()] == ['resnet18', 'mobilenetv3_small_050']
    assert {*two} == {'unet', 'unet-mobilenetv3_small_050'}

def test_a_backbone_has_a_card(made):
    card = (made/'bb'/'README.md').read_text()
    assert card.startswith('---') and 'A backbone for generators' in card
    assert 'over the last 1 of 2 steps' in card
    assert 'training: `14`' in card and str(made) not in card

def test_minutes_and_steps_exclude_each_other(made, tmp_path, capsys):
    line = f'quickstart --data {made}/train --out {tmp_path}/q --minutes 5'
    assert 'leave --train-steps out' in fails(capsys, f'{line} --train-steps 9')
    assert 'leave --n-synth out' in fails(capsys, f'{line} --n-synth 9')

def test_masks_alone_and_healthy_images(made, tmp_path):
    "Masks without images lend lesions to images without masks; outside the border these stay as they are."
    shutil.copytree(made/'train'/'masks', tmp_path/'alone')
    shutil.copytree(made/'test'/'images', tmp_path/'healthy')
    into = f'--into {tmp_path}/healthy --healthy --out {tmp_path}/s'
    line = f'synth --anyway {made}/gen --data {tmp_path}/alone {into}'
    assert medsyn(f'{line} -n 3 --steps 2') == 0
    for row in manifest(tmp_path/'s'):
        mask = np.asarray(Image.open(tmp_path/'s'/row['mask'])) > 0
        image, given = (np.asarray(Image.open(f)).astype(int) for f in
                        (tmp_path/'s'/row['file'], tmp_path/'healthy'/f"{row['into']}.png"))
        changed = (image != given).any(-1)
        near = np.asarray(Image.fromarray(mask*np.uint8(255)).filter(ImageFilter.MaxFilter(17))) > 0
        assert 'ignored' not in row and not (changed & ~near).any()

# What makes an example small enough to be run here.
SMALL = dict(quickstart=f'--n-train 12 --n-test 4 --n-synth 4 {QUICK}',
             pretrain='--size 32 --steps 1 --channels 16 32',
             train='--steps 2 --bs 4',
             synth='-n 4 --steps 1 --sampler dpm++ --anyway',
             segment='--size 32 --steps 1 --bs 4',
             fit='--size 32 --bs 4 --minutes 5 --least-steps 1 --most-steps 1 --most-folds 2'
                 ' --encoder mobilenetv3_small_050 --arms real two-passes',
             compare='--size 32 --steps 1 --bs 4 --seeds 0')
NOT_RUN = {'bench',     # a benchmark has no small size; nbs/api/71_bench runs each with one
           'view'}      # serves until it is stopped; tests/test_app.py looks at it

def test_every_example_runs(tmp_path, monkeypatch, capsys):
    "In the order of the overview, in one folder: what one command makes is the input of another."
    lesion_folder(tmp_path/'data', 16, size=32, seed=0)
    lesion_folder(tmp_path/'test', 4, size=32, seed=1)
    monkeypatch.chdir(tmp_path)
    for name, command in COMMANDS.items():
        if name in NOT_RUN: continue
        assert command.example.split()[:2] == ['medsyn', name]
        line = command.example.removeprefix('medsyn ')
        assert medsyn(f'{line} {SMALL.get(name, "")}') == 0, (name, capsys.readouterr().err)
