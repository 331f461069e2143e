"What a training needs in memory: counted, measured, and made smaller; bad requests are one sentence."
import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from learners import small_backbone, small_loaders

from medsyn import experiment, memory, train
from medsyn.cli import main
from medsyn.core import MedsynError
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone, KLCodec, PatchPCA, random_stable_diffusion
from medsyn.diffusion.sample import sample
from medsyn.experiment import ImageStream, images_of, make_generator
from medsyn.generate.catalog import METHODS, generator_learners
from medsyn.memory import LiveBytes, spare, step_bytes
from medsyn.train import fit_steps, precision_of

warnings.filterwarnings('ignore')
SETTINGS = dict(paired=dict(channels=(16, 32), attend=()), concat=dict(drop_mask=.5), siamese=dict(K_tau=1))

@pytest.fixture(scope='module')
def folder(tmp_path_factory): return tmp_path_factory.mktemp('memory')/'pairs'

def log_of(folder, method, **options):
    "The losses of three steps."
    backbone = small_backbone() if METHODS[method].backbone else None
    learners = generator_learners(method, small_loaders(folder), backbone, probe=10**6,
                                  **SETTINGS.get(method, {}))
    for learn in learners: fit_steps(spare(learn, **options), 3)
    return learners[-1].history.frame()

@pytest.mark.parametrize('method', ('siamese', 'alignment', 'concat', 'paired', 'arsdm'))
def test_parts_and_blocks_computed_twice_change_no_loss(folder, method):
    "In parts to float tolerance, with blocks computed twice to the last bit."
    whole = log_of(folder, method)
    parts = log_of(folder, method, accumulate=4)
    for column in whole: assert parts[column].tolist() == pytest.approx(whole[column].tolist(), rel=1e-4)
    if method == 'arsdm':
        with pytest.raises(MedsynError, match='no block that can be computed twice'):
            log_of(folder, method, checkpointing=True)
    else: assert log_of(folder, method, checkpointing=True).equals(whole)

MEASURE = '''
import gc, json, sys
import torch
from medsyn.data.lesions import draw_lesions, lesion_folder
from medsyn.data.pairs import find_pairs, pair_dls
from medsyn.diffusion.backbone import Backbone
from medsyn.generate.catalog import generator_learners
from medsyn import memory
from medsyn.memory import memory_table, spare
from medsyn.train import fit_steps
pairs = find_pairs(lesion_folder(sys.argv[1], 24, 64, seed=0))
x0 = torch.from_numpy(draw_lesions(8, 64, seed=1)[0]).permute(0, 3, 1, 2)/127.5 - 1
def learner(channels):
    dls = pair_dls(pairs, 64, bs=16, valid=.2, seed=0, augment=False, device='cpu')
    learn, = generator_learners(sys.argv[2], dls, Backbone.tiny(x0, 64, channels), probe=10**6)
    return learn
def memory_of(what):
    with open('/proc/self/status') as f: return int(next(s for s in f if s.startswith(what)).split()[1])*1024
fit_steps(learner((16, 32)), 1)
gc.collect()
with open('/proc/self/clear_refs', 'w') as f: f.write('5')      # the peak starts again
before = memory_of('VmRSS')
learn = spare(learner((64, 96, 128)), **json.loads(sys.argv[3]))
fit_steps(learn, 2)             # the second step has the moments that the first one made
measured = memory_of('VmHWM') - before
memory.OPTIONS = {sys.argv[4]: memory.OPTIONS[sys.argv[4]]}     # the row that is compared
table = memory_table((learn,)).set_index('option')
print(json.dumps(dict(measured=measured/2**30, table=table.to_dict('index'))))
'''

@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='needs the peak of the memory')
@pytest.mark.parametrize('method, options, row', [
    ('control', {}, '(none)'),
    ('siamese', dict(accumulate=4, checkpointing=True), '--checkpointing --accumulate 4')])
