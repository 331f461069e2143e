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
from PIL import Image

from medsyn.cli import COMMANDS, main, parser_of
from medsyn.data.lesions import lesion_folder

warnings.filterwarnings('ignore')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "A folder with pairs, a backbone, a generator, synthetic pairs and a segmenter, made by the commands themselves."
    d = tmp_path_factory.mktemp('cli')
    lesion_folder(d/'train', 16, size=32, seed=0); lesion_folder(d/'test', 8, size=32, seed=1)
    c = lambda *a: main([str(x) for x in a])
    assert c('pretrain', d/'train', '--out', d/'bb', '--size', 32, '--steps', 2, '--channels', 16, 32) == 0
    assert c('train', d/'train', '--backbone', d/'bb', '--out', d/'gen', '--steps', 2) == 0
    assert c('synth', d/'gen', '--data', d/'train', '--out', d/'syn', '-n', 9, '--steps', 2, '--sampler', 'dpm++') == 0
    assert c('segment', d/'train', '--out', d/'seg', '--synthetic', d/'syn', '--size', 32, '--steps', 2) == 0
    return d

def fails(capsys, *argv):
    "Runs a command that must be refused: status 2, one line, no traceback; returns the line."
    capsys.readouterr()
    status = main([str(a) for a in argv])
    out, err = capsys.readouterr()
    lines = [l for l in err.splitlines() if l.startswith('medsyn: error: ')]
    assert status == 2 and len(lines) == 1 and 'Traceback' not in err, (status, err)
    return lines[0]

def test_every_command_leaves_what_it_says(made, capsys):
    assert (made/'bb'/'backbone.json').exists() and (made/'gen'/'generator.json').exists() and (made/'seg'/'model.safetensors').exists()
    rows = [json.loads(l) for l in (made/'syn'/'manifest.jsonl').read_text().splitlines()]
    assert len(rows) == 9 and all((made/'syn'/r['file']).exists() and (made/'syn'/r['mask']).exists() for r in rows)
    assert {'file', 'mask', 'source', 'transform', 'seed', 'sampler', 'steps', 'guidance', 'prompt', 'generator', 'versions'} <= set(rows[0])
    assert {'step', 'right', 'shuffled', 'margin'} <= set(pd.read_csv(made/'gen'/'probe.csv'))

def test_siamese_from_the_command_line(made, tmp_path):
    "Trained, drawn from and compared like any other generator; nothing of the image branch is in its folder."
    run = lambda *argv: main([str(a) for a in argv])
    assert run('train', made/'train', '--backbone', made/'bb', '--out', tmp_path/'gen', '--method', 'siamese', '--steps', 3, '--bs', 4) == 0
    assert json.loads((tmp_path/'gen'/'generator.json').read_text())['class'] == 'SiameseGenerator'
    assert {'L_i', 'L_c', "L_m'", 'w_i', 'augmented'} <= set(pd.read_csv(tmp_path/'gen'/'log.csv'))
    assert run('synth', tmp_path/'gen', '--data', made/'train', '--out', tmp_path/'syn', '-n', 3, '--steps', 2, '--sampler', 'dpm++') == 0
    assert run('compare', made/'train', '--tests', made/'test', '--arms', 'real', tmp_path/'syn', '--out', tmp_path/'r', '--size', 32, '--steps', 2, '--seeds', 0) == 0
    assert set(pd.read_csv(tmp_path/'r'/'scores.csv').arm) == {'real', 'syn'}

def test_score_prints_both_conventions_and_both_averages(made, capsys):
    capsys.readouterr()
    assert main(['score', str(made/'seg'), '--tests', f'a={made}/test', f'b={made}/train', '--out', str(made/'s.csv')]) == 0
    out = capsys.readouterr().out
    assert all(w in out for w in ('dice@0.5', 'dice@256', 'Overall', 'AVE'))
    assert len(pd.read_csv(made/'s.csv')) == 24

def test_compare_takes_folders_as_arms(made, capsys):
    assert main(['compare', str(made/'train'), '--tests', str(made/'test'), '--arms', 'real', 'real-twice', f'mine={made}/syn', '--out', str(made/'cmp'),
                 '--size', '32', '--steps', '2', '--seeds', '0']) == 0
    assert set(pd.read_csv(made/'cmp'/'scores.csv').arm) == {'real', 'real-twice', 'mine'}
    assert set(json.loads((made/'cmp'/'run.json').read_text())) >= {'command', 'hardware', 'versions', 'seconds'}
    assert (made/'cmp'/'figure.png').stat().st_size > 1000

