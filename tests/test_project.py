"The project as a whole: README, start-up time, and what is committed in the notebooks."
import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
import textwrap
from configparser import ConfigParser

import nbformat
import pytest
from helpers import API, NBS, NOTEBOOKS, ROOT, directives, exports, ids, load, module_file, source

INI = ConfigParser(delimiters=['='], interpolation=None)
INI.read(ROOT/'settings.ini', encoding='utf-8')
each = lambda paths: pytest.mark.parametrize('path', paths, ids=ids(paths))

# README -------------------------------------------------------------------------------------------

def test_readme_is_current():
    import make_readme as m
    current = m.README.read_text(encoding='utf-8') == m.readme(load(m.INDEX))
    assert current, "README.md is stale: run python tests/make_readme.py"

def test_readme_links_lead_somewhere():
    text = (ROOT/'README.md').read_text(encoding='utf-8')
    links = re.findall(r'\]\(([^)\s]+)', text) + re.findall(r'(?:src|href)="([^"]+)', text)
    files = [o.split('#')[0] for o in links if '://' not in o and not o.startswith(('#', 'mailto:'))]
    missing = [o for o in files if not (ROOT/o).exists()]
    assert not missing, missing

def test_make_readme():
    "Links are rebased outside code, tables lose their style, pictures and errors are refused."
    import make_readme as m
    unchanged = "[w](https://e.org), [h](#top)\n```bash\necho [no](api/x)\n```\n`[no](b)`"
    text = f"see [a](api/x.ipynb), ![p](images/p.png), {unchanged}"
    assert m.relink_all(text) == f"see [a](nbs/api/x.ipynb), ![p](nbs/images/p.png), {unchanged}"
    assert m.relink('../LICENSE') == 'LICENSE'

    cell = lambda src, *outs: dict(cell_type='code', source=src, outputs=list(outs))
    plain = dict(output_type='execute_result', data={'text/plain': ['2']})
    html = '<style>x</style>\n<table border="1" class="c">\n  <tr></tr></table>'
    table = dict(output_type='execute_result', data={'text/html': html, 'text/plain': 'x'})
    assert m.code(cell('#| echo: true\n1+1', plain)) == ['```python\n1+1\n```', '```\n2\n```']
    assert m.code(cell('#| echo: false\ndf', table)) == ['<table>\n<tr></tr></table>']
    assert m.code(cell('#| hide\n1')) == []

    picture = dict(output_type='display_data', data={'image/png': 'x'})
    error = dict(output_type='error', ename='E')
    for refused in (picture, error):
        with pytest.raises(SystemExit): m.code(cell('x', refused))

# Start-up -----------------------------------------------------------------------------------------

HEAVY = 'torch torchvision numpy pandas matplotlib scipy sklearn fastai diffusers transformers timm'.split()

def loaded_by(code):
    "The heavy libraries that a fresh interpreter loads to run `code`, and what the code prints."
    code = f"import sys\n{code}\nprint('loaded:', *(m for m in {HEAVY} if m in sys.modules))"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    printed, _, modules = out.rpartition('loaded:')
    return modules.split(), printed

def test_import_is_light():
    "`import medsyn` loads nothing: libraries come with the module that needs them."
    assert loaded_by('import medsyn') == ([], '')

def test_help_is_quick():
    "The overview of the command line loads no heavy library. Seconds would depend on the machine."
    heavy, text = loaded_by("""
sys.argv = ['medsyn', '--help']
from medsyn.cli import main
try: main()
except SystemExit as e: assert not e.code""")
    assert not heavy, heavy
    commands = 'quickstart check pretrain train synth segment score compare bench'.split()
    assert not [name for name in commands if name not in text], text

def test_version():
    import medsyn
    assert medsyn.__version__ == INI['DEFAULT']['version']

# Code ---------------------------------------------------------------------------------------------

WIDEST = 110
CODE = [p for d in ('medsyn', 'tests') for p in sorted((ROOT/d).rglob('*.py')) if p.name != '_modidx.py']

def wide_lines(path):
    "The numbers of the lines wider than `WIDEST`."
    lines = path.read_text(encoding='utf-8').splitlines()
    return [i for i, line in enumerate(lines, 1) if len(line) > WIDEST]

