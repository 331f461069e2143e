"The order of the rooms, read from the imports: a module uses only modules with a smaller number."
import ast
import re
import sys
from configparser import ConfigParser

import pytest
from helpers import API, ROOT, exports, imported, load, module_file

NUMBER = {exports(load(p)): int(p.name.split('_')[0]) for p in API}
MODULES = sorted(NUMBER, key=NUMBER.get)
FILES = sorted((ROOT/'medsyn').rglob('*.py'))

INI = ConfigParser(delimiters=['='], interpolation=None)
INI.read(ROOT/'settings.ini', encoding='utf-8')
EVERY_FILE = pytest.mark.parametrize('path', FILES, ids=[p.relative_to(ROOT).as_posix() for p in FILES])

# Names under which a distribution is imported, where the two differ.
IMPORT_NAME = {'pillow': 'PIL', 'scikit-learn': 'sklearn', 'opencv-python-headless': 'cv2'}

def uses(module):
    "The modules of medsyn that `module` imports."
    return imported(module_file(module)) & set(NUMBER)

def is_generator(module):
    "One notebook, one way of generating: 31 to 38. Number 30 is their shared base, 39 their catalog."
    return 30 < NUMBER[module] < 39

def third_party(path):
    "The top-level packages outside medsyn and the standard library that a file imports, lazily or not."
    names = set()
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import): names |= {a.name for a in n.names}
        if isinstance(n, ast.ImportFrom) and not n.level: names.add(n.module)
    top = {name.split('.')[0] for name in names}
    return top - set(sys.stdlib_module_names) - {'medsyn'}

def declared():
    "The packages that settings.ini asks for, under the names they are imported by."
    names = [re.match(r'[\w.-]+', r)[0] for r in INI['DEFAULT']['requirements'].split()]
    return {IMPORT_NAME.get(name, name.replace('-', '_')) for name in names}

def test_numbers_are_unique():
    numbers = [int(p.name.split('_')[0]) for p in API]
    assert len(numbers) == len(set(numbers)), [p.name for p in API]

@pytest.mark.parametrize('module', MODULES)
def test_imports_point_downwards(module):
    wrong = {m for m in uses(module) if NUMBER[m] >= NUMBER[module]}
    assert not wrong, f"{module} ({NUMBER[module]:02}) imports {wrong}"

@pytest.mark.parametrize('module', [m for m in MODULES if is_generator(m)])
def test_generators_do_not_know_each_other(module):
    "Any generator may import `generate.control`, their shared base; siblings stay apart."
    wrong = {m for m in uses(module) if is_generator(m)}
    assert not wrong, f"{module} imports {wrong}: what two generators share goes to generate.control"

@pytest.mark.parametrize('module', [m for m in MODULES if m.startswith('segment.')])
def test_segmentation_knows_nothing_of_generation(module):
    wrong = {m for m in uses(module) if m.split('.')[0] in ('diffusion', 'generate', 'synth')}
    assert not wrong, f"{module} imports {wrong}: pass a generator as an argument"

@pytest.mark.parametrize('module', [m for m in MODULES if NUMBER[m] >= 40])
def test_later_rooms_reach_generators_through_the_catalog(module):
    wrong = {m for m in uses(module) if 30 <= NUMBER[m] < 39}
    assert not wrong, f"{module} imports {wrong}: go through generate.catalog"

EXTRAS = {'nibabel', 'pydicom', 'pycocotools', 'starlette', 'uvicorn'}  # of `radiology`, `layouts`, `app`

def test_extras_are_declared():
    listed = ' '.join(INI['DEFAULT'][f'{name}_requirements'] for name in ('radiology', 'layouts', 'app'))
    assert {re.match(r'[\w.-]+', r)[0] for r in listed.split()} == EXTRAS

@EVERY_FILE
def test_third_party_imports_are_declared(path):
    "What a module imports comes with `pip install medsyn`; an extra's library is imported in a function."
    at_top = {a.name.split('.')[0] for n in ast.parse(path.read_text(encoding='utf-8')).body
              if isinstance(n, ast.Import) for a in n.names}
    assert not at_top & EXTRAS
    wrong = third_party(path) - declared() - EXTRAS
    assert not wrong, f"{path.name} imports {sorted(wrong)}, which settings.ini does not require"

def test_requirements_are_used():
    "And nothing is asked for that no module imports; accelerate is loaded by diffusers and transformers."
    used = set().union(*map(third_party, FILES))
    assert not (idle := declared() - used - {'accelerate'}), idle

PICKLERS = {'pickle', 'cPickle', 'dill', 'joblib', 'cloudpickle'}
PICKLING_CALLS = {'torch.save', 'torch.jit.load', 'joblib.load', 'load_learner', 'load_pickle', 'save_pickle'}
THREAD_SETTINGS = {'set_num_threads', 'set_num_interop_threads'}

def is_true(call, name):
    "Whether a call writes `name=True`."
    return any(k.arg == name and getattr(k.value, 'value', None) is True for k in call.keywords)

def forbidden_in(node, safe_loads):
    "What is wrong with one syntax node, as a list of names."
    if isinstance(node, (ast.Attribute, ast.Name)):
        name = ast.unparse(node)
        unsafe_load = name == 'torch.load' and id(node) not in safe_loads
        wrong = unsafe_load or name in PICKLING_CALLS or name.split('.')[-1] in THREAD_SETTINGS
        return [name] if wrong else []
    if isinstance(node, ast.Call):
        pickles = [k for k in node.keywords if k.arg == 'allow_pickle' and getattr(k.value, 'value', True)]
        return ['allow_pickle'] if pickles else []
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        names = [getattr(node, 'module', None) or '', *(a.name for a in node.names)]
        return [name for name in names if name == '*' or name.split('.')[0] in PICKLERS]
    return []

@EVERY_FILE
def test_nothing_forbidden(path):
    """No hidden thread settings, no star imports, no pickles.

    `torch.load` may read foreign weights, if `weights_only=True` stands beside it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding='utf-8'))))
    safe_loads = {id(n.func) for n in nodes if isinstance(n, ast.Call) and is_true(n, 'weights_only')}
    found = [name for n in nodes for name in forbidden_in(n, safe_loads)]
    assert not found, f"{path.name}: {found}"

def test_every_module_has_a_notebook():
    "medsyn/ holds what the notebooks export, and nothing by hand."
    made = {module_file(m) for m in MODULES}
    others = [p for p in FILES if p not in made and p.name not in ('__init__.py', '_modidx.py')]
    extra = [p.relative_to(ROOT).as_posix() for p in others]
    assert not extra, extra

@EVERY_FILE
def test_hashes_come_from_core(path):
    "`core.file_hash` and `core.content_hash` hash everything: one content, one hash."
    if path.name == 'core.py': return
    modules = {n.module if isinstance(n, ast.ImportFrom) else a.name
               for n in ast.walk(ast.parse(path.read_text(encoding='utf-8')))
               if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}
    assert 'hashlib' not in modules, f"{path.name}: use file_hash or content_hash of medsyn.core, not hashlib"
