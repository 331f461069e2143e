"""Several processes of one command, joined by gloo: the losses and the files of one process.

One helper process loads the libraries and forks what a launcher would start, with a launcher's environment.
A call may be stopped: once a state is saved, its last process gets SIGTERM.
"""
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from fastai.callback.core import Callback
from learners import small_backbone, small_loaders
from safetensors.torch import load_file

from medsyn import cli
from medsyn import processes as divided
from medsyn.core import MedsynError, file_hash
from medsyn.data.lesions import lesion_folder
from medsyn.generate.control import control_learner
from medsyn.synth import _wanted
from medsyn.train import ORDER, fit_steps

FORK = '''
import json, os, signal, socket, sys, time
from pathlib import Path
import medsyn.experiment
from accelerate import PartialState
from medsyn.cli import main
for processes, command, *stopped in json.load(sys.stdin):
    children = []
    with socket.socket() as free:               # tests that run at the same time get other ports
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    for rank in range(processes):
        child = os.fork()
        if child:
            children.append(child)
            continue
        if processes > 1:
            os.environ.update(WORLD_SIZE=str(processes), RANK=str(rank), LOCAL_RANK=str(rank),
                              LOCAL_WORLD_SIZE=str(processes), MASTER_ADDR='127.0.0.1',
                              MASTER_PORT=str(port))
            PartialState._reset_state()         # a launcher sets the variables before anything is imported
        sys.stdout = open(os.devnull, 'w')
        status = 70
        try: status = main(command.split())
        except SystemExit as e: status = e.code
        finally: os._exit(status)
    state = Path(command.partition('--out ')[2].split(' ')[0])/'state'
    while stopped and not list(state.glob('0*-*.safetensors')): time.sleep(.01)
    if stopped: os.kill(children[-1], signal.SIGTERM)
    print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
'''

def launched(*calls):
    "The exit statuses of each (processes, command line[, 'stopped']) in turn, and what was said."
    call = [sys.executable, '-c', FORK]
    done = subprocess.run(call, input=json.dumps(calls), capture_output=True, text=True)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr

def test_a_restart_with_another_number_of_processes(tmp_path):
    "Two processes are stopped, one resumes, and the other way round: to float tolerance the losses of one."
    lesion_folder(tmp_path/'data', 24, 16, seed=0)
    def line(out):
        return (f'pretrain {tmp_path}/data --out {tmp_path}/{out} --size 16 --bs 4 --steps 12'
                ' --channels 16 32 --save-every 0')
    statuses, said = launched((1, line('whole')), (2, line('fewer'), 'stopped'), (1, line('fewer')),
                              (1, line('more'), 'stopped'), (2, line('more')))
    assert statuses == [[0], [143, 143], [0], [143], [0, 0]], said
    whole, *others = (pd.read_csv(tmp_path/out/'log.csv') for out in ('whole', 'fewer', 'more'))
    assert len(whole) == 12
    for other in others: pd.testing.assert_frame_equal(whole, other, rtol=2e-4, atol=1e-6)

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "The same commands with one process and with two."
    base = tmp_path_factory.mktemp('processes')
    lesion_folder(base/'data', 24, 32, seed=0)
    lesion_folder(base/'test', 6, 32, seed=1)
    small = '--size 32 --bs 4 --steps 4'
    calls = []
    for n in (1, 2):
        out = f'{base}/{n}'
        calls += [(n, f'pretrain {base}/data --out {out}/backbone {small} --channels 16 32'),
                  (n, f'train {base}/data --backbone {base}/1/backbone --out {out}/siamese --method siamese'
                      ' --bs 4 --steps 4 --set K_tau=1'),
                  (n, f'synth --anyway {base}/1/siamese --data {base}/data --out {out}/drawn'
                      f' -n 7 --bs 2 --steps 2'),
                  (n, f'compare {base}/data --tests test={base}/test --out {out}/results {small} --seeds 0'
                      ' --arms real copy-paste --encoder mobilenetv3_small_050'),
                  (n, f'segment {base}/data --out {out}/model --size 32 --bs 4 --steps 2'
                      ' --encoder mobilenetv3_small_050'),
                  (n, f'score {base}/1/model --tests a={base}/test b={base}/data --bs 4'
                      f' --out {out}/scores.csv'),
                  (n, f'score {base}/test --real {base}/data --segmenter {base}/1/model --bs 4'
                      f' --generator {base}/1/siamese --out {out}/report')]
    calls += [(2, f'fit {base}/data --out {base}/no'),
              (2, f'segment {base}/data --out {base}/no {small} --arm copy-paste'),
              (2, f'train {base}/data --backbone {base}/1/backbone --out {base}/odd --bs 5 --steps 4')]
    statuses, said = launched(*calls)
    assert statuses[:14] == [[0]]*7 + [[0, 0]]*7, said
    return base, statuses[14:], said

@pytest.mark.parametrize('stage', ('backbone', 'siamese'))
def test_the_losses_are_those_of_one_process(made, stage):
    "To float tolerance, each term; what is drawn is the same bit for bit (next test)."
    one, two = (pd.read_csv(made[0]/n/stage/'log.csv') for n in '12')
    assert list(one) == list(two) and len(one) == 4
    pd.testing.assert_frame_equal(one, two, rtol=2e-4, atol=1e-6)
    probes = [pd.read_csv(made[0]/n/stage/'probe.csv') for n in '12']
    pd.testing.assert_frame_equal(*probes, rtol=1e-3, atol=1e-6)

def files(folder):
    "File -> digest."
    return {f.relative_to(folder).as_posix(): file_hash(f) for f in sorted(folder.rglob('*')) if f.is_file()}