def excused(path):
    "The lines that may be wider: `__all__`, which nbdev writes, and lines with a `noqa` (and its reason)."
    text = path.read_text(encoding='utf-8')
    assignments = [n for n in ast.parse(text).body if isinstance(n, ast.Assign)]
    names = [n for n in assignments if ast.unparse(n.targets[0]) == '__all__']
    by_nbdev = {i for n in names for i in range(n.lineno, n.end_lineno + 1)}
    return by_nbdev | {i for i, line in enumerate(text.splitlines(), 1) if 'noqa: E501' in line}

@pytest.mark.parametrize('path', CODE, ids=[p.relative_to(ROOT).as_posix() for p in CODE])
def test_no_line_is_wide(path):
    "One idea on a line. A module's first line is the quote of its notebook's first cell: a short one."
    wide = sorted(set(wide_lines(path)) - excused(path))
    assert not wide, f"lines wider than {WIDEST}: {wide}"

def test_hardly_any_line_is_wide():
    "The exceptions are few: less than 1% of the package's lines."
    files = [p for p in CODE if p.is_relative_to(ROOT/'medsyn')]
    n_wide = sum(len(wide_lines(p)) for p in files)
    n_lines = sum(len(p.read_text(encoding='utf-8').splitlines()) for p in files)
    assert n_wide < 0.01*n_lines, f"{n_wide} of {n_lines} lines are wider than {WIDEST}"

def commands_in(text):
    "The `medsyn` command lines of a markdown text, each as a list of words."
    blocks = re.findall(r'^```bash\n(.*?)^```', text, re.M | re.S)
    lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
    calls = [shlex.split(part, comments=True) for line in lines for part in line.split('&&')]
    return [words for words in calls if words and words[0].split('/')[-1] == 'medsyn']

@pytest.mark.parametrize('path', [ROOT/'CONTRIBUTING.md', *NOTEBOOKS], ids=lambda p: p.stem)
def test_command_lines_are_accepted(path):
    "Every `medsyn` command that a page shows is one that the parser accepts."
    from medsyn.cli import parser_of
    texts = [path.read_text(encoding='utf-8')] if path.suffix == '.md' else [
        source(c) for c in load(path)['cells'] if c['cell_type'] == 'markdown']
    for _, *words in commands_in('\n'.join(texts)):
        if words and not words[0].startswith('-'): parser_of(words[0]).parse_args(words[1:])

# Notebooks ----------------------------------------------------------------------------------------

def outputs(nb):
    "Every piece of text that the notebook's outputs hold."
    for c in nb['cells']:
        for o in c.get('outputs', []):
            if 'text' in o: yield ''.join(o['text'])
            for kind, v in o.get('data', {}).items():
                if not kind.startswith('image/') and isinstance(v, (str, list)): yield ''.join(v)

@each(NOTEBOOKS)
def test_first_cell_is_title_and_quote(path):
    "nbdev's pages show the H1 and one line of quote of the first cell, and drop the rest of it."
    first = load(path)['cells'][0]
    assert first['cell_type'] == 'markdown'
    assert re.fullmatch(r'# [^\n]+\n+> [^\n]+\n*', source(first)), source(first)

@each(NOTEBOOKS)
def test_second_cell_is_an_introduction(path):
    second = load(path)['cells'][1]
    assert second['cell_type'] == 'markdown' and len(source(second)) > 150

@each(NOTEBOOKS)
def test_valid(path):
    "A notebook that breaks the format's schema opens nowhere but in Jupyter."
    nbformat.validate(load(path))

@each(NOTEBOOKS)
def test_committed_outputs_are_clean(path):
    nb = load(path)
    for c in nb['cells']:
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error', source(c)
            assert o.get('name') != 'stderr', o['text']
    text = '\n'.join(outputs(nb))
    assert not (m := re.search(r'(?<![\w.:/-])/(home|root|work|tmp|Users|private)/\S*', text)), m[0]
    progress_bar = r'\d+%\|.{0,12}[|\u2588]|\d+it/s|it/s\]|\u2588\u2588'
    assert not (m := re.search(rf'Traceback \(most recent|\w+Warning:|{progress_bar}', text)), m[0]

PLOTS = ('show_rows(', 'plt.show()')

