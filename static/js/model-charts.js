/* The curves on a model's page: drawn once, with the look of the task page. Also its copy button. */

import { readPrefs } from "./chart-controls.js";
import { Chart } from "./chart-draw.js";
import { SeriesStore } from "./chart-series.js";
import { onThemeChange, readTheme } from "./chart-theme.js";

const store = new SeriesStore();
const charts = JSON.parse(document.getElementById("model-figures").textContent).map((spec) => new Chart(spec, store));
const prefs = { ...readPrefs(), log: false };

function draw() {
  const theme = readTheme();
  for (const chart of charts) chart.draw(prefs, theme);
}

draw();
onThemeChange(draw);
