// DPM-Solver++ of second order, multistep (Lu et al., 2022), as diffusers' DPMSolverMultistepScheduler computes it.

/** As numpy rounds: a half goes to the even neighbour. */
function round(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

/** The timesteps of a drawing, the noisiest first, as diffusers spaces them. */
export function timesteps(schedule, steps) {
  const total = schedule.alphas_cumprod.length;
  if (!Number.isInteger(steps) || steps < 1 || steps > total) {
    throw new RangeError(`steps=${steps} must be a whole number from 1 to ${total}.`);
  }
  // In numpy's order, whose rounding decides where a half is met: as its `arange` and its `linspace` compute.
  const spaced = {
    trailing: (i) => round(total + i * (total - total / steps - total)) - 1,
    linspace: (i) => round((steps - i) * ((total - 1) / steps)),
    leading: (i) => Math.floor(total / (steps + 1)) * (steps - i) + schedule.steps_offset,
  }[schedule.timestep_spacing];
  if (!spaced) throw new Error(`This page knows no timestep_spacing=${schedule.timestep_spacing}.`);
  return Array.from({ length: steps }, (_, i) => spaced(i));
}

const CLEAN = {
  epsilon: (x, output, alpha, sigma) => (x - sigma * output) / alpha,
  v_prediction: (x, output, alpha, sigma) => alpha * x - sigma * output,
  sample: (x, output) => output,
};

export class Solver {
  /** `stochastic`: each step but the last adds fresh noise ("sde-dpmsolver++"). */
  constructor(schedule, steps, stochastic) {
    this.timesteps = timesteps(schedule, steps);
    this.clean = CLEAN[schedule.prediction_type];
    if (!this.clean) throw new Error(`This page knows no prediction_type=${schedule.prediction_type}.`);
    this.stochastic = stochastic;
    // x = alpha picture + sigma noise at each timestep; after the last one the noise is gone.
    const kept = [...this.timesteps.map((t) => schedule.alphas_cumprod[t]), 1];
    this.alpha = kept.map(Math.sqrt);
    this.sigma = kept.map((share) => Math.sqrt(1 - share));
    this.lambda = kept.map((share) => Math.log(share / (1 - share)) / 2); // half of the log signal-to-noise ratio
    this.index = 0;
    this.previous = null;
  }

  /**
   * One step, from the UNet's `output` for the noisy latents `x`; returns the next latents and, as `clean`, the
   * picture's latents as the UNet sees them from here.
   */
  step(output, x, noise) {
    const i = this.index++;
    const last = this.index === this.timesteps.length;
    const clean = x.map((value, k) => this.clean(value, output[k], this.alpha[i], this.sigma[i]));
    const h = this.lambda[i + 1] - this.lambda[i];
    const decay = Math.exp(this.stochastic ? -2 * h : -h);
    const keep = (this.sigma[i + 1] / this.sigma[i]) * (this.stochastic ? Math.exp(-h) : 1);
    const gain = this.alpha[i + 1] * (1 - decay);
    const fresh = this.stochastic ? this.sigma[i + 1] * Math.sqrt(1 - decay) : 0;
    // The second order's slope, from the step before; the first and the last step have none.
    const slope = this.previous && !last ? (0.5 * h) / (this.lambda[i] - this.lambda[i - 1]) : 0;
    const next = x.map((value, k) => {
      const change = slope ? slope * (clean[k] - this.previous[k]) : 0;
      return keep * value + gain * (clean[k] + change) + (fresh ? fresh * noise[k] : 0);
    });
    this.previous = clean;
    return { latents: next, clean };
  }
}
