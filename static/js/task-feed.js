/* New rows of one task: by socket, and over HTTP while the socket fails. No row is passed on twice or left out.

   Emits "frame" ({points, events, state}) and "mode" ({name, since}) with name live | catching | offline | ended | gone. */

const POLL = 3000;
const FAILURES_BEFORE_POLL = 3;
const FULL = 500; // a frame with this many rows is not the last

export class TaskFeed extends EventTarget {
  constructor({ socket, points, seq, state }) {
    super();
    Object.assign(this, { path: socket, points, seq, terminal: state.terminal, failures: 0, stopped: false });
    addEventListener("online", () => this.#again(0));
    addEventListener("offline", () => this.#lost());
    document.addEventListener("visibilitychange", () => this.#returned());
  }

  start() {
    if (this.terminal) this.#end("ended");
    else this.#connect();
  }

  #connect() {
    clearTimeout(this.retry);
    if (this.stopped || this.socket) return;
    const scheme = location.protocol === "https:" ? "wss:" : "ws:";
    const socket = new WebSocket(`${scheme}//${location.host}${this.path}?after=${this.seq}`);
    this.socket = socket;
    socket.addEventListener("open", () => {
      this.failures = 0;
      clearTimeout(this.poller);
      this.#mode("catching");
    });
    socket.addEventListener("message", (event) => this.#take(JSON.parse(event.data)));
    socket.addEventListener("close", (event) => {
      if (this.socket !== socket) return;
      this.socket = null;
      if (event.code === 1000 && this.terminal) this.#end("ended");
      else if (event.code === 4404) this.#end("gone");
      else this.#failed();
    });
  }

  #failed() {
    this.failures += 1;
    if (this.failures < FAILURES_BEFORE_POLL) this.#mode(this.failures === 1 ? "catching" : "offline"); // then polling says
    if (this.failures === FAILURES_BEFORE_POLL) this.#poll();
    this.#again(Math.random() * Math.min(15000, 500 * 2 ** this.failures)); // full jitter: no herd after a restart
  }

  #again(wait) {
    if (this.stopped) return;
    clearTimeout(this.retry);
    this.retry = setTimeout(() => this.#connect(), wait);
  }

  #lost() {
    this.#mode("offline");
    this.socket?.close();
  }

  /* From < seq: rows seen already are dropped. From > seq: something is missing, so it is fetched first. */
  async #take(frame) {
    if (frame.from > this.seq) {
      this.#mode("catching");
      await this.#fetchAll();
      if (frame.from > this.seq) return;
    }
    const fresh = (row) => row.seq > this.seq;
    const points = frame.points.filter(fresh);
    const events = frame.events.filter(fresh);
    const late = frame.to < this.seq;
    this.seq = Math.max(this.seq, frame.to);
    if (frame.state && !late) this.terminal = frame.state.terminal;
    this.dispatchEvent(new CustomEvent("frame", { detail: { points, events, state: late ? null : frame.state } }));
    if (frame.points.length < FULL && frame.events.length < FULL) this.#mode("live");
  }

  async #fetchAll() {
    this.fetching ??= this.#pages().finally(() => { this.fetching = null; });
    return this.fetching;
  }

  async #pages() {
    for (let more = true; more;) {
      const answer = await fetch(`${this.points}?after=${this.seq}`, { redirect: "manual", headers: { Accept: "application/json" } });
      if (answer.type === "opaqueredirect" || answer.status === 404) return this.#end("gone");
      if (!answer.ok) throw new Error(`points: ${answer.status}`);
      const frame = await answer.json();
      await this.#take(frame);
      more = frame.more;
    }
    return undefined;
  }

  async #poll() {
    clearTimeout(this.poller);
    if (this.stopped || this.socket?.readyState === WebSocket.OPEN) return;
    try {
      const wasOver = this.terminal;
      await this.#fetchAll();
      if (wasOver && this.terminal) this.#end("ended"); // one look more than the first that said so
    } catch {
      this.#mode("offline");
    }
    this.poller = setTimeout(() => this.#poll(), POLL);
  }

  #end(name) {
    this.stopped = true;
    clearTimeout(this.retry);
    clearTimeout(this.poller);
    this.socket?.close();
    this.#mode(name);
  }

  /* An ended task may have been started again in another window. */
  async #returned() {
    if (document.hidden || !this.stopped || this.mode === "gone") return;
    await this.#fetchAll().catch(() => {});
    if (this.terminal) return;
    this.stopped = false;
    this.#connect();
  }

  #mode(name) {
    if (this.mode === name) return;
    if (name === "offline") this.since = new Date();
    this.mode = name;
    this.dispatchEvent(new CustomEvent("mode", { detail: { name, since: this.since } }));
  }
}
