"""Energy and number of devices of a chip, counted from what the simulation does and measures.

A presentation shows one input for n_steps time steps. A query is one presentation and the three
sums of its drift compensation, which all queries at that time share. An adaptation is n_inner looks
of task_size presentations each, their gradients and the pulses. Counted are

    reads of layer 0       all its devices, once where a sample-and-hold keeps the input's current
                           for the presentation, else at each time step
    SynOps of layer 1      both devices of a synapse, for each spike of layer 0 and, for the bias
                           row, for each time step
    reads of the readout   all its devices, each time that its output is read: usually once
    ADC, DAC               a conversion of each output that is read, and of each input
    spikes                 of both layers
    discharges             a membrane of each neuron and a trace of each of the last layer
    sums of crossbars      Σ G in one read of all devices and one conversion: of hidden crossbars
                           in each look, for drift compensation; of the readout after its last
                           pulses, for its reference
    delta rule             a multiply-accumulate for each synapse of the readout and presentation,
                           in each look a comparison of each of its devices with each threshold
    SET pulses             as measured; an adaptation has no RESET and no verify read

Each presentation reads the devices anew; only the simulation draws their noise once for all
samples of a look. Not counted: leakage, wires, control, samples in memory, conversion of traces
for the gradient. Counts are {item: number}. prices.json has the price of each item, and of each
price low, typical and high values in pJ, and where they are from.
"""

import json
from pathlib import Path
from typing import NamedTuple

import network

BOOK = json.loads(Path(__file__).with_name("prices.json").read_text(encoding="utf-8"))
LEVELS = "low", "typical", "high"


class Chip(NamedTuple):
    """What the energy of a chip follows from."""

    n_in: int
    n_out: int
    n_rows: int  # of layer 0 for each input and for the bias
    n_h0: int  # neurons of layer 0
    n_h1: int  # neurons of layer 1
    n_inner: int  # looks of an adaptation
    task_size: int  # presentations of a look
    n_bits: int  # of an update, 2^(n_bits − 1) − 1 thresholds
    rates: tuple  # Hz, mean over the neurons of each layer
    pulses: float  # SET pulses of an adaptation
    n_steps: int  # time steps of a presentation
    is_held: bool = True  # whether one read of layer 0 serves all of them
    n_read: int = 1  # reads of the readout in a presentation


# A design of commit 10bc5ca, to compare with.
OLD_NAME = "read at every step: 40-40, 4 looks, 291/342 Hz"
OLD = Chip(1, 1, 16, 40, 40, 4, 20, 2, (291.0, 342.0), 72.0, 100, n_read=100)


def chip_of(cfg, family, n_rows, rates, pulses):
    """Chip of settings (train.Config), of a family of tasks, and of what a meta-test has measured:
    mean rates (Hz) of both layers, pulses of an adaptation."""
    sizes = n_rows, cfg.n_h0, cfg.n_h1, cfg.n_inner, cfg.task_size, cfg.n_bits
    return Chip(family.n_in, family.n_out, *sizes, tuple(rates), pulses, cfg.n_steps)


def devices(chip):
    """Devices of each crossbar, two a synapse."""
    return {
        "layer 0": 2 * (chip.n_in + 1) * chip.n_rows * chip.n_h0,
        "layer 1": 2 * (chip.n_h0 + 1) * chip.n_h1,
        "readout": 2 * chip.n_h1 * chip.n_out,
    }


def presentation(chip):
    """Counts of one presentation."""
    of, steps = devices(chip), chip.n_steps
    first, second = (rate * steps * network.DT for rate in chip.rates)  # spikes of a neuron
    rows = chip.n_h0 * first + steps  # of layer 1 that are driven, over the presentation
    return {
        "reads of layer 0": of["layer 0"] * (1 if chip.is_held else steps),
        "SynOps of layer 1": 2 * chip.n_h1 * rows,
        "reads of the readout": of["readout"] * chip.n_read,
        "ADC": chip.n_out * chip.n_read,
        "DAC": chip.n_in,
        "spikes": chip.n_h0 * first + chip.n_h1 * second,
        "discharges": chip.n_h0 + 2 * chip.n_h1,
    }


def adaptation(chip):
    """Counts of one adaptation."""
    of, shown = devices(chip), chip.n_inner * chip.task_size
    n_thresholds = 2 ** (chip.n_bits - 1) - 1
    return {
        **{item: shown * n for item, n in presentation(chip).items()},
        "sums of crossbars": chip.n_inner * (of["layer 0"] + of["layer 1"]) + of["readout"],
        "ADC of sums": 2 * chip.n_inner + 1,
        "delta rule": shown * chip.n_h1 * chip.n_out,
        "comparisons": chip.n_inner * of["readout"] * n_thresholds,
        "SET pulses": chip.pulses,
    }


def nanojoules(counts, level):
    """Energy of counts, in nJ by item and in total, at one of LEVELS of the prices."""
    price = {item: BOOK["prices"][BOOK["items"][item]][level] for item in counts}
    found = {item: 1e-3 * price[item] * n for item, n in counts.items()}
    return found | {"total": sum(found.values())}


def bill(counts):
    """Counts, and their energies at all LEVELS."""
    return {"counts": counts, "nJ": {level: nanojoules(counts, level) for level in LEVELS}}


def report(chip):
    """What results.json has of a chip: the devices of its crossbars, and bills by name."""
    each_step = chip._replace(is_held=False)
    counts = {
        "presentation": presentation(chip),
        "adaptation": adaptation(chip),
        "adaptation, layer 0 read at each step": adaptation(each_step),
    }
    return {
        "devices": devices(chip),
        "bills": {name: bill(x) for name, x in counts.items()},
    }
