"""What a chip does is counted as in a plain loop over time steps, spikes and devices; prices are
what their sources say."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import begun, configured

import analog
import network
import train
from img import energy, figures, studies

KEY = jax.random.key(3)
N_IN, N_OUT, N_ROWS, SIZES = 2, 3, 2, (4, 3)


# ---- the oracle ----------------------------------------------------------------------------------


def read(n, item, rows, columns):
    """Count a read of both devices of each synapse."""
    for _ in rows:
        for _ in columns:
            n[item] += 2


def present(n, layers, chip):
    """Count what happens as layers of spikes [T, neurons] come about, step by step."""
    n_steps = len(layers[0])
    for step in range(n_steps):
        if step == 0 or not chip.is_held:
            read(n, "reads of layer 0", range((N_IN + 1) * N_ROWS), range(SIZES[0]))
        rows = [row for row in [*layers[0][step], 1.0] if row]  # those that are driven
        read(n, "SynOps of layer 1", rows, range(SIZES[1]))
        n["spikes"] += sum(np.count_nonzero(z[step]) for z in layers)
        if step >= n_steps - chip.n_read:  # the last, or all
            read(n, "reads of the readout", range(SIZES[1]), range(N_OUT))
            n["ADC"] += N_OUT
    n["DAC"] += N_IN
    n["discharges"] += SIZES[0] + SIZES[1] + SIZES[1]  # membranes, then traces


def adapt(n, layers, chip):
    """Count an adaptation whose samples are the inputs of layers of spikes [T, L, neurons]."""
    shapes = ((N_IN + 1) * N_ROWS, SIZES[0]), (SIZES[0] + 1, SIZES[1]), (SIZES[1], N_OUT)
    for _ in range(chip.n_inner):
        for sample in range(chip.task_size):
            present(n, [z[:, sample] for z in layers], chip)
            n["delta rule"] += SIZES[1] * N_OUT
        for rows, columns in shapes[:2]:
            read(n, "sums of crossbars", range(rows), range(columns))
            n["ADC of sums"] += 1
        for _ in range(2 ** (chip.n_bits - 1) - 1):
            read(n, "comparisons", range(SIZES[1]), range(N_OUT))
    read(n, "sums of crossbars", *map(range, shapes[2]))
    n["ADC of sums"] += 1
    n["SET pulses"] += chip.pulses


@pytest.fixture(scope="module")
def shown():
    """Spikes of each layer [T, L, neurons] under five inputs, and their rates (Hz)."""
    keys = jax.random.split(KEY, 3)
    u = jax.random.uniform(keys[0], (5, N_IN))
    shapes = ((N_IN + 1) * N_ROWS, SIZES[0]), (SIZES[0] + 1, SIZES[1])
    hidden = tuple(
        jax.random.uniform(key, shape, minval=-0.2, maxval=0.8)
        for key, shape in zip(keys[1:], shapes, strict=True)
    )
    lif = network.Lif(0.97)
    activity = network.present(network.Dynamics(0.2, (lif, lif), 0.99, 0.03, 100), hidden, u)
    rates = tuple(float(jnp.mean(x)) for x in network.rates(activity))
    assert min(rates) > 20 and max(rates) < 900
    return [np.asarray(neurons.z) for neurons in activity.layers], rates


@pytest.mark.parametrize("is_held, n_read", [(True, 1), (False, 1), (True, 100)])
def test_an_adaptation_is_counted_as_in_a_plain_loop(shown, is_held, n_read):
    """To the rounding of a mean in single precision."""
    layers, rates = shown
    sizes = N_IN, N_OUT, N_ROWS, *SIZES
    chip = energy.Chip(*sizes, 2, 5, 3, rates, 7.0, 100, is_held, n_read)
    n = Counter()
    adapt(n, layers, chip)
    assert energy.adaptation(chip) == pytest.approx(dict(n), rel=1e-6)


def test_a_presentation_is_counted_as_in_a_plain_loop(shown):
    layers, rates = shown
    chip = energy.Chip(N_IN, N_OUT, N_ROWS, *SIZES, 2, 5, 3, rates, 7.0, 100)
    n = Counter()
    for sample in range(5):
        present(n, [z[:, sample] for z in layers], chip)
    mean = {item: x / 5 for item, x in n.items()}
    assert energy.presentation(chip) == pytest.approx(mean, rel=1e-6)


# ---- from a run ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run():
    """A run of a small network that was not trained."""
    return begun(*configured(device="perf", n_bits=4))


def n_devices(run):
    """Devices of each crossbar."""
    return [g.size for g in jax.tree.leaves(run.state.meta.g)]


def test_a_chip_is_that_of_the_meta_test(run):
    """Its spikes are those that the meta-test counts by itself."""
    measured = studies.tested(train.reported, 3, run).measured
    chip = studies.chip_of(run, measured)
    assert list(energy.devices(chip).values()) == n_devices(run)
    assert (chip.n_inner, chip.task_size, chip.n_bits) == (2, 5, 4)
    spikes = energy.presentation(chip)["spikes"]
    assert spikes == pytest.approx(np.mean(measured["spikes"]), rel=1e-5)
    assert chip.pulses == pytest.approx(np.mean(measured["pulses"]))


@pytest.mark.parametrize("device", [analog.PCM, analog.IBM], ids=["by pulses", "as stated"])
def test_programming_reads_each_device_after_each_pulse(run, device):
    """Where it is by pulses: a read follows each, and the last finishes its device."""
    found = studies.tested(studies.programming, 1, run, device)
    sets, resets, reads = (float(x[0]) for x in found.values())
    if device.stated:
        assert sets == resets == reads == 0
    else:
        assert reads == sets + resets and resets >= sum(n_devices(run))


# ---- prices --------------------------------------------------------------------------------------


def test_every_price_has_a_source_and_a_range():
    prices, items = energy.BOOK["prices"], energy.BOOK["items"]
    assert set(items.values()) == set(prices)
    for price in prices.values():
        assert price["unit"] == "pJ" and len(price["source"]) > 20 and price["what"]
        assert 0 < price["low"] <= price["typical"] <= price["high"]


# pJ, as computed of the numbers in the sources
COMPUTED = {
    ("read", "low"): 0.2**2 * 1e-6 * 10e-9 * 1e12,
    ("read", "typical"): 0.2**2 * 3e-6 * 130e-9 * 1e12,
    ("read", "high"): 0.2**2 * 5e-6 * 1e-6 * 1e12,
    ("adc", "low"): 16e-3 / (8 * 1.2e9) * 1e12,
    ("adc", "typical"): 26.3e-6 / 10.24e6 * 1e12,
    ("adc", "high"): 2 * 256**2 / 10.5e12 / 256 * 1e12,
    ("dac", "low"): 4e-3 / 1024 * 100e-9 * 1e12,
    ("set", "typical"): 90e-6 * 50e-9 * 1e12,
    ("set", "high"): 150e-6 * 150e-9 * 1.2 * 1e12,
    ("reset", "low"): 300e-6 * 40e-9 * 1.6 * 1e12,
    ("discharge", "typical"): 0.5e-12 * 1e12,
}


@pytest.mark.parametrize("price, level", COMPUTED)
def test_a_price_is_what_its_source_says(price, level):
    """To the digits that are given."""
    expected = COMPUTED[price, level]
    assert energy.BOOK["prices"][price][level] == pytest.approx(expected, rel=5e-3)


@pytest.mark.parametrize("level", energy.LEVELS)
def test_a_verify_read_is_a_read_and_a_conversion(level):
    prices = energy.BOOK["prices"]
    expected = prices["read"][level] + prices["adc"][level]
    assert prices["verify"][level] == pytest.approx(expected, rel=1e-3)


def test_energies_are_in_nanojoules():
    """A million of 4.5 pJ are 4.5 µJ."""
    found = energy.nanojoules({"SET pulses": 1e6, "DAC": 1e3}, "typical")
    assert found == pytest.approx({"SET pulses": 4500.0, "DAC": 2.57, "total": 4502.57})


# ---- the study -----------------------------------------------------------------------------------


def test_the_figure_shows_the_whole_range():
    found = {"a": ({"mean": 0.5, "ci95": 0.1}, [1.0, 20.0, 900.0]), "b": ({"mean": 2.0}, [2.0] * 3)}
    (axes,) = figures.spans(found, "nJ", "error").axes
    low, high = axes.get_xlim()
    assert low <= 1 and high >= 900 and axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 2


def test_the_study_of_energy_from_start_to_figure(run, here, capsys):
    for name in ("mine", "other"):
        train.save(run, here / name)
    studies.main(["energy", "mine", "other", "--n", "3", "--out", "."])
    out = capsys.readouterr().out
    assert energy.OLD_NAME in out and "other: 7-6, looks: 2" in out
    saved = json.loads((here / "energy.json").read_text())
    assert saved["command"] == "python img/studies.py energy mine other --n 3"
    of = saved["found"]["mine: 7-6, looks: 2"]
    chip = energy.Chip(**of["chip"])
    expected = energy.nanojoules(energy.adaptation(chip), "high")["total"]
    assert of["bills"]["adaptation"]["nJ"]["high"]["total"] == pytest.approx(expected)
    assert (here / "energy.png").exists() and of["error"]["n"] == 3
