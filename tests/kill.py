"""Kill commands at random instants, start them again, and compare the end with that of an uninterrupted run.

`python tests/kill.py FOLDER --kills 10 train segment` works in FOLDER and prints a summary as JSON. Every
process is forked from one that has loaded the libraries. It is ended with SIGKILL, every fifth one with
SIGTERM."""
import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

SMALL = '--size 32 --bs 4 --encoder mobilenetv3_small_050'
COMMANDS = {
    'pretrain': 'pretrain {data} --out {out} --size 32 --bs 4 --channels 16 32 --steps {steps}',
    'train': 'train {data} --backbone {base}/backbone --out {out} --method siamese --bs 4 --steps {steps}',
    'paired': 'train {data} --out {out} --method paired --bs 4 --steps {steps} --size 32',
    'segment': f'segment {{data}} --out {{out}} {SMALL} --steps {{steps}} --ema 0.9',
    'compare': f'compare {{data}} --tests test={{data}}_test --out {{out}} {SMALL} --steps {{steps}}'
               ' --seeds 0 --arms real copy-paste',
}
# what may differ: when and how a run was made, states, claims
LEFT_OUT = {'run.json', 'figure.png'}

def run(command, log):
    "A command of medsyn in a process of its own, which saves every step; its process id."
    from medsyn.cli import main
    child = os.fork()
    if child: return child
    with open(log, 'a') as f:
        os.dup2(f.fileno(), 1)
        os.dup2(f.fileno(), 2)
    status = 70
    try: status = main([*command.split(), '--save-every', '0'])
    except SystemExit as e: status = e.code
    finally: os._exit(status or 0)

def ended(child, seconds):
    "The status of a process that ends within some seconds; `None` if it does not."
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid: return os.waitstatus_to_exitcode(status)
        time.sleep(.01)
    return None

def contents(out):
    "File -> bytes, of everything that must be equal."
    files = [f for f in sorted(out.rglob('*')) if f.is_file() and f.name not in LEFT_OUT and f.name[0] != '.']
    return {f.relative_to(out).as_posix(): f.read_bytes() for f in files}

def written(out):
    "The finished files of a run that was ended: each must be in the result. Those in live/ are not finished."
    names = ('*.csv', 'model.safetensors', 'config.json', 'generator.json', 'backbone.json')
    files = [f for pattern in names for f in sorted(out.rglob(pattern)) if f.parent.name != 'live']
    return {f.relative_to(out).as_posix(): f.read_bytes() for f in files if not f.name.startswith('.')}

def steps_saved(out):
    "The largest step that a state vouches for."
    return max([int(f.name[:9]) for f in out.rglob('0*-*.safetensors')], default=0)

def trial(name, base, kills, steps, seed):
    "Kill a command until it has been killed so often, or is done, then let it finish; what was found."
    rng, out, log = random.Random(f'{seed} {name}'), base/f'{name}_killed', base/f'{name}.log'
    whole = base/f'{name}_whole'
    fill = dict(data=base/'data', base=base, steps=steps)
    start = time.monotonic()
    if not whole.exists():
        assert ended(run(COMMANDS[name].format(out=whole, **fill), log), 600) == 0, log.read_text()
    seconds = time.monotonic() - start
    expected = contents(whole)
    done, lost, checked = 0, [], 0
    while done < kills:
        shutil.rmtree(out, ignore_errors=True)
        while done < kills:
            child = run(COMMANDS[name].format(out=out, **fill), log)
            if ended(child, rng.uniform(.2, .6)*seconds) is not None: break
            soft = done % 5 == 4
            sent = signal.SIGTERM if soft else signal.SIGKILL
            with contextlib.suppress(ProcessLookupError): os.kill(child, sent)
            ended(child, 600)
            done += 1
            for file, data in written(out).items():
                checked += 1
                if expected.get(file) != data: lost.append(f'{file} after kill {done}')
            saved = steps_saved(out)
            print(f'{name}: kill {done} ({sent.name}), step {saved} is saved',
                  file=sys.stderr, flush=True)
        status = ended(run(COMMANDS[name].format(out=out, **fill), log), 600)
        found = contents(out)
        checked += len(expected)
        if status: lost.append(f'status {status}: {log.read_text()[-500:]}')
        lost += [f for f in {*expected, *found} if expected.get(f) != found.get(f)]
    return dict(command=name, kills=done, files_checked=checked, losses=len(lost), lost=lost[:5])

def harness(base, names, kills, steps, seed=0):
    "Trials of several commands; a list of what was found."
    from medsyn.data.lesions import lesion_folder
    base = Path(base).resolve()
    for folder, n, s in ((base/'data', 24, 0), (base/'data_test', 8, 1)):
        if not folder.exists(): lesion_folder(folder, n, 32, s)
    if 'train' in names and not (base/'backbone').exists():
        command = COMMANDS['pretrain'].format(data=base/'data', out=base/'backbone', steps=2)
        assert ended(run(command, base/'backbone.log'), 600) == 0, (base/'backbone.log').read_text()
    return [trial(name, base, kills, steps, seed) for name in names]

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder')
    parser.add_argument('names', nargs='*', default=list(COMMANDS))
    parser.add_argument('--kills', type=int, default=2)
    parser.add_argument('--steps', type=int, default=12)
    parser.add_argument('--seed', type=int, default=0)
    given = parser.parse_args()
    import medsyn.experiment  # noqa: F401 (loaded once, before the forks)
    found = harness(given.folder, given.names or list(COMMANDS), given.kills, given.steps, given.seed)
    print(json.dumps(found))
    sys.exit(any(row['losses'] for row in found))
