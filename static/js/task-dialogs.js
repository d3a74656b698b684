/* Small things that work as plain links without this file: dialogs, copy buttons, local times. */

export function showTools() {
  for (const element of document.querySelectorAll("[data-needs-js]")) element.hidden = false;
  for (const element of document.querySelectorAll("[data-without-js]")) element.hidden = true;
  localTimes();
}

const stamp = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short", hour: "2-digit", minute: "2-digit", second: "2-digit" });

function localTimes() {
  for (const time of document.querySelectorAll("time[datetime]")) time.textContent = stamp.format(new Date(time.dateTime));
}

export function bindDialogs() {
  document.addEventListener("click", (event) => {
    const opener = event.target.closest("[data-dialog]");
    if (opener) {
      event.preventDefault();
      document.getElementById(opener.dataset.dialog).showModal();
    }
    const copier = event.target.closest("[data-copy]");
    if (copier) copy(copier);
  });
  document.body.addEventListener("htmx:afterSwap", showTools);
}

async function copy(button) {
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source); // a page that is not served securely may not write the clipboard
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2500);
}
