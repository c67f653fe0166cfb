/* The box for questions: those that wait for the start, those that were handed over and not yet heard, and
 * suggestions. It hands texts on and knows nothing of streams. */

const byId = (id) => document.getElementById(id);
const FIRST = "Tell me what happens."; // a model that was asked nothing has nothing to say
const SUGGESTIONS = {
  bundled: [
    "What colour is the star now?",
    "How many objects are there now?",
    "Where is the circle now?",
    "Tell me when the red circle jumps.",
    "Describe each event when it is over.",
    "How many collisions so far?",
  ],
  other: [
    "What do you see now?",
    "Describe each event when it is over.",
    "Tell me when someone comes in.",
    "How many people are there now?",
  ],
};

export const plain = (text) => text.trim().replace(/\s+/g, " ");

export class Questions {
  atStart = [FIRST];
  #pending = []; // {text, element}

  /**
   * Args:
   *   transcript: where questions get their lines.
   *   ask: (text) → whether a stream took it; one that none took waits for the start.
   */
  constructor(transcript, ask) {
    Object.assign(this, { transcript, ask });
    byId("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#say(byId("question").value);
      byId("question").value = "";
    });
    this.suggest(true);
    this.waiting(true);
  }

  /** Gives a question its line, whose time comes when it was heard. */
  expect(text) {
    this.#pending.push({ text, element: this.transcript.question(text) });
  }

  /** A question was heard at a time. Returns whether it is news: it is not where a new stream was told it again. */
  heard(text, time) {
    const which = this.#pending.findIndex((question) => plain(question.text) === plain(text));
    if (which < 0) return false;
    const [{ element }] = this.#pending.splice(which, 1);
    this.transcript.asked(element, time);
    return true;
  }

  /** No question of an earlier stream is waited for any more. */
  forget() {
    this.#pending = [];
  }

  /** Shows what will be asked at the start, each to be taken back, or hides it while a stream is going. */
  waiting(shown) {
    byId("waiting").hidden = !shown || !this.atStart.length;
    byId("waiting")
      .querySelector("ul")
      .replaceChildren(...this.atStart.map((text) => this.#item(text)));
  }

  /** Suggests what the bundled model knows, or what any may know. */
  suggest(bundled) {
    const buttons = SUGGESTIONS[bundled ? "bundled" : "other"].map((text) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = text;
      button.addEventListener("click", () => this.#say(text));
      return button;
    });
    byId("suggestions").replaceChildren(...buttons);
  }

  #say(text) {
    const said = plain(text);
    if (!said || this.ask(said) || this.atStart.includes(said)) return;
    this.atStart.push(said);
    this.waiting(true);
  }

  #item(text) {
    const [item, said, button] = ["li", "span", "button"].map((name) => document.createElement(name));
    said.textContent = text;
    button.type = "button";
    button.className = "icon";
    button.setAttribute("aria-label", `Do not ask: ${text}`);
    button.append(byId("peek_close").firstElementChild.cloneNode(true));
    button.addEventListener("click", () => {
      this.atStart = this.atStart.filter((other) => other !== text);
      this.waiting(true);
      byId("question").focus();
    });
    item.append(said, button);
    return item;
  }
}
