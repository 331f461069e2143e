"""Kill commands at random instants, start them again, and compare the end with that of an uninterrupted run.

`python tests/kill.py FOLDER train segment --kills 10` works in FOLDER and prints a row for each command as
JSON and a summary. Every process is forked from one that has loaded the libraries, so that a start costs no
import. It is ended with SIGKILL, every fifth one with SIGTERM. With `--results FOLDER2` each kill is a row of
kills.csv there, beside run.json; this is how the recorded long run was made."""
import argparse
import contextlib
import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

SMALL = '--size 32 --bs 4 --network segformer --encoder mobilenetv3_small_050'     # a state of 11 MB
COMMANDS = {
    'pretrain': 'pretrain {data} --out {out} --size 32 --bs 4 --channels 16 32 --steps {steps}',
    'train': 'train {data} --backbone {base}/backbone --out {out} --method siamese --bs 4 --steps {steps}'
             ' --probe 2',
    'paired': 'train {data} --out {out} --method paired --bs 4 --steps {steps} --size 32',
    'segment': f'segment {{data}} --out {{out}} {SMALL} --steps {{steps}} --ema 0.9',
    'compare': f'compare {{data}} --tests test={{data}}_test --out {{out}} {SMALL} --steps {{steps}}'
               ' --seeds 0 --arms real copy-paste',
    'fit': f'fit {{data}} --out {{out}} {SMALL} --minutes 600 --least-steps {{steps}} --most-steps {{steps}}'
           ' --most-folds 2 --arms real two-passes',
}
# what may differ: when and how a run was made, how fast the machine was, states, claims
LEFT_OUT = {'run.json', 'figure.png', 'speed.json', 'plan.json'}

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

def comparable(file):
    "The bytes of a file; the plan that a report of `fit` quotes tells seconds, and is left out."
    data = file.read_bytes()
    if file.name != 'report.md' or b'## Plan' not in data: return data
    before, _, rest = data.partition(b'## Plan')
    return before + rest.partition(b'## Cross-validation')[2]

def contents(out):
    "File -> bytes, of everything that must be equal."
    files = [f for f in sorted(out.rglob('*')) if f.is_file() and f.name not in LEFT_OUT and f.name[0] != '.']
    return {f.relative_to(out).as_posix(): comparable(f) for f in files}

def written(out):
    "The finished files of a run that was ended: each must be in the result. Those in live/ are not finished."
    names = ('*.csv', 'model.safetensors', 'config.json', 'generator.json', 'backbone.json', 'report.md')
    files = [f for pattern in names for f in sorted(out.rglob(pattern)) if f.parent.name != 'live']
    return {f.relative_to(out).as_posix(): comparable(f) for f in files if not f.name.startswith('.')}

def states(out):
    "The saved states below a folder."
    return sorted(out.rglob('0*-*.safetensors'))

def lost_files(out, expected):
    "How many files an ended process has left, and what is wrong with them."
    from medsyn.core import file_hash
    found, saved = written(out), states(out)
    lost = [name for name, data in found.items() if expected.get(name) != data]
    lost += [f'{f} is damaged' for f in saved if file_hash(f) != f.stem.split('-')[1]]
    return len(found) + len(saved), lost

def kill_once(command, log, out, after, sent, expected):
    "Start a command and end it after some seconds; what was found, or `None` if it was done before."
    child = run(command, log)
    if ended(child, after) is not None: return None
    with contextlib.suppress(ProcessLookupError): os.kill(child, sent)
    status = ended(child, 600)
    checked, lost = lost_files(out, expected)
    step = max([int(f.name[:9]) for f in states(out)], default=0)
    return dict(signal=sent.name, seconds=round(after, 3), status=status, step=step, files=checked,
                losses=len(lost)), lost

