/* One turn on the page: the prompt and two answers that grow. Text only ever goes in as text. */

const REASONS = { stop: "", length: "cut at max tokens", cancelled: "stopped" };

export class TurnView {
  constructor(prompt, referenceName) {
    const part = document.getElementById("turn-template").content.cloneNode(true);
    this.element = part.querySelector(".turn");
    this.prompt = prompt;
    this.element.querySelector("[data-prompt]").textContent = prompt;
    this.sides = {};
    for (const side of ["reference", "tuned"]) {
      const box = this.element.querySelector(`[data-side="${side}"]`);
      box.setAttribute("aria-busy", "true");
      const text = box.querySelector(".answer-text");
      const copy = box.querySelector("[data-copy]");
      copy.addEventListener("click", () => copyText(copy, text));
      this.sides[side] = { box, text, copy, note: box.querySelector("[data-note]") };
    }
    this.sides.reference.box.querySelector(".answer-side").textContent = referenceName;
  }

  #side(name) {
    return this.sides[name === "tuned" ? "tuned" : "reference"];
  }

  add(event) {
    this.#side(event.side).text.append(event.text);
  }

  finish(event) {
    const { box, note, copy } = this.#side(event.side);
    box.removeAttribute("aria-busy");
    copy.hidden = false;
    const speed = event.seconds > 0 ? ` · ${(event.num_tokens / event.seconds).toFixed(1)} tokens/s` : "";
    const why = REASONS[event.finish_reason];
    note.textContent = `${event.num_tokens} tokens${speed}${why ? ` · ${why}` : ""}`;
  }

  /* The answer ended early: what is there stays. */
  interrupt(word) {
    for (const { box, note, copy, text } of Object.values(this.sides)) {
      if (!box.hasAttribute("aria-busy")) continue;
      box.removeAttribute("aria-busy");
      note.textContent = word;
      copy.hidden = text.textContent === "";
    }
  }

  get isEmpty() {
    return Object.values(this.sides).every(({ text }) => text.textContent === "");
  }

  get record() {
    return { prompt: this.prompt, reference: this.sides.reference.text.textContent, tuned: this.sides.tuned.text.textContent };
  }
}

async function copyText(button, source) {
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source); // a page that is not served securely may not write the clipboard
    button.textContent = "Selected: press Ctrl+C";
  }
  setTimeout(() => { button.textContent = "Copy"; }, 2500);
}
