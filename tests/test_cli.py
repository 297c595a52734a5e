"The command line: what it prints, what it writes, and one line for everything that goes wrong."
import json, subprocess, sys
from pathlib import Path
import numpy as np, pytest
from PIL import Image
from diffedit_lab.bench import MEANING, all_methods
from diffedit_lab.cli import main
from diffedit_lab.scenes import scene

COMMANDS = 'demo', 'edit', 'quality', 'style-csv', 'methods'
QUICK = '--steps', '5', '--set', 'n=2'

@pytest.fixture
def horse(tmp_path):
    p = tmp_path/'horse.png'
    scene('a horse on grass', seed=3).image.save(p)
    return p

@pytest.mark.parametrize('command', ['', *COMMANDS])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as e: main([*command.split(), '--help'])
    out, err = capsys.readouterr()
    assert e.value.code == 0 and not err
    assert out.startswith(f'usage: diffedit-lab {command}'.strip())
    if not command: assert all(c in out for c in COMMANDS)

def test_every_option_is_explained(capsys):
    with pytest.raises(SystemExit): main(['edit', '--help'])
    words = ' '.join(capsys.readouterr().out.split())
    for o in 'method image source target out model mask seed steps strength guidance set'.split(): assert f'--{o} ' in words

def test_installed_command():
    "The entry point, in a process of its own: streams and exit status as a shell sees them."
    exe = Path(sys.executable).parent/'diffedit-lab'
    if not exe.exists(): pytest.skip('the package is not installed in this environment')
    r = subprocess.run([exe, 'edit', '--image', 'no.png', '--target', 'x'], capture_output=True, text=True, timeout=300)
    assert (r.returncode, r.stdout) == (2, '') and r.stderr.count('\n') == 1 and r.stderr.startswith('diffedit-lab: image ')

def test_style_csv(horse, tmp_path, monkeypatch, capsys):
    "A row that cannot be done says why and the others are done; the second run makes nothing again."
    monkeypatch.chdir(tmp_path); table = tmp_path/'edits.csv'
    head = ',case_number,prompt,image_path,target,blend_word,eq_params,tau_v,tau_c,tau_s,tau_u,edit_type'
    table.write_text('\n'.join([head, '0,0,a horse on grass,horse.png,a zebra on grass,,,[.5],[.6],[.8],[.5],Replacement', '1,1,a horse on grass,lost.png,a zebra on grass,,,,,,,']))
    command = ['style-csv', str(table), '--set', 'steps=3', '--set', 'inner=2']
    assert main(command) == 2
    out, err = capsys.readouterr()
    assert out.splitlines()[0].startswith('case 0  edited: ') and 'lost.png' in out.splitlines()[1] and err.count('\n') == 1 and '1 of 2 rows failed' in err
    made = Path(out.splitlines()[0].split(': ', 1)[1]); assert Image.open(made).size == (128,128)
    assert main([*command, '--end-case', '1']) == 0 and capsys.readouterr().out.startswith('case 0  there: ')

def test_methods(capsys):
    assert main(['methods']) == 0
    out, err = capsys.readouterr()
    assert not err and {'sdedit', 'diffedit', 'fast_diffedit'} <= set(all_methods())
    for name, f in all_methods().items(): assert f'{name}\n' in out and f.__doc__ in out
    assert 'Couairon' in out

def test_edit(horse, tmp_path, capsys):
    out = tmp_path/'new'/'zebra'
    assert main(['edit', '--image', str(horse), '--source', 'a horse on grass', '--target', 'a zebra on grass', '--out', str(out), '--seed', '4',
                 '--strength', '.6', '--guidance', '5', '--set', 'negative=a dog', *QUICK]) == 0
    said, err = capsys.readouterr()
    assert not err and "diffedit: 'a zebra on grass', 128x128" in said and str(out/'picture.png') in said and '\x1b' not in said
    used = json.loads((out/'edit.json').read_text())['settings']
    assert {k: used[k] for k in ('seed','strength','guidance','steps','n','negative')} == dict(seed=4, strength=.6, guidance=5., steps=5, n=2, negative='a dog')
    assert Image.open(out/'image.png').size == (128, 128)

def test_edit_with_a_mask(horse, tmp_path, capsys):
    mask = np.zeros((128, 128), np.uint8); mask[:, 64:] = 255
    Image.fromarray(mask).save(tmp_path/'mask.png')
    assert main(['edit', '--method', 'sdedit', '--image', str(horse), '--target', 'a zebra on grass', '--mask', str(tmp_path/'mask.png'),
                 '--out', str(tmp_path/'out'), '--steps', '5', '--set', 'feather=0']) == 0
    before, after = (np.asarray(Image.open(p).convert('RGB')) for p in (horse, tmp_path/'out'/'image.png'))
    assert (before[:, :64] == after[:, :64]).all() and (before[:, 64:] != after[:, 64:]).any()

def test_warning_is_one_line_every_time(horse, tmp_path, capsys):
    for _ in range(2):
        assert main(['edit', '--image', str(horse), '--target', 'unicorn', '--out', str(tmp_path/'out'), *QUICK]) == 0
        err = capsys.readouterr().err
        assert err.count('\n') == 1 and err.startswith('diffedit-lab: warning: ') and "'unicorn'" in err

