"The site in _docs/ from the stored outputs: nbdev's processing, smalldocs' pages, formulae as MathML. Nothing is executed or fetched."
import html, os, re, shutil
from pathlib import Path
from latex2mathml.converter import convert
from nbdev.config import nbpath2html
from nbdev.doclinks import _build_modidx
from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs
from smalldocs.site import build

ROOT = Path(__file__).resolve().parent.parent
NUMBER = r'(?<![\w/])((?:[\w.-]+/)*)\d+[a-zA-Z0-9]*_(?=\w+\.ipynb)'  # of a notebook's file name, in a link or the sidebar
NOWHERE = r'\[source\]\(/blob/[^)]*\){[^}]*}'                       # nbdev's link to the source of a project without a host
FAR = r'@import url\([^)]*//[^)]*\);?'                               # a theme's web font; the system's own serves

def prepare(proc):
    "Call pages as nbdev's links call them, `images` for `00_images`; leave out what only Quarto reads, and where a notebook's own classes seem to live."
    for p in sorted(proc.rglob('*.ipynb')):
        s = re.sub(NOWHERE + r'|output-file: [\w.-]+\\n|__main__\.', '', p.read_text(encoding='utf-8'))
        p.unlink()
        p.with_name(nbpath2html(p).stem + '.ipynb').write_text(re.sub(r'(?<=\]\()' + NUMBER, r'\1', s), encoding='utf-8')
    side, site = proc/'sidebar.yml', proc/'nbdev.yml'
    side.write_text(re.sub(NUMBER, r'\1', side.read_text()))
    site.write_text(site.read_text().split('format-links')[0])

def mathml(m):
    "One formula of a page."
    return convert(html.unescape(m[2]).strip()[2:-2], display='block' if m[1] == 'display' else 'inline')

def finish(page, out):
    "Links that work from a folder and lead somewhere, and no formula left for a script to draw."
    s = page.read_text(encoding='utf-8')
    s = re.sub(r'<span class="math (inline|display)">(.*?)</span>', mathml, s, flags=re.S)
    s = re.sub(r'<(link|script)\b[^>]*katex[^>]*>(</script>)?', '', s)
    s = re.sub(r'<a href="[^"]*#_\w+">(.*?)</a>', r'\1', s)  # nbdev links private names, which have no entry
    s = re.sub(r'href="/(?!/)', f'href="{os.path.relpath(out, page.parent)}/', s)
    page.write_text(s, encoding='utf-8')

def main():
    os.chdir(ROOT)
    refresh_quarto_yml()
    _build_modidx()
    proc = proc_nbs(n_workers=0, force=True)
    prepare(proc)
    site, out = build(proc, quiet=True), ROOT/'_docs'
    shutil.rmtree(out, ignore_errors=True)
    shutil.move(site.out, out)
    for page in out.rglob('*.html'): finish(page, out)
    for css in out.rglob('*.css'): css.write_text(re.sub(FAR, '', css.read_text(encoding='utf-8')), encoding='utf-8')
    for w in site.warnings: print('warning:', w)
    print(f'{len(site.pages)} pages: open _docs/index.html')

if __name__ == '__main__': main()