def test_quickstart_leaves_everything_and_its_commands_run(tmp_path):
    small = ['--n-train', '12', '--n-test', '8', '--size', '32', '--pretrain-steps', '2', '--train-steps', '2', '--segment-steps', '2', '--n-synth', '8',
             '--sample-steps', '2', '--channels', '16', '32', '--seeds', '0']
    q = tmp_path/'q'
    assert main(['quickstart', '--out', str(q), *small]) == 0
    for f in ('pairs.png', 'probe.png', 'commands.sh', 'quickstart.json', 'synthetic/manifest.jsonl', 'results/table.md', 'results/run.json'): assert (q/f).exists(), f
    env = dict(os.environ, PATH=f'{Path(sys.executable).parent}{os.pathsep}{os.environ["PATH"]}')
    subprocess.run(['bash', '-e', str(q/'commands.sh')], check=True, env=env, capture_output=True)
    lines = lambda p: [{k: v for k, v in json.loads(l).items()} for l in p.read_text().splitlines()]
    assert lines(q/'synthetic'/'manifest.jsonl') == lines(q/'again'/'synthetic'/'manifest.jsonl')       # the same images, to the byte: their hashes are in it

def test_quickstart_on_a_folder(made, tmp_path):
    assert main(['quickstart', '--data', str(made/'train'), '--out', str(tmp_path/'q'), '--size', '32', '--pretrain-steps', '2', '--train-steps', '2', '--segment-steps', '2',
                 '--sample-steps', '2', '--channels', '16', '32', '--seeds', '0', '--n-synth', '4']) == 0
    train, test = (set(pd.read_csv(tmp_path/'q'/'data'/f'{k}.csv', dtype=str).name) for k in ('train', 'test'))
    assert len(test) == 4 and len(train) == 12 and not train & test

def test_a_list_of_pairs_stands_for_a_folder(made, tmp_path, capsys):
    from medsyn.data.pairs import find_pairs, save_list
    save_list(tmp_path/'some.csv', find_pairs(made/'train')[:9])
    assert main(['check', str(tmp_path/'some.csv')]) == 0
    assert capsys.readouterr().out.startswith('9 pairs, 0 errors')

@pytest.fixture
def data(tmp_path): return lesion_folder(tmp_path/'data', 10, size=32, seed=3)

def _train(d, out): return ('pretrain', d, '--out', out, '--size', 32, '--steps', 1, '--channels', 16, 32)

def test_truncated_image(data, tmp_path, capsys):
    f = data/'images'/'0004.png'; f.write_bytes(f.read_bytes()[:200])
    e = fails(capsys, *_train(data, tmp_path/'out')); assert '0004.png' in e and 'again' in e
    assert not (tmp_path/'out').exists()

def test_image_and_mask_of_different_size(data, tmp_path, capsys):
    Image.open(data/'masks'/'0002.png').resize((40, 40), Image.NEAREST).save(data/'masks'/'0002.png')
    e = fails(capsys, *_train(data, tmp_path/'out')); assert '0002' in e and '32x32' in e and '40x40' in e

@pytest.mark.parametrize('how, word', [('jpeg', 'jpeg'), ('grey', 'values'), ('alpha', 'alpha')])
def test_mask_that_is_not_two_valued(data, tmp_path, capsys, how, word):
    f = data/'masks'/'0001.png'; m = np.array(Image.open(f))
    if how == 'jpeg': f.unlink(); Image.fromarray(m).resize((32, 32), Image.BILINEAR).save(f.with_suffix('.jpg'), quality=30)
    elif how == 'grey': m[::2] = 77; m[1::4] = 130; Image.fromarray(m).save(f)
    else: Image.fromarray(np.dstack([m, m, m, np.random.default_rng(0).integers(0, 255, m.shape, np.uint8)])).save(f)
    e = fails(capsys, *_train(data, tmp_path/'out')); assert '0001' in e and word in e.lower(), e

def test_unpaired_file_and_duplicate_stem(data, tmp_path, capsys):
    shutil.copy(data/'images'/'0000.png', data/'images'/'extra.png')
    e = fails(capsys, *_train(data, tmp_path/'out')); assert 'extra.png' in e and 'mask' in e
    (data/'images'/'extra.png').unlink(); shutil.copy(data/'images'/'0000.png', data/'images'/'0000.bmp')
    e = fails(capsys, *_train(data, tmp_path/'out')); assert '0000.bmp' in e and '0000.png' in e

def test_folder_without_pairs_and_too_few(tmp_path, capsys):
    (tmp_path/'empty').mkdir()
    assert 'no image/mask pairs' in fails(capsys, *_train(tmp_path/'empty', tmp_path/'out'))
    lesion_folder(tmp_path/'few', 5, size=32)
    assert 'only 5 pairs' in fails(capsys, *_train(tmp_path/'few', tmp_path/'out'))
    assert not (tmp_path/'out').exists()

