"Downloads against a server on this machine, and archives that were made to do harm."
import gzip
import hashlib
import io
import stat
import tarfile
import threading
import zipfile
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from medsyn.core import MedsynError
from medsyn.data import public
from medsyn.data.lesions import lesion_folder
from medsyn.data.pairs import find_pairs
from medsyn.data.public import PUBLIC, PublicSet, extract, fetch, get_public

DATA = bytes(hashlib.sha256(str(i).encode()).digest()[0] for i in range(200_000))
SHA = hashlib.sha256(DATA).hexdigest()

class Handler(BaseHTTPRequestHandler):
    "One file, served as the test's `rules` say."
    def do_GET(self):
        rules, start = self.server.rules, 0
        data = rules.get('data', DATA)
        asked = self.headers.get('Range')
        self.server.log.append((self.path, asked, self.headers.get('If-Range')))
        if fails := rules.get('fail', []):
            return self.send_error(fails.pop(0))
        current = self.headers.get('If-Range') in (None, rules.get('etag', '"v1"'))
        if asked and rules.get('range', True) and current:
            start = int(asked[6:-1])
            if start >= len(data): return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header('Content-Range', f"bytes {rules.get('lie', start)}-{len(data)-1}/{len(data)}")
        if rules.get('length', True): self.send_header('Content-Length', str(len(data) - start))
        if tag := rules.get('etag', '"v1"'): self.send_header('ETag', tag)
        if rules.get('modified'): self.send_header('Last-Modified', rules['modified'])
        self.send_header('Content-Type', rules.get('type', 'application/zip'))
        self.end_headers()
        self.wfile.write(data[start:start + (rules['cuts'].pop(0) if rules.get('cuts') else len(data))])
    def log_message(self, *a): pass

@pytest.fixture
def server(monkeypatch):
    "A server on loopback; `.rules` says how it behaves, `.log` what it was asked."
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    monkeypatch.setattr(public.time, 'sleep', lambda s: None)
    s = ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    s.rules, s.log, s.url = {}, [], f'http://127.0.0.1:{s.server_port}/set.zip'
    threading.Thread(target=s.serve_forever, daemon=True).start()
    yield s
    s.shutdown(); s.server_close()

def names(path): return sorted(p.name for p in path.iterdir())

# Downloads --------------------------------------------------------------------------------------------------

def test_plain(server, tmp_path):
    assert fetch(server.url, tmp_path/'sub'/'set.zip', SHA).read_bytes() == DATA
    assert names(tmp_path/'sub') == ['set.zip']
    fetch(server.url, tmp_path/'sub'/'set.zip', SHA)
    # what is there is not fetched again
    assert len(server.log) == 1

def test_resume_after_cuts(server, tmp_path):
    server.rules = dict(cuts=[50_000, 1, 70_000])
    assert fetch(server.url, tmp_path/'set.zip', SHA).read_bytes() == DATA
    assert [r for _, r, _ in server.log] == [None, 'bytes=50000-', 'bytes=50001-', 'bytes=120001-']
    assert all(i == '"v1"' for _, _, i in server.log[1:])

def test_resume_in_a_second_call(server, tmp_path):
    server.rules = dict(cuts=[50_000] + [0]*5)
    with pytest.raises(MedsynError, match='what has arrived is kept in set.zip.part'):
        fetch(server.url, tmp_path/'set.zip', SHA)
    assert (tmp_path/'set.zip.part').stat().st_size == 50_000 and not (tmp_path/'set.zip').exists()
    server.log.clear()
    assert fetch(server.url, tmp_path/'set.zip', SHA).read_bytes() == DATA
    assert [r for _, r, _ in server.log] == ['bytes=50000-'] and names(tmp_path) == ['set.zip']

def test_resume_by_date(server, tmp_path):
    server.rules = dict(etag=None, modified=formatdate(0, usegmt=True), cuts=[50_000], range=True)
    server.rules['etag'] = None
    fetch(server.url, tmp_path/'set.zip', SHA)
    assert server.log[1][2] == formatdate(0, usegmt=True)

def test_changed_file_starts_over(server, tmp_path):
    "A part of an older version is never glued to a newer one."
    server.rules = dict(cuts=[50_000] + [0]*5)
    with pytest.raises(MedsynError): fetch(server.url, tmp_path/'set.zip')
    server.rules = dict(data=DATA[::-1], etag='"v2"')
    assert fetch(server.url, tmp_path/'set.zip').read_bytes() == DATA[::-1]

def test_part_of_another_address_starts_over(server, tmp_path):
    server.rules = dict(cuts=[50_000] + [0]*5)
    with pytest.raises(MedsynError): fetch(server.url, tmp_path/'set.zip')
    server.log.clear()
    fetch(server.url.replace('set', 'other'), tmp_path/'set.zip', SHA)
    assert server.log[0][1] is None

