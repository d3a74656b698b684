/* Says so when a part of a page could not be fetched: htmx alone would leave the page as it was, in silence. */
const NOTICE_ID = "connection-notice";

function show(text) {
  const place = document.getElementById("messages");
  if (!place) return;
  let notice = document.getElementById(NOTICE_ID);
  if (!notice) {
    notice = document.createElement("p");
    notice.id = NOTICE_ID;
    notice.className = "notice notice-warning";
    place.append(notice);
  }
  if (notice.textContent !== text) notice.textContent = text;
}

document.addEventListener("htmx:sendError", () => {
  show("The studio does not answer. Your page is still here; it goes on as soon as the studio is back.");
});
document.addEventListener("htmx:responseError", (event) => {
  const status = event.detail.xhr.status;
  if (status === 404) show("This is gone: it was deleted, or it belongs to another account. Reload the page.");
  else if (status === 403) show("This page was open for too long. Reload it and try again.");
  else if (status === 413) show("That was too large for the studio.");
  else show("Something went wrong in the studio. Nothing on this page is lost; try again, or reload it.");
});
document.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) document.getElementById(NOTICE_ID)?.remove();
});
