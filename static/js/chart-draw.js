/* One chart on the page: composes Plotly traces from the store, the preferences and the theme. */

import { condense, smooth } from "./chart-series.js";

const DENSE = 400; // points of a smoothed line
const DASHED = new Set(["chosen-eval", "rejected-eval", "margin-eval"]);
const touch = matchMedia("(pointer: coarse)");

export class Chart {
  constructor(spec, store) {
    this.spec = spec;
    this.store = store;
    this.element = document.getElementById(spec.element);
    this.card = this.element.closest("[data-chart-card]");
    this.keys = spec.figure.data.map((trace) => trace.meta.key);
    this.dragmode = touch.matches ? false : "zoom"; // a finger that scrolls the page must not zoom
    this.drawn = false;
    for (const trace of spec.figure.data) store.load(trace.meta.key, trace.x, trace.y);
    this.#sayIfEmpty(); // a chart below the fold is drawn later, but it is not without points
  }

  #sayIfEmpty() {
    this.card.querySelector("[data-empty]").hidden = !this.isEmpty;
    this.element.hidden = this.isEmpty;
  }

  get isEmpty() {
    return this.keys.every((key) => this.store.get(key).x.length === 0);
  }

  async draw(prefs, theme) {
    this.#sayIfEmpty();
    if (this.isEmpty) return;
    const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: "reset" };
    await Plotly.react(this.element, this.#traces(prefs, theme), this.#layout(prefs, theme), config);
    this.drawn = true;
  }

  #traces(prefs, theme) {
    return this.spec.figure.data.flatMap((given) => {
      const { key, role, smooth: canSmooth } = given.meta;
      const { x, y } = this.store.get(key);
      if (x.length === 0) return [];
      const color = theme.roles[role];
      const line = { color, width: 2, dash: DASHED.has(role) ? "dot" : "solid" };
      const marker = { color, size: x.length > 40 ? 4 : 7 };
      const base = { ...given, x: [...x], y: [...y], line, marker, legendgroup: key };
      if (x.length === 1) return [{ ...base, mode: "markers" }];
      if (!canSmooth || prefs.smoothing === 0 || x.length < 3) return [base];
      const raw = { ...base, line: { ...line, width: 1 }, opacity: 0.32, showlegend: false };
      const trend = condense({ x, y }, DENSE);
      const even = { ...base, x: [...trend.x], y: smooth(trend.y, prefs.smoothing), line: { ...line, width: 2.4 }, hoverinfo: "skip" };
      return [raw, even];
    });
  }

  /* The last step, and a range for an axis whose values are all the same: Plotly would magnify their last digit. */
  #extent() {
    let [lastStep, low, high] = [0, Infinity, -Infinity];
    for (const trace of this.spec.figure.data) {
      const { x, y } = this.store.get(trace.meta.key);
      if (x.length) lastStep = Math.max(lastStep, x[x.length - 1]);
      if (trace.yaxis === "y2") continue;
      for (const value of y) if (Number.isFinite(value)) [low, high] = [Math.min(low, value), Math.max(high, value)];
    }
    const size = Math.max(Math.abs(low), Math.abs(high));
    const margin = Math.max(size * 0.05, 0.01);
    return { lastStep, flat: high >= low && high - low < size * 1e-4 + 1e-9 ? [low - margin, high + margin] : null };
  }

  #layout(prefs, theme) {
    const given = this.spec.figure.layout;
    const axis = { gridcolor: theme.line, linecolor: theme.strong, tickcolor: theme.strong, color: theme.muted };
    const layout = {
      ...given,
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: this.dragmode,
      font: { family: theme.font, size: 12, color: theme.muted },
      hoverlabel: { ...given.hoverlabel, bgcolor: theme.surface, bordercolor: theme.strong, font: { color: theme.text, family: theme.font, size: 12 } },
      legend: { ...given.legend, font: { color: theme.text }, bgcolor: "rgba(0,0,0,0)" },
      xaxis: { ...given.xaxis, ...axis }, yaxis: { ...given.yaxis, ...axis },
    };
    const seen = this.#extent();
    if (seen.lastStep < 8) layout.xaxis.dtick = 1; // there is no half step
    if (given.yaxis2) layout.yaxis2 = { ...given.yaxis2, ...axis };
    const log = prefs.log && this.spec.logarithmic;
    this.range = log ? null : given.yaxis.range ?? seen.flat;
    if (log) layout.yaxis = { ...layout.yaxis, type: "log", dtick: undefined };
    else if (this.range) layout.yaxis.range = [...this.range];
    layout.uirevision = `${given.uirevision}${log ? "-log" : ""}`;
    layout.shapes = (given.shapes ?? []).map((shape) => ({
      ...shape, line: { ...shape.line, color: theme.muted }, label: { ...shape.label, font: { size: 11, color: theme.muted } },
    }));
    return layout;
  }

  setPan(on) {
    this.dragmode = on ? "pan" : touch.matches ? false : "zoom";
    if (this.drawn) Plotly.relayout(this.element, { dragmode: this.dragmode });
  }

  reset() {
    if (!this.drawn) return;
    const y = this.range ? { "yaxis.range": [...this.range] } : { "yaxis.autorange": true };
    Plotly.relayout(this.element, { "xaxis.autorange": true, ...y, ...(this.spec.figure.layout.yaxis2 ? { "yaxis2.autorange": true } : {}) });
  }

  resize() {
    if (this.drawn) Plotly.Plots.resize(this.element);
  }

  async picture(prefs, theme) {
    const layout = this.#layout(prefs, theme);
    const title = { text: this.spec.title, font: { size: 18, color: theme.text }, x: 0.02, xanchor: "left" };
    const figure = {
      data: this.#traces(prefs, theme),
      layout: { ...layout, paper_bgcolor: theme.surface, plot_bgcolor: theme.surface, title, margin: { ...layout.margin, t: 84 } },
    };
    return Plotly.toImage(figure, { format: "png", width: 1200, height: 640, scale: 2 });
  }
}
