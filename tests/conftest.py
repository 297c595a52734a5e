"What the tests share: the embedded models, loaded once, on the CPU and without a network."
import os

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TQDM_DISABLE', '1')

import pytest, torch

torch.set_num_threads(min(2, int(os.environ.get('OMP_NUM_THREADS') or 2)))

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
