"What several test modules share: where the project is, and its notebooks as plain dictionaries."
import ast
import json
import re
from collections import Counter, namedtuple
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT/'nbs'
def _hidden(path): return any(part.startswith(('.', '_')) for part in path.relative_to(NBS).parts)
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not _hidden(p))
API = [p for p in NOTEBOOKS if p.parent == NBS/'api']

def ids(paths):
    "Readable names for parametrised tests."
    return [p.relative_to(NBS).with_suffix('').as_posix() for p in paths]

def load(path):
    "A notebook's JSON."
    return json.loads(path.read_text(encoding='utf-8'))

def source(cell):
    "A cell's text."
    return ''.join(cell['source'])

def directives(cell):
    "The words of a code cell's `#|` lines: {'export', 'eval: false', ...}."
    if cell['cell_type'] != 'code': return set()
    return {m.strip() for m in re.findall(r'^#\|(.*)$', source(cell), re.M)}

def exports(nb):
    "The dotted module that a notebook is exported to, `None` if it is a page only."
    for c in nb['cells']:
        for d in directives(c):
            if d.startswith('default_exp'): return d.split()[1]

def module_file(dotted):
    "medsyn's file of that dotted name (relative to the package)."
    return ROOT/'medsyn'/(dotted.replace('.', '/') + '.py')

def imported(path, package='medsyn'):
    "The modules of `package` that a file imports, relative imports resolved: `data.pairs`, `core`, ..."
    here = path.relative_to(ROOT/package).with_suffix('').parts
    out = set()
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import): out |= {a.name for a in n.names}
        elif isinstance(n, ast.ImportFrom):
            base = '.'.join((package, *here)[:-n.level]) if n.level else ''
            mod = '.'.join(o for o in (base, n.module or '') if o)
            out |= {mod, *(f'{mod}.{a.name}' for a in n.names)}
    return {o.removeprefix(package + '.') for o in out if o.startswith(package + '.')}

LEAST_CASES = 2000
Verdict = namedtuple('Verdict', 'text failed')

class FuzzCount:
    "The cases of tests/test_fuzz.py over all processes of a run."
    file = ROOT/'tests'/'test_fuzz.py'
    def __init__(self): self.tests, self.counts = set(), Counter()

    def add(self, nodeid, counts):
        "What one test reports: cases, refusals, misread."
        if counts is None: return
        self.tests.add(nodeid.split('::')[-1].split('[')[0])
        self.counts.update(counts)

    def all_tests(self):
        "The names of the tests of the file."
        tree = ast.parse(self.file.read_text())
        return {n.name for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')}

    def verdict(self):
        "What is printed, and whether the run fails: only a run of the whole file owes the number of cases."
        n, missing = self.counts, self.all_tests() - self.tests
        text = (f"fuzz: cases tried {n['cases']}, refusals {n['refusals']},"
                f" silent misreadings: {n['misread']}")
        if missing:
            text += (f" (by {len(self.tests)} of {len(self.all_tests())} tests;"
                     f" {LEAST_CASES} are asked of all of them)")
        too_few = not missing and n['cases'] < LEAST_CASES
        if too_few: text += f': FAILED, fewer than {LEAST_CASES}'
        return Verdict(text, bool(too_few or n['misread']))
