"The widgets in a real browser, JupyterLab and Voila: a slider, a painted mask, a cancelled run. Skipped, saying so, where Chromium or playwright is missing."
import json, os, re, shutil, signal, socket, subprocess, sys, time, urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import nbformat, pytest

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
FLAGS = '--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync'.split()
SLOW, LONG = 60_000, 240_000   # milliseconds: a run, and a kernel that starts on a busy machine

CELLS = ["from diffedit_lab import load, scene\nfrom diffedit_lab.widgets import explore, paint\nfrom diffedit_lab.methods.diffedit import diffedit\nfrom diffedit_lab.methods.blended_latents import blended_latents",
         "model, s = load(device='cpu'), scene('a horse on grass', seed=3)",
         "x = explore(diffedit, model, s, target='a zebra on grass', steps=4, n=1)\nx.add_class('first')\nx",
         "p = paint(s)\np.add_class('brush')\np",
         "y = explore(blended_latents, model, s, mask=p, target='a cow on grass', n=1, steps=3).wait()\ny.add_class('second')\ny"]

def write_notebook(folder):
    nb = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in CELLS])
    nb.metadata['kernelspec'] = dict(display_name='Python 3', language='python', name='python3')
    nbformat.write(nb, folder/'demo.ipynb')

def free_port():
    with socket.socket() as o: o.bind(('127.0.0.1', 0)); return o.getsockname()[1]

