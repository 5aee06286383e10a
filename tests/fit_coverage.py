"""How often the constants that img/fit.py fits are within three standard errors of the true ones,
by hand: python tests/fit_coverage.py

Data sets of 200 devices are simulated with analog.pulse and analog.measure: RESET and 20 SET
pulses, each read t0 after it; pulses 10 and 20 are read at four later ages too. Of each constant
are printed its share within three errors, and the mean and std of (fitted − true)/error.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import analog  # noqa: E402
from img import fit  # noqa: E402

N_PAIRS, N_PULSES, LATER = 100, 20, (10, 20)
AGES = 38.6, 100.0, 1e3, 1e4, 1e5  # s


def measured(seed, device):
    """Reads (µS) and their ages (s) of simulated devices, NaN where they are not read."""
    key = jax.random.key(seed)
    g = fit.simulate(key, device, N_PAIRS, N_PULSES, jnp.array(AGES)).astype(float)
    early = ~np.isin(range(1 + N_PULSES), LATER)
    g[:, early, 1:] = np.nan
    return g, np.where(np.isnan(g), np.nan, AGES)


def deviations(seed, device):
    """(fitted − true)/error by name of the constants that are told; a name of history is there if
    the fit has kept it."""
    found, errors = fit.fit(*measured(seed, device), device.g_max)
    pairs = map(jax.tree.leaves, (found, device))
    z = {
        name: (fitted - true) / errors[name]
        for name, fitted, true in zip(fit.NAMES, *pairs, strict=True)
    }
    return {name: x for name, x in z.items() if errors[name] >= 0}


def main():
    """Fit, and print a line for each constant."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--n", type=int, default=20, help="data sets of each device (20)")
    n, every = parser.parse_args().n, []
    for name in ("pcm", "pcm_history"):
        found = defaultdict(list)
        for seed in range(n):
            for constant, z in deviations(seed, analog.DEVICES[name]).items():
                found[constant].append(z)
        for constant, z in found.items():
            covered = f"{np.mean(np.abs(z) < 3):8.2f} of {len(z)}"
            print(f"{name:<14}{constant:<18}{covered}{np.mean(z):8.2f} ± {np.std(z):.2f}")
            every += z
    print(f"within three standard errors: {np.mean(np.abs(every) < 3):.3f} of {len(every)}")


if __name__ == "__main__":
    main()
