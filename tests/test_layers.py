"The order of the rooms, read from the imports: a module uses only modules with a smaller number."
import ast

import pytest
from helpers import API, ROOT, exports, imported, load, module_file

NUMBER = {exports(load(p)): int(p.name.split('_')[0]) for p in API}
MODULES = sorted(NUMBER, key=NUMBER.get)
FILES = sorted((ROOT/'medsyn').rglob('*.py'))

def uses(module):
    "The modules of medsyn that `module` imports."
    return imported(module_file(module)) & set(NUMBER)

def test_numbers_are_unique():
    numbers = [int(p.name.split('_')[0]) for p in API]
    assert len(numbers) == len(set(numbers)), [p.name for p in API]

@pytest.mark.parametrize('module', MODULES)
def test_imports_point_downwards(module):
    wrong = {m for m in uses(module) if NUMBER[m] >= NUMBER[module]}
    assert not wrong, f"{module} ({NUMBER[module]:02}) imports {wrong}"

@pytest.mark.parametrize('module', [m for m in MODULES if 30 <= NUMBER[m] < 37])
def test_generators_do_not_know_each_other(module):
    allowed = {'generate.control'} if module == 'generate.siamese' else set()
    wrong = {m for m in uses(module) if 30 <= NUMBER[m] < 37} - allowed
    assert not wrong, f"{module} imports {wrong}: what two generators share belongs into diffusion"

@pytest.mark.parametrize('module', [m for m in MODULES if m.startswith('segment.')])
def test_segmentation_knows_nothing_of_generation(module):
    wrong = {m for m in uses(module) if m.split('.')[0] in ('diffusion', 'generate', 'synth')}
    assert not wrong, f"{module} imports {wrong}: pass a generator as an argument"

@pytest.mark.parametrize('module', [m for m in MODULES if NUMBER[m] >= 40])
def test_later_rooms_reach_generators_through_the_catalog(module):
    wrong = {m for m in uses(module) if 30 <= NUMBER[m] < 37}
    assert not wrong, f"{module} imports {wrong}: go through generate.catalog"

@pytest.mark.parametrize('path', FILES, ids=[p.relative_to(ROOT).as_posix() for p in FILES])
def test_nothing_forbidden(path):
    """No thread settings behind the user's back, no star imports, and no pickles: `torch.load` reads foreign weights
    only, and only with `weights_only=True` written beside it."""
    found = []
    tree = ast.parse(path.read_text(encoding='utf-8'))
    safe = {id(n.func) for n in ast.walk(tree) if isinstance(n, ast.Call)
            and any(k.arg == 'weights_only' and getattr(k.value, 'value', None) is True for k in n.keywords)}
    for n in ast.walk(tree):
        name = ast.unparse(n) if isinstance(n, (ast.Attribute, ast.Name)) else ''
        if name.split('.')[-1] in ('set_num_threads', 'set_num_interop_threads'): found.append(name)
        if name == 'torch.load' and id(n) not in safe: found.append(name)
        if name in ('torch.save', 'torch.jit.load', 'load_learner', 'load_pickle', 'save_pickle', 'joblib.load'): found.append(name)
        if isinstance(n, ast.Call) and any(k.arg == 'allow_pickle' and getattr(k.value, 'value', 1) for k in n.keywords): found.append('allow_pickle')
        if isinstance(n, (ast.Import, ast.ImportFrom)):
            names = [getattr(n, 'module', None) or '', *(a.name for a in n.names)]
            found += [o for o in names if o.split('.')[0] in ('pickle', 'cPickle', 'dill', 'joblib', 'cloudpickle') or o == '*']
    assert not found, f"{path.name}: {found}"

def test_every_module_has_a_notebook():
    "medsyn/ holds what the notebooks export, and nothing by hand."
    made = {module_file(m) for m in MODULES}
    extra = [p.relative_to(ROOT).as_posix() for p in FILES if p not in made and p.name not in ('__init__.py', '_modidx.py')]
    assert not extra, extra
