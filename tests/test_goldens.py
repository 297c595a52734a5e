"""Numbers recorded from the original programs, reached through the package's public functions.

Every folder with a `case.json` below $DIFFEDIT_LAB_GOLDENS (default ../shared/goldens) is one case: `<item>_<case>`. The files `checkers_*.py`
say how an item is reached; a checker computes tensors by name, and the test compares every tensor that the case expects within the case's own
bound. All settings come from the case, so a further case of a known item needs no new code."""
import fnmatch, inspect, json, math, os
from importlib import import_module
from pathlib import Path

import numpy as np, pytest, torch
from safetensors.torch import load_file

from golden_tools import model_of

GOLDENS = Path(os.environ.get('DIFFEDIT_LAB_GOLDENS') or Path(__file__).resolve().parents[1]/'../shared/goldens').resolve()
if not GOLDENS.is_dir(): pytest.skip(f'no golden vectors at {GOLDENS}: set DIFFEDIT_LAB_GOLDENS to their folder', allow_module_level=True)
CASES = sorted(p.parent for p in GOLDENS.rglob('case.json'))
CHECKERS = [import_module(f.stem).ITEMS for f in sorted(Path(__file__).parent.glob('checkers_*.py'))]
ITEMS = {k: f for items in CHECKERS for k,f in items.items()}

def item_of(folder, case):
    "The item's name; two families call different things `edit`, and the one that takes an order says so."
    name = case.get('item') or folder.name.rpartition('_')[0]
    return f'{name} by instruction' if 'instruction' in case.get('settings', {}) else name

class Tensors(dict):
    "A case's tensors by name, and the bounds of the expected ones."
    def __init__(self, folder, case, bounds):
        super().__init__(load_file(folder/'tensors.safetensors'))
        found = {n: v for k,v in case['tensors'].items() if v['role']=='expected' for n in (fnmatch.filter(self, k) or [k])} # 'after/*' stands for many
        self.bounds = {k: v.get('max_abs', bounds.get(k)) for k,v in found.items()}

def error(got, want):
    "Largest absolute difference; infinite where a value is not finite."
    got, want = (torch.as_tensor(np.array(x) if isinstance(x, np.ndarray) else x).double() for x in (got, want))
    assert got.shape==want.shape, f'shape {tuple(got.shape)}, recorded {tuple(want.shape)}'
    e = (got-want).abs().max().item() if want.numel() else 0.
    return e if math.isfinite(e) else math.inf

@pytest.mark.parametrize('folder', CASES, ids=lambda p: str(p.relative_to(GOLDENS)))
def test_golden(folder):
    "Every tensor a case expects, within the case's bound. The item's function says which defect of which original the default avoids."
    case = json.loads((folder/'case.json').read_text())
    item = item_of(folder, case)
    if item not in ITEMS: pytest.skip(f'no checker for item {item!r} yet')
    check = ITEMS[item]
    t = Tensors(folder, case, getattr(check, 'bounds', {})) # a family that states its bounds in prose has them beside its checker
    got, more = check(model_of(folder, case, getattr(check, 'dtype', torch.float32)), t, case['settings'])
    assert t.bounds, f'{folder} expects nothing'
    lost = [k for k in t.bounds if k not in got]
    assert not lost, f'{item}: nothing here computes {lost}'
    claims = [(k, got[k], t[k], b) for k,b in t.bounds.items()] + more
    far = {k: (e, b) for k,x,y,b in claims if not (e := error(x, y))<=b}
    assert not far, f'{item}: (error, bound) by tensor: {far}'

def test_every_checker_names_the_defect():
    assert len(ITEMS)==sum(map(len, CHECKERS)), 'two checkers for one item'
    for name,f in ITEMS.items(): assert inspect.getdoc(f), name