def test_the_estimate_is_within_15_percent_of_the_measured_peak(tmp_path, method, options, row):
    "The growth of the resident memory of a process in training, against what was counted without data."
    given = [str(tmp_path/'pairs'), method, json.dumps(options), row]
    call = [sys.executable, '-W', 'ignore', '-c', MEASURE, *given]
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536', OMP_NUM_THREADS='1')     # freed memory goes back
    done = subprocess.run(call, capture_output=True, text=True, env=env)
    assert not done.returncode, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    counted = found['table'][row]['total']
    print(f"{method} {row}: counted {counted:.3f} GiB, measured {found['measured']:.3f}")
    assert counted == pytest.approx(found['measured'], rel=.15)

def test_parts_take_less(folder):
    "A step in three parts needs less than with the whole batch."
    pairs = find_pairs(lesion_folder(folder.with_name('large'), 12, 64, seed=0))
    def step(**options):
        dls = pair_dls(pairs, 64, bs=6, valid=.25, seed=0, augment=False, device='cpu')
        learn, = generator_learners('control', dls, small_backbone(), probe=10**6)
        return step_bytes(spare(learn, **options))
    assert .6*step() > step(accumulate=3)

def test_live_bytes_follow_the_tensors():
    with LiveBytes() as live:
        total = torch.zeros(100, device='meta')
        for _ in range(5): total = total + 1
    assert (live.now, live.peak) == (400, 800)

# Requests ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def made(tmp_path_factory):
    "Pairs and a backbone."
    base = tmp_path_factory.mktemp('requests')
    lesion_folder(base/'data', 16, 16, seed=0)
    small = '--size 16 --bs 4 --channels 16 32 --steps 1'
    assert main(f'pretrain {base}/data --out {base}/backbone {small}'.split()) == 0
    return base

def line(made, out, more):
    "The words of a command."
    return f'train {made}/data --backbone {made}/backbone --out {out} --bs 4 {more}'.split()

@pytest.mark.parametrize('more, words', [
    ('--accumulate 0', 'a batch of 4 cannot be computed in 0 parts: give 1 to 4'),
    ('--accumulate 5', 'a batch of 4 cannot be computed in 5 parts: give 1 to 4'),
    ('--precision bf16', 'bf16 was requested on cpu, which does not compute in it: use fp32'),
    ('--precision fp16', 'fp16 was requested on cpu'),
    ('--precision half', "unknown precision 'half'"),
    ('--eight-bit', 'leave --eight-bit out')])
def test_what_the_device_or_the_batch_lacks(made, tmp_path, capsys, monkeypatch, more, words):
    "One sentence, status 2, and no folder."
    monkeypatch.setattr(experiment, 'generator_dls', on_the_cpu(experiment.generator_dls))
    assert main(line(made, tmp_path/'o', f'--steps 2 {more}')) == 2
    said = [s for s in capsys.readouterr().err.splitlines() if s.startswith('medsyn: error: ')]
    assert len(said) == 1 and words in said[0]
    assert not (tmp_path/'o').exists()

def on_the_cpu(loaders):
    "The same loaders on the CPU, whatever this machine has."
    def made(*args, **kw):
        dls = loaders(*args, **kw)
        dls.device = torch.device('cpu')
        return dls
    return made

def test_a_dry_run_prints_and_writes_nothing(made, tmp_path, capsys):
    assert main(line(made, tmp_path/'o', '--dry-run')) == 0
    said = capsys.readouterr().out
    expected = 'weights  moments  average', '--checkpointing --accumulate 4', 'Fits: '
    assert all(words in said for words in expected)
    assert 'Made:' not in said and not (tmp_path/'o').exists()

def test_the_precision_that_a_card_has(monkeypatch):
    "bf16 where it is no emulation, fp16 on an older card, such as a T4; the CPU stays in float32."
    asked = []
    def supported(has):
        def answer(including_emulation=True):
            asked.append(including_emulation)
            return has
        return answer
    for has, chosen in ((True, 'bf16'), (False, 'fp16')):
        monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported(has))
        assert precision_of('cuda') == chosen and precision_of('cuda', 'fp16') == 'fp16'
        assert train.precision_cbs('cuda')[0].amp_mode.value == chosen
    assert not any(asked)
    assert precision_of('cpu') == 'fp32' and not train.precision_cbs('cpu')
    with pytest.raises(MedsynError, match='use fp32 or fp16'): precision_of('cuda', 'bf16')