def test_server_without_range(server, tmp_path):
    server.rules = dict(range=False, cuts=[50_000])
    assert fetch(server.url, tmp_path/'set.zip', SHA).read_bytes() == DATA

def test_server_without_marks(server, tmp_path):
    "Without ETag or date nobody can tell whether the file is still the same: start over."
    server.rules = dict(etag=None, cuts=[50_000])
    assert fetch(server.url, tmp_path/'set.zip', SHA).read_bytes() == DATA
    assert [r for _, r, _ in server.log] == [None, None]

def test_server_that_resumes_elsewhere(server, tmp_path):
    server.rules = dict(cuts=[50_000] + [0]*9, lie=10)
    with pytest.raises(MedsynError, match='resumed at 10 instead of 50000'):
        fetch(server.url, tmp_path/'set.zip', SHA)
    assert not (tmp_path/'set.zip').exists()

def test_server_without_length(server, tmp_path):
    server.rules = dict(length=False)
    assert fetch(server.url, tmp_path/'set.zip', SHA).read_bytes() == DATA

def test_passing_trouble_is_tried_again(server, tmp_path):
    server.rules = dict(fail=[503, 500, 429])
    assert fetch(server.url, tmp_path/'set.zip', SHA).read_bytes() == DATA

def test_part_that_is_too_long(server, tmp_path):
    "416: there is nothing after what we have. Start over."
    server.rules = dict(cuts=[150_000] + [0]*5)
    with pytest.raises(MedsynError): fetch(server.url, tmp_path/'set.zip')
    with open(tmp_path/'set.zip.part', 'ab') as f: f.write(bytes(100_000))
    server.rules = {}
    assert fetch(server.url, tmp_path/'set.zip', SHA).read_bytes() == DATA

def test_wrong_checksum(server, tmp_path):
    words = f'arrived with SHA-256 {SHA[:12]}... instead of 000000000000...'
    with pytest.raises(MedsynError, match=words): fetch(server.url, tmp_path/'set.zip', '0'*64)
    assert names(tmp_path) == []
    (tmp_path/'set.zip').write_bytes(b'mine')
    with pytest.raises(MedsynError, match='exists but its SHA-256 is not'):
        fetch(server.url, tmp_path/'set.zip', SHA)
    assert (tmp_path/'set.zip').read_bytes() == b'mine'

@pytest.mark.parametrize('code', [401, 403, 404])
def test_missing(server, tmp_path, code):
    server.rules = dict(fail=[code])
    with pytest.raises(MedsynError, match=f'is not available \\({code} '):
        fetch(server.url, tmp_path/'set.zip')
    assert len(server.log) == 1 and names(tmp_path) == []

def test_web_page_instead_of_a_file(server, tmp_path):
    server.rules = dict(data=b'<html>please log in', type='text/html; charset=utf-8')
    with pytest.raises(MedsynError, match='a web page instead of a file'):
        fetch(server.url, tmp_path/'set.zip')
    assert names(tmp_path) == []

def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv('no_proxy', '127.0.0.1'); monkeypatch.setattr(public.time, 'sleep', lambda s: None)
    with pytest.raises(MedsynError, match='could not be fetched'):
        fetch('http://127.0.0.1:9/set.zip', tmp_path/'set.zip', timeout=1)

@pytest.mark.parametrize('url', ['file:///etc/passwd', 'ftp://example.org/x', 'x.zip', ''])
def test_other_addresses(url, tmp_path):
    with pytest.raises(MedsynError, match='no http or https address'): fetch(url, tmp_path/'x')

def test_unwritable(server, tmp_path):
    (tmp_path/'file').touch()
    with pytest.raises(MedsynError, match='a file stands where a folder is needed'):
        fetch(server.url, tmp_path/'file'/'set.zip')

# Archives ---------------------------------------------------------------------------------------------------

def zipped(path, *members):
    "A zip archive of (name or ZipInfo, bytes)."
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in members: z.writestr(name, data)
    return path

def tarred(path, *members, mode='w:gz'):
    "A tar archive of (name or TarInfo, bytes)."
    with tarfile.open(path, mode) as t:
        for info, data in members:
            if isinstance(info, str): info = tarfile.TarInfo(info)
            info.size = len(data); t.addfile(info, io.BytesIO(data))
    return path

def refused(archive, dest, words, **kw):
    "`extract` refuses and leaves the folder as it was."
    before = names(dest) if dest.exists() else []
    with pytest.raises(MedsynError, match=words) as e: extract(archive, dest, **kw)
    assert '\n' not in str(e.value) and (names(dest) if dest.exists() else []) == before

