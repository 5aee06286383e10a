"""Circuits around the devices, against plain loops and statistics."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import begun, call, configured

import analog
import network
import train
from img import circuits, studies

KEY = jax.random.key(3)


def test_a_converter_has_the_nearest_of_its_levels():
    """2^n − 1, from −full to full; its derivative is 1 where it does not clip."""
    x = jnp.linspace(-3.0, 3.0, 1001)
    found = circuits.quantise(x, 3, 2.0)
    levels = np.linspace(-2, 2, 7)
    nearest = np.abs(found - levels[np.abs(x[:, None] - levels).argmin(1)])
    assert np.sum(nearest > 1e-5) <= 6  # at the middle between two
    assert len(np.unique(np.round(found, 4))) == 7
    slope = jax.vmap(jax.grad(lambda x: circuits.quantise(x, 3, 2.0)))(x)
    np.testing.assert_array_equal(slope, np.abs(x) <= 2)


def plain_wires(g, ohm):
    """Conductances (µS) of one array [rows, cols] through wires, cell by cell: the drops along both
    ways of each cell's current, segment by segment."""
    rows, columns = g.shape
    found = np.zeros_like(g)
    for i in range(rows):
        for j in range(columns):
            along_row = sum(g[i, k:].sum() for k in range(j + 1))
            along_column = sum(g[: k + 1, j].sum() for k in range(i, rows))
            found[i, j] = g[i, j] * (1 - 1e-6 * ohm * (along_row + along_column))
    return found


def test_wires_equal_a_plain_loop():
    g = np.random.default_rng(0).uniform(0.1, 12, (2, 7, 9))
    found = circuits.wires(analog.PCM, jnp.asarray(g, jnp.float32), 500.0)
    expected = [plain_wires(side, 500.0) for side in g]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert np.min(found / g) < 0.9


def test_wires_are_the_first_order_of_the_network_of_resistors():
    """Kirchhoff's laws, solved for one array whose rows are all driven."""
    rows, columns, ohm = 4, 5, 50.0
    g = 1e-6 * np.random.default_rng(1).uniform(1, 12, (rows, columns))
    n, wire = rows * columns, 1 / ohm
    index = np.arange(n).reshape(rows, columns)
    matrix, known = np.zeros((2 * n, 2 * n)), np.zeros(2 * n)

    def join(a, b, conductance):
        """A conductance between two nodes; b is None for ground, or a driven end at 1 V."""
        matrix[a, a] += conductance
        if b is not None:
            matrix[b, b] += conductance
            matrix[a, b] -= conductance
            matrix[b, a] -= conductance

    for i in range(rows):
        for j in range(columns):
            row_node, column_node = index[i, j], n + index[i, j]
            join(row_node, column_node, g[i, j])
            if j == 0:
                join(row_node, None, wire)
                known[row_node] = wire
            else:
                join(row_node, index[i, j - 1], wire)
            join(column_node, None if i == rows - 1 else n + index[i + 1, j], wire)
    volts = np.linalg.solve(matrix, known)
    drop = (volts[:n] - volts[n:]).reshape(rows, columns)
    found = circuits.wires(analog.PCM, jnp.asarray(1e6 * g[None], jnp.float32), ohm)[0]
    first = 1 - found / (1e6 * g)
    np.testing.assert_allclose(first, 1 - drop, rtol=0.05)  # drops of 1 %, squared


def test_gains_belong_to_a_chip():
    """Each column has its own, which stays from read to read."""
    g = network.Network((jnp.full((2, 3, 4000), 5.0).at[1].set(1.0),) * 2, jnp.ones((2, 3, 1)))
    circuit = circuits.CIRCUITS["gains10"]
    assemble = jax.jit(network.assemble, static_argnums=2)
    chip = assemble(KEY, analog.PERF, analog.fabricate, g, circuit)
    first, second = (network.read(KEY, analog.PERF, tile, 1.0, False) for tile in chip.hidden)
    ratio = first[0] * analog.span(analog.PERF) / 4
    np.testing.assert_allclose(first, np.broadcast_to(first[0], first.shape))
    assert abs(ratio.mean() - 1) < 4 * 0.1 / 4000**0.5
    assert abs(ratio.std() - 0.1) < 4 * 0.1 / 8000**0.5
    assert np.any(first != second)
    again = network.read(KEY, analog.PERF, chip.hidden[0], 9.0, False)
    np.testing.assert_array_equal(first, again)


