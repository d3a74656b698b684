// Every step: a form that must be sent once is sent once, and nothing typed is lost on the way to another step.
const form = document.querySelector("#step-form");
const buttons = () => [...document.querySelectorAll("button[form=step-form], #step-form button[type=submit]")];

if (form.matches("[data-once]")) {
  form.addEventListener("submit", (event) => {
    if (form.dataset.sent) { event.preventDefault(); return; }
    form.dataset.sent = "yes";
    for (const button of buttons()) button.setAttribute("aria-disabled", "true");
  });
}
// Coming back with the browser's own button shows the page as it was left: let it be sent again.
window.addEventListener("pageshow", (event) => {
  if (!event.persisted) return;
  delete form.dataset.sent;
  for (const button of buttons()) button.removeAttribute("aria-disabled");
});

// A value that is being mended is no longer refused; the summary says what is wrong with the new one.
document.addEventListener("input", (event) => {
  if (event.target.form !== form || !event.target.matches("[aria-invalid]")) return;
  event.target.removeAttribute("aria-invalid");
  event.target.closest(".field, .choice")?.querySelector(".errorlist")?.remove();
});

// A link to another step saves this one first, as the Back button does.
let touched = false;
for (const kind of ["input", "change"])
  document.addEventListener(kind, (event) => { if (event.target.form === form) touched = true; });
document.addEventListener("click", (event) => {
  const link = event.target instanceof Element ? event.target.closest("a[data-step]") : null;
  if (!link || !touched || event.button || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  const go = document.createElement("input");
  go.type = "hidden";
  go.name = "go";
  go.value = link.dataset.step;
  form.append(go);
  form.submit();
});
