"""README.md from nbs/index.ipynb, without Quarto.

`python tests/make_readme.py` writes it; `--check` only tells whether it is stale.
Markdown cells are copied, code cells become fenced blocks followed by their outputs.
Relative links and images start from nbs/ in the notebook and from the project's top in README.md.
A picture must be a file in nbs/images: an embedded one is refused."""
import posixpath
import re
import sys

from helpers import NBS, ROOT, directives, load, source

INDEX, README = NBS/'index.ipynb', ROOT/'README.md'
NOTE = '<!-- made from nbs/index.ipynb by tests/make_readme.py: edit the notebook -->'
ELSEWHERE = ('#', '/', 'mailto:')

def relink(url):
    "A link as seen from the top folder."
    if url.startswith(ELSEWHERE) or '://' in url: return url
    return posixpath.normpath(posixpath.join('nbs', url))

def relink_all(text):
    "Every `](link)`, `src=` and `href=` of a markdown text, code left alone."
    def change(part):
        part = re.sub(r'(\]\()([^)\s]+)', lambda m: m[1] + relink(m[2]), part)
        return re.sub(r'((?:src|href)=")([^"]+)', lambda m: m[1] + relink(m[2]), part)
    parts = re.split(r'(^```.*?^```[ \t]*$|`[^`\n]+`)', text, flags=re.M | re.S)
    return ''.join(p if i % 2 else change(p) for i, p in enumerate(parts))

def tidy_html(text):
    "A table of pandas without its style sheet and classes, which GitHub does not show."
    text = re.sub(r'<style.*?</style>\s*', '', text, flags=re.S)
    text = re.sub(r' (?:class|style|border)="[^"]*"', '', text)
    return re.sub(r'^\s+', '', text, flags=re.M).strip()

def fence(text, lang=''):
    "A fenced block."
    return f"```{lang}\n{text.rstrip()}\n```"

def output(o):
    "One output of a code cell as markdown; pictures and errors are refused."
    if o['output_type'] == 'error': raise SystemExit(f"{INDEX.name}: an output is an error ({o['ename']})")
    if o['output_type'] == 'stream': return fence(''.join(o['text'])) if o['name'] == 'stdout' else ''
    data = {k: ''.join(v) for k, v in o['data'].items() if isinstance(v, (str, list))}
    if any(k.startswith('image/') for k in data):
        raise SystemExit(f"{INDEX.name}: an output is an image; write it to nbs/images and show it by a link")
    if 'text/markdown' in data: return data['text/markdown'].strip()
    if '<table' in data.get('text/html', ''): return tidy_html(data['text/html'])
    return fence(data['text/plain']) if 'text/plain' in data else ''

def code(cell):
    "A code cell and its outputs, as its directives allow."
    words = directives(cell)
    if words & {'hide', 'default_exp'} or 'include: false' in words: return []
    text = re.sub(r'^#\|.*\n?', '', source(cell), flags=re.M).strip()
    show = [fence(text, 'python')] if text and 'echo: false' not in words else []
    return show + ([] if 'output: false' in words else [output(o) for o in cell['outputs']])

def readme(nb):
    "The whole text."
    parts = [NOTE]
    for c in nb['cells']:
        if c['cell_type'] == 'markdown': parts.append(relink_all(source(c).strip()))
        else: parts += code(c)
    return '\n\n'.join(p for p in parts if p) + '\n'

if __name__ == '__main__':
    new = readme(load(INDEX))
    if '--check' not in sys.argv: README.write_text(new, encoding='utf-8')
    elif README.read_text(encoding='utf-8') != new:
        raise SystemExit("README.md is stale: run python tests/make_readme.py")
