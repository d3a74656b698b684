/* What the person sets on the charts: smoothing, log axis, width, pan; kept in this browser. */

const KEY = "studio.charts";
const DEFAULTS = { smoothing: 0.6, log: false, wide: [] };

export function readPrefs() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY) ?? "{}");
    const prefs = { ...DEFAULTS, ...kept };
    prefs.smoothing = Math.min(0.98, Math.max(0, Number(prefs.smoothing) || 0));
    prefs.wide = Array.isArray(prefs.wide) ? prefs.wide : [];
    prefs.log = prefs.log === true;
    return prefs;
  } catch {
    return { ...DEFAULTS };
  }
}

function keep(prefs) {
  try {
    localStorage.setItem(KEY, JSON.stringify(prefs));
  } catch { /* private windows may refuse; the setting then lasts for this page */ }
}

/* `board` has: charts, prefs, theme, drawAll(). */
export function bindControls(board) {
  const slider = document.getElementById("smoothing");
  const shown = document.getElementById("smoothing-value");
  const log = document.getElementById("log-axis");
  slider.value = String(board.prefs.smoothing);
  shown.value = board.prefs.smoothing.toFixed(2);
  log.checked = board.prefs.log;
  slider.addEventListener("input", () => {
    board.prefs.smoothing = Number(slider.value);
    shown.value = board.prefs.smoothing.toFixed(2);
    keep(board.prefs);
    board.drawAll();
  });
  log.addEventListener("change", () => {
    board.prefs.log = log.checked;
    keep(board.prefs);
    board.drawAll();
  });
  for (const chart of board.charts) bindTools(chart, board);
}

function bindTools(chart, board) {
  const tool = (name) => chart.card.querySelector(`[data-tool="${name}"]`);
  const widen = tool("widen");
  const showWidth = () => {
    const wide = board.prefs.wide.includes(chart.spec.id);
    chart.card.classList.toggle("chart-wide", wide);
    widen.setAttribute("aria-pressed", String(wide));
    widen.textContent = wide ? "Narrow" : "Widen";
  };
  showWidth();
  widen.addEventListener("click", () => {
    const wide = new Set(board.prefs.wide);
    if (!wide.delete(chart.spec.id)) wide.add(chart.spec.id);
    board.prefs.wide = [...wide];
    keep(board.prefs);
    showWidth();
    for (const each of board.charts) each.resize();
  });
  tool("pan").addEventListener("click", (event) => {
    const on = event.currentTarget.getAttribute("aria-pressed") !== "true";
    event.currentTarget.setAttribute("aria-pressed", String(on));
    chart.setPan(on);
  });
  tool("reset").addEventListener("click", () => chart.reset());
  tool("png").addEventListener("click", async () => {
    if (chart.isEmpty) return;
    const link = document.createElement("a");
    link.href = await chart.picture(board.prefs, board.theme);
    link.download = `${board.fileName}-${chart.spec.element.replace("chart-", "")}.png`;
    link.click();
  });
}
