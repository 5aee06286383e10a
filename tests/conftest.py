"""Every test runs on the CPU, with strict dtype promotion and NaN checks, and imports the scripts from the folder above."""
import os
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = ("--xla_backend_optimization_level=0 "    # compile faster; the results are held against laws
                           "--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp())    # shared by workers and the runs they start
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import train  # noqa: E402

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_debug_nans", True)


@pytest.fixture
def x64():
    """Double precision for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


TINY = ("--n_h0 5 --n_h1 4 --batch_train 3 --task_size 3 --dac_bits 3 --batch_test 5 --lr_drop 3").split()


def launch(folder, *flags, **options):
    """train.py as a subprocess in a folder."""
    return subprocess.Popen([sys.executable, str(ROOT/"train.py"), *flags], cwd=folder, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def call(capsys, *flags):
    """Exit status, standard output and error of train.py in this process."""
    status = train.main([*TINY, *flags])
    return status, *capsys.readouterr()


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def arrays(folder):
    with np.load(folder/"checkpoint.npz") as file:
        return {name: file[name] for name in file.files}