def test_size_that_does_not_fit_the_network(made, data, tmp_path, capsys):
    assert 'stride' in fails(capsys, 'pretrain', data, '--out', tmp_path/'o', '--size', 30, '--steps', 1, '--channels', 16, 32)
    assert 'multiples of 32' in fails(capsys, 'segment', data, '--out', tmp_path/'o', '--size', 40, '--steps', 1)
    assert 'multiples of 32' in fails(capsys, 'segment', data, '--out', tmp_path/'o', '--size', 16, '--steps', 1)
    assert not (tmp_path/'o').exists()

def test_masks_without_a_lesion(made, data, tmp_path, capsys):
    for f in (data/'masks').iterdir(): Image.new('L', (32, 32)).save(f)
    assert 'none of the 9 masks has a lesion' in fails(capsys, 'synth', made/'gen', '--data', data, '--out', tmp_path/'o', '-n', 2)
    assert not (tmp_path/'o').exists()

def test_output_folder_of_another_run(made, capsys):
    before = (made/'syn'/'manifest.jsonl').read_bytes()
    e = fails(capsys, 'synth', made/'gen', '--data', made/'train', '--out', made/'syn', '-n', 9, '--steps', 3, '--sampler', 'dpm++'); assert 'steps was 2, now 3' in e
    assert 'is not empty' in fails(capsys, *_train(made/'train', made/'test'))
    assert (made/'syn'/'manifest.jsonl').read_bytes() == before

def test_unwritable_output(made, tmp_path, capsys):
    (tmp_path/'file').write_text('')
    assert 'a file stands where a folder is needed' in fails(capsys, *_train(made/'train', tmp_path/'file'/'out'))

@pytest.mark.skipif(not Path('/dev/full').exists(), reason='needs /dev/full')
def test_full_disk_leaves_what_is_complete(made, tmp_path, monkeypatch, capsys):
    "The disk fills up during the fourth pair; with space again the run ends with the same bytes as an unbroken one."
    import medsyn.core
    real, count = os.fsync, [0]
    def fsync(fd):
        count[0] += 1
        if count[0] == 14: raise OSError(28, 'No space left on device')
        return real(fd)
    argv = ['synth', made/'gen', '--data', made/'train', '--out', tmp_path/'o', '-n', 9, '--steps', 2, '--sampler', 'dpm++']
    monkeypatch.setattr(medsyn.core.os, 'fsync', fsync)
    assert 'the disk is full' in fails(capsys, *argv)
    monkeypatch.undo()
    assert not list((tmp_path/'o').rglob('.*.png*'))
    assert main([str(a) for a in argv]) == 0
    tree = lambda p: {str(f.relative_to(p)): f.read_bytes() for f in sorted(p.rglob('*')) if f.is_file()}
    assert tree(tmp_path/'o') == tree(made/'syn')

@pytest.mark.parametrize('argv, words', [
    (('segment', '{d}/train', '--out', '{t}', '--encoder', 'resnet81', '--size', 32), ("unknown encoder 'resnet81'", 'resnet18')),
    (('segment', '{d}/train', '--out', '{t}', '--network', 'unett', '--size', 32), ("did you mean 'unet'",)),
    (('segment', '{d}/train', '--out', '{t}', '--loss', 'dice', '--size', 32), ("unknown loss 'dice'",)),
    (('synth', '{d}/gen', '--data', '{d}/train', '--out', '{t}', '--sampler', 'ddmi'), ("did you mean 'ddim'",)),
    (('synth', '{d}/gen', '--data', '{d}/train', '--out', '{t}', '--masks', 'rand'), ("did you mean 'random'",)),
    (('synth', '{d}/bb', '--data', '{d}/train', '--out', '{t}'), ('holds no generator', 'medsyn train')),
    (('synth', '{d}/gen', '--data', '{d}/train', '--out', '{t}', '--prompt', 'a cat'), ("does not know the prompt 'a cat'",)),
    (('train', '{d}/train', '--backbone', '{d}/nowhere', '--out', '{t}'), ('is not a folder', 'medsyn pretrain')),
    (('train', '{d}/train', '--backbone', '{d}/bb', '--out', '{t}', '--method', 'controll'), ("did you mean 'control'",)),
    (('train', '{d}/train', '--backbone', '{d}/bb', '--out', '{t}', '--steps', 0), ('0 training steps',)),
    (('score', '{d}/gen', '--tests', '{d}/test'), ('{d}/gen',)),
    (('score', '{d}/seg', '--tests', '{d}/nowhere'), ('nowhere',)),
    (('compare', '{d}/train', '--tests', '{d}/train', '--out', '{t}', '--size', 32), ('are training images too',)),
    (('compare', '{d}/train', '--tests', '{d}/test', '--arms', 'real', '{d}/nope', '--out', '{t}', '--size', 32), ('nope',)),
    (('quickstart', '--data', '{d}/nowhere', '--out', '{t}'), ('nowhere',)),
    (('bench', '--what', 'siamees'), ("did you mean 'siamese'",)),
    (('check', '{d}/nowhere'), ('nowhere',))])
