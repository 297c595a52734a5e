"README.md, and its pictures in README_files/, from the stored cells and outputs of nbs/index.ipynb. Nothing is executed."
import base64, json, posixpath, re, shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KINDS = ('image/jpeg', 'image/png', 'text/markdown', 'text/html', 'text/plain')  # the first that an output has is shown
FILES = 'README_files'

def text(x):
    "Notebook text as one string."
    return ''.join(x)

def rebase(md, here='nbs'):
    "Links relative to nbs/, written relative to the root."
    def fix(m): return m[1] + posixpath.normpath(posixpath.join(here, m[2]))
    return re.sub(r'(\]\(|src="|href=")(?!\w+:|[#/])([^)"\s]+)', fix, md)

def output(out, save):
    "One stored output as Markdown; `save(kind, base64)` returns a picture's path."
    if out['output_type'] == 'stream':
        if out['name'] == 'stderr': return ''
        kind, body = 'text/plain', text(out['text'])
    elif 'data' not in out: raise ValueError('nbs/index.ipynb stores an error: run `make render`')
    else:
        kind = next((k for k in KINDS if k in out['data']), None)
        if kind is None or any('widget' in k for k in out['data']): return ''
        body = text(out['data'][kind])
    if kind.startswith('image'): return f'![]({save(kind, body)})'
    if kind == 'text/plain': return '```\n' + body.strip('\n') + '\n```'
    return re.sub(r'data:(image/\w+);base64,([\w+/=]+)', lambda m: save(*m.groups()), body).strip('\n')

def readme(nb):
    "The Markdown of notebook `nb`, and its pictures as {path: bytes}."
    pics, parts = {}, ['<!-- Made from nbs/index.ipynb by `make readme`: edit the notebook. -->']
    def save(kind, body):
        name = f'{FILES}/{len(pics) + 1:02d}.{kind.split("/")[1].replace("jpeg", "jpg")}'
        pics[name] = base64.b64decode(body)
        return name
    for cell in nb['cells']:
        src = text(cell['source'])
        flags = dict(re.findall(r'^#\|\s*(\w+)[ :]*(.*?)\s*$', src, re.M))
        src = re.sub(r'^#\|.*\n?', '', src, flags=re.M).strip('\n')
        if cell['cell_type'] == 'raw' or 'hide' in flags or not src: continue
        if cell['cell_type'] == 'markdown': parts.append(rebase(src)); continue
        if flags.get('echo') != 'false': parts.append(f'```python\n{src}\n```')
        if flags.get('output') != 'false': parts += filter(None, (output(o, save) for o in cell['outputs']))
    return '\n\n'.join(parts) + '\n', pics

def main():
    md, pics = readme(json.loads((ROOT/'nbs/index.ipynb').read_text(encoding='utf-8')))
    (ROOT/'README.md').write_text(md, encoding='utf-8')
    shutil.rmtree(ROOT/FILES, ignore_errors=True)
    for name, data in pics.items():
        (ROOT/name).parent.mkdir(exist_ok=True)
        (ROOT/name).write_bytes(data)

if __name__ == '__main__': main()
