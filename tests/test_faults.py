"What stops a training from outside: one sentence, exit status 2, nothing lost; the same command resumes."
import contextlib
import ctypes
import os
import resource
import shutil
import subprocess
import sys
import warnings

import pytest

from medsyn.cli import main
from medsyn.core import file_hash
from medsyn.data.lesions import lesion_folder
from medsyn.resume import states_in

warnings.filterwarnings('ignore')

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Pairs, and the uninterrupted training on them."
    base = tmp_path_factory.mktemp('faults')
    lesion_folder(base/'data', 16, 16, seed=0)
    assert main(command(base, base/'whole').split()) == 0
    return base

def command(base, out, more='--save-every 0'):
    "The line that trains a small backbone."
    return f'pretrain {base}/data --out {out} --size 16 --bs 4 --channels 16 32 --steps 5 {more}'

def refused(capsys, line):
    "The sentence with which a command ends with status 2."
    capsys.readouterr()
    assert main(line.split()) == 2
    said = [s for s in capsys.readouterr().err.splitlines() if s.startswith('medsyn: error: ')]
    assert len(said) == 1
    return said[0]

def weights(out): return file_hash(out/'unet'/'diffusion_pytorch_model.safetensors')

@contextlib.contextmanager
def largest_file(size):
    "Inside, the kernel refuses files above so many bytes."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

OVERRIDE = 1 << 1       # the capability by which root ignores permissions (CAP_DAC_OVERRIDE)

@contextlib.contextmanager
def permissions_hold():
    "Inside, permissions hold for root too: the capability is put aside."
    if os.geteuid():
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32*2)(0x20080522, 0)
    sets = (ctypes.c_uint32*6)()        # effective, permitted and inheritable, twice
    assert libc.capget(header, sets) == 0
    sets[0] &= ~OVERRIDE
    assert libc.capset(header, sets) == 0
    try: yield
    finally:
        sets[0] |= sets[1] & OVERRIDE
        assert libc.capset(header, sets) == 0

@contextlib.contextmanager
def read_only(*folders):
    "Inside, nothing can be written into the folders."
    for folder in folders: folder.chmod(0o555)
    try:
        with permissions_hold(): yield
    finally:
        for folder in folders: folder.chmod(0o755)

def test_a_file_that_the_system_does_not_allow(made, tmp_path, capsys):
    "The first state is refused; with the limit gone the command ends as the uninterrupted one, to the byte."
    with largest_file(100_000): said = refused(capsys, command(made, tmp_path/'o'))
    assert 'cannot write' in said and 'a limit of the system allows no larger file' in said
    assert main(command(made, tmp_path/'o').split()) == 0
    assert weights(tmp_path/'o') == weights(made/'whole')

def test_a_model_that_cannot_be_written(made, tmp_path, capsys):
    "The training is done, and its weights are refused, by safetensors."
    line = command(made, tmp_path/'o', '')
    with largest_file(100_000): assert 'allows no larger file' in refused(capsys, line)
    assert not (tmp_path/'o'/'backbone.json').exists()      # the mark of a whole folder
    assert main(line.split()) == 0
    assert weights(tmp_path/'o') == weights(made/'whole')

def test_a_folder_that_became_read_only(made, tmp_path, capsys, monkeypatch):
    "A full disk stops the training at its third state; then its folders are read-only: the states stay."
    out, written, fsync = tmp_path/'o', [], os.fsync
    def full(descriptor):
        written.append(descriptor)
        if len(written) == 8: raise OSError(28, 'No space left on device')
        fsync(descriptor)
    monkeypatch.setattr(os, 'fsync', full)
    assert 'the disk is full: free some space' in refused(capsys, command(made, out))
    monkeypatch.undo()
    kept = [f.name for f in states_in(out/'state')]
    assert kept
    with read_only(out, out/'state', out/'live'):
        assert 'no permission to write there' in refused(capsys, command(made, out))
    assert [f.name for f in states_in(out/'state')] == kept
    assert main(command(made, out).split()) == 0
    assert weights(out) == weights(made/'whole')

def test_a_read_only_place(made, tmp_path, capsys):
    (tmp_path/'shut').mkdir()
    with read_only(tmp_path/'shut'):
        assert 'no permission to write there' in refused(capsys, command(made, tmp_path/'shut'/'o'))

@pytest.mark.parametrize('change, words', [
    ('--bs 5', 'bs was 4, now 5'), ('--steps 7', 'steps was 5, now 7'), ('--seed 1', 'seed was 0, now 1')])
def test_a_state_of_another_configuration(made, tmp_path, capsys, change, words):
    "A run that was begun with other settings, or on other pairs, is refused, and stays as it is."
    out = tmp_path/'o'
    with largest_file(100_000): refused(capsys, command(made, out))
    before = {f: file_hash(f) for f in out.rglob('*') if f.is_file()}
    said = refused(capsys, f'{command(made, out)} {change}')
    assert f'{out} holds another pretrain run ({words})' in said
    assert {f: file_hash(f) for f in out.rglob('*') if f.is_file()} == before

def test_a_state_of_another_number_of_pairs(made, tmp_path, capsys):
    shutil.copytree(made/'data', tmp_path/'data')
    with largest_file(100_000): refused(capsys, command(tmp_path, tmp_path/'o'))
    for kind in ('images', 'masks'): sorted((tmp_path/'data'/kind).iterdir())[0].unlink()
    assert 'holds another pretrain run (pairs was' in refused(capsys, command(tmp_path, tmp_path/'o'))

def test_the_exit_status_of_the_program(made, tmp_path):
    "As a stranger starts it: python -m medsyn."
    (tmp_path/'file').touch()
    call = [sys.executable, '-m', 'medsyn', *command(made, tmp_path/'file'/'o').split()]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert done.stderr.count('medsyn: error: ') == 1
