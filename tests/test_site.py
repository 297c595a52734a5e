"The site: every page is built, every link leads somewhere, and nothing is fetched from a network."
import re, shutil, subprocess, sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
import pytest

ROOT = Path(__file__).resolve().parent.parent
NBS = [p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(d[0] in '._' for d in p.relative_to(ROOT).parts)]

class Page(HTMLParser):
    "What a page refers to, and what may be referred to in it."
    def __init__(self, file):
        super().__init__()
        self.file, self.refs, self.ids, self.pictures = file, [], set(), 0
        self.feed(file.read_text(encoding='utf-8'))
    def handle_starttag(self, tag, attrs):
        self.ids |= {v for k, v in attrs if k in ('id', 'name')}
        self.refs += [(tag, v) for k, v in attrs if k in ('href', 'src') and v]
        self.pictures += tag == 'img'

def broken(pages):
    "(page, reference) for every reference to a file or a place in a file that is not there."
    by_file = {p.file.resolve(): p for p in pages}
    for p in pages:
        for tag, ref in p.refs:
            url = urlsplit(ref)
            if url.scheme or url.netloc: continue
            file = (p.file.parent/unquote(url.path)).resolve() if url.path else p.file.resolve()
            if not file.exists() or url.fragment and file in by_file and unquote(url.fragment) not in by_file[file].ids: yield p.file.name, ref

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The site, built from the notebooks as they are."
    here = tmp_path_factory.mktemp('site')
    for name in 'nbs', 'diffedit_lab', 'tools': shutil.copytree(ROOT/name, here/name, ignore=shutil.ignore_patterns('__pycache__', '*.safetensors'))
    for name in 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md': shutil.copy(ROOT/name, here)
    r = subprocess.run([sys.executable, 'tools/docs.py'], cwd=here, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert r.returncode == 0, r.stdout[-3000:]
    return here/'_docs'

@pytest.fixture(scope='module')
def pages(site): return [Page(p) for p in site.rglob('*.html')]

def test_every_notebook_is_a_page(pages): assert len(pages) == len(NBS)

def test_every_link_leads_somewhere(pages): assert not list(broken(pages))

def test_the_sidebar_knows_every_notebook():
    assert sorted(re.findall(r'- (\S+\.ipynb)', (ROOT/'nbs'/'sidebar.yml').read_text())) == sorted(p.relative_to(ROOT/'nbs').as_posix() for p in NBS)

def test_nothing_is_fetched(pages, site):
    assert not [(p.file.name, ref) for p in pages for tag, ref in p.refs if tag != 'a' and (urlsplit(ref).netloc or urlsplit(ref).scheme in ('http','https'))]
    sheets = {p.name: p.read_text(encoding='utf-8') for p in site.rglob('*.css')}
    assert 'cosmo.min.css' in sheets and not [n for n, s in sheets.items() if re.search(r'(@import|url\()[^;)]{0,9}//', s)]

def test_no_page_was_made_by_running(pages):
    assert not [p.file.name for p in pages if 'it/s]' in p.file.read_text(encoding='utf-8')] # a bar of progress

def test_pictures_are_there(pages):
    assert next(p for p in pages if p.file.name == 'index.html').pictures >= 2

def test_a_broken_link_is_seen(tmp_path):
    (tmp_path/'a.html').write_text('<p id="x"><a href="b.html"></a><a href="#x"></a><a href="#y"></a><img src="c.png"><a href="http://d.e"></a>')
    assert [ref for _, ref in broken([Page(tmp_path/'a.html')])] == ['b.html', '#y', 'c.png']
