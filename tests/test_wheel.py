"The wheel, built by way of the sdist from a bare copy, holds everything the package needs and nothing else."
import configparser, re, shutil, subprocess, sys, zipfile
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
LIB = 'diffedit_lab'
BUILT_FROM = 'settings.ini', 'setup.py', 'pyproject.toml', 'MANIFEST.in', 'constraints.txt', 'README.md', 'LICENSE'

@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    tmp = tmp_path_factory.mktemp('wheel')
    for name in BUILT_FROM: shutil.copy(ROOT/name, tmp)
    for name in LIB, 'nbs': shutil.copytree(ROOT/name, tmp/name, ignore=shutil.ignore_patterns('__pycache__'))
    r = subprocess.run([sys.executable, '-m', 'build', '--no-isolation'], cwd=tmp, capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return zipfile.ZipFile(next((tmp/'dist').glob('*.whl')))

def text(wheel, name): return wheel.read(next(n for n in wheel.namelist() if n.endswith(f'.dist-info/{name}'))).decode()

def test_wheel_holds_the_package(wheel):
    "Modules, sprites with their licence, and model folders: each file of the checkout's package."
    here = {p.relative_to(ROOT).as_posix() for p in (ROOT/LIB).rglob('*') if p.is_file() and '__pycache__' not in p.parts}
    packed = {n for n in wheel.namelist() if n.startswith(f'{LIB}/')}
    assert packed == here
    assert any(re.fullmatch(rf'{LIB}/data/sprites/\w+\.(webp|png)', n) for n in packed)
    assert any(n.startswith(f'{LIB}/data/') and 'LICENSE' in n for n in packed)

def test_wheel_holds_the_models(wheel):
    names = set(wheel.namelist())
    for part in 'unet/config.json', 'unet/diffusion_pytorch_model.safetensors', 'vae/config.json', 'tokenizer/tokenizer_config.json':
        assert f'{LIB}/models/tiny/{part}' in names

def test_wheel_holds_nothing_else(wheel):
    assert not [n for n in wheel.namelist() if not n.startswith(f'{LIB}/') and '.dist-info/' not in n]
    assert not [n for n in wheel.namelist() if Path(n).suffix in {'.ipynb', '.bin', '.pt', '.ckpt', '.pkl', '.pyc'}]

def test_wheel_metadata(wheel):
    ini = configparser.ConfigParser(interpolation=None)
    ini.read(ROOT/'settings.ini')
    cfg, meta, eps = ini['DEFAULT'], text(wheel, 'METADATA'), text(wheel, 'entry_points.txt').replace(' ', '')
    version = re.search(r'^__version__ = "(.+)"', (ROOT/LIB/'__init__.py').read_text(), re.M)[1]
    assert f'\nName: {cfg["lib_name"]}\nVersion: {version}\n' in meta
    assert 'Requires-Dist: torch>=2.2\n' in meta and 'torch==' not in meta  # bounds stay open
    assert cfg['console_scripts'] in eps and f'{LIB}={LIB}._modidx:d' in eps
