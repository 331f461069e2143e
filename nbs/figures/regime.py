"""The regime of the pages on PolypGen: which pairs are labelled, what is tested on, how a segmenter is trained.

Producers of figure notebooks import it (`python tests/produce.py NOTEBOOK`). `does_it_pay` established it: an ImageNet
encoder, strong augmentation, and a second pass over real pairs as the control of every arm that adds images."""
import os
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medsyn.core import hardware, save_json, versions, write_atomic
from medsyn.data.pairs import find_pairs, group_of
from medsyn.diffusion.backbone import Backbone
from medsyn.experiment import make_backbone, make_generator, share_runs, split_once
from medsyn.generate.catalog import METHODS, load_generator

torch.set_num_threads(1)
DATA = Path(os.environ['MEDSYN_DATA'])
POLYPGEN = DATA/'polypgen'
WEIGHTS = os.environ.get('MEDSYN_WEIGHTS')      # of an EfficientNet-Lite0, a file
WORK = Path(os.environ['MEDSYN_WORK'])          # a folder for everything large
ENCODER = 'tf_efficientnet_lite0'

def training(steps):
    """The keywords of `compare` and `train_segmenter` that every page shares.

    The averaged weights cover the same share of a run of any length: a decay of 0.995 at 750 steps."""
    return dict(size=64, steps=steps, bs=16, augment='strong', ema=1 - 3.75/steps,
                encoder=ENCODER, encoder_weights=WEIGHTS)

def centre(*names):
    "The pairs of some hospitals."
    return find_pairs(POLYPGEN, where=dict(centre=list(names)))

def shuffled_groups(pairs, seed):
    "Lists of pairs, one for each group (a video or a patient), in random order."
    groups = {}
    for p in pairs: groups.setdefault(group_of(p), []).append(p)
    names = sorted(groups)
    return [groups[names[i]] for i in np.random.default_rng(seed).permutation(len(names))]

def tests_and_rest():
    "Test sets by name (150 frames of C1 to C3, and C5), and the frames of C1 to C3 that are left."
    test, rest = [], []
    for group in reversed(shuffled_groups(centre('C1', 'C2', 'C3'), seed=0)):
        (test if len(test) < 150 else rest).extend(group)
    return {'in distribution': test, 'C5': centre('C5')}, rest

def labelled_subset(k=0, n=100):
    "`n` labelled pairs, and the image files of all other frames of C1 to C3 that are not tested on."
    order = [p for group in shuffled_groups(tests_and_rest()[1], 100 + k) for p in group]
    return order[:n], [p.image for p in order[n:]]

def opened_backbone(labelled, frames, folder):
    "The folder of a backbone that has seen all these images: MEDSYN_BACKBONE, or one that is trained here."
    given = os.environ.get('MEDSYN_BACKBONE')
    if given is None: make_backbone(labelled, folder, 64, 1000, 32, seed=0, unlabelled=frames)
    return Path(given or folder)

def each_once(names, work, folder):
    "Call `work(name)` for every name and leave a file `folder/name.done`; several processes share the names."
    def mark(name): return folder/f'{name}.done'
    def do(name):
        work(name)
        write_atomic(mark(name), '')
    share_runs(names, mark, do, folder.name)

def once(mark, work):
    "Call `work` and leave a file `mark`, unless it is there; one process does it and the others wait."
    each_once([mark.stem], lambda _: work(), mark.parent)

GENERATOR_STEPS, GENERATOR_BATCH = 1000, 16

def fresh_backbone(method):
    "A copy of the backbone that the generators of all pages start from; nothing for a method with its own networks."
    if not METHODS[method].backbone: return None
    labelled, frames = labelled_subset(0)
    return Backbone.from_pretrained(opened_backbone(labelled, frames, WORK/'generators'/'backbone'))

def trained_generator(method):
    "The generator of a method on the first labelled subset: trained once, and opened by every page that needs it."
    folder = WORK/'generators'/method
    def train():
        labelled, _ = labelled_subset(0)
        make_generator(split_once(labelled), fresh_backbone(method), folder, method, GENERATOR_STEPS, GENERATOR_BATCH,
                       size=64, seed=0, source='all images of subset 0', save_every=3)
    once(folder.with_suffix('.done'), train)
    return load_generator(folder)

def keep_record(file, notebook, started, **more):
    "Write command, commit, hardware and versions beside stored rows."
    save_json(file, dict(command=f'python tests/produce.py nbs/figures/{notebook}.ipynb',
                         commit=os.environ.get('MEDSYN_COMMIT', ''), versions=versions(),
                         hardware=f'{hardware()}, one thread, shared with other work',
                         seconds=round(time.time() - started), **more))

def logs_of(compared):
    "The log files of a comparison's runs by name: the arm (and subset), and the seed of further runs."
    found = {}
    for log in sorted((compared/'runs').glob('*.log.csv')):
        arm, seed = log.name.removesuffix('.log.csv').split('_unet_')
        found[arm if seed == '0' else f'{arm}, seed {seed}'] = log
    return found

def write_curves(logs, file):
    "Held-out Dice of runs while they trained, from their log files by name: run, step, Dice."
    rows = [pd.read_csv(log)[['step', 'held-out dice@0.5']].dropna().assign(run=name) for name, log in logs.items()]
    write_atomic(file, pd.concat(rows).round(4).to_csv(index=False))

def say(*words):
    "Print at once, for a log."
    print(time.strftime('%H:%M:%S'), *words, flush=True, file=sys.stdout)
