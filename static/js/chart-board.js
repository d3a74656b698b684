/* All charts of a page: loads their figures, takes new points, draws at most a few times a second what is seen. */

import { bindControls, readPrefs } from "./chart-controls.js";
import { Chart } from "./chart-draw.js";
import { SeriesStore } from "./chart-series.js";
import { onThemeChange, readTheme } from "./chart-theme.js";

const PAUSE = 200; // ms between two drawings

export class ChartBoard {
  constructor(specs, fileName) {
    this.store = new SeriesStore();
    this.fileName = fileName;
    this.prefs = readPrefs();
    this.theme = readTheme();
    this.charts = specs.map((spec) => new Chart(spec, this.store));
    this.stale = new Set(this.charts);
    this.seen = new Set();
    this.watcher = new IntersectionObserver((entries) => this.#look(entries), { rootMargin: "300px" });
    for (const chart of this.charts) this.watcher.observe(chart.card);
    bindControls(this);
    onThemeChange(() => {
      this.theme = readTheme();
      this.drawAll();
    });
  }

  add(points) {
    const touched = new Set();
    for (const { step, values } of points) {
      for (const [key, value] of Object.entries(values)) {
        this.store.put(key, step, value);
        touched.add(key);
      }
    }
    for (const chart of this.charts) if (chart.keys.some((key) => touched.has(key))) this.stale.add(chart);
    this.#plan();
  }

  drawAll() {
    for (const chart of this.charts) this.stale.add(chart);
    this.#plan();
  }

  #look(entries) {
    for (const entry of entries) {
      const chart = this.charts.find((each) => each.card === entry.target);
      if (entry.isIntersecting) this.seen.add(chart);
      else this.seen.delete(chart);
    }
    this.#plan();
  }

  #plan() {
    if (this.planned) return;
    this.planned = true;
    const wait = Math.max(0, PAUSE - (performance.now() - (this.last ?? -PAUSE)));
    setTimeout(() => requestAnimationFrame(() => this.#draw()), wait);
  }

  async #draw() {
    const due = [...this.stale].filter((chart) => this.seen.has(chart));
    for (const chart of due) this.stale.delete(chart);
    await Promise.all(due.map((chart) => chart.draw(this.prefs, this.theme)));
    this.last = performance.now();
    this.planned = false;
    if ([...this.stale].some((chart) => this.seen.has(chart))) this.#plan();
  }
}