def test_synth_writes_the_files_and_the_manifest_of_one_process(made):
    one, two = (files(made[0]/n/'drawn') for n in '12')
    assert one == two and len(one) == 2*7 + 3     # the manifest, the settings and the card

def test_compare_shares_its_runs(made):
    one, two = (files(made[0]/n/'results') for n in '12')
    for found in (one, two): del found['run.json'], found['figure.png']
    tables = [name for name in one if name.startswith('runs/') and name.endswith('.csv')]
    assert one == two and len(tables) == 4      # scores and curve of each arm

def test_segment_has_the_losses_of_one_process(made):
    """Through batch normalisation, whose running statistics agree too.

    Two steps: at the deepest level a channel has four values, and AdamW enlarges what rounding changes."""
    one, two = (pd.read_csv(made[0]/n/'model'/'log.csv') for n in '12')
    assert list(one) == list(two) and len(one) == 2
    pd.testing.assert_frame_equal(one[['loss', 'lr']], two[['loss', 'lr']], rtol=5e-5, atol=1e-6)
    pd.testing.assert_frame_equal(one, two, rtol=1e-2)      # a Dice is taken of thresholded pixels
    one, two = (load_file(made[0]/n/'model'/'model.safetensors') for n in '12')
    statistics = [name for name in one if name.endswith('running_var')]
    assert statistics
    for name in statistics: torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)

def test_score_of_a_segmenter_is_that_of_one_process(made):
    one, two = (made[0]/n/'scores.csv' for n in '12')
    assert one.read_bytes() == two.read_bytes() and len(pd.read_csv(one)) == 6 + 24

def test_score_of_images_is_that_of_one_process(made):
    "Every number, every sentence, and every row of an image."
    one, two = (json.loads((made[0]/n/'report'/'report.json').read_text()) for n in '12')
    assert one['numbers'] == two['numbers'] and one['short'] == two['short'] and len(one['numbers']) > 10
    assert {row['section'] for row in one['numbers']} >= {'fidelity', 'novelty', 'obedience'}
    tables = [(made[0]/n/'report'/'images.csv').read_bytes() for n in '12']
    assert tables[0] == tables[1]

def test_what_cannot_use_a_launcher_is_refused_in_one_sentence(made):
    _, statuses, said = made
    assert statuses[0] == [2, 2]
    assert said.count('a launcher started 2 processes, and medsyn fit uses one') == 1

def test_an_arm_that_needs_the_whole_batch_is_refused(made):
    assert made[1][1] == [2, 2]
    assert 'this arm changes the batch or the loss, for which a step needs its whole batch' in made[2]

def test_a_batch_that_cannot_be_divided(made):
    assert made[1][2] == [2, 2]
    assert 'a batch of 5 cannot be divided over 2 processes: give a multiple of 2' in made[2]

class CatchCB(Callback):
    "Keeps what the network is given in the first step, and the data that the loss is computed from."
    order = ORDER['divide'] + .1
    def before_batch(self):
        if hasattr(self, 'first'): return
        learn = self.learn
        self.first = dict(zt=learn.xb[0], t=learn.xb[1], mask=learn.xb[2].mask, target=learn.yb[0],
                          x0=learn.noised.x0, z0=learn.noised.z0, eps=learn.noised.eps)

def test_the_rows_of_all_processes_are_the_batch_bit_for_bit(tmp_path, monkeypatch):
    "Images, masks, latents, timesteps, noise and targets of two processes, put together, are those of one."
    def batch(processes, rank):
        monkeypatch.setattr(divided, 'count', lambda: processes)
        monkeypatch.setattr(divided, 'number', lambda: rank)
        caught = CatchCB()
        learn = control_learner(small_loaders(tmp_path), small_backbone(), seed=0, cbs=[caught])
        divide = [divided.DivideCB()] if processes > 1 else []
        fit_steps(learn, 1, cbs=divide)
        return caught.first
    whole, *shares = batch(1, 0), batch(2, 0), batch(2, 1)
    for name, value in whole.items():
        assert len(shares[0][name]) == len(value)//2
        assert torch.equal(torch.cat([share[name] for share in shares]), value), name

def test_one_process_is_not_a_launch(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '1')
    cli.check_launcher('fit')
    monkeypatch.setenv('WORLD_SIZE', '3')
    with pytest.raises(MedsynError, match='a launcher started 3'): cli.check_launcher('fit')

def test_dropped_images_count_as_in_one_process():
    "Two processes made images 4 to 7; one process would have stopped when 5 are kept."
    rows = [dict(file='a')]*3 + [{}]
    assert _wanted([(6, False), (7, False), (4, True), (5, False)], rows, 5, tries=5) == {4, 5, 6}
    assert _wanted([(4, False), (5, False)], rows, 9, tries=0) == {4, 5}

def free_port():
    "A port that nobody listens on."
    with socket.create_server(('127.0.0.1', 0)) as server: return str(server.getsockname()[1])

def test_a_launcher_starts_them(made):
    "accelerate's launcher itself: the refusal, and the exit status."
    settings = '--multi_gpu --num_machines 1 --num_processes 2 --mixed_precision no --dynamo_backend no'
    call = [sys.executable, '-m', 'accelerate.commands.launch', *settings.split(),
            '--main_process_port', free_port(), '-m', 'medsyn', 'check', str(made[0]/'data')]
    env = dict(os.environ, PYTHONPATH=str(Path(cli.__file__).parent.parent))
    done = subprocess.run(call, capture_output=True, text=True, env=env)
    assert done.returncode and 'medsyn check uses one: start it without the launcher' in done.stderr
