// The upload form: drag and drop, a size check before sending, progress while sending, sentences when it breaks off.
// Listens on the document, because htmx replaces the form when it was not valid. Without this file it is a plain form.

const find = (form, name) => form?.querySelector(`[data-upload-${name}]`);
const formOf = (event) => event.target instanceof Element ? event.target.closest("[data-upload]") : null;
const zoneOf = (event) => event.target instanceof Element ? event.target.closest("[data-dropzone]") : null;

function say(form, problem) {
  const box = find(form, "problem");
  box.textContent = "";
  if (!problem) return;
  const list = document.createElement("ul");
  list.className = "errorlist";
  const item = document.createElement("li");
  item.textContent = problem;
  list.append(item);
  box.append(list);
}

function size(bytes) {
  const mb = bytes / 1048576;
  return mb >= 10 ? `${mb.toFixed(0)} MB` : mb >= 1 ? `${mb.toFixed(1)} MB` : `${Math.max(bytes / 1024, 0.1).toFixed(1)} KB`;
}

function problemWith(form, file) {
  if (file.size === 0) return "The file is empty. Choose a file with one preference pair on each line.";
  if (file.size > Number(form.dataset.maxBytes))
    return `The file has ${size(file.size)}; the limit of this studio is ${form.dataset.limit}. Upload a part of it, or gzip it.`;
  return "";
}

function showSending(form, sending) {
  find(form, "progress").hidden = !sending;
  find(form, "cancel").hidden = !sending;
}

document.addEventListener("dragover", (event) => {
  const zone = zoneOf(event);
  if (!zone) return;
  event.preventDefault();
  zone.classList.add("is-over");
});

document.addEventListener("dragleave", (event) => zoneOf(event)?.classList.remove("is-over"));

document.addEventListener("drop", (event) => {
  const zone = zoneOf(event);
  if (!zone) return;
  event.preventDefault();
  zone.classList.remove("is-over");
  const form = zone.closest("[data-upload]");
  const items = [...(event.dataTransfer?.items ?? [])].filter((item) => item.kind === "file");
  if (items.some((item) => item.webkitGetAsEntry?.()?.isDirectory))
    return say(form, "A folder cannot be uploaded. Drop the .jsonl file inside it.");
  if (items.length !== 1) return say(form, "Drop one file.");
  const input = zone.querySelector("input[type=file]");
  input.files = event.dataTransfer.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});

document.addEventListener("change", (event) => {
  const form = formOf(event);
  if (!form || event.target.type !== "file") return;
  const file = event.target.files[0];
  say(form, file ? problemWith(form, file) : "");
});

document.addEventListener("htmx:confirm", (event) => {
  const form = formOf(event);
  const file = form?.querySelector("input[type=file]").files[0];
  const problem = file ? problemWith(form, file) : "";
  if (!problem) return;
  event.preventDefault();
  say(form, problem);
});

document.addEventListener("htmx:beforeSend", (event) => {
  const form = formOf(event);
  if (!form) return;
  say(form, "");
  showSending(form, true);
});

document.addEventListener("htmx:xhr:progress", (event) => {
  const form = formOf(event);
  const { loaded, total, lengthComputable } = event.detail;
  if (!form || !lengthComputable || !total) return;
  const percent = Math.floor((100 * loaded) / total);
  find(form, "progress").querySelector("progress").value = percent;
  find(form, "status").textContent = loaded < total
    ? `${size(loaded)} of ${size(total)} · ${percent} %` : "Uploaded. The studio is storing the file…";
});

document.addEventListener("htmx:beforeSwap", (event) => {
  const form = formOf(event);
  const { xhr } = event.detail;
  if (!form || ![413, 507].includes(xhr.status)) return;
  if (xhr.responseText.trimStart().startsWith("<form")) event.detail.shouldSwap = true;
  else say(form, xhr.responseText.slice(0, 300));
});

document.addEventListener("htmx:afterRequest", (event) => {
  const form = formOf(event);
  if (!form || !form.isConnected) return;
  showSending(form, Boolean(event.detail.xhr?.getResponseHeader("HX-Redirect")));
});

// Other parts of a page send requests too, and one that is replaced by the next is aborted: not this form's affair.
document.addEventListener("htmx:sendError", (event) => {
  const form = formOf(event);
  if (form) say(form, "The connection broke off before the whole file arrived. Check that the studio is running, then upload it again.");
});

document.addEventListener("htmx:sendAbort", (event) => {
  const form = formOf(event);
  if (form) say(form, "The upload was cancelled; nothing was kept.");
});

document.addEventListener("click", (event) => {
  const button = event.target instanceof Element ? event.target.closest("[data-upload-cancel]") : null;
  if (button) window.htmx.trigger(button.closest("[data-upload]"), "htmx:abort");
});
