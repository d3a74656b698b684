/* The end of the log, fetched again while the task lives; stays at the bottom unless the person scrolled up. */

const PAUSE = 5000;

export class TaskLog {
  constructor(address, ended) {
    this.address = address;
    this.element = document.getElementById("task-log");
    this.element.scrollTop = this.element.scrollHeight;
    this.ended = ended;
    setInterval(() => { if (!this.ended && !document.hidden) this.fetch(); }, PAUSE);
  }

  follow(ended) {
    if (ended && !this.ended) setTimeout(() => this.fetch(), 1500);
    this.ended = ended;
  }

  async fetch() {
    const answer = await fetch(this.address, { redirect: "manual" }).catch(() => null);
    if (!answer?.ok) return;
    const text = await answer.text();
    const box = this.element;
    if (!text || text === box.textContent) return;
    const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
    box.textContent = text;
    if (atEnd) box.scrollTop = box.scrollHeight;
  }
}
