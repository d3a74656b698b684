/* The numbers behind the charts: one series per metric key, by step. Knows neither Plotly nor the page. */

const MOST = 4000; // points of a series before it is thinned
const THINNED = 2000;

export class SeriesStore {
  #series = new Map();

  load(key, x, y) {
    this.#series.set(key, { x: [...x], y: [...y] });
  }

  get(key) {
    return this.#series.get(key) ?? { x: [], y: [] };
  }

  /* A step that is there already (a run that resumed) is replaced, an older one goes to its place. */
  put(key, step, value) {
    if (!this.#series.has(key)) this.load(key, [], []);
    const { x, y } = this.#series.get(key);
    let at = x.length;
    while (at > 0 && x[at - 1] > step) at -= 1;
    if (at > 0 && x[at - 1] === step) {
      y[at - 1] = value;
      return;
    }
    x.splice(at, 0, step);
    y.splice(at, 0, value);
    if (x.length > MOST) this.#series.set(key, thin({ x, y }, THINNED));
  }

  latest(key) {
    const { y } = this.get(key);
    for (let at = y.length - 1; at >= 0; at -= 1) if (y[at] !== null) return y[at];
    return null;
  }
}

/* Both ends, and of every stretch its lowest, its highest and a gap if it has one: spikes stay visible. */
export function thin({ x, y }, limit) {
  const inner = x.length - 2;
  const buckets = Math.floor((limit - 2) / 3);
  const kept = [0];
  for (let bucket = 0; bucket < buckets; bucket += 1) {
    const start = 1 + Math.floor((bucket * inner) / buckets);
    const end = 1 + Math.floor(((bucket + 1) * inner) / buckets);
    let lowest = -1, highest = -1, gap = -1;
    for (let at = start; at < end; at += 1) {
      if (y[at] === null) { if (gap < 0) gap = at; continue; }
      if (lowest < 0 || y[at] < y[lowest]) lowest = at;
      if (highest < 0 || y[at] > y[highest]) highest = at;
    }
    kept.push(...[...new Set([lowest, highest, gap])].filter((at) => at >= 0).sort((a, b) => a - b));
  }
  kept.push(x.length - 1);
  return { x: kept.map((at) => x[at]), y: kept.map((at) => y[at]) };
}

/* Means of neighbours when there are far more points than pixels: a moving average alone would be a thick band. */
export function condense({ x, y }, limit) {
  if (x.length <= 2 * limit) return { x, y };
  const means = { x: [], y: [] };
  for (let group = 0; group < limit; group += 1) {
    const start = Math.floor((group * x.length) / limit), end = Math.floor(((group + 1) * x.length) / limit);
    const numbers = y.slice(start, end).filter((value) => value !== null);
    means.x.push(x[Math.floor((start + end - 1) / 2)]);
    means.y.push(numbers.length ? numbers.reduce((sum, value) => sum + value, 0) / numbers.length : null);
  }
  return means;
}

/* Exponential moving average without the bias of its start; a gap stays a gap. */
export function smooth(values, weight) {
  let average = 0, share = 0;
  return values.map((value) => {
    if (value === null) return null;
    average = weight * average + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return average / share;
  });
}