def command(kind, folder, port):
    if kind=='voila': return [sys.executable, '-m', 'voila', 'demo.ipynb', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1']
    return [sys.executable, '-m', 'jupyterlab', '--no-browser', '--ip=127.0.0.1', f'--port={port}', '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--allow-root', f'--ServerApp.root_dir={folder}']

@contextmanager
def serving(kind, folder):
    "A server for the notebook; its address. With it its kernels go."
    port, settings = free_port(), folder/'settings'
    quiet = settings/'@jupyterlab'/'apputils-extension'; quiet.mkdir(parents=True)
    (quiet/'notification.jupyterlab-settings').write_text(json.dumps(dict(fetchNews='false', checkForUpdates=False)))
    env = os.environ|dict(JUPYTERLAB_WORKSPACES_DIR=str(folder/'workspaces'), JUPYTERLAB_SETTINGS_DIR=str(settings), JUPYTER_RUNTIME_DIR=str(folder/'runtime'), OMP_NUM_THREADS='1')
    with open(folder/'server.log', 'w') as log: server = subprocess.Popen(command(kind, folder, port), cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(120):
            if server.poll() is not None: break
            try: urllib.request.urlopen(f'http://127.0.0.1:{port}/static/' if kind=='voila' else f'http://127.0.0.1:{port}/api', timeout=1); break
            except urllib.error.HTTPError: break
            except OSError: time.sleep(.5)
        assert server.poll() is None, (folder/'server.log').read_text()[-3000:]
        yield f'http://127.0.0.1:{port}' + ('/' if kind=='voila' else '/lab/tree/demo.ipynb')
    finally:
        os.killpg(server.pid, signal.SIGINT)
        try: server.wait(20)
        except subprocess.TimeoutExpired: os.killpg(server.pid, signal.SIGKILL)

@pytest.fixture(scope='module')
def browser():
    playwright = pytest.importorskip('playwright.sync_api', reason='the widgets were not tried in a browser: pip install playwright')
    if not CHROMIUM: pytest.skip('the widgets were not tried in a browser: no Chromium on this machine')
    with playwright.sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()

CONNECTED = "async () => (await (await fetch('/api/kernels')).json()).some(k => k.connections && k.execution_state=='idle')"

def run_all(page):
    "JupyterLab's menu: Run, Run All Cells, once the page has its kernel: before that JupyterLab drops the click, or asks. It is answered, and what it asked is in the error."
    from playwright.sync_api import TimeoutError
    asked = []
    def answer(dialog): asked.append(dialog.inner_text()); dialog.locator('.jp-mod-accept').click()
    page.add_locator_handler(page.locator('.jp-Dialog'), answer)
    page.wait_for_selector('.jp-Notebook', timeout=LONG)
    for _ in range(3):
        page.wait_for_function(CONNECTED, polling=500, timeout=LONG)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=LONG)
        page.click('.lm-MenuBar-itemLabel:text-is("Run")'); page.click('.lm-Menu-itemLabel:text-is("Run All Cells")')
        began = page.locator('.jp-InputPrompt').filter(has_text=re.compile(r'\[[*1-9]')).first # [*] or [1]; before that [ ]
        with suppress(TimeoutError): return began.wait_for(timeout=30_000)
    raise AssertionError(f'Run All Cells ran no cell; JupyterLab asked {asked}')

class Panel:
    "One `Explorer` on a page."
    def __init__(self, page, name): self.page, self.at = page, f'.{name}'
    def part(self, css): return self.page.locator(f'{self.at} {css}')
    def picture(self): return self.page.evaluate("""async at => {const b = await (await fetch(document.querySelector(at + ' img.widget-image').src)).arrayBuffer();
        return Array.from(new Uint8Array(await crypto.subtle.digest('SHA-1', b))).join()}""", self.at)
    def slide(self, word, key, times=1):
        knob = self.part(f'.widget-inline-hbox:has(label:text-is("{word}")) .noUi-handle'); knob.focus()
        for _ in range(times): knob.press(key)
    def type(self, word, text): field = self.part(f'.widget-inline-hbox:has(label:text-is("{word}")) input'); field.fill(text); field.press('Enter')
    def live(self, on): self.part('.widget-checkbox:has-text("draw when") input').set_checked(on)
    def click(self, name): self.part(f'button:text-is("{name}")').click()
    def says(self, text, timeout=SLOW): self.part(f'.widget-html:has-text("{text}")').first.wait_for(timeout=timeout)
    def changes(self, before):
        "The picture, once it is another one."
        until = time.time()+SLOW/1000
        while (now := self.picture())==before: assert time.time()<until, 'the picture stayed as it was'; time.sleep(.1)
        return now
    def idle(self): self.part('button:text-is("Cancel"):disabled').wait_for(timeout=SLOW)

def stroke(page, *points):
    "A line drawn with the mouse, in shares of the canvas."
    canvas = page.locator('.brush canvas'); canvas.scroll_into_view_if_needed(); o = canvas.bounding_box()
    at = [(o['x']+x*o['width'], o['y']+y*o['height']) for x,y in points]
    page.mouse.move(*at[0]); page.mouse.down()
    for p in at[1:]: page.mouse.move(*p, steps=6)
    page.mouse.up()

def tap(page, x, y):
    "A finger on the canvas."
    o = page.locator('.brush canvas').bounding_box(); page.touchscreen.tap(o['x']+x*o['width'], o['y']+y*o['height'])

def play(kind, page):
    "What a student does."
    if kind=='jupyterlab': run_all(page)
    page.wait_for_selector('.second img.widget-image', timeout=LONG)
    x, y = Panel(page, 'first'), Panel(page, 'second')

    x.says('diffedit:'); x.idle(); before = x.picture() # a slider changes the picture
    x.slide('guidance', 'ArrowRight'); x.changes(before); x.idle(); shown = x.picture()
    x.slide('threshold', 'ArrowLeft'); x.says('without the model'); cut = x.changes(shown) # so does the threshold, at once
    x.part('.widget-hbox button[class*="run"]').last.click(); assert x.changes(cut)==before # a thumbnail brings the first one back

    x.slide('steps', 'End'); x.part('button:text-is("Cancel"):enabled').wait_for() # 100 steps; cancelled within two seconds
    pressed = time.time(); x.click('Cancel'); x.says('cancelled', 10_000)
    assert time.time()-pressed<2 and x.picture()==before
    x.type('target', ''); x.says('ValueError: target must be')  # an error is one line
    x.live(False); x.slide('steps', 'Home'); x.slide('steps', 'ArrowRight', 3); x.type('target', 'a cow on grass'); x.live(True)
    x.click('Draw'); x.says("diffedit: 'a cow on grass'"); x.idle() # and the panel works on

    empty = y.picture(); stroke(page, (.3,.5), (.7,.5), (.7,.8)); y.click('Draw'); line = y.changes(empty) # a painted mask goes into an edit
    tap(page, .2, .2); y.click('Draw'); dot = y.changes(line)  # a finger paints, too
    for _ in range(2): page.click('.brush button:text-is("undo")')
    y.click('Draw'); assert y.changes(dot)==empty

@pytest.mark.parametrize('kind', ['jupyterlab', 'voila'])
def test_widgets(kind, browser, tmp_path):
    pytest.importorskip(kind); pytest.importorskip('anywidget'); write_notebook(tmp_path)
    with serving(kind, tmp_path) as url:
        page = browser.new_page(viewport=dict(width=1500, height=2400), has_touch=True); errors = []
        page.on('pageerror', lambda e: errors.append(str(e)))
        page.goto(url, timeout=LONG)
        try: play(kind, page)
        finally:
            if keep := os.environ.get('DIFFEDIT_LAB_SHOTS'): Path(keep).mkdir(exist_ok=True); page.screenshot(path=f'{keep}/{kind}.png') # to look at
        assert not page.locator('text=Traceback').count() and not errors, errors
        page.close()

def test_a_click_sorts_a_saved_comparison(browser, tmp_path):
    from PIL import Image
    from diffedit_lab.bench import Comparison
    from diffedit_lab.result import Edit
    im = Image.new('RGB', (16,16)); edit = Edit(im, None, None, im, 'm', {}, 1., 2)
    facts = [{'method': m, 'seconds': t, 'background dB': d} for m, t, d in (('sdedit', 2., None), ('diffedit', 10., 24.), ('imagic', 9., float('inf')))]
    page = browser.new_page()
    page.goto(Comparison([edit]*3, facts, im, note='a note').save(tmp_path/'table.html').as_uri())
    def names(column): page.click(f'th:text-is("{column}")'); return page.locator('tr[data-row] td:nth-child(2)').all_inner_texts()
    assert names('seconds') == ['sdedit', 'imagic', 'diffedit'] and names('seconds') == ['diffedit', 'imagic', 'sdedit']
    assert names('background dB') == ['diffedit', 'imagic', 'sdedit'] and names('background dB') == ['imagic', 'diffedit', 'sdedit'] # no number: last
    assert names('method') == ['diffedit', 'imagic', 'sdedit']
    assert page.locator('tr').last.inner_text().strip() == 'the source'
    page.close()
