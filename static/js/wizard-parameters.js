// Step 3: marks what differs from the default, resets a field, fills the presets of the layer list.
const changed = (element, yes) => element.toggleAttribute("data-changed", yes);

for (const row of document.querySelectorAll("[data-parameter]")) {
  const input = row.querySelector("input");
  const reset = row.querySelector("[data-reset]");
  if (!reset) continue;
  const differs = () => input.value.trim() !== row.dataset.default && Number(input.value) !== Number(row.dataset.default);
  const show = () => { changed(row, differs()); reset.hidden = !differs(); };
  input.addEventListener("input", show);
  reset.addEventListener("click", () => {
    input.value = row.dataset.default;
    show();
    input.focus();
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
  show();
}

for (const group of document.querySelectorAll("[data-modules]")) {
  const boxes = [...group.querySelectorAll("input[type=checkbox]")];
  const presets = group.querySelector("[data-presets]");
  const show = () => {
    const ticked = boxes.filter((box) => box.checked).length;
    changed(group, ticked < boxes.length);
  };
  group.addEventListener("change", show);
  if (!presets) continue;
  presets.hidden = false;
  for (const button of presets.querySelectorAll("[data-preset]")) {
    button.addEventListener("click", () => {
      const names = button.dataset.preset.split(",");
      for (const box of boxes) box.checked = names[0] === "*" || names.includes(box.value);
      show();
      group.dispatchEvent(new Event("change", { bubbles: true }));
    });
  }
}
