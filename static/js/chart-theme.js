/* Colours of the charts, read from the style sheet; tells when the person switches between light and dark. */

const ROLES = ["train", "eval", "chosen", "rejected", "chosen-eval", "rejected-eval", "margin", "margin-eval", "second"];
const dark = matchMedia("(prefers-color-scheme: dark)");

export function readTheme() {
  const style = getComputedStyle(document.documentElement);
  const value = (name) => style.getPropertyValue(name).trim();
  return {
    roles: Object.fromEntries(ROLES.map((role) => [role, value(`--series-${role}`)])),
    text: value("--text"), muted: value("--text-2"), line: value("--line"), strong: value("--line-strong"),
    surface: value("--surface"), font: getComputedStyle(document.body).fontFamily,
  };
}

export function onThemeChange(act) {
  dark.addEventListener("change", act);
}
