"What the tests share: the embedded models, loaded once, on the CPU and without a network."
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TQDM_DISABLE', '1')

import pytest, torch

# `make test` runs as many workers as there are cores, four at most (pytest-xdist); each has its share of the cores.
THREADS = min(2, int(os.environ.get('OMP_NUM_THREADS') or 2), max(1, (os.cpu_count() or 1) // int(os.environ.get('PYTEST_XDIST_WORKER_COUNT') or 1)))
torch.set_num_threads(THREADS)

@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file's tests share what is slow to make, so they go to one worker; each notebook goes to any."
    from xdist.scheduler import LoadScopeScheduling
    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid): return nodeid if '::test_notebook[' in nodeid else nodeid.split('::')[0]
    return Files(config, log)

@pytest.fixture(scope='session')
def model():
    "The embedded text-to-image model."
    from diffedit_lab import load
    return load('tiny', device='cpu', dtype=torch.float32)

@pytest.fixture(scope='session')
def judge():
    "The embedded CLIP."
    from diffedit_lab import load_clip
    return load_clip(device='cpu')

@pytest.fixture(scope='session')
def scene():
    "A horse on grass."
    import diffedit_lab
    return diffedit_lab.scene('a horse on grass', seed=3)