def test_a_circuit_that_train_does_not_know_is_refused_in_one_line(here):
    status, _, err = call("--circuit", "nowhere")
    assert status == 2 and err.count("\n") == 1
    assert "--circuit nowhere must be one of ideal" in err and "img/circuits.py" in err


def test_the_study_from_start_to_figure(here, monkeypatch, capsys):
    labels = {name: circuits.LABELS[name] for name in ("ideal", "stuck5")}
    kept = {"membranes are not discharged, but pause": (9, False)}
    monkeypatch.setattr(circuits, "LABELS", labels)
    monkeypatch.setattr(circuits, "NOT_DISCHARGED", kept)
    train.save(begun(*configured(device="ibm", grad_thr=0.02)), here / "mine")
    studies.main(["circuits", "mine", "--n", "3", "--out", "."])
    assert "times the first    1.000" in capsys.readouterr().out
    (found,) = json.loads((here / "circuits.json").read_text())["found"].values()
    assert len(found) == 4 and found["5 % of devices stuck"]["over"]["mean"] != 1
    assert all(len(x["chips"]) == 3 for x in found.values())


def test_a_study_is_drawn_again_from_its_numbers(here, capsys):
    numbers = {"mean": 0.5, "n": 2, "chips": [0.25, 0.75]}
    diverged = {"mean": None, "n": 1, "chips": [None]}
    found = {"after adaptation": {"ideal circuits": numbers, "another": diverged}}
    saved = {"command": "as before", "unit": "error", "found": found}
    (here / "circuits.json").write_text(json.dumps(saved))
    studies.main(["circuits", "--out", "."])
    assert (here / "circuits.png").exists()
    assert json.loads((here / "circuits.json").read_text()) == saved
    with pytest.raises(SystemExit):
        studies.main(["limits", "--out", "."])
    assert "no limits.json to draw" in capsys.readouterr().err


@pytest.mark.parametrize("keeps_traces", [True, False])
def test_what_is_not_discharged_is_there_when_the_next_input_comes(keeps_traces):
    """Of one input that is shown again and again, against a presentation as long as all of them."""
    lif = network.Lif(0.97)
    dynamics = network.Dynamics(0.2, (lif, lif), 0.99, 0.03, 40)
    keys = jax.random.split(KEY, 2)
    hidden = tuple(
        jax.random.uniform(key, shape, minval=-0.2, maxval=0.8)
        for key, shape in zip(keys, ((2, 5), (6, 4)), strict=True)
    )
    u = jnp.array([[1.5]])
    n_all = 40 * (circuits.N_BEFORE + 1)
    whole = network.present(dynamics._replace(n_steps=n_all), hidden, u)
    last = np.asarray(whole.layers[-1].z[-40:])
    decay = 0.99 ** np.arange(39.0, -1, -1)
    fresh = 0.03 * np.tensordot(decay, last, 1)
    found = circuits.after_others(KEY, dynamics, hidden, u, 0, keeps_traces)
    assert fresh.max() > 0.1
    np.testing.assert_allclose(found, whole.e[-1] if keeps_traces else fresh, rtol=1e-4)


def test_a_long_pause_discharges_everything():
    lif = network.Lif(0.9)
    dynamics = network.Dynamics(0.2, (lif, lif), 0.9, 0.03, 40)
    hidden = jnp.full((2, 5), 0.6), jnp.full((6, 4), 0.2)
    u = jnp.array([[1.5], [0.7]])
    found = circuits.after_others(KEY, dynamics, hidden, u, 400, True)
    fresh = network.present(dynamics, hidden, u).e[-1]
    assert fresh.min() > 0.01
    np.testing.assert_allclose(found, fresh, rtol=1e-5)
