"The wheel as a user gets it: its contents, its requirements, and one training step beside the newest fastai."
import os
import re
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest
from helpers import API, ROOT, exports, load

STEP = """
import importlib, pkgutil, sys, warnings; warnings.filterwarnings('ignore')
from importlib.metadata import version
from tempfile import TemporaryDirectory
import fastai, fastcore, medsyn
files = [m.__file__ for m in (fastai, fastcore, medsyn)]
assert all(f.startswith(sys.prefix) for f in files), files
assert version('fastai') == sys.argv[1], version('fastai')
for m in pkgutil.walk_packages(medsyn.__path__, 'medsyn.'): importlib.import_module(m.name)
import torch; torch.manual_seed(0)
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.segment.learner import segment_learner
from medsyn.segment.models import segmenter
from medsyn.train import fit_steps
with TemporaryDirectory() as d:
    dls = pair_dls(find_pairs(lesion_folder(d + '/data', 16, size=64)), size=64, bs=4)
    learn = segment_learner(dls, segmenter('unet', encoder='resnet18'))
    before = [p.detach().clone() for p in learn.model.parameters()]
    fit_steps(learn, 1)
    assert any((a != b).any() for a, b in zip(before, learn.model.parameters())), 'nothing was learned'
print('one step on fastai', version('fastai'), 'and fastcore', version('fastcore'))
"""

def call(*cmd, **kw):
    "Run a command away from the checkout's own package; its output, or a failed test that shows it."
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'}
    r = subprocess.run([str(c) for c in cmd], capture_output=True, text=True, env=env, **kw)
    assert r.returncode == 0, f"{' '.join(map(str, cmd))}\n{r.stdout[-2000:]}\n{r.stderr[-4000:]}"
    return r.stdout

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from a copy, so that nothing is left in the checkout."
    src = tmp_path_factory.mktemp('src')
    left_out = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', 'out')
    for name in 'settings.ini setup.py pyproject.toml README.md LICENSE'.split(): shutil.copy(ROOT/name, src)
    for name in ('medsyn', 'nbs'): shutil.copytree(ROOT/name, src/name, ignore=left_out)
    call(sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', src/'dist', src)
    return next((src/'dist').glob('*.whl'))

def test_contents(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    modules = {f"medsyn/{exports(load(p)).replace('.', '/')}.py" for p in API}
    want = modules | {'medsyn/__init__.py', 'medsyn/_modidx.py'}
    assert want <= set(names), want - set(names)
    extra = [n for n in names if n not in want and '.dist-info/' not in n and not n.endswith('/__init__.py')]
    assert not extra, extra
    assert any(n.endswith('LICENSE') for n in names)

def test_metadata(wheel):
    z = zipfile.ZipFile(wheel)
    read = lambda end: z.read(next(n for n in z.namelist() if n.endswith(end))).decode()
    meta = message_from_string(read('.dist-info/METADATA'))
    assert meta['Requires-Python'] == '>=3.11' and meta['License-Expression'] == 'Apache-2.0'
    runtime = [r for r in meta.get_all('Requires-Dist') if 'extra ==' not in r]
    spec = {re.match(r'[\w.-]+', r)[0]: sorted(re.findall(r'([<>=!~]=?)([\w.]+)', r)) for r in runtime}
    assert all('>=' in dict(o) for o in spec.values()), spec
    capped = {k: o for k, o in spec.items() if len(o) > 1}
    assert capped == {'fastai': [('<', '3'), ('>=', '2.8.7')]}, "fastai alone has an upper bound"
    assert 'medsyn=medsyn.cli:main' in read('entry_points.txt').replace(' ', '')
    assert 'dev' in meta.get_all('Provides-Extra')

@pytest.fixture(scope='module')
def newest(tmp_path_factory):
    "The newest fastai's version; skips the test where the package index cannot be reached."
    d = tmp_path_factory.mktemp('newest')
    pip = [sys.executable, '-m', 'pip', 'download', '--quiet', '--no-deps', '--retries', '1']
    r = subprocess.run([*pip, '-d', d, 'fastai>=2.8.7,<3'], capture_output=True, text=True)
    if r.returncode:
        last_line = (r.stderr.strip().splitlines() or ['pip failed'])[-1]
        pytest.skip(f"the package index is out of reach: {last_line[:200]}")
    return re.match(r'fastai-([\d.]+)', next(Path(d).iterdir()).name)[1].rstrip('.')

def test_one_step_beside_the_newest_fastai(wheel, newest, tmp_path):
    "nbdev holds the development environment at an older fastai; a user gets the newest, which is tried here."
    call(sys.executable, '-m', 'venv', tmp_path/'ve')
    python = tmp_path/'ve'/'bin'/'python'
    site = Path(call(python, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip())
    here = call(sys.executable, '-c', 'import sysconfig; print(sysconfig.get_path("purelib"))').strip()
    (site/'parent.pth').write_text(here + '\n')     # big libraries are found there, not downloaded
    frozen = call(sys.executable, '-m', 'pip', 'list', '--format', 'freeze').splitlines()
    big = [o for o in frozen if re.match('(torch|torchvision|diffusers|transformers)==', o)]
    (tmp_path/'same.txt').write_text('\n'.join(big))
    install = [python, '-m', 'pip', 'install', '--quiet', '--upgrade', '-c', tmp_path/'same.txt']
    call(*install, wheel, f'fastai=={newest}')
    out = call(python, '-c', STEP, newest, cwd=tmp_path)
    assert f'one step on fastai {newest}' in out

    # the command line too, as a user has it
    data = ['--n-train', 12, '--n-test', 4, '--size', 32, '--channels', 16, 32, '--bs', 4]
    steps = ['--pretrain-steps', 2, '--train-steps', 2, '--segment-steps', 2]
    synthesis = ['--n-synth', 2, '--sample-steps', 2]
    medsyn = python.with_name('medsyn')
    text = call(medsyn, 'quickstart', '--out', 'q', *data, *steps, *synthesis, '--seeds', 0, cwd=tmp_path)
    assert 'dice@0.5 against real' in text
    print(out)