@each(NOTEBOOKS)
def test_figures_are_committed(path):
    "A notebook that plots has pictures among its outputs; a kernel without an inline backend leaves none."
    code_cells = [c for c in load(path)['cells'] if c['cell_type'] == 'code']
    shown = [c for c in code_cells if not directives(c) & {'export', 'hide', 'eval: false'}]
    plots = [c for c in shown if any(call in source(c) for call in PLOTS)]
    pictures = [o for c in shown for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    assert pictures or not plots, f"{len(plots)} cells plot, no picture is committed: run tests/execute.py"

@each(NOTEBOOKS)
def test_size(path):
    assert path.stat().st_size < 600_000, f"{path.stat().st_size/1000:.0f} kB: smaller or fewer figures"

@each(NOTEBOOKS)
def test_imports_stand_alone(path):
    """nbdev's pages run each cell that imports something, without the cells before it.

    Such a cell holds imports and definitions alone."""
    imports = (ast.Import, ast.ImportFrom)
    for c in load(path)['cells']:
        words, text = directives(c), source(c)
        skipped = words & {'export', 'exporti', 'eval: false'} or 'nbdev_export' in text
        if c['cell_type'] != 'code' or skipped: continue
        body = ast.parse(re.sub(r'^\s*[%!].*$', '', text, flags=re.M)).body
        if any(isinstance(n, imports) for statement in body for n in ast.walk(statement)):
            assert all(isinstance(b, (*imports, ast.FunctionDef, ast.ClassDef)) for b in body), text

def names_of(module, folder):
    "What can be imported from a module of medsyn or from a file beside the notebook."
    if module.startswith('medsyn'): return set(dir(importlib.import_module(module)))
    tree = ast.parse((folder/f'{module}.py').read_text(encoding='utf-8'))
    given = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    return given | {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}

@each(NOTEBOOKS)
def test_cells_that_are_not_run_can_be(path):
    "The producer of a figure runs for hours and in no test: it parses, and what it imports is there."
    for c in load(path)['cells']:
        if 'eval: false' not in directives(c): continue
        text = re.sub(r'^\s*[%!].*$', '', source(c), flags=re.M)
        for n in ast.walk(ast.parse(text, f'{path.name}, cell {c["id"]}')):
            if not isinstance(n, ast.ImportFrom): continue
            if n.module.split('.')[0] != 'medsyn' and not (path.parent/f'{n.module}.py').exists(): continue
            missing = {a.name for a in n.names} - names_of(n.module, path.parent)
            assert not missing, f'{n.module} has no {missing}'

@each(NOTEBOOKS)
def test_departures_are_listed(path):
    """A note that begins `> **Departure.**` has a row in explain/departures.

    Quarto's callouts (`:::`) show as raw text in Jupyter and are not used."""
    text = '\n'.join(source(c) for c in load(path)['cells'] if c['cell_type'] == 'markdown')
    assert not re.search(r'^:::', text, re.M)
    notes = len(re.findall(r'^> \*\*Departure', text, re.M))
    table = '\n'.join(map(source, load(NBS/'explain'/'departures.ipynb')['cells']))
    listed = table.count(f'| [{path.stem.split("_", 1)[-1]}](')
    assert notes <= listed, f"{notes} departures in the notebook, {listed} rows in explain/departures"

@each(API)
def test_exports_its_module(path):
    nb = load(path)
    module = exports(nb)
    assert module.strip('_') == path.stem.split('_', 1)[1], module
    assert module_file(module).exists()
    assert 'nbdev_export()' in source(nb['cells'][-1]) and 'hide' in directives(nb['cells'][-1])

def test_only_api_exports():
    assert not [p.name for p in NOTEBOOKS if p not in API and exports(load(p))]

def test_sidebar_lists_every_notebook():
    listed = re.findall(r'- (\S+\.ipynb)', (NBS/'sidebar.yml').read_text())
    assert sorted(listed) == sorted(p.relative_to(NBS).as_posix() for p in NOTEBOOKS)

def test_quarto_settings_agree():
    assert (NBS/'_quarto.yml').resolve() == ROOT/'_quarto.yml'
    text = (NBS/'nbdev.yml').read_text()
    for k in ('title', 'description', 'git_url'): assert f'"{INI["DEFAULT"][k]}"' in text, k

# Documentation of what is public ------------------------------------------------------------------

def public(module):
    "The functions and classes of a module's `__all__` that it defines itself, with their public methods."
    for name in module.__all__:
        o = getattr(module, name)
        defined_here = getattr(o, '__module__', '') == module.__name__
        if defined_here and (inspect.isfunction(o) or inspect.isclass(o)): yield name, o

def signature_of(module, o):
    "The function that holds the parameters of `o`: itself, or the `__init__` that a class writes."
    fn = o if inspect.isfunction(o) else vars(o).get('__init__')
    fn = inspect.unwrap(fn) if fn else None
    if not inspect.isfunction(fn) or fn.__module__ != o.__module__: return None
    return fn if fn.__code__.co_filename == module.__file__ else None

def parameters(fn):
    "The public parameters of `fn` as syntax nodes with the text of their line; `*args` and `**kwargs` last."
    text = textwrap.dedent(inspect.getsource(fn))
    args = ast.parse(text).body[0].args
    every = [*args.posonlyargs, *args.args, *args.kwonlyargs, args.vararg, args.kwarg]
    lines = text.splitlines()
    return [(a, lines[a.end_lineno - 1]) for a in every
            if a is not None and a.arg not in ('self', 'cls') and not a.arg.startswith('_')]

def undocumented(fn):
    "Parameters of `fn` without a comment on their own line."
    return [a.arg for a, line in parameters(fn) if '#' not in line]

def untyped(fn):
    "Parameters of `fn` without a type; `*args` and `**kwargs` need none."
    args = ast.parse(textwrap.dedent(inspect.getsource(fn))).body[0].args
    starred = {a.arg for a in (args.vararg, args.kwarg) if a}
    return [a.arg for a, _ in parameters(fn) if a.annotation is None and a.arg not in starred]

def has_docstring(o):
    "Whether `o` has one of its own: a class does not inherit it."
    return bool(((vars(o).get('__doc__') if inspect.isclass(o) else o.__doc__) or '').strip())

@each(API)
def test_public_names_are_documented(path):
    module = importlib.import_module('medsyn.' + exports(load(path)))
    missing = []
    for name, o in public(module):
        if not has_docstring(o): missing.append(f'{name}: docstring')
        if fn := signature_of(module, o): missing += [f'{name}: {a}' for a in undocumented(fn)]
    assert not missing, missing

@each(API)
def test_public_parameters_are_typed(path):
    module = importlib.import_module('medsyn.' + exports(load(path)))
    missing = []
    for name, o in public(module):
        if fn := signature_of(module, o): missing += [f'{name}: {a}' for a in untyped(fn)]
    assert not missing, missing

def shared_loaders(text):
    "Names of loaders that are made once and used in a loop or function: their epochs are counted on."
    tree, shared = ast.parse(text), set()
    for scope in (node for node in ast.walk(tree) if isinstance(getattr(node, 'body', None), list)):
        made = set()
        for node in (node for node in scope.body if isinstance(node, ast.Assign)):
            target, value = node.targets[0], node.value
            both = zip(target.elts, value.elts) if isinstance(value, ast.Tuple) else [(target, value)]
            made |= {t.id for t, v in both if ast.unparse(v).startswith(('pair_dls(', 'generator_dls('))}
        inner = [node for node in scope.body if isinstance(node, (ast.For, ast.FunctionDef))]
        shared |= made & {n.id for node in inner for n in ast.walk(node) if isinstance(n, ast.Name)}
    return shared

@each(sorted((NBS/'figures').glob('*.ipynb')))
def test_each_learner_of_a_figure_has_its_own_loaders(path):
    assert shared_loaders('dls = pair_dls(a)\nfor x in b: fit(dls)') == {'dls'}
    sources = [source(c) for c in load(path)['cells'] if c['cell_type'] == 'code' and '_dls(' in source(c)]
    assert not {name for text in sources for name in shared_loaders(text)}

def test_the_duration_of_the_quickstart_is_the_recorded_one():
    recorded = json.loads((NBS/'results'/'quickstart'/'run.json').read_text())
    minutes = 'one two three four five six seven eight nine ten'.split()[round(recorded['seconds']/60) - 1]
    for file in (ROOT/'README.md', NBS/'index.ipynb', NBS/'tutorials'/'01_quickstart.ipynb'):
        assert f'took {minutes} minutes' in file.read_text(encoding='utf-8'), file
