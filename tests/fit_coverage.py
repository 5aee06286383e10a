"""sim"""
import sys, time
from pathlib import Path
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import jax, jax.numpy as jnp, numpy as np
import analog
from img import fit

def simulate(key, device, n_devices, n_pulses, ages):
    keys = jax.random.split(key, n_pulses+2)
    blank = analog.blank(keys[0], device, (2, n_devices//2, 1))
    def step(xbar, inp):
        key, n = inp
        pk, rk = jax.random.split(key)
        xbar = analog.pulse(pk, device, xbar, jnp.ones_like(xbar.g), 0.0, n == 0)
        f = lambda k, t: analog.measure(k, device, xbar, t)
        reads = jax.vmap(f)(jax.random.split(rk, len(ages)), jnp.asarray(ages))
        return xbar, reads
    _, reads = jax.lax.scan(step, blank, (keys[1:], jnp.arange(n_pulses+1.)))
    return reads.reshape(n_pulses+1, len(ages), -1).transpose(2,0,1)

AGES = np.array([38.6, 100, 1e3, 1e4, 1e5], np.float32)
if __name__ == "__main__":
    zs = {}
    for name in sys.argv[2].split(","):
        device = analog.DEVICES[name]
        for seed in range(int(sys.argv[1])):
            g = np.array(jax.jit(simulate, static_argnums=(2,3))(jax.random.key(seed), device, 200, 20, AGES), float)
            age = np.broadcast_to(AGES.astype(float), g.shape).copy()
            later = np.isin(np.arange(21), (10, 20))
            g[:, ~later, 1:] = np.nan
            age[np.isnan(g)] = np.nan
            t = time.time()
            with jax.enable_x64(True):
                found, err = fit.fit(g, age, 12.0)
            d, truth = {k: float(v) for k, v in analog.describe("x", found).items() if k not in ("name","law")}, analog.describe("x", device)
            if seed == 0: print(name, time.time()-t)
            for k, e in err.items():
                if np.isnan(e): continue
                zs.setdefault((name, k), []).append((d[k], truth[k], e))
    for k, v in zs.items():
        v = np.array(v); z=(v[:,0]-v[:,1])/v[:,2]
        print(k, len(v), "truth %.4g mean est %.4g se %.2g  z mean %.2f std %.2f cov3 %.2f" % (v[0,1], v[:,0].mean(), v[:,2].mean(), z.mean(), z.std(), np.mean(abs(z)<3)))