def test_eight_bits_are_bitsandbytes(monkeypatch):
    "The optimiser gets the groups and the rates of the plain one."
    adamw = type('AdamW8bit', (torch.optim.AdamW,), {})
    module = SimpleNamespace(optim=SimpleNamespace(AdamW8bit=adamw))
    monkeypatch.setitem(sys.modules, 'bitsandbytes', module)
    weight = torch.nn.Parameter(torch.ones(2))
    opt = memory.eight_bit_adamw([[weight]], 1e-2)
    assert type(opt.opt) is adamw and opt.opt.param_groups[0]['lr'] == 1e-2

def test_sampling_in_bf16_is_near(monkeypatch):
    "As on a card with bf16; here its arithmetic is the CPU's."
    from medsyn.diffusion import sample as module
    from medsyn.generate.control import ControlGenerator
    generator, masks = ControlGenerator(small_backbone()), torch.ones(2, 1, 16, 16)
    plain = sample(generator, masks, steps=3)
    seen = []
    generator.backbone.unet.conv_out.register_forward_hook(lambda m, x, out: seen.append(out.dtype))
    monkeypatch.setattr(module, 'autocast_of', lambda *_: torch.autocast('cpu', torch.bfloat16))
    low = sample(generator, masks, steps=3)
    assert set(seen) == {torch.bfloat16}
    assert abs(plain.astype(int) - low).mean() < 4 and (plain != low).any()

# Data -------------------------------------------------------------------------------------------------------

def test_a_codec_is_fitted_on_a_stream(tmp_path, monkeypatch):
    "To the last bit as on all images at once, and no more than one batch is read at a time."
    pairs = find_pairs(lesion_folder(tmp_path/'d', 11, 16, seed=0))
    stream = ImageStream(pairs, 16, bs=4)
    assert [len(batch) for batch in stream] == [4, 4, 3] and len(stream) == 11
    whole, streamed = PatchPCA().fit(images_of(pairs, 16)), PatchPCA().fit(stream)
    for name, value in whole.state_dict().items(): assert torch.equal(value, streamed.state_dict()[name])

def test_many_patches_are_thinned_alike():
    "Every third of 3.1 million patches, in one piece or in three."
    x0 = torch.rand(12, 1, 512, 512)
    class Pieces(list):
        def __len__(self): return len(x0)
    whole = PatchPCA(1, 1, 1).some_patches(x0)
    pieces = PatchPCA(1, 1, 1).some_patches(Pieces([x0[:5], x0[5:6], x0[6:]]))
    assert len(whole) == 12*512**2//3 and torch.equal(whole, pieces)

def test_latents_are_encoded_once_and_removed(tmp_path, monkeypatch):
    "On Stable Diffusion's layout: the same losses as without a cache, and no image is encoded twice."
    model = random_stable_diffusion(tmp_path/'sd', width=8)
    pairs = find_pairs(lesion_folder(tmp_path/'d', 10, 64, seed=0))
    encoded, moments = [], KLCodec.moments
    def counted(self, x0):
        encoded.append(len(x0))
        return moments(self, x0)
    monkeypatch.setattr(KLCodec, 'moments', counted)
    logs, counts = [], []
    for cache in (True, False):
        encoded.clear()
        out = tmp_path/f'{cache}'
        backbone = Backbone.from_pretrained(model, 64)
        make_generator(pairs, backbone, out, steps=6, bs=3, probe=100, cache=cache)
        counts.append(sum(encoded))
        logs.append(pd.read_csv(out/'log.csv'))
        assert not (out/'cache').exists()
    pd.testing.assert_frame_equal(*logs, rtol=1e-5)
    assert counts[1] - counts[0] == 6*3 - 9         # six batches of three; nine training images, once