def test_wrong_names_and_folders(made, tmp_path, capsys, argv, words):
    out = tmp_path/'out'
    fill = lambda s: str(s).replace('{d}', str(made)).replace('{t}', str(out))
    e = fails(capsys, *map(fill, argv))
    assert all(fill(w) in e for w in words), e
    assert not out.exists()                                 # nothing half-written

def test_checkpoint_of_another_architecture(made, tmp_path, capsys):
    shutil.copytree(made/'seg', tmp_path/'seg')
    c = json.loads((tmp_path/'seg'/'config.json').read_text()); c['encoder'] = 'resnet34'; (tmp_path/'seg'/'config.json').write_text(json.dumps(c))
    assert str(tmp_path/'seg') in fails(capsys, 'score', tmp_path/'seg', '--tests', made/'test')
    shutil.copytree(made/'gen', tmp_path/'gen')
    shutil.copy(made/'gen'/'codec'/'model.safetensors', tmp_path/'gen'/'prompts'/'model.safetensors')
    assert 'belongs to another model' in fails(capsys, 'synth', tmp_path/'gen', '--data', made/'train', '--out', tmp_path/'o', '-n', 1)
    assert not (tmp_path/'o').exists()

HEAVY = ('torch', 'numpy', 'pandas', 'matplotlib', 'fastai', 'diffusers')

@pytest.mark.parametrize('argv', [['--help'], *[[name, '--help'] for name in COMMANDS]], ids=' '.join)
def test_help_needs_nothing_heavy(argv):
    "What makes help quick: it imports no heavy library. (Seconds depend on the machine.)"
    code = f"""import sys
from medsyn.cli import COMMANDS, main, parser_of
try: main({argv!r})
except SystemExit: pass
sys.exit(any(m in sys.modules for m in {HEAVY}))"""
    assert subprocess.run([sys.executable, '-c', code], capture_output=True).returncode == 0

@pytest.mark.parametrize('name', COMMANDS)
def test_help_fits_one_screen(name):
    "Every option has a sentence, what is required comes first, and an example ends the page."
    lines = parser_of(name).format_help().splitlines()
    assert len(lines) <= 40 and max(map(len, lines)) <= 120
    assert lines[0].startswith(f'usage: medsyn {name}') and lines[-1].startswith(f'Example: medsyn {name}')
    options = COMMANDS[name].options.values()
    assert all(o.about for o in options), [o.name for o in options if not o.about]
    required = [o.required for o in options]
    assert required == sorted(required, reverse=True)

# What makes an example small enough to be run here.
SMALL = dict(quickstart='--n-train 12 --n-test 4 --size 32 --pretrain-steps 1 --train-steps 1 --segment-steps 1 --n-synth 4'
                        ' --sample-steps 1 --channels 16 32 --seeds 0',
             pretrain='--size 32 --steps 1 --channels 16 32', train='--steps 2 --bs 4', synth='-n 4 --steps 1 --sampler dpm++',
             segment='--size 32 --steps 1 --bs 4',
             fit='--size 32 --bs 4 --minutes 5 --least-steps 1 --most-steps 1 --most-folds 2 --arms real two-passes'
                 ' --encoder mobilenetv3_small_050', compare='--size 32 --steps 1 --bs 4 --seeds 0')
NOT_RUN = {'bench'}     # a benchmark has no small size; nbs/api/71_bench runs each with one

def test_every_example_runs(tmp_path, monkeypatch, capsys):
    "In the order of the overview, in one folder: what one command makes is the input of another."
    lesion_folder(tmp_path/'data', 16, size=32, seed=0)
    lesion_folder(tmp_path/'test', 4, size=32, seed=1)
    monkeypatch.chdir(tmp_path)
    for name, command in COMMANDS.items():
        if name in NOT_RUN: continue
        argv = shlex.split(f"{command.example} {SMALL.get(name, '')}")
        assert argv[:2] == ['medsyn', name]
        assert main(argv[1:]) == 0, (name, capsys.readouterr().err)

def test_settings_reach_the_method(made, tmp_path, capsys):
    train = 'train', made/'train', '--backbone', made/'bb', '--method', 'siamese', '--steps', 2, '--bs', 4
    assert main([str(a) for a in (*train, '--out', tmp_path/'gen', '--set', 'w_c=0.5')]) == 0
    assert json.loads((tmp_path/'gen'/'train.json').read_text())['settings'] == {'w_c': .5}
    assert 'not of the form name=value' in fails(capsys, *train, '--out', tmp_path/'x', '--set', 'w_c')
    assert not (tmp_path/'x').exists()
