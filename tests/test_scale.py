"""The same run on one device, on eight, and on two processes."""
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY, arrays

STEP = """
import sys
import numpy as np
import jax
jax.config.update("jax_num_cpu_devices", int(sys.argv[1]))
import train
cfg, device = train.configure(dict(n_h0=9, n_h1=8, batch_train=4, task_size=6, dac_bits=4, n_inner=2, grad_thr=0.1))
assert jax.device_count() == int(sys.argv[1])
meta = train.meta_of(train.start(cfg, device))
def gradient(key, meta):
    return jax.value_and_grad(train.meta_loss, has_aux=True)(meta, key, cfg, device)
keys = jax.random.split(jax.random.key(1), int(sys.argv[3]))
out = jax.jit(lambda keys, meta: train.on_chips(gradient, keys, meta, parts=4))(keys, meta)
np.savez(sys.argv[2], *jax.tree.leaves(out))
"""


@pytest.mark.parametrize("n_chips", [6, 1])    # over 8 devices: two at a time on 4 devices each; one on 4
def test_eight_devices_equal_one(tmp_path, n_chips):
    for devices in (1, 8):
        subprocess.run([sys.executable, "-c", STEP, str(devices), tmp_path/f"{devices}.npz", str(n_chips)], check=True,
                       env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=300)
    with np.load(tmp_path/"1.npz") as one, np.load(tmp_path/"8.npz") as eight:
        for name in one.files:
            assert np.abs(one[name]).max() > 0
            np.testing.assert_allclose(one[name], eight[name], atol=1e-5*np.abs(one[name]).max(), rtol=0)


def test_two_processes_equal_one(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = [sys.executable, str(ROOT/"train.py"), *TINY, "--n_iter", "1",
             "--n_chips", str(2*os.cpu_count())]    # a multiple of the devices of both hosts, one a core

    def start(folder, **variables):
        (tmp_path/folder).mkdir(exist_ok=True)
        return subprocess.Popen(flags, cwd=tmp_path/folder, env=os.environ | variables, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    pair = [start("pair", JAX_COORDINATOR_ADDRESS=f"127.0.0.1:{port}", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i))
            for i in range(2)]
    outputs = [process.communicate(timeout=400) for process in pair]
    assert [process.returncode for process in pair] == [0, 0], outputs
    assert "MSE before adaptation" in outputs[0][0] and "MSE" not in outputs[1][0]    # the first host alone reports
    alone = start("alone")
    alone.communicate(timeout=400)
    one, two = arrays(tmp_path/"alone/run/pcm"), arrays(tmp_path/"pair/run/pcm")
    for name in ("hidden0", "hidden1", "readout", "theta", "hidden1_m", "readout_v"):
        np.testing.assert_allclose(one[name], two[name], atol=1e-5*np.abs(one[name]).max(), rtol=0)
