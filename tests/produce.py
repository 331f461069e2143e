"""Run the producer of a figure notebook: its cells with `#| eval: false`, in their order, as one program.

`MEDSYN_DATA=data MEDSYN_WORK=runs python tests/produce.py nbs/figures/rivals.ipynb` makes what the page
reads; the same command resumes. Cells that only import run too. A producer takes its paths from the
environment: MEDSYN_DATA (the data sets), MEDSYN_WEIGHTS (an encoder's ImageNet weights, a file), MEDSYN_WORK
(a folder for everything large), and for some pages MEDSYN_BACKBONE (a folder of `medsyn pretrain`)."""
import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

import nbformat


def is_produced(cell):
    "Whether a cell belongs to the producer: it is marked `eval: false`, or it only imports."
    if cell.cell_type != 'code': return False
    if '#| eval: false' in cell.source: return True
    if cell.source.lstrip().startswith('%'): return False
    body = ast.parse(cell.source).body
    return bool(body) and all(isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in body)

def commit():
    "The commit that the working tree stands on, with a + if it was changed."
    def git(*words):
        return subprocess.run(['git', *words], capture_output=True, text=True).stdout.strip()
    return git('rev-parse', '--short', 'HEAD') + '+'*bool(git('status', '--porcelain', '--', 'medsyn', 'nbs'))

def produce(path, until=None):
    "Run the producer's cells, to the one whose id is `until`, from the notebook's folder."
    cells = [c for c in nbformat.read(path, as_version=4).cells if is_produced(c)]
    ids = [c.id for c in cells]
    if until is not None:
        if until not in ids: sys.exit(f"{path} has no producer cell {until!r}: they are {', '.join(ids)}")
        cells = cells[:ids.index(until) + 1]
    os.environ.setdefault('MEDSYN_COMMIT', commit())
    os.chdir(Path(path).parent)
    sys.path.insert(0, os.getcwd())
    namespace = {'__name__': '__main__'}
    for cell in cells: exec(compile(cell.source, f'{Path(path).name}, cell {cell.id}', 'exec'), namespace)

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('notebook', help='a notebook below nbs/figures')
    parser.add_argument('--until', help='the id of the last cell that runs (default: all of them)')
    given = parser.parse_args()
    produce(Path(given.notebook).resolve(), given.until)