def trial(name, base, kills, steps, seed):
    "Kill a command until it has been killed so often, and let it finish between; a row a kill, and a sum."
    rng, out, log = random.Random(f'{seed} {name}'), base/f'{name}_killed', base/f'{name}.log'
    whole = base/f'{name}_whole'
    fill = dict(data=base/'data', base=base, steps=steps)
    start = time.monotonic()
    if not whole.exists():
        assert ended(run(COMMANDS[name].format(out=whole, **fill), log), 600) == 0, log.read_text()
    seconds, expected = time.monotonic() - start, contents(whole)
    command = COMMANDS[name].format(out=out, **fill)
    rows, lost, checked = [], [], 0
    while len(rows) < kills:
        shutil.rmtree(out, ignore_errors=True)
        while len(rows) < kills:
            sent = signal.SIGTERM if len(rows) % 5 == 4 else signal.SIGKILL
            # early instants are the more frequent ones: a resumed run reaches the later stages
            after = rng.triangular(.05, .8, .05)*seconds
            ended_early = kill_once(command, log, out, after, sent, expected)
            if ended_early is None: break
            row, lost_now = ended_early
            rows.append(dict(command=name, kill=len(rows) + 1, **row))
            lost += [f'{file} after kill {len(rows)}' for file in lost_now]
        status = ended(run(command, log), 600)
        found = contents(out)
        checked += len(expected)
        if status: lost.append(f'status {status}: {log.read_text()[-500:]}')
        lost += [f for f in {*expected, *found} if expected.get(f) != found.get(f)]
    checked += sum(row['files'] for row in rows)
    return rows, dict(command=name, kills=len(rows), files_checked=checked, losses=len(lost), lost=lost[:5])

def summary(found):
    "Kills, files checked and losses of several trials, in a line."
    total = {k: sum(row[k] for row in found) for k in ('kills', 'files_checked', 'losses')}
    return 'kills: {kills}, files checked: {files_checked}, losses: {losses}'.format(**total)

def prepare(base, with_backbone):
    "The data, and what `train` starts from."
    from medsyn.data.lesions import lesion_folder
    for folder, n, s in ((base/'data', 24, 0), (base/'data_test', 8, 1)):
        if not folder.exists(): lesion_folder(folder, n, 32, s)
    if with_backbone and not (base/'backbone').exists():
        command = COMMANDS['pretrain'].format(data=base/'data', out=base/'backbone', steps=2)
        assert ended(run(command, base/'backbone.log'), 600) == 0, (base/'backbone.log').read_text()

def commit():
    "The commit of the checkout."
    return subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=Path(__file__).parent,
                          capture_output=True, text=True).stdout.strip()

def record(results, given, rows, found, seconds):
    "Write kills.csv and run.json."
    from medsyn.core import hardware, save_json, versions
    results.mkdir(parents=True, exist_ok=True)
    with open(results/'kills.csv', 'w', newline='') as f:
        table = csv.DictWriter(f, list(rows[0]), lineterminator='\n')
        table.writeheader()
        table.writerows(rows)
    command = f'python tests/kill.py FOLDER {" ".join(given.names)} --kills {given.kills}'
    save_json(results/'run.json', dict(
        command=f'{command} --steps {given.steps} --seed {given.seed} --results nbs/results/kills',
        seed=given.seed, commit=commit(), hardware=hardware(), versions=versions(), seconds=round(seconds),
        summary=summary(found), commands=found))

def main():
    "The trials of the named commands; status 1 after a loss."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder')
    parser.add_argument('names', nargs='*')
    parser.add_argument('--kills', type=int, default=10)
    parser.add_argument('--steps', type=int, default=12)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--results', type=Path)
    given = parser.parse_intermixed_args()
    given.names = given.names or list(COMMANDS)
    import medsyn.experiment
    import medsyn.fit  # noqa: F401 (loaded once, before the forks)
    base, start = Path(given.folder).resolve(), time.monotonic()
    prepare(base, 'train' in given.names)
    rows, found = [], []
    for name in given.names:
        of_command, total = trial(name, base, given.kills, given.steps, given.seed)
        rows += of_command
        found.append(total)
        print({k: v for k, v in total.items() if v or k == 'losses'}, file=sys.stderr, flush=True)
        if given.results: record(given.results, given, rows, found, time.monotonic() - start)
    print(json.dumps(found))
    print(summary(found))
    return int(any(row['losses'] for row in found))

if __name__ == '__main__': sys.exit(main())
