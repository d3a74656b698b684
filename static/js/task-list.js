/* The task list: no filter button where htmx filters, and no refresh under the hands of someone in the table. */

for (const element of document.querySelectorAll("[data-without-js]")) element.hidden = true;

document.body.addEventListener("htmx:beforeRequest", (event) => {
  const rows = document.getElementById("task-rows");
  if (event.detail.elt === rows && rows.contains(document.activeElement)) event.preventDefault();
});
