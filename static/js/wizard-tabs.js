// Step 1: the kinds of models as tabs. Without this file all of them stand below one another.
const box = document.querySelector("[data-tabs]");
const bar = box.querySelector(".tabs");
const links = [...bar.querySelectorAll("a")];
const idOf = (link) => link.hash.slice(1);
const panels = () => [...box.querySelectorAll(".tab-panel")];
let current = "";

function show(kind) {
  current = kind;
  for (const panel of panels()) {
    panel.hidden = panel.id !== kind;
    panel.setAttribute("role", "tabpanel");
  }
  for (const link of links) {
    const chosen = idOf(link) === kind;
    link.setAttribute("aria-selected", chosen);
    link.tabIndex = chosen ? 0 : -1;
  }
}

function mark() {
  const holder = box.querySelector("input[name=model]:checked")?.closest(".tab-panel");
  for (const link of links) link.toggleAttribute("data-holds-choice", holder != null && idOf(link) === holder.id);
  return holder;
}

box.classList.add("has-tabs");
bar.setAttribute("role", "tablist");
for (const link of links) {
  link.setAttribute("role", "tab");
  link.setAttribute("aria-controls", idOf(link));
  link.addEventListener("click", (event) => { event.preventDefault(); show(idOf(link)); });
}
bar.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (!step) return;
  const next = links[(links.indexOf(document.activeElement) + step + links.length) % links.length];
  show(idOf(next));
  next.focus();
  event.preventDefault();
});
box.addEventListener("change", mark);
// The list is drawn again while something is downloaded.
document.body.addEventListener("htmx:afterSwap", () => { show(current); mark(); });

show((mark() || panels()[0]).id);
