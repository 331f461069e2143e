"""Execute notebooks in place and keep their outputs.

`python tests/execute.py nbs/api/31_generate.siamese.ipynb` runs one; several paths run one after the other.
Cells with `#| eval: false` keep the outputs that they have. nbdev_clean then removes the metadata."""
import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def is_run(cell):
    "Whether a cell is code that runs everywhere."
    return cell.cell_type == 'code' and '#| eval: false' not in cell.source

def execute(path):
    "Run a notebook from its own folder and write it back, all cells in their places."
    os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'     # figures become outputs
    nb = nbformat.read(path, as_version=4)
    run = nbformat.from_dict({**nb, 'cells': [c for c in nb.cells if is_run(c)]})
    resources = {'metadata': {'path': str(Path(path).parent)}}
    NotebookClient(run, timeout=1800, coalesce_streams=True, resources=resources).execute()
    done = {c.id: c for c in run.cells}
    nb.cells = [done.get(c.id, c) for c in nb.cells]
    for cell in nb.cells:       # messages of libraries are not kept
        if 'outputs' in cell: cell.outputs = [o for o in cell.outputs if o.get('name') != 'stderr']
    nbformat.write(nb, path)

if __name__ == '__main__':
    for path in sys.argv[1:]:
        start = time.perf_counter()
        execute(path)
        subprocess.run(['nbdev_clean', '--fname', path], check=True)
        print(f'{path}: {time.perf_counter() - start:.0f} s', flush=True)
