/* Keeps the status card true between two fetches of it, and says when a part of the page must be fetched again. */

const READING_PAUSE = 60000; // without evaluations the reading is fetched again about once a minute

export function say(name) {
  document.body.dispatchEvent(new CustomEvent(name));
}

export function words(seconds) {
  if (seconds === null || seconds === undefined || seconds < 0) return "–";
  const total = Math.round(seconds);
  const second = total % 60, minutes = Math.floor(total / 60), minute = minutes % 60, hours = Math.floor(minutes / 60);
  const two = (number) => String(number).padStart(2, "0");
  if (hours >= 24) return `${Math.floor(hours / 24)} d ${hours % 24} h`;
  if (hours) return `${hours} h ${two(minute)} min`;
  return minutes ? `${minutes} min ${two(second)} s` : `${second} s`;
}

function short(value, percent) {
  if (value === null) return "–";
  return percent ? `${(value * 100).toFixed(1)} %` : Number(value.toPrecision(4)).toString();
}

export class TaskStatus {
  constructor(state, store, now) {
    this.skew = Date.now() / 1000 - now; // how far this machine's clock is from the studio's
    this.state = state;
    this.store = store;
    this.title = document.title;
    this.readAt = Date.now();
    setInterval(() => this.#clock(), 1000);
    document.body.addEventListener("htmx:afterSwap", () => this.show());
    this.show();
  }

  take({ points, events, state }) {
    if (state) this.#change(state);
    if (events.length) say("task:events");
    const evaluated = points.some((point) => point.split === "eval");
    if (evaluated || (points.length && Date.now() - this.readAt > READING_PAUSE)) {
      this.readAt = Date.now();
      say("task:evaluated");
    }
    this.show();
  }

  /* Only what changes the shape of the card is fetched; numbers are set here. */
  #change(state) {
    const before = this.state;
    this.state = state;
    const shape = (each) => [each.status, each.desired_state, each.phase, each.queue_position, each.phase_total > 0, each.step > 0].join();
    if (shape(before) !== shape(state)) say("task:changed");
  }

  show() {
    for (const field of document.querySelectorAll("[data-state]")) {
      const value = this.state[field.dataset.state];
      if (field instanceof HTMLProgressElement) field.value = value;
      else field.textContent = typeof value === "number" ? Math.round(value).toLocaleString("en") : value || (field.dataset.none ?? "–");
    }
    const phase = document.querySelector("[data-phase-progress]");
    if (phase && this.state.phase_total) Object.assign(phase, { max: this.state.phase_total, value: this.state.phase_done });
    for (const field of document.querySelectorAll("[data-latest]")) {
      field.textContent = short(this.store.latest(field.dataset.latest), "percent" in field.dataset);
    }
    this.#clock();
    document.title = this.state.status === "running" ? `${this.state.percent} % · ${this.title}` : this.title;
  }

  #clock() {
    const { started, ended, eta_seconds: eta } = this.state;
    const elapsed = document.querySelector("[data-elapsed]");
    if (elapsed && started) elapsed.textContent = words((ended ?? Date.now() / 1000 - this.skew) - started);
    const left = document.querySelector("[data-eta]");
    if (left) left.textContent = eta === null ? "–" : words(eta);
  }
}
