"""The fit of a device finds the constants that reads were simulated with, and refuses what it
cannot fit."""

import contextlib
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import analog
import train
from img import fit

AGES = 38.6, 1e3, 1e5  # s
PULSES = 8
HEAD = "device,pulse,g_uS\n"
RISES = "".join(f"d{k % 10},{k // 10},{1 + k // 10}\n" for k in range(30))


def simulated(name):
    """Reads (µS) of 60 devices and their ages (s); after the pulses 4 and 8 at all AGES, else at
    the first."""
    device = analog.DEVICES[name]
    g = fit.simulate(jax.random.key(3), device, 30, PULSES, jnp.array(AGES)).astype(float)
    g[:, ~np.isin(range(1 + PULSES), (4, 8)), 1:] = np.nan
    return g, np.where(np.isnan(g), np.nan, AGES)


def lines_of(g, age):
    """Rows of a CSV file."""
    known = zip(*np.nonzero(np.isfinite(g)), strict=True)
    return [f"d{i},{n},{g[i, n, k]},{age[i, n, k]}\n" for i, n, k in known]


def called(*arguments):
    """Exit status, standard output and error of the command line in this process."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            fit.main(arguments)
        except SystemExit as end:
            status = end.code
    return status, out.getvalue(), err.getvalue()


def written(folder, text):
    """The path of a file with that text."""
    path = folder / "curves.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


# ---- the law -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pcm", "pcm_history"])
def test_constants_are_within_four_standard_errors(name):
    """One of 23 normal deviations is further off once in 700 times. ν is drawn once per device, so
    that its mean has an error of nu_std/√n, and more for the noise of reads."""
    device = analog.DEVICES[name]
    g, age = simulated(name)
    found, errors = fit.fit(g, age, device.g_max)
    assert 1 < errors["nu_mean"] / (found.law.nu_std / len(g) ** 0.5) < 3
    assert 0.5 < errors["reset_mean"] / (np.std(g[:, 0, 0]) / len(g) ** 0.5) < 2
    constants = analog.describe(name, found)
    truth = analog.describe(name, device)
    told = {key for key, error in errors.items() if error >= 0}
    history = {"set_history", "set_std_history", "history_decay"}
    assert history & told == (history if name == "pcm_history" else set())
    assert {"set_slope", "nu_mean", "nu_std", "read_slope", "reset_std"} < told
    for key in told:
        assert abs(constants[key] - truth[key]) < 4 * errors[key], key
    analog.from_constants(constants)


def test_the_likelihood_is_that_of_a_normal_density(x64):
    """Where no std depends on G and nothing is cut off, all reads of a device are jointly normal:
    G follows a linear recursion, whose covariance is written out here."""
    law = analog.Nandakumar(0.0, 0.0, 0.0, 0.2)
    device = analog.PCM._replace(
        law=law, set_std_slope=0.0, set_std_offset=0.3, reset_mean=5.0, reset_std=0.4
    )
    n = 4
    decay = 1 + device.set_slope
    mean, cov = [5.0], np.zeros((n, n))
    while len(mean) < n:
        mean.append(decay * mean[-1] + device.set_offset)
    for i in range(n):
        for j in range(n):
            shared = sum(decay ** (i + j - 2 * k) for k in range(1, min(i, j) + 1))
            cov[i, j] = decay ** (i + j) * 0.4**2 + 0.3**2 * shared
    cov += 0.2**2 * np.eye(n)
    g = np.random.default_rng(0).multivariate_normal(mean, cov, 3)
    off = g - mean
    expected = np.sum(off * np.linalg.solve(cov, off.T).T) / 2
    expected += 3 / 2 * np.linalg.slogdet(cov)[1]
    start = np.array(jax.tree.leaves(device))
    held = np.full(len(start), False)
    reads = g[:, :, None], np.zeros((3, n, 1))
    loss, _, _ = fit.likelihood(np.zeros(len(start)), held, start, *reads)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize("n_devices", [1, 2])
def test_spreads_of_one_device_are_those_of_pcm(monkeypatch, n_devices):
    """Of one device they cannot be told; µS are scaled to g_max."""

    def search(start, held, data):
        return 0.0, start, np.where(held, np.nan, 1.0)

    monkeypatch.setattr(fit, "search", search)
    g = np.ones((n_devices, 3, 1))
    device, errors = fit.fit(g, g, 36.0)
    held = {name for name in fit.NAMES if np.isnan(errors[name])}
    assert held == ({"g_max", "reset_std", "nu_std"} if n_devices == 1 else {"g_max"})
    np.testing.assert_allclose(device.reset_std, 3 * analog.PCM.reset_std)
    assert device.law.nu_std == 0.008 and device.g_max == 36 and device.t0 == 1


# ---- the file ------------------------------------------------------------------------------------


def test_the_order_of_rows_and_missing_reads_do_not_matter(tmp_path):
    g, age = (x[:11].copy() for x in simulated("pcm"))
    g[3, 4] = g[0, 0] = np.nan
    lines = lines_of(g, age)
    np.random.default_rng(0).shuffle(lines)
    found, ages = fit.load(written(tmp_path, "device,pulse,g_uS,time_s\n" + "".join(lines)))
    names = sorted(range(11), key=lambda i: f"d{i}")
    np.testing.assert_array_equal(found, g[names])
    np.testing.assert_array_equal(ages, np.where(np.isnan(g), np.nan, age)[names])


def test_a_read_without_time_is_at_the_earliest_age(tmp_path):
    text = "device,pulse,g_uS,time_s\n" + "a,0,1,\na,1,2,0.2\na,2,3,\na,2,2.5,60\n"
    g, age = fit.load(written(tmp_path, text))
    assert g[0, 2].tolist() == [3, 2.5] and age[0, 2].tolist() == [1, 60]
    assert age[0, :2, 0].tolist() == [1, 1]


@pytest.mark.parametrize(
    "text, what",
    [
        ("", "must have rows"),
        (HEAD, "must have rows"),
        ("device,pulse,g\na,0,1\n", "no column ['g_uS']; found"),
        ("device,pulse,g_uS,t\na,0,1,1\n", "a cell of t"),
        ("device;pulse;g_uS\na;0;1,5\n", "found ['device;pulse;g_uS']"),
        (HEAD + "a,0,1,5\na,1,2,5\n", "a cell of no column"),
        (HEAD + 'a,0,"1,5"\n', "'1,5'"),
        (HEAD + "a,0\n", "must have rows"),
        (HEAD + "a,half,1\n", "'half'"),
        (HEAD + "a,0,nan\na,1,2\na,2,3\n", "not a number"),
        (HEAD + "a,1,1\na,2,2\n", "pulse 0"),
        (HEAD + "a,0,1\na,1,2\n", "2 at least"),
        (HEAD + "a,-1,1\n" + RISES, "pulse 0"),
        (HEAD + RISES + "a,99999,4\n", "9999"),
        (HEAD + "a,0,1\na,1,2\na,2,3\n", "30 reads"),
        (HEAD + "a,0,1e-6\na,1,2e-6\na,2,3e-6\n", "siemens"),
        (HEAD + "a,0,9\na,1,8\na,2,7\n", "do not raise G"),
        ("device,pulse,g_uS,time_s\na,0,1,-2\na,1,2,\na,2,3,\n", "time_s"),
    ],
)
def test_a_file_that_cannot_be_fitted_is_refused_in_a_line(tmp_path, text, what):
    status, out, err = called(written(tmp_path, text))
    assert status == 2 and not out
    assert err.startswith("error: ") and what in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [["--name", "2x"], ["--name", "pcm"], ["--g_max", "2"], ["--g_max", "nan"]]
)
def test_a_setting_that_makes_no_device_is_refused_in_a_line(tmp_path, flags):
    status, out, err = called(written(tmp_path, HEAD + RISES), *flags)
    assert status == 2 and not out and flags[0] in err and err.count("\n") == 1


def test_a_missing_file_is_refused_in_a_line(tmp_path):
    status, _, err = called(str(tmp_path / "none.csv"))
    assert status == 2 and "none.csv" in err and err.count("\n") == 1


# ---- the command line ----------------------------------------------------------------------------


def test_the_command_line_prints_a_device_and_draws_it(tmp_path, monkeypatch):
    """The device that is fitted, here pcm_history, is what train.py reads."""
    known = analog.DEVICES["pcm_history"]
    errors = dict.fromkeys(fit.NAMES, np.nan) | {"set_slope": 0.5}
    monkeypatch.setattr(fit, "fit", lambda *data: (known, errors))
    text = "device,pulse,g_uS,time_s\n" + "".join(lines_of(*simulated("pcm")))
    status, out, err = called(written(tmp_path, text), "--name", "mine", "--g_max", "12")
    assert status == 0 and analog.from_constants(json.loads(out)) == ("mine", known)
    told, rest = err.split("not told by the reads")
    assert told.split() == ["set_slope", "-0.084", "±", "0.5"]
    assert all(f"{name} " in rest for name in fit.NAMES if name != "set_slope")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("n_ages, n_panels", [(1, 1), (3, 2)])
def test_the_figure_shows_the_means_of_what_is_known(n_ages, n_panels):
    """The first read after each pulse; where there are later ones, those after the pulse that was
    read most."""
    g, age = (x[:, :, :n_ages].copy() for x in simulated("pcm"))
    g[0, 3], g[:5, 8, -1] = np.nan, np.nan
    figure = fit.draw("mine", analog.PCM, g, age)
    assert len(figure.axes) == n_panels
    drawn = figure.axes[0].lines[0].get_ydata()
    np.testing.assert_allclose(drawn[3], np.mean(g[1:, 3, 0]))
    if n_panels == 2:
        later = figure.axes[1].lines[0]
        np.testing.assert_allclose(later.get_xdata(), AGES)
        np.testing.assert_allclose(later.get_ydata(), np.mean(g[:, 4], 0))


def test_reads_keep_their_order_and_those_of_one_age_are_averaged(tmp_path):
    """Sorted by their values, the first of two reads would always be the lower."""
    text = "device,pulse,g_uS,time_s\n" + "a,0,1,\na,1,2.5,1\na,1,1.5,1\na,1,3,60\na,1,5,60.1\n"
    g, age = fit.load(written(tmp_path, text + "a,2,3,\n"))
    assert g[0, 1].tolist() == [2.5, 1.5, 3, 5]
    ages, means = fit.at_each_age(g, age)
    assert ages.tolist() == [1, 60]
    np.testing.assert_array_equal(means[0], [[1, np.nan], [2, 4], [3, np.nan]])


@pytest.mark.parametrize("top, g_max", [(5.0, 5.0), (7.0, 12.0), (12.0, 12.0), (30.0, 30.0)])
def test_the_range_is_that_of_pcm_where_reads_fill_half_of_it(tmp_path, monkeypatch, top, g_max):
    """Another --g_max is taken as it is."""
    given = []

    def fitted(g, age, g_max):
        given.append(g_max)
        raise train.Refused("enough")

    monkeypatch.setattr(fit, "fit", fitted)
    path = written(tmp_path, HEAD + RISES + f"d0,2,{top}\n")
    called(path)
    called(path, "--g_max", "40")
    assert given == [g_max, 40.0]