def test_demo(tmp_path, capsys):
    assert main(['demo', '--out', str(tmp_path/'demo')]) == 0
    out, err = capsys.readouterr()
    assert not err
    for s in ('IoU', 'before paste-back', 'after paste-back', 'the judge sees', '140 UNet rows', str(tmp_path/'demo'/'picture.png')): assert s in out, s
    assert Image.open(tmp_path/'demo'/'picture.png').width > 3*128

def test_quality(tmp_path, capsys):
    file = tmp_path/'q.json'
    assert main(['quality', '--cases', '1', '--json', str(file)]) == 0
    q, out = json.loads(file.read_text()), capsys.readouterr().out
    assert {'codec_psnr', 'clip_object', 'clip_background', 'gen_object', 'gen_background', 'inversion_psnr', 'diffedit_iou', 'fast_diffedit_iou',
            'swap_success', 'swap_background_psnr', 'two_object_iou', 'cases'} <= set(MEANING)
    assert set(q) == set(MEANING)|{f'{k}_se' for k in MEANING if k != 'cases'}
    assert type(q['cases']) is int and q['cases'] == 1
    for k in MEANING:
        assert f'| {k} ' in out
        if k != 'cases': assert type(q[k]) is float and (q[k] > 5 if k.endswith('_psnr') else 0 <= q[k] <= 1) and q[f'{k}_se'] >= 0, k

def test_terminal_pictures(monkeypatch, capsys):
    from diffedit_lab import cli
    im = Image.new('RGB', (30, 10), 'red')
    monkeypatch.setattr('sys.stdout.isatty', lambda: True, raising=False); monkeypatch.setenv('COLUMNS', '60'); monkeypatch.delenv('NO_COLOR', raising=False)
    monkeypatch.setenv('COLORTERM', 'truecolor'); cli._show(im)
    assert capsys.readouterr().out.count('\n') == 10
    for k, v in dict(NO_COLOR='1', COLORTERM='').items():
        with monkeypatch.context() as m:
            m.setenv(k, v); cli._show(im)
            assert capsys.readouterr().out == ''

BAD = {
    'no command': ('', 'COMMAND'),
    'unknown command': ('paint', 'paint'),
    'unknown option': ('edit --image {horse} --target x --colour red', '--colour'),
    'no picture': ('edit --target x', '--image'),
    'missing picture': ('edit --image {tmp}/no.png --target x', 'does not exist'),
    'picture is a folder': ('edit --image {tmp} --target x', 'is a folder'),
    'picture is no picture': ('edit --image {text} --target x', 'cannot be read as a picture'),
    'no target': ('edit --image {horse}', 'needs --target'),
    'unknown method': ('edit --image {horse} --target x --method magic', 'there are blended_latents, diffedit'),
    'unknown model': ('edit --image {horse} --target x --model huge', 'no model'),
    'judge as model': ('edit --image {horse} --target x --model tiny-clip', 'tiny-clip'),
    'strength out of range': ('edit --image {horse} --target x --strength 1.2', 'strength must be in [0, 1]'),
    'strength is no number': ('edit --image {horse} --target x --strength much', 'much'),
    'steps zero': ('edit --image {horse} --target x --steps 0', 'steps must be'),
    'negative seed': ('edit --image {horse} --target x --seed -1', 'seed must be'),
    'set without a value': ('edit --image {horse} --target x --set n', 'name=value'),
    'set of an unknown keyword': ('edit --image {horse} --target x --set wobble=3', 'wobble'),
    'set out of range': ('edit --image {horse} --target x --set threshold=7', 'threshold must be'),
    'mask for another picture': ('edit --image {horse} --target x --mask {wide}', 'mask is 64x16'),
    'missing mask': ('edit --image {horse} --target x --mask {tmp}/no.png', 'does not exist'),
    'out is a file': ('edit --image {horse} --target x --out {text}', 'name a folder'),
    'out below a file': ('demo --out {text}/deep', 'cannot be written'),
    'no cases': ('quality --cases 0', '--cases must be'),
    'json is a folder': ('quality --json {tmp}', 'name a file'),
    'json in no folder': ('quality --json {tmp}/no/q.json', 'there is no folder'),
}

@pytest.mark.parametrize('kind', BAD)
def test_bad_input_is_one_line(kind, horse, tmp_path, capsys):
    (tmp_path/'notes.txt').write_text('not a picture')
    Image.new('L', (64, 16)).save(tmp_path/'wide.png')
    line, part = BAD[kind]
    places = dict(horse=horse, tmp=tmp_path, text=tmp_path/'notes.txt', wide=tmp_path/'wide.png')
    assert main([w.format(**places) for w in line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == '' and err.count('\n') == 1 and err.startswith('diffedit-lab: ') and part in err, err
    assert 'Traceback' not in err

def test_ctrl_c(monkeypatch, capsys):
    from diffedit_lab import cli
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'load', stop)
    assert main(['quality', '--cases', '1']) == 130
    assert capsys.readouterr().err == 'diffedit-lab: stopped\n'