BAD_NAMES = ['../evil', '/evil', 'a/../../evil', '..', 'C:/evil', 'c:evil', '..\\evil', 'a\\..\\..\\evil',
             '//server/evil', './../evil']

@pytest.mark.parametrize('name', BAD_NAMES)
@pytest.mark.parametrize('make,end', [(zipped, 'zip'), (tarred, 'tar.gz')])
def test_paths_that_lead_outside(tmp_path, name, make, end):
    archive = make(tmp_path/f'a.{end}', ('ok.png', b'1'), (name, b'2'))
    refused(archive, tmp_path/'in'/'side', 'outside the target folder')
    assert not list(tmp_path.rglob('evil*'))

@pytest.mark.parametrize('kind', [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_zip_links(tmp_path, kind):
    i = zipfile.ZipInfo('link'); i.create_system = 3; i.external_attr = (kind | 0o777) << 16
    archive = zipped(tmp_path/'a.zip', ('ok.png', b'1'), (i, '/etc/passwd'))
    refused(archive, tmp_path/'out', 'a link or device')

@pytest.mark.parametrize('kind', [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE,
                                  tarfile.BLKTYPE])
def test_tar_links(tmp_path, kind):
    i = tarfile.TarInfo('link'); i.type, i.linkname = kind, '../../etc/passwd'
    archive = tarred(tmp_path/'a.tar', ('ok.png', b'1'), (i, b''), mode='w')
    refused(archive, tmp_path/'out', 'a link or device')

def test_link_then_file_through_it(tmp_path):
    i = tarfile.TarInfo('dir'); i.type, i.linkname = tarfile.SYMTYPE, str(tmp_path)
    refused(tarred(tmp_path/'a.tar.gz', (i, b''), ('dir/evil', b'1')), tmp_path/'out', 'a link or device')
    assert not (tmp_path/'evil').exists()

@pytest.mark.parametrize('make,end', [(zipped, 'zip'), (tarred, 'tar.gz')])
def test_bombs(tmp_path, make, end):
    bomb = make(tmp_path/f'bomb.{end}', *((f'{i}.png', bytes(2**24)) for i in range(6)))
    assert bomb.stat().st_size < 200_000
    refused(bomb, tmp_path/'out', 'unpacks to more than 64 MiB')
    refused(bomb, tmp_path/'out', 'unpacks to more than 10 MiB', max_gb=10/1024)
    assert len(names(extract(bomb, tmp_path/'out', max_ratio=5000))) == 6       # who trusts it can say so

def test_zip_that_lies_about_its_sizes(tmp_path):
    f = zipped(tmp_path/'a.zip', ('x.png', bytes(10**6)))
    f.write_bytes(f.read_bytes().replace((10**6).to_bytes(4, 'little'), (10).to_bytes(4, 'little')))
    refused(f, tmp_path/'out', 'is damaged')

def test_zip_of_an_unknown_compression(tmp_path):
    "Deflate64, which Windows writes for large files, is number 9; zipfile cannot read it."
    f = zipped(tmp_path/'a.zip', ('x.png', bytes(10**6)))
    deflate, deflate64 = (n.to_bytes(2, 'little') for n in (8, 9))
    data = bytearray(f.read_bytes())
    for signature, offset in ((b'PK\x03\x04', 8), (b'PK\x01\x02', 10)):
        at = data.index(signature) + offset
        assert data[at:at + 2] == deflate
        data[at:at + 2] = deflate64
    f.write_bytes(data)
    refused(f, tmp_path/'out', 'cannot be unpacked here .*unzip or 7z')

@pytest.mark.parametrize('twice', [('a.png', 'a.png'), ('a.png', 'A.PNG')])
def test_names_twice(tmp_path, twice):
    warned = pytest.warns(UserWarning) if twice[0] == twice[1] else pytest.MonkeyPatch.context()
    with warned: f = zipped(tmp_path/'a.zip', *((t, b'1') for t in twice))
    refused(f, tmp_path/'out', 'twice')

def test_more_after_the_end(tmp_path):
    f = tarred(tmp_path/'a.tar', ('x.png', b'1'), mode='w')
    (tmp_path/'a.tar.gz').write_bytes(gzip.compress(f.read_bytes() + bytes(2**22)))
    refused(tmp_path/'a.tar.gz', tmp_path/'out', 'data after its end')

def test_file_and_folder_of_one_name(tmp_path):
    refused(zipped(tmp_path/'a.zip', ('a', b'1'), ('a/b', b'2')), tmp_path/'out', 'cannot write')

def test_encrypted(tmp_path):
    f = zipped(tmp_path/'a.zip', ('x.png', b'1'*40))
    raw = bytearray(f.read_bytes())
    raw[6] |= 1; raw[raw.index(b'PK\1\2') + 8] |= 1
    f.write_bytes(raw)
    refused(f, tmp_path/'out', 'is encrypted')

KINDS = [('tar.gz', 'w:gz'), ('tar.xz', 'w:xz'), ('tar.bz2', 'w:bz2'), ('zip', None)]

HARMS = [(*kind, harm) for kind in KINDS for harm in ('cut', 'flip')] + [('tar', 'w', 'cut')]

@pytest.mark.parametrize('end,mode,harm', HARMS)
def test_damage(tmp_path, end, mode, harm):
    members = [(f'{i}.png', DATA[i*1000:i*1000 + 40_000]) for i in range(5)]
    path = tmp_path/f'a.{end}'
    f = zipped(path, *members) if mode is None else tarred(path, *members, mode=mode)
    raw = bytearray(f.read_bytes())
    if harm == 'cut': raw = raw[:len(raw)//2]
    else: raw[len(raw)//2] ^= 0xff
    f.write_bytes(raw)
    refused(f, tmp_path/'out', 'is damaged|neither zip nor tar')

@pytest.mark.parametrize('name,words', [('a.rar', 'unrar or 7z'), ('a.zip', 'neither zip nor tar'),
                                        ('a.tar.gz', 'neither zip nor tar')])
def test_no_archive(tmp_path, name, words):
    (tmp_path/name).write_bytes(b'Rar!' + DATA[:999])
    refused(tmp_path/name, tmp_path/'out', words)
    refused(tmp_path/'missing.zip', tmp_path/'out', 'is not a file')

def test_empty_and_in_the_way(tmp_path):
    refused(zipped(tmp_path/'a.zip'), tmp_path/'out', 'holds no file|neither')
    (tmp_path/'out').mkdir(exist_ok=True); (tmp_path/'out'/'x.png').write_bytes(b'mine')
    archive = zipped(tmp_path/'b.zip', ('x.png', b'theirs'), ('y.png', b'1'))
    refused(archive, tmp_path/'out', "already holds 'x.png'")
    assert (tmp_path/'out'/'x.png').read_bytes() == b'mine'
    extract(zipped(tmp_path/'c.zip', ('y.png', b'1')), tmp_path/'out')          # beside what is there: fine
    assert names(tmp_path/'out') == ['x.png', 'y.png']

@pytest.mark.parametrize('end,mode', [('tar.gz', 'w:gz'), ('tar.xz', 'w:xz'), ('tar', 'w')])
def test_good_tar(tmp_path, end, mode):
    i = tarfile.TarInfo('./d'); i.type, i.mode = tarfile.DIRTYPE, 0o000
    j = tarfile.TarInfo('d/run.png'); j.mode = 0o6777
    archive = tarred(tmp_path/f'a.{end}', (i, b''), (j, b'1'), ('d/e/f.png', DATA), mode=mode)
    out = extract(archive, tmp_path/'out')
    assert (out/'d'/'e'/'f.png').read_bytes() == DATA
    # neither setuid nor executable
    assert not (out/'d'/'run.png').stat().st_mode & 0o6111

# Sets -------------------------------------------------------------------------------------------------------

def test_get_public_from_one_end_to_the_other(server, tmp_path, monkeypatch):
    lesion_folder(tmp_path/'Toy', 8, 32)
    files = sorted((tmp_path/'Toy').rglob('*.png'))
    archive = zipped(tmp_path/'a.zip', *((str(p.relative_to(tmp_path)), p.read_bytes()) for p in files))
    server.rules = dict(data=archive.read_bytes(), cuts=[5000])
    sha = hashlib.sha256(archive.read_bytes()).hexdigest()
    toy = PublicSet('toy', 'rendered lesions', server.url, '8', 'Toy/images, Toy/masks', 'none', 'none',
                    ((server.url, sha),))
    monkeypatch.setitem(PUBLIC, 'toy', toy)
    for _ in range(2): out = get_public('toy', tmp_path/'sets')
    assert [p.name for p in find_pairs(out)] == [f'Toy/{i:04d}' for i in range(8)] and len(server.log) == 2

@pytest.mark.parametrize('name', [k for k, s in PUBLIC.items() if not s.files])
def test_by_hand(name, tmp_path):
    with pytest.raises(MedsynError, match='cannot be fetched by a program') as e:
        get_public(name, tmp_path/'x')
    assert PUBLIC[name].page in str(e.value) and not (tmp_path/'x').exists()

def test_registry():
    for k, s in PUBLIC.items():
        assert k == s.name and s.page.startswith('https://') and s.licence and s.citation and s.layout
        assert s.files or s.by_hand
        assert all(u.startswith('https://') and u.endswith('.zip') for u, _ in s.files)
